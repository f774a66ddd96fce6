package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
)

// inputs are files of events that are gone through, and what is said of them beside the
// answer.
type inputs struct {
	err      io.Writer
	progress *progress
	bad      uint64
	trouble  bool // the answer is not complete
}

// newInputs says on a terminal what is being done, and how much of something is found.
func newInputs(stderr io.Writer, doing, found string) inputs {
	return inputs{err: stderr, progress: newProgress(stderr, doing, found)}
}

// open finds the files; - is standard input.
func (in *inputs) open(names []string, stdin io.Reader) []ndjson.Input {
	var all []ndjson.Input
	for _, name := range names {
		if name == "-" {
			all = append(all, ndjson.Stream("standard input", stdin))
			continue
		}
		file, err := ndjson.File(name)
		if err != nil {
			in.failed(name, err)
			continue
		}
		all = append(all, file)
	}
	return all
}

// say prints a line beside the answer.
func (in *inputs) say(format string, args ...any) {
	in.progress.clear()
	fmt.Fprintf(in.err, "imdsgate: "+format+"\n", args...)
}

// maxBad is how many bad lines are named. Somebody who gives a file that is
// something else should still see what was said before.
const maxBad = 20

func (in *inputs) badLine(l ndjson.BadLine) {
	if in.bad++; in.bad <= maxBad {
		in.say("%v", l)
	}
	if in.bad == maxBad {
		in.say("further bad lines are only counted")
	}
}

func (in *inputs) failed(name string, err error) {
	in.trouble = true
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		err = p.Err
	}
	in.say("read %s: %v", name, err)
}

// count says how many of something were.
func count(n uint64, thing, more string) string {
	if n == 1 {
		return "1 " + thing + more + " was"
	}
	return fmt.Sprintf("%d %ss%s were", n, thing, more)
}
