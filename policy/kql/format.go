package kql

import (
	"fmt"
	"strings"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Format prints a condition in canonical form: one line, single blanks, no
// parentheses but those that the tree needs, values in quotes unless they have a
// wildcard.
func Format(e Expr) string {
	var f formatter
	f.expr(e, 0)
	return f.String()
}

type formatter struct{ strings.Builder }

// Precedences of what surrounds an expression.
const (
	inOr = 1 + iota
	inAnd
	inNot
)

func (f *formatter) expr(e Expr, outer int) {
	switch e := e.(type) {
	case *Logic:
		own := inOr
		if e.Op == syntax.And {
			own = inAnd
		}
		f.grouped(own <= outer, func() {
			for i, x := range e.X {
				if i > 0 {
					f.WriteString(" " + e.Op.String() + " ")
				}
				f.expr(x, own)
			}
		})
	case *Not:
		f.WriteString("not ")
		f.expr(e.X, inNot)
	case *Is:
		f.name(e.Field)
		f.WriteString(": ")
		_, single := e.Value.(*Text)
		f.grouped(!single, func() { f.expr(e.Value, 0) })
	case *Range:
		f.name(e.Field)
		f.WriteString(" " + e.Op.String() + " ")
		f.value(e.Value)
	case *Nested:
		f.name(e.Field)
		f.WriteString(": { ")
		f.expr(e.X, 0)
		f.WriteString(" }")
	case *Text:
		f.value(e)
	}
}

func (f *formatter) grouped(parentheses bool, print func()) {
	if parentheses {
		f.WriteString("(")
		defer f.WriteString(")")
	}
	print()
}

func (f *formatter) value(t *Text) {
	if s, ok := t.plain(); ok {
		f.WriteString(`"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`)
		return
	}
	f.bare(t)
}

// name prints a field without quotes where it can do without.
func (f *formatter) name(t *Text) {
	if s, ok := t.plain(); ok && strings.ContainsFunc(s, func(r rune) bool {
		return blank(r) || strings.ContainsRune(special, r)
	}) || s == "" && ok || isKeyword(s) {
		f.value(t)
		return
	}
	f.bare(t)
}

func isKeyword(s string) bool {
	return strings.EqualFold(s, "and") || strings.EqualFold(s, "or") || strings.EqualFold(s, "not")
}

// bare prints words, with everything escaped that would end them.
func (f *formatter) bare(t *Text) {
	for i, part := range t.Parts {
		if i > 0 {
			f.WriteByte('*')
		}
		for _, r := range part {
			f.WriteString(escaped(r))
		}
	}
}

func escaped(r rune) string {
	switch {
	case blank(r):
		return fmt.Sprintf(`\u%04x`, r)
	case strings.ContainsRune(special, r):
		return `\` + string(r)
	}
	return string(r)
}
