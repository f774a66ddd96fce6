package eql

import (
	"cmp"
	"slices"
	"strings"
)

// How many stages are asked at once
//
// Two rules of three say the same of an event: that a program was executed, that it
// is one of these shells. So a Set gives every condition that stages share a place
// of its own and asks for it at most once per event.
//
// And most rules are about programs that this event does not mention. Each stage
// therefore waits behind one of its conjuncts, its guard: a list of words for one
// field, or an "or" of such lists. The words of all guards for a field are looked up
// together (see wordIndex), and only stages whose guard let them through are asked for
// the rest. Of the conjuncts that would do, the guard is the one with the smallest
// part of all the words that the Set knows for the field: of the four values of
// event.type that rules mention every one is common, of four hundred names of
// programs every one is rare. A stage that has no guard is asked every time that its
// category comes.

// A Set is many stages that are asked about an event together. It answers as each of
// them would, and does not change; any number of goroutines may use it, each with a
// Matcher of its own.
type Set struct {
	stages   []member
	atoms    []shared
	fields   []Field      // that the atoms with one field read
	indexes  []*wordIndex // for the fields of guards
	words    int          // that automata of indexes find
	category Field
	names    map[string]int32 // of categories to their places in which
	which    []members        // by category; the first are stages for any
}

// members are the stages of a category.
type members struct {
	unguarded []int32
	indexes   []int32 // those that can let the others through
}

// member is one stage of a Set.
type member struct {
	category int32
	whole    []node // all of its conjuncts
	rest     []node // those that its guard leaves to ask for
}

// node is a condition whose atoms are places in a Set.
type node struct {
	op   op
	atom int32
	of   []node
}

// shared is an atom of any number of stages.
type shared struct {
	*atom
	field int32   // place in fields; -1 if it reads several
	index int32   // that knows it; -1 if none does
	opens []opens // what it is, or belongs to, the guard of
}

// opens are stages of one category.
type opens struct {
	category int32
	stages   []int32
}

// NewSet compiles stages together. They must have been compiled with the same Schema.
func NewSet(stages ...*Stage) *Set {
	b := &setBuilder{
		Set:   &Set{names: map[string]int32{}, which: make([]members, 1)},
		atoms: map[string]int32{}, places: map[*atom]int32{}, fields: map[Field]int32{}, words: map[Field]map[string]bool{}, indexes: map[int32]int32{},
		tables: tableBudget,
	}
	conds := make([][]*cond, len(stages))
	for i, s := range stages {
		m := member{category: b.categoryOf(s)}
		for _, c := range s.conjuncts {
			conds[i] = append(conds[i], c.cond)
		}
		slices.SortStableFunc(conds[i], cheaper)
		for _, k := range conds[i] {
			m.whole = append(m.whole, b.node(k))
		}
		b.stages = append(b.stages, m)
	}
	for i := range b.stages {
		b.guard(int32(i), conds[i])
	}
	for _, x := range b.Set.indexes {
		x.finish(&b.tables, &b.Set.words)
	}
	return b.Set
}

// setBuilder is what NewSet needs while it compiles.
type setBuilder struct {
	*Set
	atoms   map[string]int32          // places, by key
	places  map[*atom]int32           // the same, for those that were met
	fields  map[Field]int32           // places
	words   map[Field]map[string]bool // that are looked for in a field
	indexes map[int32]int32           // places, by field
	tables  int                       // what is left of tableBudget
}

func (b *setBuilder) categoryOf(s *Stage) int32 {
	if s.event.Any {
		return 0
	}
	if len(b.which) > 1 && b.category != s.category {
		panic("eql: NewSet of stages that were compiled with different schemas")
	}
	b.category = s.category
	place, ok := b.names[s.event.Category]
	if !ok {
		place = int32(len(b.which))
		b.names[s.event.Category] = place
		b.which = append(b.which, members{})
	}
	return place
}

func (b *setBuilder) node(k *cond) node {
	n := node{op: k.op}
	if k.op == opAtom {
		n.atom = b.atom(k.atom)
	}
	for _, x := range k.of {
		n.of = append(n.of, b.node(x))
	}
	return n
}

func (b *setBuilder) atom(a *atom) int32 {
	if place, ok := b.places[a]; ok {
		return place
	}
	key := a.key()
	place, ok := b.atoms[key]
	if ok {
		b.places[a] = place
		return place
	}
	place = int32(len(b.Set.atoms))
	b.atoms[key], b.places[a] = place, place
	s := shared{atom: a, field: -1, index: -1}
	if a.shape != shapeOther {
		s.field = b.field(a.fields[0])
	}
	if w := a.test.words; w != nil {
		known := b.words[a.fields[0]]
		if known == nil {
			known = map[string]bool{}
			b.words[a.fields[0]] = known
		}
		for _, list := range [][]string{w.exact, w.prefixes, w.suffixes, w.contained} {
			for _, text := range list {
				known[text] = true
			}
		}
		for i := range w.globs {
			known[strings.Join(w.globs[i].parts, "*")] = true
		}
	}
	b.Set.atoms = append(b.Set.atoms, s)
	return place
}

func (b *setBuilder) field(f Field) int32 {
	place, ok := b.fields[f]
	if !ok {
		place = int32(len(b.Set.fields))
		b.fields[f] = place
		b.Set.fields = append(b.Set.fields, f)
	}
	return place
}

func (b *setBuilder) index(field int32) int32 {
	place, ok := b.indexes[field]
	if !ok {
		place = int32(len(b.Set.indexes))
		b.indexes[field] = place
		b.Set.indexes = append(b.Set.indexes, &wordIndex{field: field})
	}
	return place
}

// guard gives a stage its guard.
func (b *setBuilder) guard(stage int32, conds []*cond) {
	m := &b.stages[stage]
	best, at := likely, -1
	for i, k := range conds {
		if chance := b.chance(k); chance < best {
			best, at = chance, i
		}
	}
	c := &b.which[m.category]
	if at < 0 {
		m.rest = m.whole
		c.unguarded = append(c.unguarded, stage)
		return
	}
	for i, n := range m.whole {
		if i != at || !sufficient(conds[i]) {
			m.rest = append(m.rest, n)
		}
	}
	b.open(stage, m.category, conds[at])
}

// likely is the chance of what is no guard.
const likely = 1.0

// chance estimates how often a condition lets a stage through; at most likely if it
// can be a guard.
func (b *setBuilder) chance(k *cond) float64 {
	switch k.op {
	case opAtom:
		w := k.atom.test.words
		if w == nil || w.all {
			return likely
		}
		n := len(w.exact) + len(w.prefixes) + len(w.suffixes) + len(w.contained) + len(w.globs)
		chance := float64(n) / float64(1+len(b.words[k.atom.fields[0]]))
		if len(w.contained) > 0 {
			chance += scanning
		}
		return chance
	case opAnd:
		least := likely
		for _, x := range k.of {
			least = min(least, b.chance(x))
		}
		return least
	case opOr:
		sum := 0.0
		for _, x := range k.of {
			sum += b.chance(x)
		}
		return sum
	}
	return likely
}

// scanning stands for what it costs to read a value to its end, which can be a long
// command line.
const scanning = 0.2

// sufficient reports whether a guard leaves nothing of the condition to ask for.
func sufficient(k *cond) bool {
	return k.op == opAtom || k.op == opOr && !slices.ContainsFunc(k.of, func(x *cond) bool { return !sufficient(x) })
}

// open lets a stage be asked when a condition may hold.
func (b *setBuilder) open(stage, category int32, k *cond) {
	switch k.op {
	case opAtom:
		place := b.places[k.atom]
		a := &b.Set.atoms[place]
		if a.index < 0 {
			a.index = b.index(a.field)
			b.Set.indexes[a.index].add(place, a.test.words)
		}
		c := &b.which[category]
		if !slices.Contains(c.indexes, a.index) {
			c.indexes = append(c.indexes, a.index)
		}
		for i := range a.opens {
			if o := &a.opens[i]; o.category == category {
				if !slices.Contains(o.stages, stage) {
					o.stages = append(o.stages, stage)
				}
				return
			}
		}
		a.opens = append(a.opens, opens{category, []int32{stage}})
	case opAnd:
		b.open(stage, category, slices.MinFunc(k.of, func(x, y *cond) int { return cmp.Compare(b.chance(x), b.chance(y)) }))
	case opOr:
		for _, x := range k.of {
			b.open(stage, category, x)
		}
	}
}
