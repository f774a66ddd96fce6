package procwatch

import (
	"bytes"
	"errors"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked says that a process keeps others from its memory, where its command line is.
var ErrLocked = errors.New("the process keeps its memory locked")

// Cmdlines reads /proc/PID/cmdline for somebody who cannot wait. It is in the memory of
// the process, and who reads it takes mmap_lock (proc_pid_cmdline_read in
// fs/proc/base.c): an ordinary user can keep that for as long as he likes, with a page of
// a FUSE file that nobody gives him, and a thread that calls mmap meanwhile. A read that
// has begun cannot be ended. The zero value is ready. Its method may be called from any
// goroutine.
type Cmdlines struct {
	mu      sync.Mutex
	reading map[int]*reading          // by pid
	waited  map[uint32]*time.Duration // for reads that were slow, by user, since
	since   time.Time
}

// reading is a read that has not ended. Cmdlines.mu guards what does not say otherwise.
type reading struct {
	dir  int           // while somebody waits
	over chan struct{} // closed when nobody waits any more
	late bool          // likewise, and it goes on
	uid  uint32
	of   bool // uid is known

	n    int // of the bytes, once it is over and not late
	err  error
	held bool // up by somebody
}

const (
	// cmdlineIn is how long a read may take. It takes microseconds, and some
	// milliseconds where the arguments are swapped out. Longer, and each process that is
	// locked holds up its own client for so long.
	cmdlineIn = 100 * time.Millisecond
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
	// maxReading bounds all, for those who have more than one user (newuidmap(1)).
	maxReading = 1024
)

// Read reads the beginning of the command line of a process into buf, from a file below
// its directory in /proc, and returns what was read. The error is ErrLocked if that takes
// too long, or if other processes of its user's make us wait.
func (c *Cmdlines) Read(pid, dir int, name string, buf []byte) ([]byte, error) {
	r, patience, err := c.begin(pid, dir)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		c.end(pid, r, 0, false, err)
		return nil, err
	}
	b := hold(len(buf)) // the caller's may be in use again when the read ends
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		before := waits()
		n, err := read(fd, *b)
		held := waits() != before
		unix.Close(fd)
		c.end(pid, r, n, held, err)
	}()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-r.over:
	case <-timeout.C:
	}
	took := time.Since(began)
	c.mu.Lock()
	defer c.mu.Unlock()
	locked := c.reading[pid] == r
	if locked || r.held && took > slow {
		c.ask(r, dir)
		c.charge(r.uid, took)
	}
	if locked {
		r.late = true
		close(r.over)
		return nil, ErrLocked
	}
	n := copy(buf, (*b)[:r.n])
	release(b)
	return buf[:n], r.err
}

// begin makes a reading, and says how long it may take. It waits for another one of the
// process, or one of too many of its user's.
func (c *Cmdlines) begin(pid, dir int) (*reading, time.Duration, error) {
	var timeout <-chan time.Time
	for {
		r, before, patience := c.tryBegin(pid, dir)
		switch {
		case r != nil:
			return r, patience, nil
		case before == nil:
			return nil, 0, ErrLocked
		}
		if timeout == nil {
			timeout = time.After(cmdlineIn)
		}
		select {
		case <-before.over:
		case <-timeout:
			return nil, 0, ErrLocked
		}
	}
}

func (c *Cmdlines) tryBegin(pid, dir int) (r, before *reading, patience time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if before = c.reading[pid]; before != nil {
		if before.late {
			return nil, nil, 0
		}
		return nil, before, 0
	}
	r, patience = &reading{dir: dir, over: make(chan struct{})}, cmdlineIn
	if len(c.reading) >= maxUnasked {
		c.ask(r, dir)
		late, all := 0, 0
		for _, other := range c.reading {
			if c.ask(other, other.dir); other.uid != r.uid {
				continue
			}
			if all++; other.late {
				late++
			} else {
				before = other
			}
		}
		switch {
		case late >= maxLate || len(c.reading) >= maxReading:
			return nil, nil, 0
		case all >= maxAtOnce:
			return nil, before, 0
		}
	}
	if len(c.waited) > 0 {
		if time.Since(c.since) > forgetAfter {
			clear(c.waited)
		}
		c.ask(r, dir)
		if w := c.waited[r.uid]; w != nil && *w > maxWaited {
			patience = shortly
		}
	}
	if c.reading == nil {
		c.reading = map[int]*reading{}
	}
	c.reading[pid] = r
	return r, nil, patience
}

// charge is called with c.mu held.
func (c *Cmdlines) charge(uid uint32, took time.Duration) {
	if len(c.waited) == 0 {
		c.waited, c.since = map[uint32]*time.Duration{}, time.Now()
	}
	if c.waited[uid] == nil {
		c.waited[uid] = new(time.Duration)
	}
	*c.waited[uid] += took
}

// ask finds out whose process it is that is read. It is called with c.mu held.
func (c *Cmdlines) ask(r *reading, dir int) {
	if !r.of {
		r.uid, r.of = userOf(dir), true
	}
}

// end is called once for each reading.
func (c *Cmdlines) end(pid int, r *reading, n int, held bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.reading, pid)
	if !r.late {
		r.n, r.held, r.err = n, held, err
		close(r.over)
	}
}

// waits counts how often this thread has waited for something, which a processor that
// others have is not (getrusage(2)).
func waits() int64 {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_THREAD, &u)
	return u.Nvcsw
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

// userOf is the real user of a process. The owner of its directory is root for one that
// is not dumpable.
func userOf(dir int) uint32 {
	fd, err := unix.Openat(dir, "status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
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
