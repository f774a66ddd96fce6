package procwatch

import (
	"bytes"
	"errors"
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
	reading map[int]*reading // by pid
	late    int              // of them
}

type reading struct {
	done chan struct{} // closed when the following is there
	n    int
	err  error

	late bool
	uid  int // of a late one
}

const (
	// cmdlineIn is how long a read may take. It takes microseconds, and some
	// milliseconds where the arguments are swapped out. Longer, and each process that is
	// locked holds up its own client for so long, once.
	cmdlineIn = 100 * time.Millisecond
	// maxLate bounds the reads that are late, of one user, and maxAllLate all: each keeps
	// a thread. Of whoever has more no process is read until one ends.
	maxLate    = 4
	maxAllLate = 128
	// maxReading bounds all reads, since each may become late.
	maxReading = 1024
)

// Read reads the beginning of the command line of a process into buf, from a file below
// its directory in /proc, and returns what was read. The error is ErrLocked if that takes
// too long, or if others of its user's have.
func (c *Cmdlines) Read(pid, dir int, name string, buf []byte) ([]byte, error) {
	timeout := time.NewTimer(cmdlineIn)
	defer timeout.Stop()
	var r *reading
	for r == nil {
		var before *reading
		if r, before = c.begin(pid, dir); r != nil {
			break
		}
		if before == nil {
			return nil, ErrLocked
		}
		select {
		case <-before.done:
		case <-timeout.C:
			return nil, ErrLocked
		}
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		c.end(pid, r)
		return nil, err
	}
	b := hold(len(buf)) // the caller's may be in use again when the read ends
	go func() {
		r.n, r.err = read(fd, *b)
		unix.Close(fd)
		c.end(pid, r)
	}()
	select {
	case <-r.done:
		n := copy(buf, (*b)[:r.n])
		release(b)
		return buf[:n], r.err
	case <-timeout.C:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reading[pid] == r {
		r.late, r.uid = true, userOf(dir)
		c.late++
	}
	return nil, ErrLocked
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

// begin makes a reading, or returns another one of this process that may end in time; nil
// if it is of no use to wait.
func (c *Cmdlines) begin(pid, dir int) (r, before *reading) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if before = c.reading[pid]; before != nil {
		if before.late {
			return nil, nil
		}
		return nil, before
	}
	if len(c.reading) >= maxReading || c.late >= maxAllLate || c.late > 0 && c.lateOf(userOf(dir)) >= maxLate {
		return nil, nil
	}
	if c.reading == nil {
		c.reading = map[int]*reading{}
	}
	r = &reading{done: make(chan struct{})}
	c.reading[pid] = r
	return r, nil
}

func (c *Cmdlines) lateOf(uid int) (n int) {
	for _, r := range c.reading {
		if r.late && r.uid == uid {
			n++
		}
	}
	return n
}

func (c *Cmdlines) end(pid int, r *reading) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.reading, pid)
	if r.late {
		c.late--
	}
	close(r.done)
}

// userOf is the real user of a process, -1 if it is not known. The owner of its directory
// is root for one that is not dumpable.
func userOf(dir int) int {
	fd, err := unix.Openat(dir, "status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	defer unix.Close(fd)
	var b [512]byte // the name and seven short lines are before it
	n, _ := unix.Read(fd, b[:])
	_, line, _ := bytes.Cut(b[:max(n, 0)], []byte("\nUid:\t"))
	text, _, _ := bytes.Cut(line, []byte("\t"))
	uid, err := strconv.Atoi(string(text))
	if err != nil {
		return -1
	}
	return uid
}
