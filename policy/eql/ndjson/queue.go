package ndjson

import (
	"bufio"
	"cmp"
	"container/heap"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
)

// queue puts events in order: by time, then by tiebreaker, then as they came.
//
// What does not fit into memory goes into a temporary file, in runs that are each in
// order, and comes back as the runs are merged. A run costs a buffer of
// 64 kB to merge.
type queue struct {
	memory int // bytes that may wait in memory
	decode *decoder

	heap     waiting
	size     int // of those in memory
	file     *os.File
	end      int64 // of the file
	released int64 // the time of the youngest event that has left
	late     uint64
}

// An item waits: an event in memory, or the first one of a run.
type item struct {
	event *Event
	run   *bufio.Reader
}

type waiting []item

func (w waiting) Len() int           { return len(w) }
func (w waiting) Less(i, j int) bool { return w[i].event.compare(w[j].event) < 0 }
func (w waiting) Swap(i, j int)      { w[i], w[j] = w[j], w[i] }
func (w *waiting) Push(x any)        { *w = append(*w, x.(item)) }
func (w *waiting) Pop() any {
	last := len(*w) - 1
	x := (*w)[last]
	(*w)[last] = item{}
	*w = (*w)[:last]
	return x
}

func (e *Event) compare(o *Event) int {
	return cmp.Or(cmp.Compare(e.at, o.at), e.tie.compare(o.tie), cmp.Compare(e.order, o.order))
}

func newQueue(memory int, decode *decoder) *queue {
	return &queue{memory: memory, decode: decode, released: math.MinInt64}
}

// add lets an event wait.
func (q *queue) add(e *Event) {
	if e.at < q.released {
		q.late++
	}
	heap.Push(&q.heap, item{event: e})
	q.size += e.size()
}

// full reports whether more waits than may.
func (q *queue) full() bool { return q.size > q.memory }

// release passes on the events that are older than a time, in order.
func (q *queue) release(before int64, f func(*Event) error) error {
	for len(q.heap) > 0 && q.heap[0].event.at < before {
		if err := q.first(f); err != nil {
			return err
		}
	}
	return nil
}

// drain passes on all events, in order.
func (q *queue) drain(f func(*Event) error) error {
	for len(q.heap) > 0 {
		if err := q.first(f); err != nil {
			return err
		}
	}
	return nil
}

// shrink passes on events in order until half of the memory is free.
func (q *queue) shrink(f func(*Event) error) error {
	for q.size > q.memory/2 {
		if err := q.first(f); err != nil {
			return err
		}
	}
	return nil
}

func (q *queue) first(f func(*Event) error) error {
	it := q.heap[0]
	e := it.event
	if it.run == nil {
		q.size -= e.size()
		heap.Pop(&q.heap)
	} else if next, err := q.next(it.run); err != nil {
		return err
	} else if next == nil {
		heap.Pop(&q.heap)
	} else {
		q.heap[0].event = next
		heap.Fix(&q.heap, 0)
	}
	q.released = max(q.released, e.at)
	return f(e)
}

// spill writes what waits in memory to the temporary file.
func (q *queue) spill() error {
	if q.file == nil {
		file, err := os.CreateTemp("", "imdsgate-eql-")
		if err != nil {
			return fmt.Errorf("sort events: %w; TMPDIR says where", err)
		}
		q.file = file
		os.Remove(file.Name()) // fails on Windows, and close does it
	}
	slices.SortFunc(q.heap, func(a, b item) int { return a.event.compare(b.event) })
	w := bufio.NewWriterSize(io.NewOffsetWriter(q.file, q.end), 64<<10)
	var runs waiting
	start, head := q.end, []byte(nil)
	for _, it := range q.heap {
		if it.run != nil {
			runs = append(runs, it)
			continue
		}
		e := it.event
		head = binary.AppendVarint(head[:0], e.at)
		head = binary.AppendUvarint(head, e.order)
		head = binary.AppendUvarint(head, uint64(len(e.line)))
		w.Write(head)
		w.WriteString(e.line)
		q.end += int64(len(head) + len(e.line))
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("sort events: %w; TMPDIR says where", err)
	}
	run := bufio.NewReaderSize(io.NewSectionReader(q.file, start, q.end-start), 64<<10)
	q.heap, q.size = runs, 0
	e, err := q.next(run)
	if err != nil {
		return err
	}
	if e != nil {
		q.heap = append(q.heap, item{e, run})
	}
	heap.Init(&q.heap)
	return nil
}

// next reads an event of a run, or nil at its end.
func (q *queue) next(run *bufio.Reader) (*Event, error) {
	at, err := binary.ReadVarint(run)
	if err == io.EOF {
		return nil, nil
	}
	order, err2 := binary.ReadUvarint(run)
	size, err3 := binary.ReadUvarint(run)
	if err := cmp.Or(err, err2, err3); err != nil {
		return nil, fmt.Errorf("sort events: %w", err)
	}
	line := make([]byte, size)
	if _, err := io.ReadFull(run, line); err != nil {
		return nil, fmt.Errorf("sort events: %w", err)
	}
	if err := q.decode.decode(line); err != nil {
		return nil, fmt.Errorf("sort events: %w", err)
	}
	e := q.decode.keep()
	e.at, e.order = at, order
	return e, nil
}

// close removes the temporary file.
func (q *queue) close() {
	if q.file != nil {
		q.file.Close()
		os.Remove(q.file.Name())
	}
}
