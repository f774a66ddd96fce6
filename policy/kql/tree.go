// Package kql reads conditions written in KQL, Kibana's query language, and
// translates them into the tree of package eql/syntax, so that package eql judges
// events by them: there is one engine, and one meaning of a missing value.
//
//	q, err := kql.Parse("rule.toml", src)
//	tree, err := kql.Translate(q, schema)
//	query, err := eql.Compile(tree, schema)
//
// It has what published detection rules use: fields with quoted and bare values,
// wildcards in values and in names of fields, and, or and not, groups of values,
// ranges, field:* and nested field:{ ... }. KQL has no comments. On top of the
// grammar, what Elasticsearch makes of it:
//
//   - A string is compared as a whole and with its case. Only * is a wildcard, and
//     only outside of quotes; a backslash before it takes that from it.
//   - A field with several values matches if any of them does; "not field:x" also
//     matches where there is no field.
//   - A number may be in quotes. An address is compared by value, and may be a block
//     of them. A field that no event has matches nothing, with a warning.
//
// Differences, all of them intended, and errors rather than a guess: a value without
// a field (Kibana searches all fields), field:null, a date without > or <, and dates
// relative to now. In field:{ ... } names are put together and no more: events here
// have no lists of objects whose parts would have to stay together.
package kql

import "github.com/imdsgate/imdsgate/policy/eql/syntax"

// Query is what Parse returns.
type Query struct {
	File   string // as given to Parse
	Source string // as given to Parse
	Where  Expr

	// Warnings are what its author should know although it parses. Those of the
	// compiled query are others.
	Warnings []*syntax.Error
}

// An Expr is a condition, a *Logic, *Not, *Is, *Range or *Nested; or, as the value
// of an Is, a *Text or a *Logic or *Not of them.
type Expr interface {
	syntax.Node
	expr()
}

// Logic is a chain of two or more operands joined by syntax.And, or by syntax.Or.
type Logic struct {
	syntax.Pos
	Op syntax.Op
	X  []Expr
}

// Not is "not X".
type Not struct {
	syntax.Pos
	X Expr
}

// Is is "field: value", or "field: (values)".
type Is struct {
	syntax.Pos
	Field *Text
	Value Expr
}

// Range is "field > value", with Lt, Le, Gt or Ge.
type Range struct {
	syntax.Pos
	Field *Text
	Op    syntax.Op
	Value *Text
}

// Nested is "field: { X }".
type Nested struct {
	syntax.Pos
	Field *Text
	X     Expr
}

// Text is a value or the name of a field, cut at its wildcards: a*b is ["a", "b"],
// a lone * is ["", ""], and what has no wildcard is one part.
type Text struct {
	syntax.Pos
	Parts []string
}

func (*Logic) expr()  {}
func (*Not) expr()    {}
func (*Is) expr()     {}
func (*Range) expr()  {}
func (*Nested) expr() {}
func (*Text) expr()   {}

// plain is the text if it has no wildcard.
func (t *Text) plain() (string, bool) { return t.Parts[0], len(t.Parts) == 1 }

// anything reports whether t is nothing but wildcards.
func (t *Text) anything() bool {
	for _, p := range t.Parts {
		if p != "" {
			return false
		}
	}
	return len(t.Parts) > 1
}
