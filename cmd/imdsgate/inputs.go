package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/imdsgate/imdsgate/event"
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

// history gives each line of events to take: of files, of all such files in directories,
// or of standard input. What take says is wrong with a line is named, and the line left
// out. far is how many events were taken so far, and how many of those were found.
func (in *inputs) history(ctx context.Context, args []string, stdin io.Reader, take func(line []byte) error, far func() (events, found uint64)) error {
	files, err := expand(args)
	if err != nil {
		return err
	}
	taken, foreign := map[string]uint64{}, uint64(0)
	opened := in.open(files, stdin)
	walk := ndjson.Walk{
		Inputs: opened, Roles: ndjson.Roles{Timestamp: "@timestamp"}, Bad: in.badLine, Failed: in.failed,
		Line: func(name string, number int, line []byte) error {
			switch err := take(line); {
			case err == nil:
				taken[name]++
			case errors.Is(err, event.ErrForeign):
				foreign++
			default:
				in.badLine(ndjson.BadLine{Input: name, Number: number, Err: err})
			}
			return nil
		},
		Progress: func(at ndjson.Progress) {
			at.Events, at.Matches = far()
			in.progress.show(at)
		},
	}
	err = walk.Run(ctx)
	in.progress.clear()
	if err != nil {
		return interrupted(err)
	}
	if in.bad > 0 {
		in.say("%s left out", count(in.bad, "bad line", ""))
	}
	if foreign > 0 {
		in.say("%s no document of imdsgate, and left out", count(foreign, "line", ""))
	}
	for _, file := range opened {
		if taken[file.Name] == 0 && file.Size != 0 {
			in.trouble = true
			in.say("%s has no events of imdsgate in it: is it the right file? They are written to events.path of the configuration", file.Name)
		}
	}
	if len(opened) == 0 {
		in.trouble = true
	}
	return nil
}

// expand puts the files of events in a directory in its place.
func expand(args []string) ([]string, error) {
	var all []string
	for _, arg := range args {
		info, err := os.Stat(arg)
		if arg == "-" || err != nil || !info.IsDir() {
			all = append(all, arg)
			continue
		}
		before := len(all)
		err = filepath.WalkDir(arg, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !eventFile(entry.Name()) {
				return err
			}
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() { // also where a link leads
				all = append(all, path)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("read directory: %w", err)
		}
		if len(all) == before {
			return nil, fmt.Errorf("%s has no files of events: their names have .ndjson, .jsonl or .json in them", arg)
		}
	}
	return all, nil
}

// eventFile tells files of events by their names: events.ndjson, events.ndjson.1,
// events-20261126.ndjson.gz.
func eventFile(name string) bool {
	for _, part := range []string{".ndjson", ".jsonl", ".json"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}
