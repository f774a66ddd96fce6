// Package firstseen remembers which combinations of values rules have seen, and when
// last, so that a rule of the type new_terms can tell the first time in its window
// from every other.
//
// Everything is kept in memory, and written behind to a file, from which the next
// start takes it up. Asking and remembering take a lock for as long as a map takes,
// and never wait for the file: changes are written in batches, every few seconds.
// What a crash loses is what came after the last of them, and is new once more.
// A file that cannot be read or written stops nothing: the store goes on in memory,
// says so in Stats and to whom Open was told to report, and tries again.
//
// Of each combination there is a digest and a time, in memory and on disk, and no
// value. MaxTerms bounds them per rule: the one that was not seen for the longest time
// makes room, and is new when it comes again.
package firstseen

import (
	"container/list"
	"sync"
	"time"
)

// MaxTerms is how many combinations are remembered of one rule, in about 150 bytes
// each. With too few, programs that are well known raise alerts again.
const MaxTerms = 16 << 10

// Key is the digest of a combination of values.
type Key [16]byte

// Store is what all rules have seen. Its methods may be called from any goroutine.
type Store struct {
	mu        sync.RWMutex // guards the following, and what they lead to
	rules     map[string]*history
	windows   map[string]time.Duration // as Rules has them; nil before it is called
	dropped   map[string]struct{}      // rules that are in the file, and no longer here
	forgotten uint64
	failure   error

	file *file // nil if there is none
}

// history is what one rule has seen.
type history struct {
	window  time.Duration
	terms   map[Key]*list.Element // of *term
	order   list.List             // the one that was seen last comes first
	changed map[Key]struct{}      // since it was written
	gone    map[Key]struct{}      // in the file, and no longer here
}

type term struct {
	key     Key
	last    int64 // seconds since 1970
	written int64 // what the file has as last; 0 if it has nothing
}

// New is a store that keeps nothing beyond its own life.
func New() *Store { return &Store{rules: map[string]*history{}} }

// Rules says which rules there are, and how long each remembers. What others have seen
// is forgotten. The map must not be changed afterwards.
func (s *Store) Rules(windows map[string]time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.windows = windows
	s.apply()
}

// apply makes the rules those that there are.
func (s *Store) apply() {
	for rule := range s.rules {
		if _, ok := s.windows[rule]; !ok {
			delete(s.rules, rule)
			if s.file != nil {
				s.dropped[rule] = struct{}{}
			}
		}
	}
	for rule, window := range s.windows {
		s.history(rule).window = window
	}
}

func (s *Store) history(rule string) *history {
	h := s.rules[rule]
	if h == nil {
		h = &history{terms: map[Key]*list.Element{}, changed: map[Key]struct{}{}, gone: map[Key]struct{}{}}
		s.rules[rule] = h
	}
	return h
}

// Seen reports whether a rule has seen a combination within its window before that
// time.
func (s *Store) Seen(rule string, k Key, at time.Time) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	h := s.rules[rule]
	return h != nil && h.seen(k, at)
}

// See remembers that a rule has seen a combination, and reports whether it had before:
// of many who see one at once, one is the first.
func (s *Store) See(rule string, k Key, at time.Time) (before bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.rules[rule]
	if h == nil {
		return false
	}
	before = h.seen(k, at)
	s.see(h, k, at.Unix())
	return before
}

func (h *history) seen(k Key, at time.Time) bool {
	e, ok := h.terms[k]
	return ok && e.Value.(*term).last >= at.Add(-h.window).Unix()
}

func (s *Store) see(h *history, k Key, at int64) {
	e, ok := h.terms[k]
	if !ok {
		s.makeRoom(h, at)
		e = h.order.PushFront(&term{key: k})
		h.terms[k] = e
		delete(h.gone, k)
	}
	t := e.Value.(*term)
	if at < t.last {
		return
	}
	t.last = at
	h.order.MoveToFront(e)
	// A file that is somewhat behind spares a write for each request.
	if s.file != nil && t.last-t.written > int64(h.window/time.Second)/100 {
		h.changed[k] = struct{}{}
	}
}

// makeRoom forgets what is out of the window, and one more if need be.
func (s *Store) makeRoom(h *history, now int64) {
	for e := h.order.Back(); e != nil; e = h.order.Back() {
		t := e.Value.(*term)
		expired := t.last < now-int64(h.window/time.Second)
		if !expired && len(h.terms) < MaxTerms {
			return
		}
		if !expired {
			s.forgotten++
		}
		h.forget(e)
	}
}

func (h *history) forget(e *list.Element) {
	t := h.order.Remove(e).(*term)
	delete(h.terms, t.key)
	delete(h.changed, t.key)
	if t.written != 0 {
		h.gone[t.key] = struct{}{}
	}
}

// Stats is the state of a store.
type Stats struct {
	Path      string `json:"path,omitempty"`
	Rules     int    `json:"rules"`
	Terms     int    `json:"terms"`
	Forgotten uint64 `json:"forgotten"` // within their windows, for want of room
	Unwritten int    `json:"unwritten"`
	Error     string `json:"error,omitempty"` // why it is not written
}

// Stats tells how much is remembered, and whether it is written.
func (s *Store) Stats() Stats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := Stats{Rules: len(s.rules), Forgotten: s.forgotten}
	for _, h := range s.rules {
		st.Terms += len(h.terms)
		st.Unwritten += len(h.changed) + len(h.gone)
	}
	if s.file != nil {
		st.Path = s.file.path
	}
	if s.failure != nil {
		st.Error = s.failure.Error()
	}
	return st
}
