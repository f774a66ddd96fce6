// Package loop lets many tasks wait for sockets on one goroutine.
//
// A Task is straight-line code that runs on the Loop until it waits; then others
// run. One of them runs at any moment, so that they need no locks between them. It
// is a coroutine: to wait costs two switches of the stack rather than a round
// through Go's scheduler, which takes longer than to pass on an answer of a
// kilobyte. What may take more than some microseconds must not run on the Loop:
// Task.Away does it elsewhere and waits.
//
// Sockets are watched by epoll(7). Each registration has a generation, so that an
// event that was under way when its socket was closed never reaches the one that
// has its place since.
//
// It is the wrong tool where a goroutine for each connection will do.
package loop

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Loop runs tasks. Make one with New, and have a goroutine call Run.
type Loop struct {
	ep    int
	file  *os.File // of ep, which the runtime's own poller watches
	raw   syscall.RawConn
	poll  func(fd uintptr) bool
	alarm int // an eventfd that ends a wait

	places  []place
	free    []uint32
	ready   []*Task
	spare   []*Task // the other half of ready
	timers  timers
	armed   time.Time // when the wait ends at the latest; zero for never
	idle    []*fiber
	left    bool // a task has gone away, or ended, since others were last let run
	away    int  // tasks that are
	tasks   int  // that have not ended
	events  [64]unix.EpollEvent
	n       int // of the events
	workers chan func()
	resting atomic.Int32 // goroutines that receive from workers

	mu     sync.Mutex // guards the following
	posted []post
	asleep bool // who posts must ring
	closed bool
	done   chan struct{}
}

// place is the number by which epoll knows a connection.
type place struct {
	conn       *Conn
	generation int32
}

// alarmPlace is that of the alarm, and no connection's.
const alarmPlace = -1

// post is what others want of a task.
type post struct {
	task *Task
	why  why
}

type why uint8

const (
	begin why = iota
	back      // what it went away for is done
	look      // it may have something to do
)

// New makes a Loop. It needs two descriptors until it ends.
func New() (*Loop, error) {
	l := &Loop{done: make(chan struct{}), workers: make(chan func()), alarm: -1}
	l.poll = l.pollOnce
	if err := l.open(); err != nil {
		if l.file != nil {
			l.file.Close()
		}
		if l.alarm >= 0 {
			unix.Close(l.alarm)
		}
		return nil, fmt.Errorf("watch connections with epoll: %w", err)
	}
	return l, nil
}

func (l *Loop) open() error {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(ep, true); err != nil { // or else package os does not watch it
		unix.Close(ep)
		return err
	}
	l.ep, l.file = ep, os.NewFile(uintptr(ep), "epoll")
	if l.raw, err = l.file.SyscallConn(); err != nil {
		return err
	}
	if l.alarm, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return err
	}
	return l.control(unix.EPOLL_CTL_ADD, l.alarm, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: alarmPlace})
}

func (l *Loop) control(op, fd int, event *unix.EpollEvent) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.ep), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(event)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// Start begins a task. It may be called from any goroutine, and reports false when
// the Loop is closed.
func (l *Loop) Start(f func(*Task)) (*Task, bool) {
	t := &Task{loop: l, f: f, index: -1}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, false
	}
	l.post(t, begin)
	return t, true
}

// Close ends the Loop when its tasks have ended, and waits for that. No task can be
// started any more.
func (l *Loop) Close() {
	l.mu.Lock()
	l.closed = true
	l.ring()
	l.mu.Unlock()
	<-l.done
}

// post is called with l.mu held.
func (l *Loop) post(t *Task, w why) {
	l.posted = append(l.posted, post{t, w})
	l.ring()
}

// ring is called with l.mu held.
func (l *Loop) ring() {
	if l.asleep {
		l.asleep = false
		one := uint64(1)
		unix.Write(l.alarm, (*[8]byte)(unsafe.Pointer(&one))[:])
	}
}

// Run runs tasks until Close. It must be called once.
func (l *Loop) Run() {
	defer close(l.done)
	defer l.end()
	for ran := 0; ; {
		run := l.ready
		ran += len(run)
		l.ready = l.spare[:0]
		for i, t := range run {
			run[i] = nil
			l.resume(t)
		}
		l.spare = run[:0]
		if l.left {
			l.left = false
			// Most who are away come back at once, and need not ring. After the end of
			// a task others run while nobody waits: when the next one is away they
			// would be in its way.
			runtime.Gosched()
		}
		switch l.collect() {
		case busy:
			if ran >= maxRuns {
				ran = 0
				l.look()
			}
		case idle:
			ran = 0
			l.wait()
		case over:
			return
		}
	}
}

func (l *Loop) end() {
	close(l.workers)
	for _, f := range l.idle {
		f.stop()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asleep = false // nobody may ring any more
	l.file.Close()
	unix.Close(l.alarm)
}

// maxRuns is how many tasks may run before it is looked whether events have made others
// ready. Fewer, and looking costs as much as what is found; more, and those who are
// connected keep out who is not.
const maxRuns = 32

const (
	busy = iota
	idle
	over
)

// collect makes ready what was posted.
func (l *Loop) collect() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, p := range l.posted {
		l.posted[i] = post{}
		switch t := p.task; p.why {
		case begin:
			l.tasks++
			l.makeReady(t)
		case back:
			l.away--
			t.state = running
			l.makeReady(t)
		case look:
			if t.state == waiting {
				l.makeReady(t)
			} else {
				t.looks = true
			}
		}
	}
	l.posted = l.posted[:0]
	l.asleep = len(l.ready) == 0
	switch {
	case !l.asleep:
		return busy
	case l.closed && l.tasks == 0:
		return over
	}
	return idle
}

func (l *Loop) makeReady(t *Task) {
	if !t.ready {
		t.ready = true
		l.ready = append(l.ready, t)
	}
}

func (l *Loop) resume(t *Task) {
	t.ready = false
	if t.fiber == nil {
		t.fiber = l.fiber()
		t.fiber.task = t
	}
	f := t.fiber
	if f.next(); f.task == nil {
		t.fiber, t.f = nil, nil
		l.tasks--
		l.left = true
		l.timers.remove(t)
		if len(l.idle) < maxIdle {
			l.idle = append(l.idle, f)
		} else {
			f.stop()
		}
	}
}

// wait waits for events or the first timer.
func (l *Loop) wait() {
	if l.away > 0 || !l.linger() {
		l.park()
	}
	l.tell()
}

// lingerFor is how long the Loop waits in the kernel, in milliseconds, before it parks.
// While it does, it keeps its processor from other goroutines: more, and those are
// late; less, and requests that come one after the other each pay for a round
// through Go's scheduler, and for the monitor thread that it wakes. That one sees to it
// that a Loop which lingers again and again does not keep the processor for longer than
// any goroutine may: some 10 ms.
const lingerFor = 1

// linger waits a little for events, and reports whether there are some. It is not for
// when a task is away, which may need the processor to come back. The runtime can end
// it: to be stopped is a signal, and that ends the call (signal(7), epoll_wait(2)).
func (l *Loop) linger() bool {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.ep), uintptr(unsafe.Pointer(&l.events)), uintptr(len(l.events)), lingerFor, 0, 0)
	if l.n = int(n); errno != 0 || n == 0 {
		l.n = 0
		return false
	}
	l.mu.Lock()
	l.asleep = false
	l.mu.Unlock()
	if first := l.timers.first(); !first.IsZero() && !first.After(time.Now()) {
		l.expire()
	}
	return true
}

// park waits as long as it takes. Meanwhile it takes no thread and no processor: the
// runtime waits for it as for any connection.
func (l *Loop) park() {
	if first := l.timers.first(); !first.IsZero() && (l.armed.IsZero() || first.Before(l.armed)) {
		l.armed = first
		l.file.SetReadDeadline(first)
	}
	l.n = 0
	err := l.raw.Read(l.poll)
	l.mu.Lock()
	l.asleep = false
	l.mu.Unlock()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		l.expire()
	case err != nil:
		panic("loop: epoll is lost: " + err.Error())
	}
}

// look is wait, without waiting.
func (l *Loop) look() {
	l.n = 0
	l.pollOnce(uintptr(l.ep))
	l.tell()
	l.expire()
}

func (l *Loop) tell() {
	for i := range l.events[:l.n] {
		l.happened(&l.events[i])
	}
}

func (l *Loop) pollOnce(ep uintptr) bool {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, ep, uintptr(unsafe.Pointer(&l.events)), uintptr(len(l.events)), 0, 0, 0)
	if errno != 0 {
		return true // an empty round finds out more
	}
	l.n = int(n)
	return n > 0
}

func (l *Loop) happened(e *unix.EpollEvent) {
	if e.Fd == alarmPlace {
		return
	}
	p := &l.places[e.Fd]
	if p.conn == nil || p.generation != e.Pad {
		return // it was closed in this round
	}
	p.conn.happened(e.Events)
}

// expire makes ready whose time is up.
func (l *Loop) expire() {
	now := time.Now()
	for {
		first := l.timers.first()
		if first.IsZero() || first.After(now) {
			l.armed = first
			l.file.SetReadDeadline(first)
			return
		}
		t := l.timers[0]
		switch {
		case t.state != waiting || t.until.IsZero():
			l.timers.remove(t)
		case t.until.After(now):
			l.timers.set(t, t.until)
		default:
			l.timers.remove(t)
			t.late = !t.ready
			l.makeReady(t)
		}
	}
}
