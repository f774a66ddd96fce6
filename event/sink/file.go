// Package sink takes events away from those who make them.
//
// A File is the spool: one line of JSON per document, in a file that is
// rotated by size. Everything else that wants events reads them from there, so
// that one slow reader costs nobody anything. Record never blocks: what does
// not fit into the queue is dropped, and counted.
package sink

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
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
	// Queue is how many events may wait for the disk: 4096. A lower number
	// drops events when the disk stalls for a moment; each place costs a few
	// kilobytes while it is taken.
	Queue int `yaml:"queue"`
	// Layout is the data streams that documents name: own, or defend.
	Layout event.Layout `yaml:"layout"`
}

const (
	// batchFor is how long an event may wait for others, unless it is urgent:
	// a service that answers in a fraction of a millisecond is not to share its
	// cores with somebody who writes down each answer at once. A crash of the
	// daemon loses that much; followers see it that much later.
	batchFor   = 50 * time.Millisecond
	bufferSize = 64 << 10
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

	written, dropped, failed atomic.Uint64
	err                      atomic.Pointer[error]
}

// Stats counts documents since the start.
type Stats struct {
	Written uint64 `json:"written"`
	Dropped uint64 `json:"dropped"` // events that found the queue full
	Failed  uint64 `json:"failed"`  // documents that the disk did not take
	Error   string `json:"error,omitempty"`
}

// Open opens or makes the file, for its owner to write and its group to read.
// It never follows a link. The sequence numbers of its documents go on from
// those of an earlier run in the same boot.
func Open(o Options) (*File, error) {
	o.MaxSize = cmp.Or(o.MaxSize, 100<<20)
	o.Keep = cmp.Or(o.Keep, 4)
	o.Queue = cmp.Or(o.Queue, 4096)
	w := &writer{path: o.Path, maxSize: o.MaxSize, keep: o.Keep}
	if err := w.open(); err != nil {
		return nil, err
	}
	f := &File{options: o, queue: make(chan *event.Event, o.Queue), wake: make(chan struct{}, 1), done: make(chan struct{}), stop: make(chan struct{})}
	f.batch = time.AfterFunc(batchFor, f.wakeUp)
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
	s := Stats{Written: f.written.Load(), Dropped: f.dropped.Load(), Failed: f.failed.Load()}
	if err := f.err.Load(); err != nil {
		s.Error = (*err).Error()
	}
	return s
}

// loop is the one goroutine that writes.
func (f *File) loop(w *writer) {
	defer close(f.done)
	defer f.batch.Stop()
	enc := newEncoder()
	for stopped := false; !stopped; {
		select {
		case <-f.wake:
		case <-f.stop:
			stopped = true
		}
		f.waiting.Store(false)
		for more := true; more; {
			select {
			case e := <-f.queue:
				f.write(w, enc, e)
			default:
				more = false
			}
		}
		f.note(w.flush())
	}
	f.note(w.close())
}

func (f *File) write(w *writer, enc *encoder, e *event.Event) {
	now := time.Now()
	views := e.Views()
	var ids []string
	for i := range views {
		v := &views[i]
		if v.Document == event.Alert {
			v.Related = ids
		}
		f.note(w.write(enc.encode(v, now)))
		if v.Document != event.Alert {
			ids = append(ids, v.ID)
		}
	}
}

// note counts what became of the documents that an operation of the writer
// settled.
func (f *File) note(documents int, err error) {
	if err != nil {
		f.failed.Add(uint64(documents))
		f.err.Store(&err)
		return
	}
	f.written.Add(uint64(documents))
}

// encoder gives each document its id, its place and its form.
type encoder struct {
	sequence uint64
	entropy  io.Reader
	line     []byte
}

func newEncoder() *encoder {
	return &encoder{sequence: sinceBoot(), entropy: ulid.Monotonic(rand.Reader, 0)}
}

// encode returns a line that is good until the next call.
func (enc *encoder) encode(v *event.View, now time.Time) []byte {
	enc.sequence++
	v.Sequence = enc.sequence
	v.Created = now
	id, err := ulid.New(ulid.Timestamp(now), enc.entropy)
	if err != nil {
		// Only when the clock of ULIDs overflows within a millisecond.
		id = ulid.Make()
	}
	v.ID = id.String()
	enc.line = append(v.AppendJSON(enc.line[:0]), '\n')
	return enc.line
}

// writer is the file with its rotation. Its methods return how many documents
// they settled: those that are in the file now, or, with an error, those that
// are lost.
type writer struct {
	path    string
	maxSize int64
	keep    int

	file    *os.File // nil after a rotation that failed
	buf     *bufio.Writer
	good    int64 // bytes of the file that are whole lines
	waiting int   // documents in buf
}

func (w *writer) open() error {
	file, err := openAppend(w.path)
	if err != nil {
		return fmt.Errorf("open the event file: %w", err)
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return fmt.Errorf("open the event file: %w", err)
	}
	w.file, w.good = file, info.Size()
	w.buf = bufio.NewWriterSize(file, bufferSize)
	return nil
}

func (w *writer) write(line []byte) (settled int, err error) {
	if w.file == nil {
		if err := w.open(); err != nil {
			return 1, err
		}
	}
	if w.buf.Available() < len(line) {
		if settled, err = w.flush(); err != nil {
			return settled + 1, err
		}
	}
	if size := w.good + int64(w.buf.Buffered()); size > 0 && size+int64(len(line)) > w.maxSize {
		n, err := w.rotate()
		if settled += n; err != nil {
			return settled + 1, err
		}
	}
	if len(line) > bufferSize {
		if _, err := w.file.Write(line); err != nil {
			return settled + 1, w.lost(err)
		}
		w.good += int64(len(line))
		return settled + 1, nil
	}
	w.waiting++
	w.buf.Write(line) // fits, so it cannot fail
	return settled, nil
}

func (w *writer) flush() (settled int, err error) {
	if w.file == nil || w.waiting == 0 {
		return 0, nil
	}
	size := int64(w.buf.Buffered())
	settled = w.waiting
	if err := w.buf.Flush(); err != nil {
		return settled, w.lost(err)
	}
	w.waiting = 0
	w.good += size
	return settled, nil
}

// lost drops what the disk did not take, with the line that it took a part of,
// and lets the next write try again.
func (w *writer) lost(err error) error {
	w.waiting = 0
	w.buf.Reset(w.file)
	return errors.Join(fmt.Errorf("write the event file: %w", err), w.file.Truncate(w.good))
}

func (w *writer) rotate() (settled int, err error) {
	if settled, err = w.close(); err != nil {
		return settled, err
	}
	for i := w.keep; i > 0; i-- {
		from := w.path
		if i > 1 {
			from = fmt.Sprintf("%s.%d", w.path, i-1)
		}
		err := os.Rename(from, fmt.Sprintf("%s.%d", w.path, i))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return settled, fmt.Errorf("rotate the event file: %w", err)
		}
	}
	return settled, w.open()
}

func (w *writer) close() (settled int, err error) {
	if w.file == nil {
		return 0, nil
	}
	settled, err = w.flush()
	err = errors.Join(err, w.file.Close())
	w.file = nil
	return settled, err
}
