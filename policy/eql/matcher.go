package eql

import "slices"

// A Matcher asks the stages of a Set about one event after the other, and allocates
// nothing for it. It must be used by one goroutine at a time. It keeps values of the
// last event until the next.
type Matcher struct {
	set   *Set
	event Event

	// What is known of the present event is marked with its number, so that nothing
	// has to be cleared for the next.
	now    uint64
	read   []uint64 // the fields whose value is in values
	values []Value
	looked []uint64 // the indexes that were asked
	memo   []uint64 // for atoms: twice the number, and one if it holds
	asked  []uint64 // the stages that were asked

	value uint64   // likewise, the number of a string that an automaton reads
	seen  []uint64 // the words that it has

	categories []int32 // of the event; the first is any
	open       []int32 // stages whose guard lets them be asked
	some       []int   // the stages that are wanted; nil for all
	matches    []int
	text       []byte // of a value, what an index looks up
}

// NewMatcher makes a Matcher.
func (s *Set) NewMatcher() *Matcher {
	return &Matcher{
		set:    s,
		read:   make([]uint64, len(s.fields)),
		values: make([]Value, len(s.fields)),
		looked: make([]uint64, len(s.indexes)),
		memo:   make([]uint64, len(s.atoms)),
		asked:  make([]uint64, len(s.stages)),
		seen:   make([]uint64, s.words),
	}
}

// Match returns the stages that match an event, by their places in NewSet and in
// that order. The slice is valid until the next call.
func (m *Matcher) Match(e Event) []int {
	m.begin(e)
	m.guards()
	return m.end()
}

// few is for how many stages it takes longer to look their guards up than to ask them.
const few = 12

// MatchOf is Match for some of the stages, which must be in order.
func (m *Matcher) MatchOf(e Event, some []int) []int {
	m.begin(e)
	if len(some) > few {
		m.some = some
		m.guards()
		m.some = nil
		return m.end()
	}
	for _, i := range some {
		if s := &m.set.stages[i]; slices.Contains(m.categories, s.category) && m.all(s.whole) {
			m.matches = append(m.matches, i)
		}
	}
	return m.end()
}

func (m *Matcher) begin(e Event) {
	m.event, m.now = e, m.now+1
	m.matches, m.open = m.matches[:0], m.open[:0]
	m.categories = append(m.categories[:0], 0)
	if len(m.set.names) == 0 {
		return
	}
	v := e.Value(m.set.category.Slot)
	for i := range v.len() {
		if x := v.single(i); x.kind == isString {
			if place, ok := m.set.names[x.str()]; ok && !slices.Contains(m.categories, place) {
				m.categories = append(m.categories, place)
			}
		}
	}
}

func (m *Matcher) end() []int {
	m.event = nil
	slices.Sort(m.matches)
	return m.matches
}

// guards asks the stages that their guards let through, and those without.
func (m *Matcher) guards() {
	for _, c := range m.categories {
		for _, i := range m.set.which[c].indexes {
			m.look(i)
		}
	}
	for _, c := range m.categories {
		for _, i := range m.set.which[c].unguarded {
			m.ask(i)
		}
	}
	for _, i := range m.open {
		m.ask(i)
	}
}

func (m *Matcher) ask(stage int32) {
	if m.asked[stage] == m.now {
		return
	}
	m.asked[stage] = m.now
	if m.some != nil {
		if _, wanted := slices.BinarySearch(m.some, int(stage)); !wanted {
			return
		}
	}
	if m.all(m.set.stages[stage].rest) {
		m.matches = append(m.matches, int(stage))
	}
}

func (m *Matcher) all(nodes []node) bool {
	for i := range nodes {
		if !m.holds(&nodes[i]) {
			return false
		}
	}
	return true
}

func (m *Matcher) holds(n *node) bool {
	switch n.op {
	case opAtom:
		return m.atom(n.atom)
	case opAnd:
		return m.all(n.of)
	case opOr:
		for i := range n.of {
			if m.holds(&n.of[i]) {
				return true
			}
		}
		return false
	}
	return !m.holds(&n.of[0])
}

func (m *Matcher) atom(place int32) bool {
	if known := m.memo[place]; known>>1 == m.now {
		return known&1 == 1
	}
	a := &m.set.atoms[place]
	if a.index >= 0 && m.looked[a.index] == m.now {
		return false // or else it would have been marked
	}
	var holds bool
	if a.field >= 0 {
		holds = a.holds(m.valueOf(a.field))
	} else {
		holds = a.pred(m.event)
	}
	m.memo[place] = m.now << 1
	if holds {
		m.memo[place]++
	}
	return holds
}

func (m *Matcher) valueOf(field int32) *Value {
	v := &m.values[field]
	if m.read[field] != m.now {
		m.read[field] = m.now
		*v = m.event.Value(m.set.fields[field].Slot)
	}
	return v
}

// look asks an index which atoms hold.
func (m *Matcher) look(place int32) {
	if m.looked[place] == m.now {
		return
	}
	m.looked[place] = m.now
	x := m.set.indexes[place]
	v := m.valueOf(x.field)
	switch v.kind {
	case isString:
		x.look(v.str(), m)
	case isStrings:
		for _, s := range v.strs() {
			x.look(s, m)
		}
	case isList:
		for i := range v.list() {
			if v := &v.list()[i]; v.kind == isString {
				x.look(v.str(), m)
			}
		}
	}
}

// opens lets the stages be asked that an atom guards.
func (m *Matcher) opens(atom int32) {
	for _, o := range m.set.atoms[atom].opens {
		if slices.Contains(m.categories, o.category) {
			m.open = append(m.open, o.stages...)
		}
	}
}
