package loop

import (
	"container/heap"
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// ErrCancelled says that the task was cancelled.
var ErrCancelled = errors.New("cancelled")

// Task is code that runs on a Loop. Its methods but Cancel, Cancelled and Wake may
// be called only by that code.
type Task struct {
	loop  *Loop
	f     func(*Task)
	fiber *fiber
	state state
	ready bool // in Loop.ready
	looks bool // Wake came while it was not waiting
	late  bool

	until time.Time // of the wait; zero for ever
	alarm time.Time // when Loop.timers looks at it
	index int       // there; negative if it is not

	cancelled atomic.Bool
}

type state uint8

const (
	running state = iota
	waiting
	away
)

// Interest is what a task waits for on a connection.
type Interest struct {
	Conn *Conn
	For  Events
}

// Wait waits until something that is of interest may have happened, Wake was
// called, or the time is up; the zero time never is. It may return early: look. What
// has happened ends waits until it is dealt with: In by reading until ErrAgain, Out by
// writing until that, and Gone by either, or by Look. The error is
// os.ErrDeadlineExceeded or ErrCancelled. Only one task may wait for a connection.
func (t *Task) Wait(until time.Time, interests ...Interest) error {
	if t.cancelled.Load() {
		return ErrCancelled
	}
	now := t.looks
	t.looks = false
	for _, i := range interests {
		if err := i.Conn.Watch(); err != nil {
			return err
		}
		now = now || i.Conn.seen&i.For != 0
	}
	if now {
		return nil
	}
	for _, i := range interests {
		i.Conn.task, i.Conn.want = t, i.For
	}
	t.until = until
	if !until.IsZero() && (t.index < 0 || until.Before(t.alarm)) {
		t.loop.timers.set(t, until)
	}
	t.state = waiting
	t.fiber.park()
	t.state = running
	for _, i := range interests {
		i.Conn.task = nil
	}
	late := t.late
	t.late = false
	switch {
	case t.cancelled.Load():
		return ErrCancelled
	case late:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// Sleep waits for so long. It may be woken; the error is nil or ErrCancelled.
func (t *Task) Sleep(d time.Duration) error {
	if err := t.Wait(time.Now().Add(d)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// Yield lets others run before the task goes on.
func (t *Task) Yield() error {
	t.loop.makeReady(t)
	t.fiber.park()
	if t.cancelled.Load() {
		return ErrCancelled
	}
	return nil
}

// Away calls a function on a goroutine of its own, and waits until it returns, also
// if the task is cancelled meanwhile. Other tasks go on.
func (t *Task) Away(f func()) {
	l := t.loop
	l.left = true
	l.away++
	t.state = away
	job := func() {
		f()
		l.mu.Lock()
		l.post(t, back)
		l.mu.Unlock()
	}
	select {
	case l.workers <- job:
	default:
		go l.work(job)
	}
	t.fiber.park()
}

// maxWorkers bounds the goroutines that are kept for tasks that go away: their stacks
// have grown to what is needed.
const maxWorkers = 32

func (l *Loop) work(job func()) {
	for ok := true; ok; {
		job()
		if l.resting.Add(1) > maxWorkers {
			l.resting.Add(-1)
			return
		}
		job, ok = <-l.workers
		l.resting.Add(-1)
	}
}

// Go begins another task on the same Loop.
func (t *Task) Go(f func(*Task)) *Task {
	u := &Task{loop: t.loop, f: f, index: -1}
	t.loop.tasks++
	t.loop.makeReady(u)
	return u
}

// Cancel makes every wait of the task return ErrCancelled. It may be called from any
// goroutine, and after the task has ended.
func (t *Task) Cancel() {
	t.cancelled.Store(true)
	t.Wake()
}

// Cancelled reports whether Cancel was called. It may be called from any goroutine.
func (t *Task) Cancelled() bool { return t.cancelled.Load() }

// Wake ends the present wait of the task, or else the next. It may be called from
// any goroutine, and after the task has ended.
func (t *Task) Wake() {
	l := t.loop
	l.mu.Lock()
	defer l.mu.Unlock()
	l.post(t, look)
}

// fiber is a stack on which tasks run, one after the other.
type fiber struct {
	task  *Task // nil when it has ended
	yield func(struct{}) bool
	next  func() (struct{}, bool)
	stop  func()
}

// maxIdle bounds the stacks that are kept for tasks to come. They have grown to what
// tasks need, some 8 KiB.
const maxIdle = 32

func (l *Loop) fiber() *fiber {
	if n := len(l.idle); n > 0 {
		f := l.idle[n-1]
		l.idle = l.idle[:n-1]
		return f
	}
	f := new(fiber)
	f.next, f.stop = iter.Pull(func(yield func(struct{}) bool) {
		defer func() {
			if p := recover(); p != nil { // or else the stack is that of the Loop
				panic(fmt.Sprintf("%v\n\nof a task:\n%s", p, debug.Stack()))
			}
		}()
		f.yield = yield
		for more := true; more; more = yield(struct{}{}) {
			f.task.f(f.task)
			f.task = nil
		}
	})
	return f
}

func (f *fiber) park() { f.yield(struct{}{}) }

// timers are tasks that wait for their time, by when to look at them: that is not
// after their time, and often before, because waits that end early leave it as it is.
type timers []*Task

func (h timers) first() time.Time {
	if len(h) == 0 {
		return time.Time{}
	}
	return h[0].alarm
}

func (h *timers) set(t *Task, at time.Time) {
	t.alarm = at
	if t.index < 0 {
		heap.Push(h, t)
	} else {
		heap.Fix(h, t.index)
	}
}

func (h *timers) remove(t *Task) {
	if t.index >= 0 {
		heap.Remove(h, t.index)
	}
}

func (h timers) Len() int           { return len(h) }
func (h timers) Less(i, j int) bool { return h[i].alarm.Before(h[j].alarm) }
func (h timers) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *timers) Push(t any) {
	t.(*Task).index = len(*h)
	*h = append(*h, t.(*Task))
}
func (h *timers) Pop() any {
	n := len(*h) - 1
	t := (*h)[n]
	(*h)[n] = nil
	*h = (*h)[:n]
	t.index = -1
	return t
}
