package eql

import "github.com/imdsgate/imdsgate/policy/eql/syntax"

// What is never true, whatever the event, is a slip that its author will want to
// hear of: a comparison with null by anything but == and !=, an atom that is
// required together with its negation, or a value that is required of a field that
// must have none. Little more is sure, because a field may have several values:
// a == "x" and a == "y" can hold.

// certainty is what is known of a condition without an event.
type certainty uint8

const (
	open certainty = iota
	certain
	impossible
)

func (c certainty) not() certainty {
	switch c {
	case certain:
		return impossible
	case impossible:
		return certain
	}
	return open
}

// warnOfNever warns of the conditions that are never true. The query must be right.
func (c *compiler) warnOfNever() {
	syntax.Walk(c.tree, func(n syntax.Node) bool {
		e, ok := n.(*syntax.Event)
		if ok {
			c.neverIn(e.Where)
		}
		return !ok
	})
}

// neverIn warns of the smallest parts of a condition that are never true.
func (c *compiler) neverIn(e syntax.Expr) {
	l, ok := e.(*syntax.Logic)
	if ok {
		before := len(c.warnings)
		for _, x := range l.X {
			c.neverIn(x)
		}
		if len(c.warnings) > before || l.Op == syntax.Or {
			return
		}
		if one, other := c.contradiction(l); other != nil {
			c.warnf(other.Position(), "", "this is never true together with %s", abbreviate(syntax.Format(one)))
		}
		return
	}
	if c.certainty(e) == impossible {
		c.warnf(e.Position(), "", "this is never true")
	}
}

func abbreviate(s string) string {
	if r := []rune(s); len(r) > 60 {
		return string(r[:60]) + "…"
	}
	return s
}

func (c *compiler) certainty(e syntax.Expr) certainty {
	switch e := e.(type) {
	case *syntax.Not:
		return c.certainty(e.X).not()
	case *syntax.Logic:
		decisive, other := impossible, certain
		if e.Op == syntax.Or {
			decisive, other = certain, impossible
		}
		all := other
		for _, x := range e.X {
			switch c.certainty(x) {
			case decisive:
				return decisive
			case open:
				all = open
			}
		}
		if one, _ := c.contradiction(e); one != nil {
			return decisive
		}
		return all
	}
	if p := c.positive(e); p != e {
		return c.atomCertainty(p).not()
	}
	return c.atomCertainty(e)
}

func (c *compiler) atomCertainty(e syntax.Expr) certainty {
	if !c.varies[e] {
		if v := c.constant(e); v.kind == isBool && v.bool() {
			return certain
		}
		return impossible
	}
	isNever := func(x syntax.Expr) bool {
		_, absent := x.(*syntax.Field) // for which there is a warning already
		return !absent && !c.varies[x] && c.constant(x).kind == none
	}
	switch e := e.(type) {
	case *syntax.Binary:
		if _, ok := c.existence(e); !ok && e.Op < syntax.Add && (isNever(e.X) || isNever(e.Y)) {
			return impossible
		}
	case *syntax.In:
		for _, y := range e.List {
			if !isNever(y) {
				return open
			}
		}
		return impossible
	case *syntax.Call: // startsWith and its like
		for _, arg := range e.Args {
			if isNever(arg) {
				return impossible
			}
		}
	}
	return open
}

// contradiction finds two operands of an "and" that are never true together, or of
// an "or" that are never false together. It compares atoms as they are written.
func (c *compiler) contradiction(l *syntax.Logic) (one, other syntax.Expr) {
	type side struct {
		holds bool // required to hold, or not to
		expr  syntax.Expr
	}
	var xs []syntax.Expr
	for _, x := range l.X {
		if inner, ok := x.(*syntax.Logic); !ok {
			xs = append(xs, x)
		} else if inner.Op == l.Op {
			xs = append(xs, inner.X...)
		}
	}
	// Only atoms on fields that are in others with the opposite sign are printed.
	signs := map[string]int{}
	for _, x := range xs {
		if a, holds := c.bare(x); a != nil {
			signs[firstField(a)] |= sign(holds)
		}
	}
	atoms := map[string]side{}
	missing := map[string]syntax.Expr{} // fields that must have no value
	for _, x := range xs {
		a, holds := c.bare(x)
		if a == nil {
			continue
		}
		if signs[firstField(a)] == sign(true)|sign(false) {
			text := syntax.Format(a)
			if s, ok := atoms[text]; ok && s.holds != holds {
				return s.expr, x
			}
			atoms[text] = side{holds, x}
		}
		if y, ok := c.existence(a); ok && holds && l.Op == syntax.And {
			if f, ok := y.(*syntax.Field); ok {
				missing[f.Name] = x
			}
		}
	}
	if len(missing) == 0 {
		return nil, nil
	}
	for _, x := range xs {
		if a, holds := c.bare(x); a != nil && holds {
			if y, ok := c.operand(a); ok {
				if f, ok := y.(*syntax.Field); ok && missing[f.Name] != nil {
					return missing[f.Name], x
				}
			}
		}
	}
	return nil, nil
}

func sign(holds bool) int {
	if holds {
		return 1
	}
	return 2
}

// firstField is the name of a field in e, or "".
func firstField(e syntax.Expr) string {
	name := ""
	syntax.Walk(e, func(n syntax.Node) bool {
		if f, ok := n.(*syntax.Field); ok && name == "" {
			name = f.Name
		}
		return name == ""
	})
	return name
}

// bare is the atom in a condition, and whether it must hold for the condition to
// hold; nil if there is more to it.
func (c *compiler) bare(e syntax.Expr) (atom syntax.Expr, holds bool) {
	holds = true
	for {
		switch x := e.(type) {
		case *syntax.Not:
			e, holds = x.X, !holds
			continue
		case *syntax.Logic:
			return nil, false
		}
		if p := c.positive(e); p != e {
			return p, !holds
		}
		return e, holds
	}
}
