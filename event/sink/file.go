// Package sink takes events away from those who make them.
//
// A File is the spool: one line of JSON per document, in a file that is
// rotated by size and age. Everything else that wants events reads them from there,
// with a Cursor that knows after a restart where it was, so that one slow reader costs
// nobody anything. Record never blocks: what does not fit into the queue is dropped. On
// a full disk the oldest documents make room. What is missing for either reason is
// counted, and told by an event of the action events-suppressed.
package sink

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/oklog/ulid/v2"
)

// Options of a File. Zero values are replaced by what the comments say.
type Options struct {
	Path string `yaml:"path"`
	// MaxSize is the size, in bytes, at which the file is rotated: 100 MB.
	MaxSize int64 `yaml:"max_size"`
	// Keep is how many rotated files are kept beside the present one: 4, five
	// in all. They are called Path.1 (the youngest) and so on.
	Keep int `yaml:"keep"`
	// MaxAge is how old the file gets before it is rotated, however small it is. All
	// files together reach back Keep+1 times as far at most. Without it, as far as their
	// sizes do.
	MaxAge time.Duration `yaml:"max_age"`
	// Fsync is when documents are brought to the disk itself: see Fsync.
	Fsync Fsync `yaml:"fsync"`
	// Queue is how many events may wait for the disk: 4096. A lower number
	// drops events when the disk stalls for a moment; each place costs a few
	// kilobytes while it is taken.
	Queue uint16 `yaml:"queue"`
	// Aggregate is for how long requests that are like one that was written are counted,
	// to be told by one document then: 0, each is written.
	Aggregate Window `yaml:"aggregate"`
	// Journal passes what somebody should see on to journald. A change takes a restart.
	Journal bool `yaml:"journal"`
	// Layout is the data streams that documents name: own, or defend.
	Layout event.Layout `yaml:"layout"`
}

const (
	// batchFor is how long an event may wait for others, unless it is urgent:
	// a service that answers in a fraction of a millisecond is not to share its
	// cores with somebody who writes down each answer at once. A crash of the
	// daemon loses that much; followers see it that much later.
	batchFor = 50 * time.Millisecond
	// bufferSize is how much is written at once. With 8 KiB, ext4 takes three times as
	// long for each byte (Linux 6.18).
	bufferSize = 64 << 10
	// pieceSize is how much is rendered at once, and breath the pause after it, unless somebody
	// waits. Where there is one processor requests wait for that long: with 64 KiB that was
	// seen in one of twenty-five. To yield is not enough, after which the runtime looks for
	// packets only when there is nothing else to run.
	pieceSize = 8 << 10
	breath    = 50 * time.Microsecond
	// notMoreOften is how often gaps are told, and FsyncInterval syncs.
	notMoreOften = time.Second
)

// File is the spool. Record may be called from any goroutine, and by many at
// once.
type File struct {
	options Options
	queue   chan *event.Event
	wake    chan struct{} // there is something to write, with room for one
	batch   *time.Timer   // wakes
	waiting atomic.Bool   // batch runs
	done    chan struct{}
	stopped atomic.Bool
	stop    chan struct{}

	// Which only loop uses.
	enc      *encoder
	rendered documents
	repeats  repeats
	told     gaps

	host    func() *event.Host // of events of its own
	later   *time.Timer        // wakes for what need not be done at once
	ends    *time.Timer        // wakes when a window of repeats ends
	dropped atomic.Uint64
	counts
	err atomic.Pointer[error]
}

// documents are lines that are yet to be written.
type documents struct {
	bytes []byte
	ends  []int
}

// counts is what became of documents. The writer counts, anybody reads.
type counts struct{ written, failed, removed, repeated atomic.Uint64 }

// Stats counts documents since the start.
type Stats struct {
	Written uint64 `json:"written"`
	Repeats uint64 `json:"repeats"` // requests that were counted, and not written
	Dropped uint64 `json:"dropped"` // events that found the queue full
	Failed  uint64 `json:"failed"`  // documents that the disk did not take
	Removed uint64 `json:"removed"` // documents that made room on a full disk
	Waiting int    `json:"waiting"` // events in the queue
	Error   string `json:"error,omitempty"`
}

// Fsync is when documents are brought to the disk itself. The end of the daemon, however
// sudden, loses none that was written; only the end of the host does.
type Fsync uint8

const (
	// FsyncRotate is when the file is rotated. What is younger the kernel writes within
	// half a minute by itself.
	FsyncRotate Fsync = iota
	// FsyncNever leaves all of it to the kernel.
	FsyncNever
	// FsyncInterval is once a second, while there are events.
	FsyncInterval
	// FsyncAlways is after every batch: 50 ms of events, or one that is urgent. A slow
	// disk makes the queue overflow.
	FsyncAlways
)

var fsyncNames = []string{"rotate", "never", "interval", "always"}

func (f Fsync) MarshalText() ([]byte, error) { return []byte(fsyncNames[f]), nil }

// UnmarshalText reads never, rotate, interval or always.
func (f *Fsync) UnmarshalText(text []byte) error {
	if i := slices.Index(fsyncNames, string(text)); i >= 0 {
		*f = Fsync(i)
		return nil
	}
	return fmt.Errorf("unknown value %q; there are never, rotate, interval, always", text)
}

// Open opens or makes the file, for its owner to write and its group to read.
// It never follows a link. Events of its own are of the host at their time. The sequence numbers of its documents go on from
// those of an earlier run in the same boot. What a crash has left of a line is taken
// away.
func Open(o Options, host func() *event.Host) (*File, error) {
	o.MaxSize = cmp.Or(o.MaxSize, 100<<20)
	o.Keep = cmp.Or(o.Keep, 4)
	o.Queue = cmp.Or(o.Queue, 4096)
	f := &File{
		options: o, host: host, enc: newEncoder(), repeats: newRepeats(o.Aggregate),
		queue: make(chan *event.Event, o.Queue), wake: make(chan struct{}, 1), done: make(chan struct{}), stop: make(chan struct{}),
	}
	w := &writer{path: o.Path, maxSize: o.MaxSize, maxAge: o.MaxAge, keep: o.Keep, fsync: o.Fsync, counts: &f.counts}
	if err := w.open(); err != nil {
		return nil, err
	}
	if err := w.tidy(); err != nil {
		return nil, errors.Join(err, w.close())
	}
	f.batch = time.AfterFunc(batchFor, f.wakeUp)
	f.later = time.AfterFunc(batchFor, f.wakeUp)
	f.ends = time.AfterFunc(batchFor, f.wakeUp)
	go f.loop(w)
	return f, nil
}

// Record queues an event, which must not be changed any more.
func (f *File) Record(e *event.Event) {
	if f.stopped.Load() {
		f.dropped.Add(1)
		return
	}
	hurry := urgent(e)
	if !hurry && len(f.queue) > cap(f.queue)/4*3 {
		f.dropped.Add(1) // the rest is for what must not be lost
		return
	}
	select {
	case f.queue <- e:
	default:
		f.dropped.Add(1)
	}
	switch {
	case hurry || len(f.queue) > cap(f.queue)/2:
		f.wakeUp()
	case !f.waiting.Swap(true):
		f.batch.Reset(batchFor)
	}
}

// urgent reports whether somebody should see an event at once.
func urgent(e *event.Event) bool {
	switch {
	case e.Kind == event.Started:
		return false // anybody can start programs as fast as he likes
	case e.Kind != event.Asked, e.Decision.WouldBe == event.Deny:
		return true
	}
	for i := range e.Decision.Matches {
		if e.Decision.Matches[i].Alert {
			return true
		}
	}
	return false
}

func (f *File) wakeUp() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// Close writes what is queued and closes the file.
func (f *File) Close() error {
	if f.stopped.Swap(true) {
		return nil
	}
	close(f.stop)
	<-f.done
	if err := f.err.Load(); err != nil {
		return *err
	}
	return nil
}

// Path is where the present file is.
func (f *File) Path() string { return f.options.Path }

// Stats reports what became of the events so far.
func (f *File) Stats() Stats {
	s := Stats{Written: f.written.Load(), Repeats: f.repeated.Load(), Dropped: f.dropped.Load(), Failed: f.failed.Load(), Removed: f.removed.Load(), Waiting: len(f.queue)}
	if err := f.err.Load(); err != nil {
		s.Error = (*err).Error()
	}
	return s
}

// loop is the one goroutine that writes.
func (f *File) loop(w *writer) {
	defer close(f.done)
	defer f.batch.Stop()
	defer f.later.Stop()
	defer f.ends.Stop()
	for stopped := false; !stopped; {
		select {
		case <-f.wake:
		case <-f.stop:
			stopped = true
		}
		f.waiting.Store(false)
		for f.render(pieceSize) {
			f.write(w)
			if !stopped && len(f.wake) == 0 && len(f.queue) < cap(f.queue)/16 { // more take memory
				time.Sleep(breath)
			}
		}
		f.endWindows(w, stopped)
		err := w.flush()
		f.note(err)
		if err == nil {
			f.tellGaps(w, stopped)
		}
		again, err := w.settle()
		f.note(err)
		if again {
			f.later.Reset(notMoreOften)
		}
	}
	f.note(w.close())
}

// gaps is what is missing between documents.
type gaps struct {
	at                       time.Time // when it was told last
	dropped, failed, removed uint64
}

// tellGaps records what is missing since that was told last. It is called when the disk
// takes documents.
func (f *File) tellGaps(w *writer, atOnce bool) {
	now := gaps{time.Now(), f.dropped.Load(), f.failed.Load(), f.removed.Load()}
	missing := []struct {
		n      uint64
		reason string
	}{
		{now.dropped - f.told.dropped, "they came faster than the disk took them, and the queue was full"},
		{now.failed - f.told.failed, "the disk did not take them"},
		{now.removed - f.told.removed, "the disk was full, and they were the oldest"},
	}
	if missing[0].n+missing[1].n+missing[2].n == 0 {
		return
	}
	if !atOnce && now.at.Sub(f.told.at) < notMoreOften {
		f.later.Reset(notMoreOften)
		return
	}
	told := uint64(0)
	for _, m := range missing {
		if m.n == 0 {
			continue
		}
		told++
		f.add(&event.Event{Kind: event.Lifecycle, Host: f.host(), Time: now.at, State: event.State{
			Action: "events-suppressed", Type: "info", Message: fmt.Sprintf("%d events are missing: %s", m.n, m.reason),
			Reason: m.reason, Failed: true, Suppressed: int64(m.n),
		}})
	}
	f.write(w)
	if err := w.flush(); err != nil {
		f.note(err)
		f.told.at = now.at
		f.told.failed += told // they come again
		f.later.Reset(notMoreOften)
		return
	}
	f.told = now
}

// render gives queued events their form, about as many bytes as it is told. It reports
// whether there is something to write.
func (f *File) render(atLeast int) bool {
	for len(f.rendered.bytes) < atLeast {
		select {
		case e := <-f.queue:
			f.take(e)
		default:
			return len(f.rendered.ends) > 0
		}
	}
	return true
}

// take renders an event, or counts it.
func (f *File) take(e *event.Event) {
	like, counts := f.repeats.of(e)
	if !counts {
		f.add(e)
		return
	}
	now := time.Now()
	if f.repeats.count(like, e, now) {
		f.repeated.Add(1)
		if f.options.Layout == event.Defend {
			f.addConnections(e)
		}
		return
	}
	if f.repeats.full() {
		if tells, _ := f.repeats.end(f.repeats.ends()); tells != nil {
			f.add(tells)
		}
	}
	f.repeats.begin(like, f.add(e), now)
}

// endWindows writes what was counted in windows that are over, or in all.
func (f *File) endWindows(w *writer, all bool) {
	if f.repeats.window == 0 {
		return
	}
	by := time.Now()
	if all {
		by = by.Add(f.repeats.window)
	}
	for more := true; more; f.write(w) {
		for more && len(f.rendered.bytes) < bufferSize {
			var tells *event.Event
			if tells, more = f.repeats.end(by); tells != nil {
				f.add(tells)
			}
		}
		if ends := f.repeats.ends(); !more && !ends.IsZero() {
			f.ends.Reset(time.Until(ends))
		}
	}
}

// add renders the documents of an event, and returns the ID of the decision among them.
func (f *File) add(e *event.Event) (decision string) {
	now := time.Now()
	views := e.Views()
	var ids []string
	for i := range views {
		v := &views[i]
		if v.Document == event.Alert {
			v.Related = ids
		}
		f.addView(v, now)
		if v.Document != event.Alert {
			ids = append(ids, v.ID)
		}
		if v.Document == event.RequestDecision {
			decision = v.ID
		}
	}
	return decision
}

// addConnections renders those of a request that is counted. Elastic's rules about its own
// agent ask which connections follow upon the start of a program, and they count elsewhere.
func (f *File) addConnections(e *event.Event) {
	now := time.Now()
	views := e.Views()
	for i := range views {
		if views[i].Document == event.ConnectionAttempt {
			f.addView(&views[i], now)
		}
	}
}

func (f *File) addView(v *event.View, now time.Time) {
	f.rendered.bytes = f.enc.append(f.rendered.bytes, v, now)
	f.rendered.ends = append(f.rendered.ends, len(f.rendered.bytes))
}

// write hands what is rendered to the writer.
func (f *File) write(w *writer) {
	begin := 0
	for _, end := range f.rendered.ends {
		f.note(w.write(f.rendered.bytes[begin:end]))
		begin = end
	}
	f.rendered = documents{f.rendered.bytes[:0], f.rendered.ends[:0]}
}

// note keeps an error for Stats and Close.
func (f *File) note(err error) {
	if err != nil {
		f.err.Store(&err)
	}
}

// encoder gives each document its id, its place and its form.
type encoder struct {
	sequence uint64
	entropy  io.Reader
}

func newEncoder() *encoder {
	return &encoder{sequence: sinceBoot(), entropy: ulid.Monotonic(rand.Reader, 0)}
}

// append gives a document its place, and adds it to b as a line.
func (enc *encoder) append(b []byte, v *event.View, now time.Time) []byte {
	enc.sequence++
	v.Sequence = enc.sequence
	v.Created = now
	id, err := ulid.New(ulid.Timestamp(now), enc.entropy)
	if err != nil {
		// Only when the clock of ULIDs overflows within a millisecond.
		id = ulid.Make()
	}
	v.ID = id.String()
	return append(v.AppendJSON(b), '\n')
}
