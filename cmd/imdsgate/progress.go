package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/mattn/go-isatty"

	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
)

const (
	// progressAfter is how long somebody waits before he wonders.
	progressAfter = time.Second
	progressEvery = 200 * time.Millisecond
)

// progress is a line on a terminal that says how far something is.
type progress struct {
	doing string    // what
	found string    // what is counted
	w     io.Writer // nil if nobody looks
	start time.Time
	last  time.Time
	shown bool
}

func newProgress(stderr io.Writer, doing, found string) *progress {
	p := &progress{doing: doing, found: found, start: time.Now()}
	if f, ok := stderr.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
		p.w = stderr
	}
	return p
}

func (p *progress) show(at ndjson.Progress) {
	now := time.Now()
	if p.w == nil || now.Sub(p.start) < progressAfter || now.Sub(p.last) < progressEvery {
		return
	}
	p.last = now
	p.clear()
	p.shown = true
	doing := p.doing
	if at.Sorting {
		doing = "looking for the order of"
	}
	far := fmt.Sprintf("%d MB", at.Read>>20)
	if at.Size > 0 {
		far = fmt.Sprintf("%d %%", min(100, 100*at.Read/at.Size))
	}
	fmt.Fprintf(p.w, "%s %s: %s, %d events, %d %s", doing, at.Input, far, at.Events, at.Matches, p.found)
}

// clear takes the line away, so that something else can be written.
func (p *progress) clear() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}
