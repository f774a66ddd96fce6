package sink

import (
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// Window is for how long repeats of a request are counted, written "60s"; 0 is not at all.
type Window time.Duration

// shortest and longest are the bounds of a Window. With less, there is a document for
// nearly each request all the same; with more, a kill of the daemon loses the counts of
// half a day, and a reader learns of what goes on when it is over.
const shortest, longest = Window(time.Second), Window(time.Hour)

func (w Window) MarshalText() ([]byte, error) { return []byte(time.Duration(w).String()), nil }

// UnmarshalText reads a duration, as in 60s.
func (w *Window) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not written as 60s or 5m", text)
	}
	if *w = Window(d); *w != 0 && (*w < shortest || *w > longest) {
		return fmt.Errorf("repeats are counted for 1s to 1h, or for 0s, which is not at all; not for %s", text)
	}
	return nil
}

// repeats counts requests that are like one that was written. The first is written as it
// comes; those that are like it, until the window that began with it ends, are told by
// one document then. It is for one goroutine at a time.
//
// What a person has to see is never counted: see plain. What tells requests apart is all
// that a document says, but for a list of fields (event.AppendLikeness), so that a field
// that is added later hides nothing.
type repeats struct {
	window time.Duration // 0 counts none
	known  map[likeness]*alike
	order  []*alike // as their windows end
	text   []byte
}

// likeness is the SHA-256 of what requests that are alike have in common.
type likeness [sha256.Size]byte

// alike is a request that was written, and those that are like it.
type alike struct {
	likeness
	ends time.Time
	last *event.Event // nil if there is no other yet
	event.Repeats
}

// maxAlike bounds them. With fewer than there are programs and paths in a window, windows
// end early; each takes a kilobyte or two. Who makes up requests to fill it makes more
// documents, and not fewer.
const maxAlike = 1 << 10

func newRepeats(w Window) repeats {
	return repeats{window: time.Duration(w), known: map[likeness]*alike{}}
}

// plain reports whether an event is a request of which nobody has to see more than how
// often it came.
func plain(e *event.Event) bool {
	if e.Kind != event.Asked || urgent(e) || e.Decision.Verdict == event.Deny || e.Request.Malformed != "" || len(e.Starts) > 0 || len(e.Subjects) == 0 {
		return false
	}
	for i := range e.Decision.Matches {
		if e.Decision.Matches[i].Literal { // a sequence, of which this is the end
			return false
		}
	}
	return true
}

// of is the likeness of an event. It is not counted if there is none.
func (r *repeats) of(e *event.Event) (l likeness, ok bool) {
	if r.window == 0 || !plain(e) {
		return l, false
	}
	r.text, ok = e.AppendLikeness(r.text[:0])
	return sha256.Sum256(r.text), ok
}

// count counts an event, if one like it was written in a window that is not over.
func (r *repeats) count(l likeness, e *event.Event, now time.Time) bool {
	a := r.known[l]
	if a == nil || !now.Before(a.ends) {
		return false
	}
	if a.Requests++; a.Requests == 1 {
		a.First = e.Time
	}
	if e.Connection.First {
		a.Connections++
	}
	a.last = e
	return true
}

func (r *repeats) full() bool { return len(r.order) >= maxAlike }

// ends is when the next window ends; zero if there is none.
func (r *repeats) ends() time.Time {
	if len(r.order) == 0 {
		return time.Time{}
	}
	return r.order[0].ends
}

// begin begins a window with an event that was written with an ID.
func (r *repeats) begin(l likeness, id string, now time.Time) {
	a := &alike{likeness: l, ends: now.Add(r.window), Repeats: event.Repeats{Of: id}}
	r.known[l] = a
	r.order = append(r.order, a)
}

// end ends the window that began first, if it ends by a time, and returns the event that
// tells of its repeats; nil if there were none.
func (r *repeats) end(by time.Time) (tell *event.Event, ended bool) {
	if len(r.order) == 0 || r.order[0].ends.After(by) {
		return nil, false
	}
	a := r.order[0]
	r.order[0] = nil
	r.order = r.order[1:]
	if r.known[a.likeness] == a { // and not the next of its kind
		delete(r.known, a.likeness)
	}
	if a.last == nil {
		return nil, true
	}
	e := *a.last
	e.Repeats = a.Repeats
	return &e, true
}
