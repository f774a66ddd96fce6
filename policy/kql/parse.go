package kql

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

const (
	// maxSource and maxDepth are the bounds that package syntax has for EQL: no rule
	// that somebody wrote comes near them.
	maxSource = 1 << 20
	maxDepth  = 200

	maxWarnings = 20
)

// Parse reads a condition. The name is that of the file or the rule that it comes
// from and appears in errors; it may be empty. The error is a syntax.ErrorList.
func Parse(name, src string) (*Query, error) {
	p := &parser{query: &Query{File: name, Source: src}}
	switch {
	case len(src) > maxSource:
		p.fail(syntax.Pos{Line: 1, Col: 1}, "", "a query of %d bytes is too long; the limit is %d", len(src), maxSource)
	case !utf8.ValidString(src):
		p.fail(syntax.Pos{Line: 1, Col: 1}, "", "this is not UTF-8")
	default:
		p.tokens()
		p.query.Where = p.or(p.condition)
		if !p.at(eof) {
			p.unexpected("and, or, or the end of the query")
		}
	}
	if len(p.errs) > 0 {
		return nil, p.errs
	}
	return p.query, nil
}

// A parser reads one query by recursive descent. After its one complaint every
// further token reads as failed, so that the functions below return without another
// word; what they return is dropped.
type parser struct {
	query *Query
	toks  []token
	next  int
	depth int
	errs  syntax.ErrorList
}

func (q *Query) errorf(at syntax.Pos, hint string, err error, format string, args ...any) *syntax.Error {
	e := (&syntax.Query{File: q.File, Source: q.Source}).Errorf(at, format, args...)
	e.Hint, e.Err = hint, err
	return e
}

func (p *parser) fail(at syntax.Pos, hint, format string, args ...any) {
	if len(p.errs) == 0 {
		p.errs = syntax.ErrorList{p.query.errorf(at, hint, nil, format, args...)}
	}
}

func (p *parser) refuse(at syntax.Pos, hint, format string, args ...any) {
	if len(p.errs) == 0 {
		p.errs = syntax.ErrorList{p.query.errorf(at, hint, errors.ErrUnsupported, format, args...)}
	}
}

func (p *parser) tokens() {
	s := scanner{src: p.query.Source, pos: syntax.Pos{Line: 1, Col: 1}, fail: p.fail}
	for len(p.toks) == 0 || p.toks[len(p.toks)-1].kind != eof {
		p.toks = append(p.toks, s.scan())
	}
}

func (p *parser) tok() token {
	t := p.toks[min(p.next, len(p.toks)-1)]
	if len(p.errs) > 0 {
		t.kind, t.parts = failed, []string{""}
	}
	return t
}

func (p *parser) at(kinds ...kind) bool { return slices.Contains(kinds, p.tok().kind) }

func (p *parser) got(k kind) bool {
	if p.at(k) {
		p.next++
		return true
	}
	return false
}

// close takes the bracket that ends what open began.
func (p *parser) close(open token, k kind) {
	switch {
	case p.got(k):
	case p.at(eof):
		p.fail(open.pos, "", "this %s is not closed", open.kind)
	default:
		p.unexpected(k.String())
	}
}

func (p *parser) unexpected(due string) {
	t := p.tok()
	found, hint := t.kind.String(), ""
	if t.kind == word || t.kind == quoted {
		found = p.source(t)
	}
	switch {
	case strings.HasPrefix(found, "//") || strings.HasPrefix(found, "/*"):
		hint = "KQL has no comments"
	case t.kind == kwAnd || t.kind == kwOr || t.kind == kwNot:
		hint = "a keyword that is a value is put in quotes"
	case t.kind == colon && p.next > 0 && p.toks[p.next-1].kind == word:
		hint = "a value with a colon is put in quotes"
	}
	p.fail(t.pos, hint, "expected %s, found %s", due, found)
}

// source is a token as it is written, or its beginning.
func (p *parser) source(t token) string {
	if r := []rune(p.query.Source[t.from:t.to]); len(r) > 30 {
		return string(r[:30]) + "…"
	}
	return p.query.Source[t.from:t.to]
}

// deeper counts a level of nesting until the function that it returns is called.
func (p *parser) deeper() (leave func()) {
	p.depth++
	if p.depth > maxDepth {
		p.fail(p.tok().pos, "", "conditions nest deeper than %d", maxDepth)
	}
	return func() { p.depth-- }
}

// or and what it calls read conditions, or values in a group, which are put together
// in the same way.
func (p *parser) or(operand func() Expr) Expr {
	return p.chain(kwOr, syntax.Or, func() Expr {
		return p.chain(kwAnd, syntax.And, func() Expr { return p.not(operand) })
	})
}

func (p *parser) chain(k kind, op syntax.Op, operand func() Expr) Expr {
	x := operand()
	if !p.at(k) {
		return x
	}
	l := &Logic{Pos: x.Position(), Op: op, X: []Expr{x}}
	for p.got(k) {
		l.X = append(l.X, operand())
	}
	return l
}

func (p *parser) not(operand func() Expr) Expr {
	t := p.tok()
	defer p.deeper()()
	switch {
	case p.got(kwNot):
		return &Not{t.pos, p.not(operand)}
	case p.got(lparen):
		x := p.or(operand)
		p.close(t, rparen)
		return x
	}
	return operand()
}

func (p *parser) condition() Expr {
	t := p.tok()
	if t.kind != word && t.kind != quoted {
		p.unexpected("a field")
		return &Text{t.pos, t.parts}
	}
	p.next++
	field := &Text{t.pos, t.parts}
	switch op := p.tok(); op.kind {
	case colon:
		p.next++
		if open := p.tok(); p.got(lbrace) {
			x := p.or(p.condition)
			p.close(open, rbrace)
			return &Nested{t.pos, field, x}
		}
		return &Is{t.pos, field, p.values()}
	case lt, le, gt, ge:
		p.next++
		value := p.value()
		if len(value.Parts) > 1 {
			p.fail(value.Pos, "", "a range ends at a value, not at a pattern")
		}
		return &Range{t.pos, field, syntax.Lt + syntax.Op(op.kind-lt), value}
	}
	if strings.HasPrefix(p.source(t), "//") || strings.HasPrefix(p.source(t), "/*") {
		p.fail(t.pos, "KQL has no comments", "this is no condition")
	}
	p.refuse(t.pos, fmt.Sprintf("write field: %s", p.source(t)), "a value without a field would be searched for in all of them")
	return field
}

// values is a value, or values in parentheses.
func (p *parser) values() Expr {
	if !p.at(lparen) {
		return p.value()
	}
	return p.not(func() Expr { return p.value() })
}

// value is a string, or words with the blanks between them.
func (p *parser) value() *Text {
	t := p.tok()
	v := &Text{t.pos, t.parts}
	switch {
	case p.got(quoted):
		return v
	case !p.got(word):
		p.unexpected("a value")
		return v
	}
	from := t.from
	var parts []string
	var part strings.Builder
	add := func(t token) {
		for i, s := range t.parts {
			if i > 0 {
				parts = append(parts, part.String())
				part.Reset()
			}
			part.WriteString(s)
		}
	}
	add(t)
	for p.at(word) {
		more := p.tok()
		if next := p.toks[p.next+1].kind; next == colon || lt <= next && next <= ge {
			p.fail(more.pos, "write and, or or, before it", "expected and, or, or the end of the query, found %s", p.source(more))
		}
		between := p.query.Source[t.to:more.from]
		if strings.Contains(between, "\n") && len(p.query.Warnings) < maxWarnings {
			p.query.Warnings = append(p.query.Warnings, p.query.errorf(more.pos, "is an or missing before it?", nil,
				"%s continues the value of the line before", p.source(more)))
		}
		part.WriteString(between)
		add(more)
		t = more
		p.next++
	}
	v.Parts = append(parts, part.String())
	if p.query.Source[from:t.to] == "null" {
		p.refuse(v.Pos, "a field without a value is found by not field:*", "null is no value")
	}
	return v
}
