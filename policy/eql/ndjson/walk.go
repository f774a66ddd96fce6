package ndjson

import (
	"cmp"
	"context"
	"fmt"
	"slices"
)

// A Walk goes through the lines of inputs, one after the other: for who makes something
// else of lines than a Search does. Files come in the order of their first events, and the
// lines of each as they stand. The functions may be nil, except Line.
type Walk struct {
	Inputs []Input
	Roles  Roles // where the time of an event is; nothing else matters
	// Line is called with each line that is not empty, from the goroutine of Run. The
	// line is good until it returns. Its error ends the walk.
	Line     func(input string, number int, line []byte) error
	Bad      func(BadLine)                 // a line that is too long
	Failed   func(input string, err error) // an input that cannot be read, or not to its end
	Progress func(Progress)                // now and then; Events and Matches are the caller's to fill in
}

// Run walks.
func (w *Walk) Run(ctx context.Context) error {
	inputs := slices.Clone(w.Inputs)
	if len(inputs) > 1 && !slices.ContainsFunc(inputs, func(in Input) bool { return in.Size < 0 }) {
		clock := newClock(w.Roles)
		first := map[string]int64{}
		for i := range inputs {
			first[inputs[i].Name] = clock.first(&inputs[i])
		}
		slices.SortStableFunc(inputs, func(a, b Input) int { return cmp.Compare(first[a.Name], first[b.Name]) })
	}
	at := Progress{Size: size(inputs)}
	if slices.ContainsFunc(inputs, func(in Input) bool { return in.Size < 0 }) {
		at.Size = -1
	}
	source := open(ctx, inputs)
	defer source.close()
	var input *Input
	before := int64(0) // bytes of the inputs before this one
	for {
		var b *block
		select {
		case <-ctx.Done():
			return ctx.Err()
		case next, ok := <-source.blocks:
			if !ok {
				return ctx.Err()
			}
			b = next
		}
		if input != b.input {
			before, input = at.Read, b.input
		}
		at.Input, at.Read = b.input.Name, before+b.read
		var err error
		b.each(func(number int, line []byte) {
			if err == nil {
				err = w.Line(b.input.Name, number, line)
			}
		})
		if err != nil {
			return err
		}
		if b.long > 0 && w.Bad != nil {
			w.Bad(BadLine{b.input.Name, b.long, fmt.Errorf("longer than %d MB", maxLine>>20)})
		}
		if b.err != nil && w.Failed != nil {
			w.Failed(b.input.Name, b.err)
		}
		if w.Progress != nil {
			w.Progress(at)
		}
		source.recycle(b)
	}
}
