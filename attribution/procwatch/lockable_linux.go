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
// that. What is not locked is status, cgroup, comm and fdinfo.
//
// What has begun cannot be ended. The zero value is ready. Its methods may be called from
// any goroutine.
type Lockable struct {
	Proc string // where proc(5) is mounted; /proc if ""

	mu     sync.Mutex
	asking map[*question]struct{}    // that have not ended
	late   map[about]int             // of them
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

	held bool // up by somebody, once it is over and not late

	began    time.Time // or was seen to go on
	patience time.Duration
	far      *atomic.Int64 // how far it is; nil if that is not counted
	was      int64         // how far it was
}

const (
	// readIn is how long an answer may take. It takes microseconds, and some
	// milliseconds where the arguments are swapped out. Longer, and each process that is
	// locked holds up its own client for so long.
	readIn = 100 * time.Millisecond
	// lookEvery is how much later it may be.
	lookEvery = 20 * time.Millisecond
	// slow is what a read takes that is held up, and not for what is done with memory
	// anyhow.
	slow = 5 * time.Millisecond
	// A user for whom maxWaited was waited within forgetAfter, in slow reads, has
	// shortly for each: with many processes he could go on for ever otherwise. No read
	// takes that long by itself.
	maxWaited   = time.Second
	forgetAfter = time.Minute
	shortly     = 2 * time.Millisecond
	// maxLate bounds the reads of a user that are late, since each keeps a thread, and
	// maxAtOnce his at once, which may all become late: of whoever has more late ones no
	// process is read, and others of his wait. It is asked whose they are when there are
	// more than maxUnasked of all.
	maxLate    = 4
	maxAtOnce  = 8
	maxUnasked = 4
	// maxAsking bounds all, for those who have more than one user (newuidmap(1)).
	maxAsking = 1024
)

// Do calls ask, which asks about a process, and waits until it returns. The error is
// ErrLocked if that takes too long, or if other processes of its user's make us wait; then
// what ask writes to is not its caller's any more, since it may go on.
func (c *Lockable) Do(pid int, ask func()) error { return c.DoWhile(pid, nil, ask) }

// DoWhile is Do for what takes longer, and counts how far it is. It may take as long as it
// likes if it goes on.
func (c *Lockable) DoWhile(pid int, far *atomic.Int64, ask func()) error {
	return c.do(about{pid: pid}, far, ask)
}

func (c *Lockable) do(a about, far *atomic.Int64, ask func()) error {
	q, err := c.begin(a, far)
	if err != nil {
		return err
	}
	go func() {
		before := waits()
		ask()
		c.end(q, waits() != before)
	}()
	<-q.over
	took := time.Since(q.began)
	if !q.late && took <= slow {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if q.late || q.held {
		c.own(q)
		c.charge(q.uid, took)
	}
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
		switch {
		case q.late:
			continue
		case now.Sub(q.began) < q.patience:
		case q.far != nil && q.far.Load() != q.was:
			q.was, q.began = q.far.Load(), now
		default:
			q.late = true
			if c.late == nil {
				c.late = map[about]int{}
			}
			c.late[q.about]++
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
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	b := hold(len(buf)) // the caller's may be in use again when the read ends
	n := 0
	if err := c.do(about{pid, strings.HasSuffix(name, "cmdline")}, nil, func() {
		n, err = read(fd, *b)
		unix.Close(fd)
	}); err != nil {
		return nil, err
	}
	n = copy(buf, (*b)[:n])
	release(b)
	return buf[:n], err
}

// begin makes a question. If there are too many about the user's processes it waits for
// one of those.
func (c *Lockable) begin(a about, far *atomic.Int64) (*question, error) {
	var timeout <-chan time.Time
	for {
		q, before := c.tryBegin(a, far)
		switch {
		case q != nil:
			return q, nil
		case before == nil:
			return nil, ErrLocked
		}
		if timeout == nil {
			timeout = time.After(readIn)
		}
		select {
		case <-before.over:
		case <-timeout:
			return nil, ErrLocked
		}
	}
}

func (c *Lockable) tryBegin(a about, far *atomic.Int64) (q, before *question) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.late[a] > 0 {
		return nil, nil
	}
	q = &question{about: a, over: make(chan struct{}), began: time.Now(), patience: readIn, far: far}
	if len(c.asking) >= maxUnasked {
		c.own(q)
		late, all := 0, 0
		for other := range c.asking {
			if c.own(other); other.uid != q.uid {
				continue
			}
			if all++; other.late {
				late++
			} else {
				before = other
			}
		}
		switch {
		case late >= maxLate || len(c.asking) >= maxAsking:
			return nil, nil
		case all >= maxAtOnce:
			return nil, before
		}
	}
	if len(c.waited) > 0 {
		if time.Since(c.since) > forgetAfter {
			clear(c.waited)
		}
		c.own(q)
		if w := c.waited[q.uid]; w != nil && *w > maxWaited {
			q.patience = shortly
		}
	}
	if c.asking == nil {
		c.asking = map[*question]struct{}{}
	}
	c.asking[q] = struct{}{}
	c.lookIn(q.patience)
	return q, nil
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
func (c *Lockable) own(q *question) {
	if !q.of {
		q.uid, q.of = userOf(cmp.Or(c.Proc, "/proc")+"/"+strconv.Itoa(q.pid)+"/status"), true
	}
}

// end is called once for each question.
func (c *Lockable) end(q *question, held bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.asking, q)
	if !q.late {
		q.held = held
		close(q.over)
		return
	}
	if c.late[q.about]--; c.late[q.about] == 0 {
		delete(c.late, q.about)
	}
}

// waits is how often this thread has waited for something, which a processor that
// others have is not (getrusage(2)). Who has waited for long goes on on another thread.
func waits() (w struct{ thread, times int64 }) {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_THREAD, &u)
	w.thread, w.times = int64(unix.Gettid()), u.Nvcsw
	return w
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
