package ndjson

import (
	"context"
	"runtime"
	"sync"
	"time"
)

// A source is inputs that are being read, one after the other, by a goroutine of its
// own.
type source struct {
	blocks chan *block
	free   chan []byte // buffers to use again
	kept   []*block    // read, and to be worked on
	cancel context.CancelFunc
	live   bool // what is read is gone, and may never end
}

func open(ctx context.Context, inputs []Input) *source {
	ctx, cancel := context.WithCancel(ctx)
	s := &source{blocks: make(chan *block), free: make(chan []byte, 16), cancel: cancel}
	for i := range inputs {
		s.live = s.live || inputs[i].Size < 0
	}
	go s.read(ctx, inputs)
	return s
}

func (s *source) read(ctx context.Context, inputs []Input) {
	defer close(s.blocks)
	for i := range inputs {
		read(&inputs[i], s.buffer, func(b *block) bool {
			select {
			case s.blocks <- b:
				return true
			case <-ctx.Done():
				return false
			}
		})
		if ctx.Err() != nil {
			return
		}
	}
}

func (s *source) buffer() []byte {
	select {
	case b := <-s.free:
		return b[:0]
	default:
		return make([]byte, 0, blockSize)
	}
}

// recycle takes back a block that is not needed any more.
func (s *source) recycle(b *block) {
	if cap(b.data) != blockSize {
		return // of a long line
	}
	select {
	case s.free <- b.data:
	default:
	}
}

// close ends the reading. It waits for the goroutine, unless that waits for an input
// that may never go on: then it ends when the input does.
func (s *source) close() {
	s.cancel()
	if s.live {
		return
	}
	for range s.blocks {
	}
}

// A pipeline works on blocks in as many goroutines as there are processors, and
// consumes what became of them in the order in which they were read.
type pipeline[T any] struct {
	// worker returns what one goroutine does with a block. It is called from the
	// goroutine of run.
	worker func() func(*block) T
	// consume is called from the goroutine of run. Its error ends everything.
	consume func(*block, T) error
	// idle is called when nothing has come for a while; it may be nil.
	idle func() error
}

// pause is how long nothing has to come for a stream to be idle.
const pause = time.Second

// maxWorkers is as many as one reader keeps busy. Each has two blocks.
const maxWorkers = 8

// A task is a block that is being worked on.
type task[T any] struct {
	*block
	result T
	done   chan struct{}
}

// run returns when all that s reads is consumed, or with the first error. Its workers
// have ended then; s is not closed.
func (p *pipeline[T]) run(ctx context.Context, s *source) error {
	workers := min(runtime.GOMAXPROCS(0), maxWorkers)
	tasks := make(chan *task[T], 2*workers)
	var working sync.WaitGroup
	for range workers {
		work := p.worker()
		working.Go(func() {
			for t := range tasks {
				t.result = work(t.block)
				close(t.done)
			}
		})
	}
	defer working.Wait()
	defer close(tasks)

	var open []*task[T] // in order
	start := func(b *block) {
		t := &task[T]{block: b, done: make(chan struct{})}
		open = append(open, t)
		tasks <- t
	}
	idle := time.NewTimer(pause)
	defer idle.Stop()
	for ended := false; ; {
		var more <-chan *block
		if len(open) < cap(tasks) && !ended {
			if len(s.kept) > 0 {
				start(s.kept[0])
				s.kept = s.kept[1:]
				continue
			}
			more = s.blocks
		}
		var first <-chan struct{}
		if len(open) > 0 {
			first = open[0].done
		}
		if more == nil && first == nil {
			return ctx.Err()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case b, ok := <-more:
			if ended = !ok; ok {
				start(b)
			}
		case <-first:
			t := open[0]
			open = open[1:]
			if err := p.consume(t.block, t.result); err != nil {
				return err
			}
			s.recycle(t.block)
			idle.Reset(pause)
		case <-idle.C:
			if p.idle != nil {
				if err := p.idle(); err != nil {
					return err
				}
			}
		}
	}
}
