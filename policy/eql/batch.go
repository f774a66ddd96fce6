package eql

import (
	"slices"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// CompileBatch is Compile for finished streams: it takes all of the language, also
// samples and pipes. A query with one of those has a Batch and no Machine.
func CompileBatch(tree *syntax.Query, schema Schema) (*Query, error) {
	return check(tree, schema).query()
}

// A Batch answers a query from a finished stream: events that were recorded. It
// must be used by one goroutine at a time.
//
// The events are to be observed in order: by time, then by what breaks ties, then
// as they came. What is found comes out in the order of the last events, as soon
// as it is certain. What only the end of the stream decides comes out of Close.
//
//	batch := query.NewBatch(0)
//	for e := range events {
//		print(batch.Observe(e))
//		if batch.Done() {
//			break
//		}
//	}
//	print(batch.Close())
//
// A single event matches as a Match of one event. A missing event is nil in the
// Events of a Match.
//
// It holds what a Machine holds, and what a sample or "| tail" has to: of a sample
// for each key and stage as many events as there are stages, and for no more keys
// than the limit, beyond which the oldest is given up and counted; of a tail as
// many matches as it lets through.
type Batch struct {
	machine *Machine // nil for a sample
	sample  *sampler // nil but for a sample
	pipes   []pipe
}

// NewBatch returns a batch that has seen nothing. The limit is the one of
// NewMachine, and of the keys of a sample; zero is 8192.
func (q *Query) NewBatch(limit int) *Batch {
	b := &Batch{}
	if q.sample {
		b.sample = q.newSampler(limit)
	} else {
		b.machine = q.newMachine(limit)
	}
	for _, p := range q.pipes {
		b.pipes = append(b.pipes, pipe{tail: p.Name == "tail", count: p.Count})
	}
	return b
}

// Observe shows an event to the batch and returns what is certain with it.
func (b *Batch) Observe(e Event) []Match {
	if b.sample != nil {
		b.sample.observe(e)
		return nil
	}
	return b.pass(0, b.machine.Observe(e))
}

// Done reports whether no further event can add anything, because a head is full.
// Close is due all the same: a tail behind it may hold what has passed.
func (b *Batch) Done() bool {
	return slices.ContainsFunc(b.pipes, func(p pipe) bool { return p.count == 0 })
}

// Close tells the batch that the stream has ended and returns what that decides.
// It is called once, and ends the use of the batch.
func (b *Batch) Close() []Match {
	var found []Match
	if b.sample != nil {
		found = b.sample.matches()
	} else {
		found = b.machine.end()
	}
	found = b.pass(0, found)
	for i := range b.pipes {
		found = append(found, b.pass(i+1, b.pipes[i].held)...)
	}
	return found
}

// Evicted is how often something was given up to stay within the limit; what is
// found may then be wrong.
func (b *Batch) Evicted() uint64 {
	if b.sample != nil {
		return b.sample.evicted
	}
	return b.machine.Evicted()
}

// pipe is a head, which lets the first matches through, or a tail, which holds the
// last ones until there are no more.
type pipe struct {
	tail  bool
	count int // how many; of a head, how many more
	held  []Match
}

// pass sends matches through the pipes from the ith on.
func (b *Batch) pass(i int, found []Match) []Match {
	for ; i < len(b.pipes) && len(found) > 0; i++ {
		found = b.pipes[i].pass(found)
	}
	return found
}

func (p *pipe) pass(found []Match) []Match {
	if !p.tail {
		n := min(len(found), p.count)
		p.count -= n
		return found[:n]
	}
	p.held = append(p.held, found...)
	if n := len(p.held) - p.count; n > 0 {
		clear(p.held[:n])
		p.held = p.held[n:]
	}
	return nil
}
