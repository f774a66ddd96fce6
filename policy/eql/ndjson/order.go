package ndjson

import (
	"cmp"
	"context"
	"math"
	"slices"
)

// How events get into order
//
// The order is that of time, then of the tiebreaker, then of arrival: files are read
// in the order of their first events, and as they were given where these are the
// same. Only events that some stage of the query describes are put in order; the
// others cannot change the answer.
//
// Events of files wait in memory, and are judged at the end. If there are many, or the
// files are large and nobody should wait for so long, the files are gone through only
// for the times: how far is an event behind the youngest before it, at most? Of
// files that are in order that is nothing, and each event is judged as it is read;
// else an event is judged once one that is so much younger has been read. What does not
// fit into memory then goes to a temporary file.
//
// A stream is read once and may never end, so that nothing can be known
// beforehand. What comes waits until nothing has come for a second, or there
// is no more room, and the older half has to go. An event that is older than one that
// has been judged is judged where it comes, and is counted as late.

// large is the size from which on files are gone through for times before they are
// read, which takes a seventh of the time of a search. Somebody who searches less
// waits for the matches a few seconds at most.
const large = 1 << 30

// patience is how many bytes of events wait before the files are gone through for
// times. Many events cost more by waiting, in memory that is no longer near the
// processor, than that does.
const patience = 8 << 20

// arrange puts files in the order in which they are read, and finds out how late
// their events come.
func (r *run) arrange(ctx context.Context) ([]Input, error) {
	inputs := slices.Clone(r.search.Inputs)
	if len(inputs) > 1 {
		clock := newClock(r.search.Roles)
		first := map[string]int64{}
		for i := range inputs {
			first[inputs[i].Name] = clock.first(&inputs[i])
		}
		slices.SortStableFunc(inputs, func(a, b Input) int { return cmp.Compare(first[a.Name], first[b.Name]) })
	}
	r.lateness = math.MaxInt64
	if r.Size = size(inputs); r.Size < large {
		return inputs, nil
	}
	return inputs, r.measure(ctx, inputs)
}

func size(inputs []Input) int64 {
	sum := int64(0)
	for _, in := range inputs {
		sum += in.Size
	}
	return sum
}

// nearBeginning is how far first looks, or to the end of the first line.
const nearBeginning = 64 << 10

// first is the time of the first event that has one, if that is near the beginning.
func (d *decoder) first(in *Input) int64 {
	at, ok := int64(math.MinInt64), false
	read(in, func() []byte { return make([]byte, 0, nearBeginning) }, func(b *block) bool {
		b.each(func(_ int, line []byte) {
			if !ok {
				at, ok = d.when(line)
			}
		})
		return false
	})
	return at
}

// times are those of a block.
type times struct {
	oldest, newest int64
	late           int64 // how far an event is behind the youngest before it in the block
}

// measured reports whether it is known how late events come.
func (r *run) measured() bool { return r.lateness < math.MaxInt64 }

// measure goes through the inputs for how late their events come.
func (r *run) measure(ctx context.Context, inputs []Input) error {
	source := open(ctx, inputs)
	defer source.close()
	newest, late := int64(math.MinInt64), int64(0)
	work := pipeline[times]{
		worker: func() func(*block) times {
			clock := newClock(r.search.Roles)
			return func(b *block) times {
				t := times{oldest: math.MaxInt64, newest: math.MinInt64}
				b.each(func(_ int, line []byte) {
					if at, ok := clock.when(line); ok {
						t.late = max(t.late, behind(at, t.newest))
						t.oldest, t.newest = min(t.oldest, at), max(t.newest, at)
					}
				})
				return t
			}
		},
		consume: func(b *block, t times) error {
			late = max(late, t.late, behind(t.oldest, newest))
			newest = max(newest, t.newest)
			r.progress(b)
			r.report()
			return nil
		},
	}
	at, input, before := r.Progress, r.input, r.before
	r.Sorting, r.Read, r.input, r.before = true, 0, nil, 0
	err := work.run(ctx, source)
	r.Progress, r.input, r.before = at, input, before
	r.lateness = late
	return err
}

// behind is how much older a time is than another; 0 if it is not.
func behind(at, newest int64) int64 {
	switch {
	case at >= newest:
		return 0
	case newest > 0 && at < newest-math.MaxInt64:
		return math.MaxInt64 - 1
	}
	return newest - at
}
