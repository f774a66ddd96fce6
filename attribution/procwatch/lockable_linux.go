package procwatch

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
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

	mu     sync.Mutex
	asking map[*question]struct{}    // that have not ended
	late   map[about]int             // of them
	lates  int                       // the sum
	waited map[uint32]*time.Duration // for answers that were slow, by user, since
	since  time.Time

	looking bool // for what is late
}

// about is what a process locks as a whole.
type about struct {
	pid    int
	memory bool // and nothing else of it
}

// question is one that has not ended. Lockable.mu guards what does not say otherwise.
type question struct {
	about
	over chan struct{} // closed when nobody waits any more
	late bool          // likewise, and it goes on
	uid  uint32
	of   bool // uid is known

	asked    atomic.Bool
	began    time.Time // or was seen to go on
	patience time.Duration
	looks    int           // since it began
	far      *atomic.Int64 // how far it is; nil if that is not counted
	was      int64         // how far it was
}

const (
	// readIn is how long an answer may take. It takes microseconds, and some
	// milliseconds where the arguments are swapped out. Longer, and each process that is
	// locked holds up its own client for so long.
	readIn = 100 * time.Millisecond
	// beginIn is how long it is waited for others about the same user, of which each may
	// take readIn. Less, and a crowd of his on a busy machine is refused.
	beginIn = time.Second
	// lookEvery is how much later it may be. What has been looked at less than
	// minLooks times is not late: we may have stood still.
	lookEvery = 20 * time.Millisecond
	minLooks  = 2
	// slow is more than an answer takes that nobody holds up, on a busy machine, too. A
	// user for whom maxWaited was waited within forgetAfter, in slow answers, has shortly
	// for each: with many processes he could go on for ever otherwise.
	slow        = 20 * time.Millisecond
	maxWaited   = time.Second
	forgetAfter = time.Minute
	shortly     = 10 * time.Millisecond
	// maxLate bounds the questions about a user that are late, since each keeps a thread.
	// Of whoever has more no process is asked about. maxLong bounds those that are slow
	// already, and maxAtOnce all of his that may become late: others of his wait. It is
	// asked whose they are when there are more than maxUnasked of all.
	maxLate    = 4
	maxLong    = 8
	maxAtOnce  = 64
	maxUnasked = 4
	// maxAsking bounds the late ones of all, for those who have more than one user
	// (newuidmap(1)), which begin with minSubordinate (login.defs(5), SUB_UID_MIN).
	maxAsking      = 1024
	minSubordinate = 100_000
)

// Do calls ask, which asks about a process, and waits until it returns. The error is
// ErrLocked if that takes too long, and then what ask writes to is not its caller's any
// more, since it may go on; or if other processes of its user's make us wait, and then it
// is not called.
func (c *Lockable) Do(pid int, ask func()) error { return c.DoWhile(pid, nil, ask) }

// DoWhile is Do for what takes longer, and counts how far it is. It may take as long as it
// likes if it goes on.
func (c *Lockable) DoWhile(pid int, far *atomic.Int64, ask func()) error {
	return c.do(&question{about: about{pid: pid}, patience: readIn, far: far}, ask)
}

func (c *Lockable) do(q *question, ask func()) error {
	q.over = make(chan struct{})
	if !c.begin(q) {
		return ErrLocked
	}
	go func() {
		q.asked.Store(true)
		ask()
		c.end(q)
	}()
	<-q.over
	took := time.Since(q.began)
	if !q.late && (took <= slow || q.far != nil) {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.own(q)
	c.charge(q.uid, took)
	if q.late {
		return ErrLocked
	}
	return nil
}

// look finds what is late, and comes again while there is something to wait for. One that
// looks after all costs each of them no timer.
func (c *Lockable) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.looking = false
	now := time.Now()
	for q := range c.asking {
		if q.late {
			continue
		}
		if !q.asked.Load() { // others run
			q.began, q.looks = now, 0
			c.lookIn(q.patience)
			continue
		}
		q.looks++
		switch {
		case now.Sub(q.began) < q.patience || q.looks < minLooks:
		case q.far != nil && q.far.Load() != q.was:
			q.was, q.began, q.looks = q.far.Load(), now, 0
		default:
			q.late = true
			if c.late == nil {
				c.late = map[about]int{}
			}
			c.late[q.about]++
			c.lates++
			close(q.over)
			continue
		}
		c.lookIn(q.patience)
	}
}

// lookIn is called with c.mu held.
func (c *Lockable) lookIn(patience time.Duration) {
	if !c.looking {
		c.looking = true
		time.AfterFunc(min(patience, lookEvery), c.look)
	}
}

// Read reads the beginning of a file below the directory of a process into buf, and
// returns what was read.
func (c *Lockable) Read(pid, dir int, name string, buf []byte) ([]byte, error) {
	return c.readIn(readIn, pid, dir, name, buf)
}

func (c *Lockable) readIn(patience time.Duration, pid, dir int, name string, buf []byte) ([]byte, error) {
	b := hold(len(buf)) // the caller's may be in use again when the read ends
	n := 0
	var err error
	q := &question{about: about{pid, strings.HasSuffix(name, "cmdline")}, patience: patience}
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
	if len(c.asking) >= maxUnasked {
		late, long, all := 0, 0, 0
		crowded := len(c.asking)-c.lates >= maxAtOnce
		for other := range c.asking {
			isLong := q.began.Sub(other.began) > slow
			if !other.late && !isLong && !crowded || c.own(q) != c.own(other) {
				continue
			}
			if other.late {
				late++
				continue
			}
			before = other
			if all++; isLong {
				long++
			}
		}
		switch {
		case late >= maxLate, c.lates >= maxAsking && (late > 0 || c.own(q) >= minSubordinate):
			return nil, false
		case long >= maxLong, all >= maxAtOnce:
			return before, false
		}
	}
	if len(c.waited) > 0 {
		if time.Since(c.since) > forgetAfter {
			clear(c.waited)
		}
		if w := c.waited[c.own(q)]; w != nil && *w > maxWaited && q.far == nil {
			q.patience = min(q.patience, shortly)
		}
	}
	if c.asking == nil {
		c.asking = map[*question]struct{}{}
	}
	c.asking[q] = struct{}{}
	c.lookIn(q.patience)
	return nil, true
}

// charge is called with c.mu held.
func (c *Lockable) charge(uid uint32, took time.Duration) {
	if len(c.waited) == 0 {
		c.waited, c.since = map[uint32]*time.Duration{}, time.Now()
	}
	if c.waited[uid] == nil {
		c.waited[uid] = new(time.Duration)
	}
	*c.waited[uid] += took
}

// own finds out whose process a question is about. It is called with c.mu held.
func (c *Lockable) own(q *question) uint32 {
	if !q.of {
		q.uid, q.of = userOf(cmp.Or(c.Proc, "/proc")+"/"+strconv.Itoa(q.pid)+"/status"), true
	}
	return q.uid
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
	c.lates--
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

// userOf is the real user of a process, by its status. The owner of its directory is root
// for one that is not dumpable.
func userOf(status string) uint32 {
	fd, err := unix.Open(status, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return unknownUser
	}
	defer unix.Close(fd)
	var b [512]byte // the name and seven short lines are before it
	n, _ := read(fd, b[:])
	_, line, _ := bytes.Cut(b[:n], []byte("\nUid:\t"))
	text, _, _ := bytes.Cut(line, []byte("\t"))
	uid, err := strconv.ParseUint(string(text), 10, 32)
	if err != nil {
		return unknownUser
	}
	return uint32(uid)
}
