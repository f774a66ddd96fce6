// Package ndjson runs EQL queries over lines of JSON: event files, and streams of
// events.
//
// A Search is a query with its inputs. Plan gives the fields their types and compiles
// the query, Run finds what it describes. Events are judged in the order of time,
// then of their tiebreaker, then as they came, whatever their order in the
// files, and whatever it takes is bounded: queue.go and order.go say how.
//
// What is wrong with a line does not stop a search: the line is reported. Only the
// fields that the query reads are taken from a line, so that it knows nothing of
// schemas beyond the types it is given; fields.go says where types come
// from, and decode.go what becomes of values.
//
// A Search must be used by one goroutine. It uses as many as there are processors
// itself, and calls back only from the one that called it.
package ndjson

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Search is a query with its inputs. The functions may be nil.
type Search struct {
	Query  *syntax.Query
	Schema eql.Schema // gives fields that it knows their types; its slots do not matter
	Roles  Roles
	Inputs []Input

	// Pending is how many unfinished chains a sequence may have, or keys a sample;
	// 0 is 65,536. Each holds its events with their lines: at 2 kB, about 5 kB for each
	// event. With fewer, a sequence without maxspan over many keys
	// loses chains, which is counted.
	Pending int
	// Memory is how many bytes of events may wait for their place in the order; 0 is
	// 64 MB. Of files, what is beyond goes to a temporary file.
	Memory int

	Found    func(Match) error // a match; its error ends the search
	Bad      func(BadLine)
	Failed   func(input string, err error) // an input that cannot be read, or not to its end
	Progress func(Progress)                // now and then, also when a stream is idle
}

// A Match is what the query describes: one event, or those of a sequence or
// sample in its order, with nil for one that is missing.
type Match []*Event

// BadLine is a line that is no event.
type BadLine struct {
	Input  string
	Number int
	Err    error
}

func (b BadLine) Error() string { return fmt.Sprintf("%s:%d: %v", b.Input, b.Number, b.Err) }

// Progress is how far a search is.
type Progress struct {
	Input   string // that is being read
	Sorting bool   // the order of the events is being looked at
	Read    int64  // bytes, compressed as they are
	Size    int64  // of all inputs; -1 if that is not known
	Events  uint64
	Bad     uint64
	Matches uint64
}

// Summary is what can be said at the end.
type Summary struct {
	Progress
	Late    uint64 // events of streams that came after younger ones had been judged
	Evicted uint64 // chains given up to stay within Pending
	Misfits map[string]uint64
}

// A Plan is a search that is ready to run.
type Plan struct {
	Fields   *Fields
	Query    *eql.Query
	Warnings []string // what the author of the query should know

	search *Search
	source *source // of streams, which cannot be read again
}

// Plan compiles the query. It reads as much of the inputs as it takes to see each field
// once that the schema does not know, and the category: mostly one event, 1,000 at
// most. An error in the query is a syntax.ErrorList.
func (s *Search) Plan(ctx context.Context) (*Plan, error) {
	p := &Plan{Fields: newFields(s.Query, s.Roles, s.Schema), search: s}
	wanted := []string{s.Roles.ID}
	for _, f := range p.Fields.unknown() {
		wanted = append(wanted, f.Name)
	}
	if testsCategory(s.Query) {
		wanted = append(wanted, s.Roles.Category)
	}
	data := newSample(wanted...)
	if len(s.Inputs) > 0 {
		source := open(ctx, s.Inputs)
		if err := source.sample(ctx, data); err != nil {
			source.close()
			return nil, err
		}
		if source.live {
			p.source = source
		} else {
			source.close()
		}
	}
	p.Fields.learn(s.Query, data)
	var err error
	if p.Query, err = eql.CompileBatch(s.Query, p.Fields); err != nil {
		p.Close()
		return nil, err
	}
	for _, w := range slices.Concat(p.Query.Warnings(), p.Fields.warnings(s.Query)) {
		p.Warnings = append(p.Warnings, w.Error())
	}
	if data.events > 0 && data.wanted[s.Roles.Category] {
		p.Warnings = append(p.Warnings, fmt.Sprintf("%s the field %s, so that none is of the category that the query asks for; is it in another?", data.nobody(), s.Roles.Category))
	}
	if data.events > 0 && data.wanted[s.Roles.ID] {
		p.Warnings = append(p.Warnings, fmt.Sprintf("%s the field %s, which is the id", data.nobody(), s.Roles.ID))
	}
	return p, nil
}

// testsCategory reports whether a query asks for a category anywhere.
func testsCategory(tree *syntax.Query) bool {
	found := false
	syntax.Walk(tree, func(n syntax.Node) bool {
		e, ok := n.(*syntax.Event)
		found = found || ok && !e.Any
		return true
	})
	return found
}

// sample looks at the first events, which are kept.
func (s *source) sample(ctx context.Context, data *sample) error {
	for !data.enough() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case b, ok := <-s.blocks:
			if !ok {
				data.all = true
				return nil
			}
			s.kept = append(s.kept, b)
			b.each(func(_ int, line []byte) {
				if !data.enough() {
					data.look(line)
				}
			})
		}
	}
	return nil
}

// Close frees what a plan holds that is not run.
func (p *Plan) Close() {
	if p.source != nil {
		p.source.close()
	}
}

// ordered reports whether an answer depends on when events happened.
func (p *Plan) ordered() bool {
	_, single := p.search.Query.Body.(*syntax.Event)
	return !single || len(p.search.Query.Pipes) > 0
}

// errDone ends a search of which the rest cannot matter.
var errDone = errors.New("done")

// Run searches. Its error is that of the context, of Found, or of the temporary
// file. The summary is good for what was done in any case.
func (p *Plan) Run(ctx context.Context) (Summary, error) {
	r := &run{Plan: p, batch: p.Query.NewBatch(cmp.Or(p.search.Pending, 1<<16)), newest: math.MinInt64, last: math.MinInt64}
	r.queue = newQueue(cmp.Or(p.search.Memory, 64<<20), newDecoder(p.Fields, p.search.Roles))
	defer r.queue.close()
	err := r.judge(ctx)
	if errors.Is(err, errDone) {
		err = nil
	}
	if err == nil {
		err = r.found(r.batch.Close())
	}
	r.Evicted, r.Late = r.batch.Evicted(), r.queue.late
	r.Misfits = r.misfits()
	return r.Summary, err
}

// run is a search that is going on.
type run struct {
	*Plan
	Summary
	queue    *queue
	batch    *eql.Batch
	decoders []*decoder
	stages   []*eql.Stage

	input    *Input
	before   int64  // bytes of the inputs before this one
	order    uint64 // of the next event
	newest   int64  // time
	last     int64  // the time of the last event that has one
	lateness int64  // how much older than those before it an event of a file may be
}

// judge reads the inputs and judges their events.
func (r *run) judge(ctx context.Context) error {
	var inputs []Input
	source, live := r.source, r.source != nil
	r.Size = -1
	if !live {
		var err error
		if inputs, err = r.arrange(ctx); err != nil {
			return err
		}
		source = open(ctx, inputs)
	}
	defer source.close()

	r.stages = r.Query.Stages()
	if u := r.Query.Until(); u != nil {
		r.stages = append(r.stages, u)
	}
	work := pipeline[*harvest]{
		worker: r.worker,
		consume: func(b *block, h *harvest) error {
			r.take(b, h)
			if !live && !r.measured() && r.queue.size > patience {
				if err := r.measure(ctx, inputs); err != nil {
					return err
				}
			}
			err := r.pass(live)
			r.report()
			return err
		},
	}
	if live {
		work.idle = func() error {
			err := r.queue.drain(r.observe)
			r.report()
			return err
		}
	}
	if err := work.run(ctx, source); err != nil {
		return err
	}
	return r.queue.drain(r.observe)
}

// harvest is what a block has in it.
type harvest struct {
	events  []*Event // that some stage describes; the others are not needed
	lines   uint64
	newest  int64 // time
	last    int64 // the time of the last event that has one
	bad     []BadLine
	untimed int // of events, those at the beginning that have no time
}

// worker returns what looks for events that matter: those that some stage describes.
// Most do not, and are forgotten here, by one of several goroutines.
func (r *run) worker() func(*block) *harvest {
	d := newDecoder(r.Fields, r.search.Roles)
	r.decoders = append(r.decoders, d)
	needsTime := r.ordered()
	return func(b *block) *harvest {
		h := &harvest{newest: math.MinInt64, last: math.MinInt64}
		b.each(func(number int, line []byte) {
			err := d.decode(line)
			if err == nil && !d.event.timed && needsTime {
				err = fmt.Errorf("no time in %s", r.search.Roles.Timestamp)
				if d.odd != "" {
					err = fmt.Errorf("%w: %.40q", err, d.odd)
				}
			}
			if err != nil {
				h.bad = append(h.bad, BadLine{b.input.Name, number, err})
				return
			}
			h.lines++
			if d.event.timed {
				h.last = d.event.at
				h.newest = max(h.newest, h.last)
			}
			for _, s := range r.stages {
				if s.Match(&d.event) {
					h.keep(d.keep())
					return
				}
			}
		})
		if b.long > 0 {
			h.bad = append(h.bad, BadLine{b.input.Name, b.long, fmt.Errorf("longer than %d MB", maxLine>>20)})
		}
		return h
	}
}

// keep takes an event. One without a time happened when the one before it did.
func (h *harvest) keep(e *Event) {
	if !e.timed {
		if e.at = h.last; h.last == math.MinInt64 {
			h.untimed++
		}
	}
	h.events = append(h.events, e)
}

// take lets the events of a block wait for their turn.
func (r *run) take(b *block, h *harvest) {
	for _, e := range h.events[:h.untimed] {
		e.at = r.last
	}
	for _, e := range h.events {
		e.order = r.order
		r.order++
		r.queue.add(e)
	}
	r.newest = max(r.newest, h.newest)
	if h.last != math.MinInt64 {
		r.last = h.last
	}
	r.Events += h.lines
	r.Bad += uint64(len(h.bad))
	for _, bad := range h.bad {
		if r.search.Bad != nil {
			r.search.Bad(bad)
		}
	}
	r.progress(b)
	if b.err != nil && r.search.Failed != nil {
		r.search.Failed(b.input.Name, b.err)
	}
}

// pass lets go of the events whose place is certain.
func (r *run) pass(live bool) error {
	if !live && r.measured() && r.newest >= math.MinInt64+r.lateness {
		if err := r.queue.release(r.newest-r.lateness, r.observe); err != nil {
			return err
		}
	}
	switch {
	case !r.queue.full():
		return nil
	case live:
		return r.queue.shrink(r.observe)
	}
	return r.queue.spill()
}

func (r *run) observe(e *Event) error {
	if err := r.found(r.batch.Observe(e)); err != nil {
		return err
	}
	if r.batch.Done() {
		return errDone
	}
	return nil
}

func (r *run) found(matches []eql.Match) error {
	for _, m := range matches {
		r.Matches++
		if r.search.Found == nil {
			continue
		}
		events := make(Match, len(m.Events))
		for i, e := range m.Events {
			events[i], _ = e.(*Event) // nil if it is missing
		}
		if err := r.search.Found(events); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) progress(b *block) {
	if r.input != b.input {
		r.before, r.input = r.Read, b.input
	}
	r.Input, r.Read = b.input.Name, r.before+b.read
}

func (r *run) report() {
	if r.search.Progress != nil {
		r.search.Progress(r.Progress)
	}
}

// misfits are the values that could not be taken, by field.
func (r *run) misfits() map[string]uint64 {
	all := map[string]uint64{}
	for _, d := range r.decoders {
		for slot, n := range d.misfits {
			if n > 0 {
				all[r.Fields.bySlot[slot].Name] += n
			}
		}
	}
	return all
}
