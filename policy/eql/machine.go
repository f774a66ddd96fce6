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
// their span are dropped as time goes on, and not counted.
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

	value []Value // the key that is being tried
	key   []byte  // its encoding
	keys  int     // how many more may be tried
}

// Match is what a query describes, found.
type Match struct {
	Events []Event // one for each step, in order
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
}

// defaultLimit is for 8192 children of different parents within the span of one
// rule. With less, a burst of processes pushes a chain out before its
// connection comes; each holds its events, so more costs memory under that burst.
const defaultLimit = 8192

// NewMachine returns a machine that has seen nothing. A limit of zero is 8192
// chains.
func (q *Query) NewMachine(limit int) *Machine {
	if limit <= 0 {
		limit = defaultLimit
	}
	return &Machine{
		query:   q,
		limit:   limit,
		groups:  make(map[string]*group),
		waiting: make([]int, len(q.steps)),
	}
}

// Evicted is how often a chain, or the further keys of an event that has more of
// them than there may be chains, was given up to stay within the limit.
func (m *Machine) Evicted() uint64 { return m.evicted }

// Pending is the number of unfinished chains.
func (m *Machine) Pending() int { return m.pending }

// Observe shows an event to the machine and returns what it completes.
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
			m.keys = m.limit
			m.eachKey(steps[i], i, e, now)
		}
	}
	if u := m.query.until; u != nil && m.pending > 0 && u.Match(e) {
		m.keys = m.limit
		m.eachKey(u, len(steps), e, now)
	}
	return m.matches
}

// eachKey calls act for each combination of the keys of e, of which len(m.value)
// are chosen already. It returns false when it had to stop.
func (m *Machine) eachKey(s *Stage, step int, e Event, now time.Time) bool {
	n := len(m.value)
	if n == len(s.keys) {
		if m.keys == 0 {
			m.evicted++
			return false
		}
		m.keys--
		m.act(step, e, now)
		return true
	}
	mark := len(m.key)
	defer func() { m.key, m.value = m.key[:mark], m.value[:n] }()
	f, v := s.keys[n], Value{}
	if f.Slot >= 0 {
		v = e.Value(f.Slot)
	}
	if !v.present(f.Type) {
		if !s.optional[n] {
			return true
		}
		m.choose(Value{})
		return m.eachKey(s, step, e, now)
	}
	for i := range v.len() {
		x := v.single(i)
		if !x.fits(f.Type) {
			continue
		}
		m.key, m.value = m.key[:mark], m.value[:n]
		m.choose(x)
		if !m.eachKey(s, step, e, now) {
			return false
		}
	}
	return true
}

func (m *Machine) choose(v Value) {
	m.key = v.appendKey(m.key)
	m.value = append(m.value, v)
}

// act lets an event with the current key take a step; the one after the last is
// until.
func (m *Machine) act(step int, e Event, now time.Time) {
	g, last := m.groups[string(m.key)], len(m.query.steps)-1
	switch {
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
	if steps == 1 {
		m.complete(c)
		return
	}
	if g == nil {
		c.group = &group{key: string(m.key), chains: make([]*chain, steps-1)}
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
	m.matches = append(m.matches, Match{c.events, slices.Clone(m.value)})
}

func (m *Machine) exceeds(now time.Time, c *chain) bool {
	span := m.query.maxSpan
	return span > 0 && now.Sub(c.start) > span
}

func (m *Machine) expire(now time.Time) {
	for m.oldest != nil && m.exceeds(now, m.oldest) {
		m.drop(m.oldest)
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

// Expire drops the chains that have exceeded their span. Observe does so, too; call
// it for a machine that is only shown what its stages match.
func (m *Machine) Expire(now time.Time) { m.expire(now) }
