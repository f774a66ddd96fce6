package eql

import (
	"slices"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Exclusion is a clause that WithoutExclusions took out of a query.
type Exclusion struct {
	syntax.Pos
	Stage  int      // index into Stages, or len(Stages()) for the until event
	Text   string   // canonical
	Fields []string // those in it that the caller chooses
}

// WithoutExclusions returns q without the clauses by which a process could talk
// itself out of a match, and what was taken out so that a person can be told.
//
// A rule excuses the known good: not a working directory below /opt/agent, not
// this parent. For an alert that is fine. When a match is to stop something, the
// excuse belongs to whoever can make the clause false, and a process picks its
// own working directory, arguments and program. So for each stage every
// conjunct (see Conjuncts) that is a negation (not, !=, not in; != null too) and
// mentions a field that callerChosen reports is removed, and so is an until
// event and a missing one that mention one: whoever can make them happen has no
// match. A stage that consists of nothing else then matches every event of its
// category.
//
// Only the outermost negations are looked at: an alternative of an "or" cannot
// be dropped without making the rule match less.
func (q *Query) WithoutExclusions(callerChosen func(field string) bool) (*Query, []Exclusion) {
	var out []Exclusion
	stricter := *q
	stricter.stages, stricter.slots, stricter.steps, stricter.missing = nil, nil, nil, nil
	excluded := make([]bool, len(q.stages))
	for i, s := range q.stages {
		if s.missing {
			if chosen := mentions(s.event, callerChosen); len(chosen) > 0 {
				out = append(out, Exclusion{s.event.Pos, i, "![" + syntax.Format(s.event) + "]", chosen})
				excluded[i] = true
			}
			stricter.stages = append(stricter.stages, s)
			continue
		}
		t := *s
		t.conjuncts = nil
		for _, c := range s.conjuncts {
			if chosen := mentions(c.expr, callerChosen); negates(c.expr) && len(chosen) > 0 {
				out = append(out, Exclusion{c.Pos, i, c.Text, chosen})
			} else {
				t.conjuncts = append(t.conjuncts, c)
			}
		}
		t.match = t.all()
		stricter.stages = append(stricter.stages, &t)
	}
	for _, s := range q.slots {
		if i := slices.Index(q.stages, s); !excluded[i] {
			stricter.slots = append(stricter.slots, stricter.stages[i])
		}
	}
	stricter.arrange()
	if q.until != nil {
		if chosen := mentions(q.until.event, callerChosen); len(chosen) > 0 {
			out = append(out, Exclusion{q.until.event.Pos, len(q.stages), "until [" + syntax.Format(q.until.event) + "]", chosen})
			stricter.until = nil
		}
	}
	return &stricter, out
}

func negates(e syntax.Expr) bool {
	switch e := e.(type) {
	case *syntax.Not:
		return true
	case *syntax.Binary:
		return e.Op == syntax.Ne
	case *syntax.In:
		return e.Not
	}
	return false
}

// mentions lists the fields in n that f reports, each once.
func mentions(n syntax.Node, f func(string) bool) []string {
	var names []string
	syntax.Walk(n, func(n syntax.Node) bool {
		if n, ok := n.(*syntax.Field); ok && f(n.Name) && !slices.Contains(names, n.Name) {
			names = append(names, n.Name)
		}
		return true
	})
	return names
}
