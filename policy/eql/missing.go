package eql

import (
	"container/list"
	"time"
)

// How missing events are noticed
//
// The chains of a sequence with missing events, ![...], are made of its other
// events alone, by the rules of machine.go. When one is complete, an event that
// ought to be missing and has equal keys disqualifies it
//
//	between two events, if it came between them;
//	at the beginning, if it came before the first, and at most the span before
//	the last;
//	at the end, if it comes after the last, and at most the span after the first;
//	and if both the beginning and the end have one, only if both come, and at most
//	the span apart: else some window of that length has the chain and neither.
//
// A disqualified chain is gone all the same as if it had matched: the events it
// has used up do not try again. So it goes on, as a ghost, until it is complete.
//
// Whether the last event is missing is known when the time it had has passed. The
// chain waits for that, and those that are complete after it wait behind it, so
// that matches come in the order of their last events.
//
// What is kept: for each key the time of the last event that ought to be missing
// at the beginning, as long as it matters; and the complete chains that wait. Of
// each there are at most as many as there may be chains. Beyond that the oldest
// is given up and counted. A beginning that was given up can no longer disqualify
// a chain; a chain that was given up never matches.

// hole is a missing event of a sequence.
type hole struct {
	stage *Stage
	after int // steps before it
}

// absence is what a Machine remembers for missing events.
type absence struct {
	seq   uint64 // of the event that is being observed
	now   time.Time
	begun map[string]*list.Element
	order *list.List // of *beginning, by time of arrival

	undecided *list.List // of *complete, in the order of their last events
	waiting   map[string][]*list.Element
}

// beginning is when an event last came that ought to be missing at the beginning.
type beginning struct {
	key string
	at  time.Time
}

// known is what a chain knows of its missing events.
type known struct {
	ghost   bool      // disqualified
	touched uint64    // the event that it took last
	begun   bool      // whether there was a beginning
	at      time.Time // when
}

// complete is a chain that waits to be told that its last event is missing.
type complete struct {
	match    Match
	key      string
	last     time.Time
	deadline time.Time
	decided  bool // whatever comes
	touched  uint64
}

func newAbsence() *absence {
	return &absence{
		begun: map[string]*list.Element{}, order: list.New(),
		undecided: list.New(), waiting: map[string][]*list.Element{},
	}
}

// before is what a chain that begins now knows.
func (a *absence) before(key []byte, now time.Time) *known {
	c := &known{touched: a.seq}
	if el, ok := a.begun[string(key)]; ok {
		if at := el.Value.(*beginning).at; !at.After(now) {
			c.begun, c.at = true, at
		}
	}
	return c
}

// observeMissing shows an event, which the chains have had, to the missing ones.
func (m *Machine) observeMissing(e Event, now time.Time) {
	steps := len(m.query.steps)
	var asked *Stage
	var matches bool
	for i, h := range m.query.missing {
		if h.after == steps && m.absence.undecided.Len() == 0 || h.after > 0 && h.after < steps && m.waiting[h.after-1] == 0 {
			continue
		}
		if h.stage != asked {
			asked, matches = h.stage, h.stage.Match(e)
		}
		if matches {
			m.join(h.stage, steps+1+i, e, now)
		}
	}
	m.absence.seq++
	m.expireMissing(now)
}

// came lets an event with the current key be one that ought to be missing.
func (m *Machine) came(h hole, now time.Time) {
	a, key := m.absence, m.joined.key
	switch h.after {
	case 0:
		a.begin(key, now)
		if a.order.Len() > m.limit {
			a.forget(a.order.Front())
			m.evicted++
		}
	case len(m.query.steps):
		a.end(string(key), now)
	default:
		if g := m.groups[string(key)]; g != nil {
			if c := g.chains[h.after-1]; c != nil && c.known.touched != a.seq && !now.Before(c.last) {
				c.known.ghost = true
			}
		}
	}
}

func (a *absence) begin(key []byte, now time.Time) {
	el, ok := a.begun[string(key)]
	if !ok {
		b := &beginning{string(key), now}
		a.begun[b.key] = a.order.PushBack(b)
		return
	}
	if b := el.Value.(*beginning); !now.Before(b.at) {
		b.at = now
		a.order.MoveToBack(el)
	}
}

func (a *absence) forget(el *list.Element) {
	delete(a.begun, a.order.Remove(el).(*beginning).key)
}

// end disqualifies the chains that wait for an event to be missing that came.
func (a *absence) end(key string, now time.Time) {
	all, ok := a.waiting[key]
	if !ok {
		return
	}
	left := all[:0]
	for _, el := range all {
		if c := el.Value.(*complete); c.decided || c.touched == a.seq || now.Before(c.last) || now.After(c.deadline) {
			left = append(left, el)
		} else {
			a.undecided.Remove(el)
		}
	}
	clear(all[len(left):])
	if len(left) == 0 {
		delete(a.waiting, key)
	} else {
		a.waiting[key] = left
	}
}

// completeMissing settles what becomes of a complete chain.
func (m *Machine) completeMissing(c *chain, match Match) {
	q, known := m.query, c.known
	begins, ends := q.missing[0].after == 0, q.missing[len(q.missing)-1].after == len(q.steps)
	if known.ghost || begins && !ends && known.begun && c.last.Sub(known.at) <= q.maxSpan {
		return
	}
	match.Events = q.withHoles(match.Events)
	if !ends {
		m.matches = append(m.matches, match)
		return
	}
	w := &complete{match: match, key: string(m.joined.key), last: c.last, touched: m.absence.seq}
	if begins {
		w.decided, w.deadline = !known.begun, known.at.Add(q.maxSpan)
	} else {
		w.deadline = c.start.Add(q.maxSpan)
	}
	a := m.absence
	a.waiting[w.key] = append(a.waiting[w.key], a.undecided.PushBack(w))
	if a.undecided.Len() > m.limit {
		a.first()
		m.evicted++
	}
}

// withHoles puts nil where an event is missing.
func (q *Query) withHoles(events []Event) []Event {
	all := make([]Event, 0, len(events)+len(q.missing))
	for i, h := range q.missing {
		all = append(append(all, events[len(all)-i:h.after]...), nil)
	}
	return append(all, events[len(all)-len(q.missing):]...)
}

// first removes the complete chain that waits at the front. It is also the first
// one of its key.
func (a *absence) first() *complete {
	c := a.undecided.Remove(a.undecided.Front()).(*complete)
	if left := a.waiting[c.key][1:]; len(left) > 0 {
		a.waiting[c.key] = left
	} else {
		delete(a.waiting, c.key)
	}
	return c
}

// expireMissing lets the time go on: what is decided by now is a match, and
// beginnings that are too long ago do not matter.
func (m *Machine) expireMissing(now time.Time) {
	a := m.absence
	if now.After(a.now) {
		a.now = now
	}
	for el := a.undecided.Front(); el != nil; el = a.undecided.Front() {
		if c := el.Value.(*complete); !c.decided && !a.now.After(c.deadline) {
			break
		}
		m.matches = append(m.matches, a.first().match)
	}
	for el := a.order.Front(); el != nil && a.now.Sub(el.Value.(*beginning).at) > m.query.maxSpan; el = a.order.Front() {
		a.forget(el)
	}
}

// end tells that no further event comes, and returns what that decides.
func (m *Machine) end() []Match {
	m.matches = nil
	for m.absence != nil && m.absence.undecided.Len() > 0 {
		m.matches = append(m.matches, m.absence.first().match)
	}
	return m.matches
}
