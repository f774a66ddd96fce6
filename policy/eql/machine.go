package eql

import (
	"slices"
	"time"
)

// How sequences are followed
//
// Events come in the order of their times; where times are equal, the order of
// arrival decides. A chain is a sequence that has begun. For every combination
// of keys there is at most one chain waiting for each step, and a newer one
// replaces an older. An event is shown to the steps from the last to the first,
// so that it takes part in a chain only once:
//
//	the first step begins a chain;
//	a later step takes over the chain that waits for it, unless its span is
//	exceeded, and either completes it or leaves it to wait for the next step.
//
// So a chain that is continued is gone from where it was: for [a] [b], the
// events a b b make one match, a a b one with the second a, and one event may
// finish a chain and begin another. Then the until event is looked for: it ends
// all chains of its key, also those that the same event has just continued, but
// not the one it completed.
//
// A key without a value keeps its event out, unless it is optional (?key): then
// no value is a value like others. A key with several values stands for as many
// events, one for each; several such keys for all combinations.
//
// This is what Elasticsearch finds by searching in windows.

// A Machine follows one query along one stream of events. It must be used by
// one goroutine at a time.
//
// It keeps at most limit unfinished chains, with their events. When there would
// be more, the chain that began first is given up and counted: it is the next to
// exceed its span, and without a span it has waited longest. Chains that exceeded
// their span are dropped as time goes on, and not counted. What missing events
// need is bounded likewise; missing.go says how.
//
// A chain takes about 320 bytes beside its events, if it waits for the second of two
// and its keys have 50 characters; with a missing event 400.
//
// Events should be observed in order. One that is late, because its time is
// before that of its predecessors, is judged where it arrives: it can begin
// a chain that later events continue, but not continue or end a chain whose last
// event is younger than itself.
type Machine struct {
	query   *Query
	limit   int
	evicted uint64

	groups  map[string]*group
	waiting []int // number of chains that have completed this step and no more
	pending int
	oldest  *chain // by the arrival of the first event
	newest  *chain
	matches []Match

	joined  joined
	absence *absence // nil unless the query has missing events
}

// Match is what a query describes, found.
type Match struct {
	Events []Event // one for each stage and run, as written; nil for a missing event
	Key    []Value // those of the sequence, then those of the last event; nil without keys
}

// group is the chains of one combination of keys.
type group struct {
	key    string
	chains []*chain // by the last step that is complete; nil if none waits there
	live   int
}

type chain struct {
	group       *group
	step        int // the last one that is complete
	start, last time.Time
	events      []Event
	older       *chain
	newer       *chain
	known       *known // nil unless the query has missing events
}

// defaultLimit is for 8192 children of different parents within the span of one
// rule. With less, a burst of processes pushes a chain out before its
// connection comes; each holds its events, so more costs memory under that burst.
const defaultLimit = 8192

// NewMachine returns a machine that has seen nothing. A limit of zero is 8192
// chains. It panics if only a Batch can answer q.
func (q *Query) NewMachine(limit int) *Machine {
	if q.sample || len(q.pipes) > 0 {
		panic("eql: NewMachine of a query that CompileBatch made for a Batch")
	}
	return q.newMachine(limit)
}

func (q *Query) newMachine(limit int) *Machine {
	if limit <= 0 {
		limit = defaultLimit
	}
	m := &Machine{
		query:   q,
		limit:   limit,
		groups:  make(map[string]*group),
		waiting: make([]int, len(q.steps)),
	}
	if len(q.missing) > 0 {
		m.absence = newAbsence()
	}
	return m
}

// Evicted is how often something was given up to stay within the limit: a chain,
// the further keys of an event that has more of them than there may be chains, or
// what is kept for missing events.
func (m *Machine) Evicted() uint64 { return m.evicted }

// Pending is the number of unfinished chains, and of complete ones that wait to
// be told that an event is missing.
func (m *Machine) Pending() int {
	if m.absence != nil {
		return m.pending + m.absence.undecided.Len()
	}
	return m.pending
}

// Observe shows an event to the machine and returns the matches that it
// completes, and those of earlier events that its time decides.
func (m *Machine) Observe(e Event) []Match {
	m.matches = nil
	now := e.Time()
	m.expire(now)
	steps := m.query.steps
	var asked *Stage // one that runs several times is asked once
	var matches bool
	for i := len(steps) - 1; i >= 0; i-- {
		if i > 0 && m.waiting[i-1] == 0 {
			continue
		}
		if s := steps[i]; s != asked {
			asked, matches = s, s.Match(e)
		}
		if matches {
			m.join(steps[i], i, e, now)
		}
	}
	if u := m.query.until; u != nil && m.pending > 0 && u.Match(e) {
		m.join(u, len(steps), e, now)
	}
	if m.absence != nil {
		m.observeMissing(e, now)
	}
	return m.matches
}

// Tick tells the machine that no event from before now is to be expected, and
// returns the matches that this decides. Only a query that ends in a missing event
// has such: that it did not come is known once the span is over. Without a Tick
// the next event brings them. A machine that is shown only what its stages match
// forgets by it what has exceeded its span.
func (m *Machine) Tick(now time.Time) []Match {
	m.matches = nil
	m.expire(now)
	return m.matches
}

// join lets an event take a step with each combination of its keys.
func (m *Machine) join(s *Stage, step int, e Event, now time.Time) {
	if !m.joined.each(s, step, e, now, m.limit, m) {
		m.evicted++
	}
}

// take lets an event with the current key take a step; the one after the last is
// until, and those after that are the missing events.
func (m *Machine) take(step int, e Event, now time.Time) {
	g, last := m.groups[string(m.joined.key)], len(m.query.steps)-1
	switch {
	case step > last+1:
		m.came(m.query.missing[step-last-2], now)
	case step == 0:
		m.begin(g, e, now)
	case g == nil:
	case step <= last:
		if c := g.chains[step-1]; c != nil {
			m.advance(c, e, now)
		}
	default:
		for _, c := range g.chains {
			if c != nil && !now.Before(c.last) {
				m.drop(c)
			}
		}
	}
}

func (m *Machine) begin(g *group, e Event, now time.Time) {
	steps := len(m.query.steps)
	c := &chain{group: g, start: now, last: now}
	c.events = append(make([]Event, 0, min(steps, 4)), e)
	if m.absence != nil {
		c.known = m.absence.before(m.joined.key, now)
	}
	if steps == 1 {
		m.complete(c)
		return
	}
	if g == nil {
		c.group = &group{key: string(m.joined.key), chains: make([]*chain, steps-1)}
		m.groups[c.group.key] = c.group
	} else if old := g.chains[0]; old != nil && old.last.After(now) {
		return
	}
	m.link(c)
	m.wait(c)
	if m.pending > m.limit {
		m.drop(m.oldest)
		m.evicted++
	}
}

// advance lets an event continue or complete a chain that waits for it.
func (m *Machine) advance(c *chain, e Event, now time.Time) {
	if now.Before(c.last) {
		return
	}
	if m.exceeds(now, c) {
		m.drop(c)
		return
	}
	c.events = append(c.events, e)
	c.last = now
	if c.known != nil {
		c.known.touched = m.absence.seq
	}
	next := c.step + 1
	if next == len(m.query.steps)-1 {
		m.drop(c)
		m.complete(c)
		return
	}
	if newer := c.group.chains[next]; newer != nil && newer.last.After(now) {
		m.drop(c)
		return
	}
	m.leave(c)
	c.step = next
	m.wait(c)
}

func (m *Machine) complete(c *chain) {
	match := Match{c.events, slices.Clone(m.joined.value)}
	if m.absence != nil {
		m.completeMissing(c, match)
		return
	}
	m.matches = append(m.matches, match)
}

func (m *Machine) exceeds(now time.Time, c *chain) bool {
	span := m.query.maxSpan
	return span > 0 && now.Sub(c.start) > span
}

func (m *Machine) expire(now time.Time) {
	for m.oldest != nil && m.exceeds(now, m.oldest) {
		m.drop(m.oldest)
	}
	if m.absence != nil {
		m.expireMissing(now)
	}
}

// wait puts a chain where its next step will find it, in place of an older one.
func (m *Machine) wait(c *chain) {
	g := c.group
	if old := g.chains[c.step]; old != nil {
		m.unlink(old)
	} else {
		g.live++
		m.waiting[c.step]++
	}
	g.chains[c.step] = c
}

// leave takes a chain out of its place.
func (m *Machine) leave(c *chain) {
	c.group.chains[c.step] = nil
	c.group.live--
	m.waiting[c.step]--
}

// drop forgets a chain.
func (m *Machine) drop(c *chain) {
	m.leave(c)
	m.unlink(c)
	if c.group.live == 0 {
		delete(m.groups, c.group.key)
	}
}

// link and unlink keep the list of all chains by age.
func (m *Machine) link(c *chain) {
	m.pending++
	c.older, m.newest = m.newest, c
	if c.older == nil {
		m.oldest = c
	} else {
		c.older.newer = c
	}
}

func (m *Machine) unlink(c *chain) {
	m.pending--
	if c.older == nil {
		m.oldest = c.newer
	} else {
		c.older.newer = c.newer
	}
	if c.newer == nil {
		m.newest = c.older
	} else {
		c.newer.older = c.older
	}
	c.older, c.newer = nil, nil
}
