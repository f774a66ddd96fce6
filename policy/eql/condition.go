package eql

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// cond is a compiled condition.
type cond struct {
	op   op
	atom *atom   // of opAtom
	of   []*cond // of the others, the cheapest first
	cost int     // an estimate
}

type op uint8

const (
	opAtom op = iota
	opAnd
	opOr
	opNot
)

// constant is a condition that holds or does not, whatever the event.
func constant(holds bool) *cond {
	if holds {
		return &cond{op: opAnd}
	}
	return &cond{op: opOr}
}

func not(k *cond) *cond { return &cond{op: opNot, of: []*cond{k}, cost: k.cost + 1} }

// cheaper orders conditions by cost. None has side effects.
func cheaper(a, b *cond) int { return cmp.Compare(a.cost, b.cost) }

// pred is a condition that can be asked about an event.
type pred func(Event) bool

func always(Event) bool { return true }
func never(Event) bool  { return false }

func (k *cond) pred() pred {
	switch k.op {
	case opAtom:
		return k.atom.pred
	case opNot:
		p := k.of[0].pred()
		return func(e Event) bool { return !p(e) }
	}
	ps := make([]pred, len(k.of))
	for i, x := range k.of {
		ps[i] = x.pred()
	}
	switch {
	case len(ps) == 1:
		return ps[0]
	case k.op == opAnd:
		return func(e Event) bool {
			for _, p := range ps {
				if !p(e) {
					return false
				}
			}
			return true
		}
	case len(ps) == 0:
		return never
	}
	return func(e Event) bool {
		for _, p := range ps {
			if p(e) {
				return true
			}
		}
		return false
	}
}

// Truth is what can be said of a condition.
type Truth uint8

const (
	False Truth = iota
	Maybe       // it depends on what is not known
	True
)

// truth is Kleene's: what does not depend on unknown fields is not in doubt for them.
func (k *cond) truth(e Event, known func(Field) bool) Truth {
	switch k.op {
	case opAtom:
		switch {
		case slices.ContainsFunc(k.atom.fields, func(f Field) bool { return f.Slot >= 0 && !known(f) }):
			return Maybe
		case k.atom.pred(e):
			return True
		}
		return False
	case opNot:
		return True - k.of[0].truth(e, known)
	}
	all := True
	if k.op == opOr {
		all = False
	}
	for _, x := range k.of {
		if t := x.truth(e, known); k.op == opAnd {
			all = min(all, t)
		} else {
			all = max(all, t)
		}
	}
	return all
}

// atom is a condition without and, or and not.
type atom struct {
	expr   syntax.Expr
	fields []Field // that it reads
	pred   pred
	kind   atomKind
	test   test
}

type atomKind uint8

const (
	ofAnyKind atomKind = iota
	ofTest             // some value of its only field passes the test
	ofAbsence          // its only field has no value
)

// on makes k the condition that some value of a field passes a test.
func (a *atom) on(f Field, t test, k *cond) *cond {
	if f.Slot < 0 {
		return constant(false)
	}
	a.fields, a.kind, a.test = []Field{f}, ofTest, t
	a.pred = func(e Event) bool {
		v := e.Value(f.Slot)
		return t.passes(&v, f.Type)
	}
	return k
}

// without makes k the condition that a field has no value.
func (a *atom) without(f Field, k *cond) *cond {
	if f.Slot < 0 {
		return constant(true)
	}
	a.fields, a.kind = []Field{f}, ofAbsence
	a.pred = func(e Event) bool {
		v := e.Value(f.Slot)
		return !v.present(f.Type)
	}
	return k
}

// holds asks an atom of one field about its value.
func (a *atom) holds(v *Value) bool {
	if a.kind == ofAbsence {
		return !v.present(a.fields[0].Type)
	}
	return a.test.passes(v, a.fields[0].Type)
}

// key names an atom by what it says and about what. Two with the same key hold for
// the same events.
func (a *atom) key() string {
	b := []byte(syntax.Format(a.expr))
	for _, f := range a.fields {
		b = binary.AppendVarint(append(b, 0, byte(f.Type)), int64(f.Slot))
	}
	return string(b)
}

// fields appends to list the fields that a condition reads and that there are.
func (k *cond) fields(list []Field) []Field {
	if k.op == opAtom {
		for _, f := range k.atom.fields {
			if f.Slot >= 0 {
				list = append(list, f)
			}
		}
	}
	for _, x := range k.of {
		list = x.fields(list)
	}
	return list
}
