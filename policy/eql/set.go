package eql

import (
	"slices"
	"strings"
)

// How many stages are asked at once
//
// Two rules of three say the same of an event: that a program was executed, that it
// is one of these shells. So a Set gives every atom that stages share a place of its
// own, and asks for it at most once per event.
//
// And most rules are about programs that this event does not mention. Each stage
// therefore waits behind one of its conjuncts, its guard: a list of words for one
// field, or an "or" of such lists. The words of all stages for the fields of guards
// are looked up together (see wordIndex), and only stages whose guard let them through
// are asked for the rest. A stage that has no guard is asked every time that its
// category comes.
//
// Which of its conjuncts is the guard of a stage is a matter of cost. The chance that
// it lets the stage through is taken to be its part of all words that the Set has for
// the field: of the four values of event.type that rules mention every one is common,
// of four hundred names of programs every one is rare. And a field that is looked up
// costs as much as some stages that are asked, which those share that it guards.

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

// NewSet compiles stages together. They must have been compiled with the same Schema; it
// panics if their categories are different fields.
func NewSet(stages ...*Stage) *Set {
	b := &setBuilder{
		Set:    &Set{names: map[string]int32{}, which: make([]members, 1)},
		atoms:  map[string]int32{},
		places: map[*atom]int32{},
		fields: map[Field]int32{},
		looked: map[int32]int32{},
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
	guards := b.guards(conds)
	for i, k := range guards {
		b.open(int32(i), k)
	}
	for i := range b.Set.atoms {
		if a := &b.Set.atoms[i]; a.test.words != nil && !a.test.words.all {
			if place, ok := b.looked[a.field]; ok {
				a.index = place
				b.indexes[place].add(int32(i), a.test.words)
			}
		}
	}
	for _, x := range b.indexes {
		x.finish(&b.tables, &b.Set.words)
	}
	for i, k := range guards {
		b.rest(&b.stages[i], conds[i], k)
	}
	return b.Set
}

// setBuilder is what NewSet needs while it compiles.
type setBuilder struct {
	*Set
	atoms  map[string]int32  // places, by key
	places map[*atom]int32   // the same, for those that were met
	fields map[Field]int32   // places
	words  []map[string]bool // by field: what is looked for in it
	looked map[int32]int32   // the indexes, by field
	tables int               // what is left of tableBudget
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
	if a.kind != ofAnyKind {
		s.field = b.field(a.fields[0])
	}
	if w := a.test.words; w != nil {
		known := b.words[s.field]
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
		b.words = append(b.words, map[string]bool{})
	}
	return place
}

// What it costs, in stages that are asked, to look a field up, and to read its values
// to their ends: a command line can be long.
const (
	lookingUp = 4.0
	scanning  = 4.0
)

// guards chooses a guard for each stage; nil for none.
func (b *setBuilder) guards(conds [][]*cond) []*cond {
	type use struct{ category, field int32 }
	guards := make([]*cond, len(conds))
	users := map[use]int{}
	// At first every stage uses all fields that it could; then those for which
	// enough others have decided.
	for round := range 4 {
		next := map[use]int{}
		for i := range conds {
			category := b.stages[i].category
			least := 1.0
			guards[i] = nil
			for _, k := range conds[i] {
				g := b.guard(k)
				if g.chance >= 1 {
					continue
				}
				cost := g.chance
				for _, f := range g.fields {
					u := use{category, f}
					if round == 0 {
						next[u]++
						continue
					}
					cost += (lookingUp + g.scan) / float64(max(users[u], 1))
				}
				if round > 0 && cost < least {
					least, guards[i] = cost, k
				}
			}
			if guards[i] != nil {
				for _, f := range b.guard(guards[i]).fields {
					next[use{category, f}]++
				}
			}
		}
		users = next
	}
	return guards
}

// guard is a condition as the guard of a stage.
type guard struct {
	chance float64 // that it lets the stage through; 1 or more if it cannot be one
	scan   float64
	fields []int32 // each once
	atoms  []int32 // one of which holds if the condition does
	whole  bool    // and the condition holds if one of them does
}

func (b *setBuilder) guard(k *cond) guard {
	none := guard{chance: 1}
	switch k.op {
	case opAtom:
		w := k.atom.test.words
		if w == nil || w.all {
			return none
		}
		place := b.places[k.atom]
		field := b.Set.atoms[place].field
		n := len(w.exact) + len(w.prefixes) + len(w.suffixes) + len(w.contained) + len(w.globs)
		g := guard{float64(n) / float64(1+len(b.words[field])), 0, []int32{field}, []int32{place}, true}
		if len(w.contained) > 0 {
			g.scan = scanning
		}
		return g
	case opAnd:
		least := none
		for _, x := range k.of {
			if g := b.guard(x); g.chance < least.chance {
				least = g
			}
		}
		least.whole = false
		return least
	case opOr:
		sum := guard{whole: true}
		for _, x := range k.of {
			g := b.guard(x)
			sum.chance += g.chance
			sum.scan = max(sum.scan, g.scan)
			sum.whole = sum.whole && g.whole
			for _, f := range g.fields {
				if !slices.Contains(sum.fields, f) {
					sum.fields = append(sum.fields, f)
				}
			}
			sum.atoms = append(sum.atoms, g.atoms...)
		}
		return sum
	}
	return none
}

// open lets a stage be asked when its guard may hold.
func (b *setBuilder) open(stage int32, k *cond) {
	category := b.stages[stage].category
	c := &b.which[category]
	if k == nil {
		c.unguarded = append(c.unguarded, stage)
		return
	}
	for _, place := range b.guard(k).atoms {
		a := &b.Set.atoms[place]
		index, ok := b.looked[a.field]
		if !ok {
			index = int32(len(b.indexes))
			b.looked[a.field] = index
			b.indexes = append(b.indexes, &wordIndex{field: a.field})
		}
		if !slices.Contains(c.indexes, index) {
			c.indexes = append(c.indexes, index)
		}
		i := slices.IndexFunc(a.opens, func(o opens) bool { return o.category == category })
		if i < 0 {
			i = len(a.opens)
			a.opens = append(a.opens, opens{category: category})
		}
		if o := &a.opens[i]; !slices.Contains(o.stages, stage) {
			o.stages = append(o.stages, stage)
		}
	}
}

// rest sets what a stage is asked for when its guard has let it through: first what
// indexes have found out by then.
func (b *setBuilder) rest(m *member, conds []*cond, k *cond) {
	for _, known := range []bool{true, false} {
		for i, n := range m.whole {
			if (conds[i] != k || !b.guard(k).whole) && b.known(m.category, n) == known {
				m.rest = append(m.rest, n)
			}
		}
	}
}

// known reports whether the indexes of a category know if a condition holds.
func (b *setBuilder) known(category int32, n node) bool {
	if n.op == opAtom {
		return slices.Contains(b.which[category].indexes, b.Set.atoms[n.atom].index)
	}
	return !slices.ContainsFunc(n.of, func(x node) bool { return !b.known(category, x) })
}
