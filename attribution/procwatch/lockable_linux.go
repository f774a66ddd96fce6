package procwatch

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked says that a process keeps others from what is asked about it. It is an
// [fs.ErrPermission].
var ErrLocked = fmt.Errorf("the process keeps itself locked: %w", fs.ErrPermission)

// Lockable asks about processes that can lock what they are asked for, for somebody who
// cannot wait. An ordinary user can keep his memory locked for as long as he likes, with a
// page of a FUSE file that nobody gives him, and a thread that calls mmap meanwhile: who
// reads the command line waits for that (proc_pid_cmdline_read in fs/proc/base.c). With an
// execve that closes such a file he keeps exec_update_lock: in which system call a thread
// is, and on newer kernels (6.18; not 6.1) stat and every link of its directory, wait for
// that. What is not locked is status, cgroup and comm, and fdinfo but of an epoll
// descriptor.
//
// What has begun cannot be ended. The zero value is ready. Its methods may be called from
// any goroutine.
type Lockable struct {
	Proc string // where proc(5) is mounted; /proc if ""
	// Insist says that there is nothing else to ask: DoAmong refuses nobody for what he has
	// made us wait, and waits shortly for each of his processes.
	Insist bool

	mu      sync.Mutex
	asking  map[*question]struct{}    // that have not ended
	late    map[about]int             // of them
	waited  map[account]time.Duration // for answers, since
	since   time.Time
	crowds  map[account]time.Duration // of it, by owner.crowd
	tooLong bool                      // for somebody

	looking bool // for who waits, and what is late
	looked  time.Time
}

// about is what a process locks as a whole.
type about struct {
	pid    int
	memory bool // and nothing else of it
}

// owner is whose a process is: a user's, and of root's a cgroup's, since root in a container
// without a user namespace is not root of the host.
type owner struct {
	uid    uint32
	cgroup string // as in /proc/PID/cgroup; of root's only
}

// account is for one way of locking: that somebody lets us wait for memory refuses no
// question about descriptors, of which he may have locked none.
type account struct {
	owner
	memory bool
}

// question is one that has not ended. Lockable.mu guards what does not say otherwise.
type question struct {
	about
	among bool          // one of many processes that somebody goes through
	over  chan struct{} // closed when nobody waits any more
	late  bool          // likewise, and it goes on
	owner owner
	of    bool // owner is known

	thread   atomic.Int32 // that asks; 0 before, and after
	began    time.Time    // or was seen to go on
	patience time.Duration
	looks    int           // since it began, at which it waited
	far      *atomic.Int64 // how far it is; nil if that is not counted
	was      int64         // how far it was
}

func one(pid int) *question { return &question{about: about{pid: pid}, patience: readIn} }

func among(pid int) *question {
	return &question{about: about{pid: pid}, patience: readIn, among: true}
}

const (
	// readIn is how long an answer may take. It takes microseconds, and some
	// milliseconds where the arguments are swapped out. Longer, and each process that is
	// locked holds up its own client for so long.
	readIn = 100 * time.Millisecond
	// beginIn is how long it is waited for others about the same user, of which each may
	// take readIn. Less, and a crowd of his on a busy machine is refused.
	beginIn = time.Second
	// lookEvery is how often it is looked which threads wait for an answer, asleep in
	// the kernel. One that is not, however long, shows that we or our machine stand
	// still. More often costs more; less often, and what is short is charged less
	// evenly. What has been seen to wait less than minLooks times is not late, and not
	// for its patience if that is shorter.
	lookEvery = 2 * time.Millisecond
	minLooks  = 10
	// Each such look charges the user of the process the time since the one before, so
	// that answers of less are charged what they take, on average; but no more than slow,
	// since it may be late itself. What a client is asked by itself is free at the first
	// look, or else one whose threads compete for his memory pays for it.
	//
	// Of a user who was charged maxWaited within forgetAfter, who goes through many
	// processes asks none, and others wait shortly for each. Higher, and he has searches,
	// and a start, wait for so long in each minute; lower, and one who swaps is passed
	// over. maxCrowd is that for all subordinate users together, or all cgroups of root's,
	// to which each adds no more than maxWaited. Root is passed over for nothing: it is
	// waited shortly for each.
	maxWaited   = time.Second
	maxCrowd    = 4 * maxWaited
	forgetAfter = time.Minute
	shortly     = 10 * time.Millisecond
	// Each question that is late keeps a thread. maxAtOnce bounds those about an owner, in
	// each of the two ways of locking: others wait for one that is not late yet. More,
	// and he can keep more threads; fewer, and a crowd of his waits longer. When maxLate
	// are late, no process of his is asked about in that way; when maxLong take longer
	// than slow, others wait, too. It is asked whose they are when there are more than
	// maxUnasked of all.
	maxAtOnce  = 16
	maxLate    = 4
	maxLong    = 8
	slow       = 20 * time.Millisecond
	maxUnasked = 4
	// maxAsking bounds those about subordinate users (newuidmap(1)) together, since who
	// has one has thousands, and those about root's cgroups: who may make one may make
	// more. Such users begin with minSubordinate (login.defs(5), SUB_UID_MIN).
	maxAsking      = 256
	minSubordinate = 100_000
)

// Do calls ask, which asks about a process, and waits until it returns. The error is
// ErrLocked if that takes too long, and then what ask writes to is not its caller's any
// more, since it may go on; or if other processes of its user's make us wait, and then it
// is not called.
func (c *Lockable) Do(pid int, ask func()) error { return c.do(one(pid), ask) }

// DoAmong is Do for one of many processes that its caller goes through. It refuses those
// of a user who has made us wait for long, for the rest of a minute. If far is not nil it
// counts how far ask is, which may take longer if it goes on, but for such a user.
func (c *Lockable) DoAmong(pid int, far *atomic.Int64, ask func()) error {
	q := among(pid)
	q.far = far
	return c.do(q, ask)
}

func (c *Lockable) do(q *question, ask func()) error {
	q.over = make(chan struct{})
	if !c.begin(q) {
		return ErrLocked
	}
	go func() {
		runtime.LockOSThread()
		q.thread.Store(int32(unix.Gettid()))
		ask()
		q.thread.Store(0)
		runtime.UnlockOSThread()
		c.end(q)
	}()
	<-q.over
	if q.late {
		return ErrLocked
	}
	return nil
}

// look finds who waits and what is late, and comes again while there is something to wait
// for. One that looks after all costs each of them no timer.
func (c *Lockable) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.looking = false
	now, more := time.Now(), false
	for q := range c.asking {
		if q.late {
			continue
		}
		more = true
		thread := q.thread.Load()
		if thread == 0 { // others run
			q.began, q.looks = now, 0
			continue
		}
		if !sleeps("/proc/self/task/"+strconv.Itoa(int(thread))+"/syscall") || q.thread.Load() != thread {
			continue
		}
		q.looks++
		if q.among || q.looks > 1 {
			c.charge(c.account(q), min(now.Sub(c.looked), slow))
		}
		over := q.among && c.hasWaited(q)
		switch {
		case over && c.refuses(q):
		case now.Sub(q.began) < q.patience || q.looks < min(minLooks, int(q.patience/lookEvery)):
			continue
		case q.far != nil && !over && q.far.Load() != q.was:
			q.was, q.began, q.looks = q.far.Load(), now, 0
			continue
		}
		q.late = true
		if c.late == nil {
			c.late = map[about]int{}
		}
		c.late[q.about]++
		close(q.over)
	}
	if more {
		c.lookLater()
	}
}

// lookLater has it looked in a moment. It is called with c.mu held.
func (c *Lockable) lookLater() {
	if !c.looking {
		c.looking, c.looked = true, time.Now()
		time.AfterFunc(lookEvery, c.look)
	}
}

// sleeps reports whether a thread of ours waits in a system call that is not one by which
// Go waits for itself (proc_pid_syscall(5); task_current_syscall in lib/syscall.c). If that
// cannot be read it may: or else nothing would ever be late.
func sleeps(syscall string) bool {
	fd, err := unix.Open(syscall, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	var b [32]byte // "running", or the number and its arguments; -1 outside of any
	n, err := read(fd, b[:])
	if err != nil {
		return true
	}
	number, _, _ := bytes.Cut(b[:n], []byte(" "))
	call, err := strconv.Atoi(string(number))
	return err == nil && call >= 0 && call != unix.SYS_FUTEX
}

// Read reads the beginning of a file below the directory of a process into buf, and
// returns what was read.
func (c *Lockable) Read(pid, dir int, name string, buf []byte) ([]byte, error) {
	return c.read(one(pid), dir, name, buf)
}

func (c *Lockable) read(q *question, dir int, name string, buf []byte) ([]byte, error) {
	b := hold(len(buf)) // the caller's may be in use again when the read ends
	n := 0
	var err error
	q.memory = strings.HasSuffix(name, "cmdline")
	if err := c.do(q, func() {
		var fd int
		if fd, err = unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		n, err = read(fd, *b)
	}); err != nil {
		return nil, err
	}
	n = copy(buf, (*b)[:n])
	release(b)
	return buf[:n], err
}

// begin reports whether a question may be asked. If there are too many about the user's
// processes that take long it waits for one of those.
func (c *Lockable) begin(q *question) bool {
	var timeout <-chan time.Time
	for {
		before, ok := c.tryBegin(q)
		if ok || before == nil {
			return ok
		}
		if timeout == nil {
			timeout = time.After(beginIn)
		}
		select {
		case <-before.over:
		case <-timeout:
			return false
		}
	}
}

func (c *Lockable) tryBegin(q *question) (before *question, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.late[q.about] > 0 {
		return nil, false
	}
	q.began = time.Now()
	if len(c.waited) > 0 && q.began.Sub(c.since) > forgetAfter {
		clear(c.waited)
		clear(c.crowds)
		c.tooLong = false
	}
	if c.tooLong && c.hasWaited(q) {
		if c.refuses(q) {
			return nil, false
		}
		q.patience = min(q.patience, shortly)
	}
	if len(c.asking) >= maxUnasked {
		late, long, all := 0, 0, 0
		crowded := len(c.asking) >= maxAtOnce
		for other := range c.asking {
			isLong := q.began.Sub(other.began) > slow
			if other.memory != q.memory || !other.late && !isLong && !crowded || c.own(q) != c.own(other) {
				continue
			}
			all++
			if other.late {
				late++
				continue
			}
			before = other
			if isLong {
				long++
			}
		}
		if late >= maxLate {
			return nil, false
		}
		if long >= maxLong || all >= maxAtOnce {
			return before, false
		}
		if len(c.asking) >= maxAsking {
			if before, all := c.ofCrowd(q); all >= maxAsking {
				return before, false
			}
		}
	}
	if c.asking == nil {
		c.asking = map[*question]struct{}{}
	}
	c.asking[q] = struct{}{}
	c.lookLater()
	return nil, true
}

// ofCrowd counts the questions about the crowd of q's owner, in its way of locking, and
// returns one that is not late if there is one. It is called with c.mu held.
func (c *Lockable) ofCrowd(q *question) (waits *question, all int) {
	crowd, ok := c.own(q).crowd()
	if !ok {
		return nil, 0
	}
	for other := range c.asking {
		if of, ok := c.own(other).crowd(); other.memory != q.memory || !ok || of != crowd {
			continue
		}
		all++
		if !other.late {
			waits = other
		}
	}
	return waits, all
}

// hasWaited reports whether it was waited too long for a question's user. It is called
// with c.mu held.
func (c *Lockable) hasWaited(q *question) bool {
	a := c.account(q)
	crowd, ok := a.crowd()
	return c.waited[a] >= maxWaited || q.among && ok && c.crowds[account{crowd, a.memory}] >= maxCrowd
}

// refuses reports whether a question is not asked when it was waited too long for its
// user. It is called with c.mu held.
func (c *Lockable) refuses(q *question) bool {
	uid := c.own(q).uid
	return q.among && !c.Insist && uid != 0 && uid != unknownUser
}

// charge is called with c.mu held.
func (c *Lockable) charge(a account, took time.Duration) {
	if len(c.waited) == 0 {
		c.waited, c.crowds, c.since = map[account]time.Duration{}, map[account]time.Duration{}, time.Now()
	}
	before := c.waited[a]
	c.waited[a] += took
	c.tooLong = c.tooLong || c.waited[a] >= maxWaited
	if crowd, ok := a.crowd(); ok { // of what one alone takes nobody else has less
		a.owner = crowd
		c.crowds[a] += min(took, max(maxWaited-before, 0))
		c.tooLong = c.tooLong || c.crowds[a] >= maxCrowd
	}
}

// account is that of a question's user. It is called with c.mu held.
func (c *Lockable) account(q *question) account { return account{c.own(q), q.memory} }

// crowd stands for those of whom an owner is one, if somebody may have as many as he likes:
// subordinate users, or root's cgroups.
func (o owner) crowd() (all owner, ok bool) {
	switch {
	case o.uid == 0:
		return owner{}, true
	case o.uid >= minSubordinate && o.uid != unknownUser:
		return owner{uid: minSubordinate}, true
	}
	return owner{}, false
}

// own finds out whose process a question is about. It is called with c.mu held.
func (c *Lockable) own(q *question) owner {
	if !q.of {
		q.owner, q.of = ownerOf(cmp.Or(c.Proc, "/proc")+"/"+strconv.Itoa(q.pid)), true
	}
	return q.owner
}

// end is called once for each question.
func (c *Lockable) end(q *question) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.asking, q)
	if !q.late {
		close(q.over)
		return
	}
	if c.late[q.about]--; c.late[q.about] == 0 {
		delete(c.late, q.about)
	}
}

func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// buffers are of maxCmdline. One that a late read has is left to it.
var buffers = sync.Pool{New: func() any { b := make([]byte, maxCmdline); return &b }}

func hold(size int) *[]byte {
	if size > maxCmdline {
		b := make([]byte, size)
		return &b
	}
	b := buffers.Get().(*[]byte)
	*b = (*b)[:size]
	return b
}

func release(b *[]byte) {
	if cap(*b) == maxCmdline {
		buffers.Put(b)
	}
}

// unknownUser is whose process it is when that cannot be read.
const unknownUser = ^uint32(0)

// ownerOf is whose a process is, by what it cannot lock of its directory. The owner of that
// is root for one that is not dumpable.
func ownerOf(dir string) owner {
	_, line, _ := bytes.Cut(beginning(dir+"/status", 512), []byte("\nUid:\t")) // the name and seven short lines are before it
	text, _, _ := bytes.Cut(line, []byte("\t"))                                // the real one
	uid, err := strconv.ParseUint(string(text), 10, 32)
	switch {
	case err != nil:
		return owner{uid: unknownUser}
	case uid == 0:
		return owner{cgroup: string(beginning(dir+"/cgroup", 4096))}
	}
	return owner{uid: uint32(uid)}
}

// beginning is that of a file; nil if it cannot be read.
func beginning(path string, size int) []byte {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	b := make([]byte, size)
	n, _ := read(fd, b)
	return b[:n]
}
