package procwatch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	defaultMax   = 200_000
	defaultReads = 2_000

	// maxPending bounds the execs that wait to be read, and the calls of
	// Options.Exec that wait: two seconds of the worst that two CPUs can do.
	maxPending = 4096
	// readAtOnce is how many images are read between two drains. More spares
	// drains, and lets the first of them wait longer for their event to be told.
	readAtOnce = 16
	// sweepEvery is how often the dead are taken out.
	sweepEvery = 5 * time.Second
	// rebuildPause is the least time between two readings of all of /proc. Whoever
	// can make us lose events could otherwise keep a core busy; until then Drain
	// says ErrLost.
	rebuildPause = time.Second
	// maxDrain bounds the messages of one Drain, some 100 ms. It is many times what
	// the buffer holds: beyond it, events come faster than they can be read.
	maxDrain = 1 << 17
)

// A Watcher listens to the proc connector and keeps the table of processes. Its
// methods may be called from any goroutine, Close included.
type Watcher struct {
	o      Options
	since  time.Duration
	buffer int
	wake   int      // eventfd that ends the reader's wait
	ready  *os.File // can be read when conn or wake can
	wg     sync.WaitGroup
	calls  chan call
	stop   chan struct{}
	once   sync.Once

	begun atomic.Uint64 // drains

	socket sync.Mutex // guards the following
	conn   *conn      // nil when closed
	empty  time.Duration
	drops  uint32
	events []event
	failed error // the socket is of no use any more

	mu      sync.Mutex // guards the following; taken with socket held, never the other way
	table   *table
	pending []pending
	woken   bool          // the reader knows that something is pending
	broken  bool          // events were lost, and the table is not yet rebuilt
	echo    time.Duration // when the last change of comm was that echoTID made
	echoTID int32
	missed  uint64
	over    uint64
	reads   uint64
	foreign uint64

	checking sync.Mutex // one Check at a time
	unsent   atomic.Uint64

	// Only of the reader.
	reader  reader
	rebuilt time.Duration
	tokens  float64
	filled  time.Duration
}

// pending is an exec whose image is to be read.
type pending struct {
	e   *entry
	img *image
}

type call struct {
	p Process
	i Image
}

// Open begins to listen, reads all of /proc, and returns when the table has
// everything. That takes a fifth of a second for 10,000 processes. The error says
// what is missing on this host; it is errors.ErrUnsupported if nothing of ours can
// change it. Reading what other users' processes are needs CAP_SYS_PTRACE.
func Open(o Options) (*Watcher, error) {
	if o.Proc == "" {
		o.Proc = "/proc"
	}
	if o.Max == 0 {
		o.Max = defaultMax
	}
	if o.Reads == 0 {
		o.Reads = defaultReads
	}
	c, err := dial(o.Proc, o.Socket, o.Buffer)
	if err != nil {
		return nil, err
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		c.close()
		return nil, fmt.Errorf("make an eventfd: %w", err)
	}
	ready, err := pollable(c.fd, wake)
	if err != nil {
		c.close()
		unix.Close(wake)
		return nil, fmt.Errorf("wait for events: %w", err)
	}
	now := monotonic()
	w := &Watcher{
		o: o, since: now, buffer: c.buffer, wake: wake, ready: ready, conn: c, empty: now, rebuilt: now, filled: now, tokens: float64(o.Reads),
		stop: make(chan struct{}), events: make([]event, 0, batch),
		reader: reader{proc: o.Proc, lockable: &Lockable{Proc: o.Proc}},
	}
	asker := &reader{proc: o.Proc, lockable: w.reader.lockable}
	w.table = newTable(o.Max, asker.alive)
	w.table.joined, w.table.offset = now, clock(unix.CLOCK_BOOTTIME)-now
	if err := w.snapshot(); err != nil {
		ready.Close()
		c.close()
		unix.Close(wake)
		return nil, fmt.Errorf("read the processes that are there already: %w", err)
	}
	w.table.stats.Strangers = 0 // those whose event came before they were read
	if o.Exec != nil {
		w.calls = make(chan call, maxPending)
		w.wg.Add(1)
		go w.deliver()
	}
	w.wg.Add(1)
	go w.read()
	return w, nil
}

// Close stops listening and waits for the goroutines. It may be called twice. What
// is called afterwards answers from the table as it was, and Drain with os.ErrClosed.
func (w *Watcher) Close() error {
	var err error
	w.once.Do(func() {
		close(w.stop)
		w.wakeUp()
		w.wg.Wait()
		w.socket.Lock()
		defer w.socket.Unlock()
		w.ready.Close()
		err = w.conn.close()
		w.conn = nil
		w.mu.Lock()
		defer w.mu.Unlock()
		unix.Close(w.wake)
		w.wake = -1
	})
	return err
}

// Since is when events began to come, on CLOCK_MONOTONIC.
func (w *Watcher) Since() time.Duration { return w.since }

// Drain reads until there is nothing more: what happened before the call is in the
// table when it returns. It takes 2 µs when nothing has happened. Calls at the same time
// share one drain that began after them. The error is ErrLost while the table is
// not to be relied on.
func (w *Watcher) Drain() error {
	err := w.drainShared()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.pending) > 0 && !w.woken && w.wake >= 0 {
		w.woken = true
		w.wakeUp() // the reader may be asleep, and finds nothing in the socket
	}
	if err == nil && w.broken {
		err = ErrLost
	}
	return err
}

// drainShared drains, or waits for a drain that began after the call.
func (w *Watcher) drainShared() error {
	before := w.begun.Load()
	w.socket.Lock()
	defer w.socket.Unlock()
	if w.begun.Load() == before {
		w.begun.Add(1)
		w.drain()
	}
	if w.conn == nil {
		return os.ErrClosed
	}
	return w.failed
}

// drain is called with w.socket held.
func (w *Watcher) drain() {
	if w.conn == nil || w.failed != nil {
		return
	}
	lost, total := false, 0
	empty := w.empty
	for {
		// What was sent before this moment is in what follows.
		now := monotonic()
		n, err := w.conn.recv()
		if err == unix.EAGAIN {
			empty = now
			break
		}
		if err == unix.ENOBUFS {
			// The kernel queues nothing more until the queue is empty (netlink_overrun,
			// NETLINK_S_CONGESTED), so the loss ends with this drain.
			lost = true
			continue
		}
		if err != nil {
			w.failed = fmt.Errorf("read from the proc connector: %w", err)
			return
		}
		w.take(n)
		if total += n; total > maxDrain {
			lost = true
			break
		}
	}
	if lost {
		var n uint64
		if drops, err := w.conn.drops(); err == nil {
			n = uint64(drops - w.drops)
			w.drops = drops
		}
		w.mu.Lock()
		w.table.lost(w.empty, monotonic(), n)
		w.broken = true
		w.mu.Unlock()
		w.wakeUp()
	}
	w.empty = empty
}

// take applies one batch. It is called with w.socket held.
func (w *Watcher) take(n int) {
	w.events = w.events[:0]
	foreign := 0
	for i := range n {
		ev, ok, _ := w.conn.event(i)
		if !ok {
			foreign++
			continue
		}
		w.events = append(w.events, ev)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.foreign += uint64(foreign)
	w.table.offset = clock(unix.CLOCK_BOOTTIME) - monotonic()
	for _, ev := range w.events {
		if ev.what == evComm && ev.pid == w.echoTID {
			w.echo = ev.time
			continue
		}
		e, img := w.table.apply(ev)
		if img == nil {
			continue
		}
		if len(w.pending) == maxPending {
			w.over++
			if w.o.Exec != nil {
				w.unsent.Add(1)
			}
			continue
		}
		w.pending = append(w.pending, pending{e, img})
	}
}

func (w *Watcher) wakeUp() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	unix.RawSyscall(unix.SYS_WRITE, uintptr(w.wake), uintptr(unsafe.Pointer(&one)), 8)
}

// read takes events as they come, so that the buffer does not fill, and reads the
// images of those that executed.
func (w *Watcher) read() {
	defer w.wg.Done()
	swept := monotonic()
	for {
		w.wait(swept)
		select {
		case <-w.stop:
			return
		default:
		}
		if w.drainShared() != nil {
			return // Drain and Check tell
		}
		now := monotonic()
		if w.lossy() && now-w.rebuilt >= rebuildPause {
			w.rebuild()
		}
		w.readImages()
		if now-swept >= sweepEvery {
			swept = now
			for more := true; more; {
				w.mu.Lock()
				more = w.table.expire(now)
				w.mu.Unlock()
			}
		}
	}
}

// wait returns when there are events, when it is woken, or when something is due.
func (w *Watcher) wait(swept time.Duration) {
	due := swept + sweepEvery
	w.mu.Lock()
	if w.broken {
		due = min(due, w.rebuilt+rebuildPause)
	}
	if len(w.pending) > 0 {
		due = 0
	}
	w.mu.Unlock()
	w.ready.SetReadDeadline(time.Now().Add(due - monotonic()))
	raw, err := w.ready.SyscallConn()
	if err != nil {
		return // closed
	}
	raw.Read(func(fd uintptr) bool {
		var events [2]unix.EpollEvent
		n, _ := unix.EpollWait(int(fd), events[:], 0)
		for i := range max(n, 0) {
			if events[i].Fd == int32(w.wake) {
				var count [8]byte
				unix.Read(w.wake, count[:])
			}
		}
		return n != 0
	})
}

// pollable is a file that can be read when one of the descriptors can. A goroutine
// waits for it as for a connection. In poll(2) it would keep one of GOMAXPROCS from
// the others until the runtime notices, after each event, and the runtime would
// look for that up to 20,000 times in a second.
func pollable(fds ...int) (*os.File, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	for _, fd := range fds {
		if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
			unix.Close(ep)
			return nil, os.NewSyscallError("epoll_ctl", err)
		}
	}
	if err := unix.SetNonblock(ep, true); err != nil {
		unix.Close(ep)
		return nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(ep), "epoll")
	if err := f.SetReadDeadline(time.Time{}); err != nil { // waiting would fail at once, each time
		f.Close()
		return nil, err
	}
	return f, nil
}

func (w *Watcher) lossy() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.broken
}

// rebuild reads all of /proc after a loss.
func (w *Watcher) rebuild() {
	w.rebuilt = monotonic()
	w.mu.Lock()
	epoch := w.table.stats.Epoch
	w.mu.Unlock()
	err := w.snapshot()
	w.rebuilt = monotonic()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil && w.table.stats.Epoch == epoch {
		w.broken = false
		w.table.stats.Rebuilds++
	}
}

// snapshot reads all of /proc into the table, which goes on taking events.
func (w *Watcher) snapshot() error {
	began := monotonic()
	pids, err := w.reader.pids()
	if err != nil {
		return err
	}
	w.mu.Lock()
	s := w.table.snapshot(began)
	w.mu.Unlock()
	const piece = 64
	records := make([]record, 0, piece)
	for len(pids) > 0 {
		n := min(piece, len(pids))
		records = records[:0]
		epoch := w.Epoch()
		for _, pid := range pids[:n] {
			if r, ok := w.reader.record(pid); ok {
				records = append(records, r)
			}
		}
		pids = pids[n:]
		if err := w.drainShared(); err != nil {
			return err
		}
		w.mu.Lock()
		same := w.table.stats.Epoch == epoch
		for _, r := range records {
			r.readable = r.readable && same // else another exec may be missing
			s.merge(r)
		}
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s.done(monotonic())
	return nil
}

// readImages reads what has executed, as far as the budget goes.
func (w *Watcher) readImages() {
	w.mu.Lock()
	todo := w.pending
	w.pending, w.woken = nil, false
	w.mu.Unlock()
	for len(todo) > 0 {
		n := min(readAtOnce, len(todo))
		w.readSome(todo[:n])
		todo = todo[n:]
	}
}

// readSome reads what a few have executed.
func (w *Watcher) readSome(todo []pending) {
	now := monotonic()
	w.tokens = min(w.tokens+(now-w.filled).Seconds()*float64(w.o.Reads), float64(w.o.Reads))
	w.filled = now
	var got [readAtOnce]struct {
		content
		ticks uint64
		at    time.Duration
		ok    bool
		late  bool // it is not that image any more
		over  bool // the budget is used up
	}
	w.mu.Lock()
	epoch := w.table.stats.Epoch
	for i, p := range todo {
		got[i].late = p.e.left || p.e.image() != p.img
	}
	w.mu.Unlock()
	for i, p := range todo {
		if got[i].late {
			continue
		}
		if got[i].over = w.tokens < 1; got[i].over {
			continue
		}
		w.tokens--
		dir, err := w.reader.open(p.e.pid)
		if err != nil {
			continue
		}
		got[i].content, got[i].ok = w.reader.content(p.e.pid, dir)
		if st, err := w.reader.stat(p.e.pid, dir); err == nil {
			got[i].ticks = st.ticks
		}
		got[i].at = monotonic()
		unix.Close(dir)
	}
	failed := w.drainShared() != nil
	w.mu.Lock()
	defer w.mu.Unlock()
	same := !failed && w.table.stats.Epoch == epoch
	for i, p := range todo {
		g := &got[i]
		// With no exec after this one, and no other process with this pid, what was
		// read is of this image.
		current := same && p.e == w.table.byPID[p.e.pid]
		if current && p.e.ticks == 0 {
			p.e.ticks = g.ticks
		}
		p.img.locked = g.locked
		switch {
		case g.ok && current && p.e.image() == p.img:
			w.table.fill(p.e, p.img, g.content, g.at)
			w.reads++
		case g.over:
			w.over++
		default:
			w.missed++
		}
		if w.o.Exec == nil {
			continue
		}
		select {
		case w.calls <- call{w.table.process(p.e), p.img.public()}:
		default:
			w.unsent.Add(1)
		}
	}
}

// deliver calls Options.Exec.
func (w *Watcher) deliver() {
	defer w.wg.Done()
	for {
		select {
		case c := <-w.calls:
			w.o.Exec(c.p, c.i)
		case <-w.stop:
			return
		}
	}
}

// Process tells of the process that has or had a pid and began at a start tick
// (field 22 of /proc/PID/stat); with 0, of the last one with that pid. Call Drain
// before. It is false if no such process is known.
func (w *Watcher) Process(pid int, startTicks uint64) (Process, bool) {
	w.mu.Lock()
	e := w.table.find(int32(pid), startTicks)
	if e == nil {
		w.mu.Unlock()
		return Process{}, false
	}
	p := w.table.process(e)
	w.mu.Unlock()
	if p.Exited {
		// Unless it has other threads, of whose end no event tells us.
		r := reader{proc: w.o.Proc, lockable: w.reader.lockable}
		if ticks, ok := r.alive(pid); ok && (ticks == startTicks || startTicks == 0 && ticks == p.Start) {
			p.Exited, p.ExitedAt = false, 0
		}
	}
	return p, true
}

// Mark is for comparing before and after something was read of a process. Call
// Drain before. A process whose first thread has ended counts as exited here.
func (w *Watcher) Mark(pid int, startTicks uint64) (Mark, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.table.find(int32(pid), startTicks)
	if e == nil {
		return Mark{}, false
	}
	return w.table.mark(e), true
}

// Active appends to pids the processes that were born or executed since a moment of
// CLOCK_MONOTONIC and still run, newest first: among them is whoever has just
// connected, most likely. It looks back on 2,048 forks and execs.
func (w *Watcher) Active(since time.Duration, pids []int) []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.table.active(since, pids)
}

// Epoch rises when events are lost. What was concluded in an earlier one has to be
// concluded again.
func (w *Watcher) Epoch() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.table.stats.Epoch
}

// Check proves that events come: it gives the calling thread the name that it has,
// for which the kernel sends an event, and looks whether it is there.
func (w *Watcher) Check(ctx context.Context) error {
	w.checking.Lock()
	defer w.checking.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var name [16]byte
	if err := unix.Prctl(unix.PR_GET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0); err != nil {
		return fmt.Errorf("read the name of a thread: %w", err)
	}
	begin := monotonic()
	w.mu.Lock()
	w.echoTID, w.echo = int32(unix.Gettid()), 0
	w.mu.Unlock()
	if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0); err != nil {
		return fmt.Errorf("name a thread: %w", err)
	}
	if err := w.Drain(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.echo < begin {
		return errors.New("the proc connector did not tell of an event that we caused: is it switched off, or another program's filter in the way?")
	}
	return nil
}

// Stats counts since Open.
func (w *Watcher) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.table.stats
	s.Processes = w.table.count
	s.ImagesRead, s.ImagesMissed, s.ImagesOverBudget = w.reads, w.missed, w.over
	s.Unsent, s.Foreign = w.unsent.Load(), w.foreign
	s.Buffer = w.buffer
	return s
}
