package kql

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Translate says in EQL what a condition means for events of a schema, for eql.Compile
// and the same schema. Where it demands one category, so does the event query; else
// that is about any event. Its error is a syntax.ErrorList of all that is wrong. Fields
// that are not known are optional in EQL, so that compiling it warns of them.
func Translate(q *Query, schema eql.Schema) (*syntax.Query, error) {
	t := &translator{query: q, schema: schema}
	where := t.condition(q.Where)
	if len(t.errs) > 0 {
		t.errs.Sort()
		return nil, t.errs
	}
	event := &syntax.Event{Pos: q.Where.Position(), Any: true, Where: where}
	t.category(event)
	return &syntax.Query{Pos: event.Pos, File: q.File, Source: q.Source, Body: event}, nil
}

type translator struct {
	query  *Query
	schema eql.Schema
	prefix string // of names in field:{ ... }
	found  int    // fields, for names with wildcards
	errs   syntax.ErrorList
}

const (
	// maxErrors bounds the report.
	maxErrors = 100
	// maxFound bounds how much longer a query becomes by names with wildcards, of which
	// published rules have one or two.
	maxFound = 10_000
)

func (t *translator) errorf(at syntax.Pos, hint, format string, args ...any) {
	if len(t.errs) < maxErrors {
		t.errs = append(t.errs, t.query.errorf(at, hint, nil, format, args...))
	}
}

func (t *translator) refuse(at syntax.Pos, hint, format string, args ...any) {
	if len(t.errs) < maxErrors {
		t.errs = append(t.errs, t.query.errorf(at, hint, errors.ErrUnsupported, format, args...))
	}
}

// category makes "event.category:x and ..." a query of that category, which means the
// same and is asked of fewer events.
func (t *translator) category(e *syntax.Event) {
	all := []syntax.Expr{e.Where}
	chain, _ := e.Where.(*syntax.Logic)
	if chain != nil && chain.Op == syntax.And {
		all = chain.X
	}
	for i, x := range all {
		b, ok := x.(*syntax.Binary)
		if !ok || b.Op != syntax.Eq {
			continue
		}
		f, _ := b.X.(*syntax.Field)
		l, _ := b.Y.(*syntax.Literal)
		if f == nil || l == nil || f.Name != t.schema.Category().Name {
			continue
		}
		e.Any, e.Category = false, l.Value.(string)
		switch rest := slices.Delete(slices.Clone(all), i, i+1); len(rest) {
		case 0:
			e.Where = &syntax.Literal{Pos: b.Pos, Value: true}
		case 1:
			e.Where = rest[0]
		default:
			e.Where = &syntax.Logic{Pos: chain.Pos, Op: syntax.And, X: rest}
		}
		return
	}
}

func (t *translator) condition(e Expr) syntax.Expr {
	switch e := e.(type) {
	case *Logic:
		l := &syntax.Logic{Pos: e.Pos, Op: e.Op}
		for _, x := range e.X {
			l.X = append(l.X, t.condition(x))
		}
		return l
	case *Not:
		return &syntax.Not{Pos: e.Pos, X: t.condition(e.X)}
	case *Nested:
		outer := t.prefix
		if name, ok := e.Field.plain(); ok {
			t.prefix += name + "."
		} else {
			t.refuse(e.Field.Pos, "", "a nested field has a name without wildcards")
		}
		defer func() { t.prefix = outer }()
		return t.condition(e.X)
	case *Is:
		return t.values(e.Field, e.Value)
	case *Range:
		return t.each(e.Field, func(f *syntax.Field, typ eql.Type, lenient bool) syntax.Expr {
			return t.within(f, typ, e, lenient)
		})
	}
	panic("unreachable: a condition of an unknown kind")
}

// each asks a condition of the field of that name, or of all with such names: it
// holds if it does of any. A condition is nil where the type of the field has no such
// values. That is an error, but not if lenient: a pattern finds all sorts of fields.
func (t *translator) each(name *Text, condition func(f *syntax.Field, typ eql.Type, lenient bool) syntax.Expr) syntax.Expr {
	if plain, ok := name.plain(); ok {
		f, ok := t.schema.Field(t.prefix + plain)
		x := condition(&syntax.Field{Pos: name.Pos, Name: t.prefix + plain, Optional: !ok}, f.Type, false)
		if x == nil { // after an error
			return &syntax.Literal{Pos: name.Pos, Value: false}
		}
		return x
	}
	any := &syntax.Logic{Pos: name.Pos, Op: syntax.Or}
	pattern := slices.Clone(name.Parts)
	pattern[0] = t.prefix + pattern[0]
	known := false
	for _, n := range slices.Sorted(t.schema.Names()) {
		if !matches(n, pattern) {
			continue
		}
		known = true
		if t.found++; t.found > maxFound {
			t.errorf(name.Pos, "", "names with wildcards stand for more than %d fields", maxFound)
			break
		}
		f, _ := t.schema.Field(n)
		if x := condition(&syntax.Field{Pos: name.Pos, Name: n}, f.Type, true); x != nil {
			any.X = append(any.X, x)
		}
	}
	switch {
	case !known:
		return condition(&syntax.Field{Pos: name.Pos, Name: strings.Join(pattern, "*"), Optional: true}, eql.Keyword, false)
	case len(any.X) == 0:
		return &syntax.Literal{Pos: name.Pos, Value: false}
	case len(any.X) == 1:
		return any.X[0]
	}
	return any
}

// matches reports whether s is the parts with anything between them.
func matches(s string, parts []string) bool {
	s, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	last := len(parts) - 1
	for _, part := range parts[1:last] {
		if _, s, ok = strings.Cut(s, part); !ok {
			return false
		}
	}
	return strings.HasSuffix(s, parts[last])
}

// values compares a field with a value, or with a group of them. A group stands
// outside of the fields of a pattern: a*: (x and y) has x in one and y in one.
func (t *translator) values(field *Text, value Expr) syntax.Expr {
	switch v := value.(type) {
	case *Text:
		return t.any(field, v)
	case *Not:
		return &syntax.Not{Pos: v.Pos, X: t.values(field, v.X)}
	case *Logic:
		l := &syntax.Logic{Pos: v.Pos, Op: v.Op}
		var texts []*Text // of an or, which are one condition
		for _, x := range v.X {
			if text, ok := x.(*Text); ok && v.Op == syntax.Or {
				texts = append(texts, text)
			} else {
				l.X = append(l.X, t.values(field, x))
			}
		}
		if len(texts) > 0 {
			l.X = append(l.X, t.any(field, texts...))
		}
		if len(l.X) == 1 {
			return l.X[0]
		}
		return l
	}
	panic("unreachable: a value of an unknown kind")
}

// any compares a field with values of which one is enough.
func (t *translator) any(field *Text, values ...*Text) syntax.Expr {
	return t.each(field, func(f *syntax.Field, typ eql.Type, lenient bool) syntax.Expr {
		return t.anyOf(f, typ, values, lenient)
	})
}

// anyOf compares it with constants at once, with patterns at once, and with those that
// like cannot have.
func (t *translator) anyOf(f *syntax.Field, typ eql.Type, values []*Text, lenient bool) syntax.Expr {
	var constants []syntax.Expr
	var simple, odd []*syntax.Literal
	l := &syntax.Logic{Pos: f.Pos, Op: syntax.Or}
	for _, v := range values {
		switch s, plain := v.plain(); {
		case v.anything():
			l.X = append(l.X, &syntax.Binary{Pos: f.Pos, Op: syntax.Ne, OpPos: f.Pos, X: f, Y: &syntax.Literal{Pos: v.Pos}})
		case plain:
			if c := t.constant(f, typ, v.Pos, s, false, lenient); c != nil {
				constants = append(constants, c)
			}
		case typ != eql.Keyword:
			if !lenient {
				hint := ""
				if typ == eql.IP {
					hint = `write a block of addresses, as in "10.0.0.0/8"`
				}
				t.errorf(v.Pos, hint, "a pattern is for strings; %s is of type %s", f.Name, typ)
			}
		case strings.ContainsAny(strings.Join(v.Parts, ""), "*?"):
			odd = append(odd, &syntax.Literal{Pos: v.Pos, Value: expression(v.Parts)})
		default:
			simple = append(simple, &syntax.Literal{Pos: v.Pos, Value: strings.Join(v.Parts, "*")})
		}
	}
	if len(constants) == 1 {
		l.X = append(l.X, &syntax.Binary{Pos: f.Pos, Op: syntax.Eq, OpPos: f.Pos, X: f, Y: constants[0]})
	} else if len(constants) > 1 {
		l.X = append(l.X, &syntax.In{Pos: f.Pos, OpPos: f.Pos, X: f, List: constants})
	}
	if len(simple) > 0 {
		l.X = append(l.X, &syntax.Match{Pos: f.Pos, Op: syntax.Like, OpPos: f.Pos, X: f, Patterns: simple})
	}
	if len(odd) > 0 {
		l.X = append(l.X, &syntax.Match{Pos: f.Pos, Op: syntax.Regex, OpPos: f.Pos, X: f, Patterns: odd})
	}
	switch len(l.X) {
	case 0:
		return nil
	case 1:
		return l.X[0]
	}
	return l
}

// expression is a regular expression for a pattern that has a ? or an escaped * in
// it, which like would take for wildcards.
func expression(parts []string) string {
	var b strings.Builder
	for i, part := range parts {
		if i > 0 {
			b.WriteString(".*")
		}
		for _, r := range part {
			if r < 0x80 && !('a' <= r|0x20 && r|0x20 <= 'z') && !('0' <= r && r <= '9') {
				b.WriteByte('\\')
			}
			b.WriteRune(r)
		}
	}
	return b.String()
}

// constant is a value as a field of that type has it, or nil after an error.
func (t *translator) constant(f *syntax.Field, typ eql.Type, at syntax.Pos, s string, ordered, lenient bool) syntax.Expr {
	l := &syntax.Literal{Pos: at, Value: s}
	fault, hint := "", ""
	switch typ {
	case eql.Long, eql.Double:
		n, err := strconv.ParseInt(s, 10, 64)
		d, err2 := strconv.ParseFloat(s, 64)
		switch {
		case err == nil:
			l.Value = n
		case err2 == nil && d == d && d-d == 0: // neither NaN nor infinite
			l.Value = d
		default:
			fault = fmt.Sprintf("%q is not a number, and %s is one", s, f.Name)
		}
	case eql.Boolean:
		if ordered {
			fault = fmt.Sprintf("%s is true or false, and has no order", f.Name)
		} else if s != "true" && s != "false" {
			fault = fmt.Sprintf("%q is neither true nor false, and %s is one of them", s, f.Name)
		}
		l.Value = s == "true"
	case eql.IP:
		if ordered {
			fault, hint = fmt.Sprintf("a range of addresses is a block; %s has addresses", f.Name), `write field: "10.0.0.0/8"`
		} else if lenient && !isBlock(s) { // else package eql complains
			return nil
		}
	case eql.Date:
		if !ordered {
			fault, hint = fmt.Sprintf("%s is a date, which is compared by < and >", f.Name), `write field >= "2025-02-04T12:00:00Z"`
		} else if strings.HasPrefix(s, "now") {
			fault = "events are judged as they happen: there is no time relative to now"
		}
	}
	if fault == "" {
		return l
	}
	if !lenient {
		t.errorf(at, hint, "%s", fault)
	}
	return nil
}

func isBlock(s string) bool {
	_, err := netip.ParseAddr(s)
	_, err2 := netip.ParsePrefix(s)
	return err == nil || err2 == nil
}

// within is a range.
func (t *translator) within(f *syntax.Field, typ eql.Type, r *Range, lenient bool) syntax.Expr {
	s, _ := r.Value.plain()
	c := t.constant(f, typ, r.Value.Pos, s, true, lenient)
	if c == nil {
		return nil
	}
	return &syntax.Binary{Pos: r.Pos, Op: r.Op, OpPos: r.Pos, X: f, Y: c}
}
