package eql

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// broken is the type of an expression that has been complained about.
const broken = null + 1

// A compiler first checks a query, which fills its maps, and then, if nothing is
// wrong, translates it.
type compiler struct {
	tree     *syntax.Query
	schema   Schema
	errs     syntax.ErrorList
	warnings syntax.ErrorList
	warned   map[string]bool

	types      map[syntax.Expr]Type
	varies     map[syntax.Expr]bool // whether it depends on fields
	fieldsSeen int
	fields     map[*syntax.Field]Field
	regexes    map[*syntax.Match]*regexp.Regexp

	constants map[syntax.Expr]Value
	tables    int // what is left of tableBudget
}

// maxErrors bounds the report. Somebody who has a hundred errors to mend does not
// miss the others.
const maxErrors = 100

func check(tree *syntax.Query, schema Schema) *compiler {
	c := &compiler{
		tree:      tree,
		schema:    schema,
		warned:    map[string]bool{},
		types:     map[syntax.Expr]Type{},
		varies:    map[syntax.Expr]bool{},
		fields:    map[*syntax.Field]Field{},
		regexes:   map[*syntax.Match]*regexp.Regexp{},
		constants: map[syntax.Expr]Value{},
		tables:    tableBudget,
	}
	switch body := tree.Body.(type) {
	case *syntax.Event:
		c.condition(body.Where)
	case *syntax.Sequence:
		items := body.Items
		if body.Until != nil {
			items = slices.Concat(items, []*syntax.Item{body.Until})
		}
		c.joined(body.By, items)
	case *syntax.Sample:
		c.joined(body.By, body.Items)
	}
	if len(c.errs) == 0 {
		c.warnOfNever()
	}
	return c
}

func (c *compiler) errorf(at syntax.Pos, hint, format string, args ...any) {
	c.add(at, hint, nil, format, args...)
}

func (c *compiler) add(at syntax.Pos, hint string, err error, format string, args ...any) {
	if len(c.errs) == maxErrors {
		return
	}
	e := c.tree.Errorf(at, format, args...)
	e.Hint, e.Err = hint, err
	c.errs = append(c.errs, e)
}

func (c *compiler) warnf(at syntax.Pos, hint, format string, args ...any) {
	if len(c.warnings) == maxErrors {
		return
	}
	w := c.tree.Errorf(at, format, args...)
	w.Hint = hint
	c.warnings = append(c.warnings, w)
}

// refuseBatch complains about what can only be answered once a stream has ended.
func (c *compiler) refuseBatch() {
	refuse := func(at syntax.Pos, format string, args ...any) {
		c.add(at, "", errors.ErrUnsupported, format, args...)
	}
	for _, p := range c.tree.Pipes {
		refuse(p.Pos, "the pipe %s cannot be judged inline: it counts the matches of a finished search", p.Name)
	}
	if body, ok := c.tree.Body.(*syntax.Sample); ok {
		refuse(body.Pos, "a sample cannot be judged inline: its events have no order that would end it")
	}
}

// joined checks events that are joined by keys.
func (c *compiler) joined(by []*syntax.Field, items []*syntax.Item) {
	for _, k := range by {
		c.expr(k)
	}
	for _, it := range items {
		c.condition(it.Event.Where)
		for i, k := range it.By {
			t := c.expr(k)
			first := items[0].By[i]
			if u := c.types[first]; t != u && t < null && u < null && !(isNumeric(t) && isNumeric(u)) {
				c.errorf(k.Pos, "", "this key is %s and %s in the first event is %s, so that they are never equal", noun(t), first.Name, noun(u))
			}
		}
	}
}

// noun describes a type.
func noun(t Type) string {
	switch t {
	case Keyword:
		return "a string"
	case IP:
		return "an IP address"
	case Long:
		return "an integer"
	case Double:
		return "a number"
	case Boolean:
		return "a boolean"
	case Date:
		return "a date"
	}
	return "null"
}

// subject names an expression for a sentence about its type.
func subject(e syntax.Expr) string {
	switch e := e.(type) {
	case *syntax.Field:
		return e.Name
	case *syntax.Call:
		return e.Name + "(...)"
	}
	return "this"
}

// condition checks an expression that must be true or false.
func (c *compiler) condition(e syntax.Expr) {
	if t := c.expr(e); t != Boolean && t < null {
		c.errorf(e.Position(), "", "a condition must be true or false; %s is %s", subject(e), noun(t))
	}
}

// expr finds the type of an expression, and whether it depends on fields, and
// complains about what is wrong in it.
func (c *compiler) expr(e syntax.Expr) Type {
	before := c.fieldsSeen
	t := c.typeOf(e)
	c.types[e] = t
	_, known := c.constants[e]
	c.varies[e] = c.fieldsSeen > before && !known
	return t
}

func (c *compiler) typeOf(e syntax.Expr) Type {
	switch e := e.(type) {
	case *syntax.Logic:
		for _, x := range e.X {
			c.condition(x)
		}
		return Boolean
	case *syntax.Not:
		c.condition(e.X)
		return Boolean
	case *syntax.Binary:
		if e.Op >= syntax.Add {
			return c.numeric(e.Op, e.X, e.Y)
		}
		c.comparison(e.Op, e.OpPos, e.X, c.expr(e.X), e.Y)
		return Boolean
	case *syntax.Unary:
		return c.numeric(e.Op, e.X)
	case *syntax.In:
		t := c.expr(e.X)
		for _, y := range e.List {
			c.comparison(syntax.Eq, e.OpPos, e.X, t, y)
		}
		return Boolean
	case *syntax.Match:
		c.match(e)
		return Boolean
	case *syntax.Call:
		return c.call(e)
	case *syntax.Field:
		return c.field(e)
	case *syntax.Literal:
		switch e.Value.(type) {
		case string:
			return Keyword
		case int64:
			return Long
		case float64:
			return Double
		case bool:
			return Boolean
		}
	}
	return null
}

func (c *compiler) field(f *syntax.Field) Type {
	c.fieldsSeen++
	field, ok := c.schema.Field(f.Name)
	switch {
	case ok && field.Slot < 0 && f.Optional:
		c.constants[f] = Value{}
	case ok && field.Slot < 0:
		c.warnOfAbsent(f, "")
	case ok:
	case f.Optional:
		field = Field{Name: f.Name, Type: null, Slot: -1}
		c.constants[f] = Value{}
		c.warnOfAbsent(f, c.didYouMean(f.Name))
	default:
		c.errorf(f.Pos, c.didYouMean(f.Name), "unknown field %s", f.Name)
		field.Type = broken
	}
	c.fields[f] = field
	return field.Type
}

// warnOfAbsent says once of a field that no event has it.
func (c *compiler) warnOfAbsent(f *syntax.Field, hint string) {
	if !c.warned[f.Name] {
		c.warned[f.Name] = true
		c.warnf(f.Pos, hint, "no event has the field %s", f.Name)
	}
}

func (c *compiler) didYouMean(name string) string {
	if near := syntax.Nearest(name, c.schema.Names()); near != "" {
		return "did you mean " + near + "?"
	}
	return ""
}

// numeric is the type of an arithmetic operation.
func (c *compiler) numeric(op syntax.Op, operands ...syntax.Expr) Type {
	result := Double
	for _, x := range operands {
		t := c.expr(x)
		if isNumeric(t) || t == null {
			continue
		}
		result = broken
		if t == broken {
			continue
		}
		hint := ""
		switch x.(type) {
		case *syntax.In, *syntax.Match:
			hint = "write parentheses: in, :, like and regex bind tighter than " + op.String()
		}
		if op == syntax.Add && t == Keyword {
			hint = "strings are joined by concat"
		}
		c.errorf(x.Position(), hint, "%s takes numbers; %s is %s", op, subject(x), noun(t))
	}
	return result
}

// comparison checks x op y, where x has type t.
func (c *compiler) comparison(op syntax.Op, at syntax.Pos, x syntax.Expr, t Type, y syntax.Expr) {
	u := c.expr(y)
	if t == broken || u == broken {
		return
	}
	if c.varies[x] && c.varies[y] {
		c.errorf(at, "one side must be a constant", "a field cannot be compared with another")
		return
	}
	orders := op != syntax.Eq && op != syntax.Ne
	switch {
	case orders && (t == IP || u == IP):
		c.errorf(at, "use cidrMatch", "%s does not compare IP addresses", op)
	case orders && (t == Boolean || u == Boolean):
		c.errorf(at, "", "%s does not compare booleans", op)
	case t == u, t == null, u == null, isNumeric(t) && isNumeric(u):
	case t == Keyword && (u == IP || u == Date):
		c.standsFor(u, x)
	case u == Keyword && (t == IP || t == Date):
		c.standsFor(t, y)
	case t == Date && u == Long && !c.varies[y], u == Date && t == Long && !c.varies[x]: // milliseconds since 1970
	default:
		c.errorf(y.Position(), "", "%s cannot be compared with %s", describe(x, t), describe(y, u))
	}
}

func describe(e syntax.Expr, t Type) string {
	if _, ok := e.(*syntax.Field); ok {
		return subject(e) + " (" + noun(t) + ")"
	}
	return noun(t)
}

func isNumeric(t Type) bool { return t == Long || t == Double }

// standsFor checks a string that stands for an address or for a date.
func (c *compiler) standsFor(t Type, e syntax.Expr) {
	l, ok := e.(*syntax.Literal)
	if !ok {
		c.errorf(e.Position(), "", "this is a string and cannot be compared with %s unless it is a constant", noun(t))
		return
	}
	s := l.Value.(string)
	if _, ok := parseBlock(s); !ok && t == IP {
		c.errorf(e.Position(), "", "%q is neither an IP address nor a block of them", s)
	}
	if _, ok := parseDate(s); !ok && t == Date {
		c.errorf(e.Position(), `write it as in "2025-02-04T12:00:00Z"`, "%q is not a date", s)
	}
}

func (c *compiler) match(m *syntax.Match) {
	switch t := c.expr(m.X); t {
	case Keyword, null, broken:
	case IP:
		c.errorf(m.X.Position(), "use == or cidrMatch", "%s takes a string; %s is %s", m.Op, subject(m.X), noun(t))
	default:
		c.errorf(m.X.Position(), "use ==", "%s takes a string; %s is %s", m.Op, subject(m.X), noun(t))
	}
	var patterns []string
	for _, p := range m.Patterns {
		if s, ok := p.Value.(string); ok {
			patterns = append(patterns, s)
		} else {
			c.errorf(p.Pos, "", "a pattern must be a string; this is %s", noun(c.typeOf(p)))
		}
	}
	if m.Op < syntax.Regex || len(patterns) < len(m.Patterns) {
		return
	}
	re, i, fault := compileRegex(patterns, m.Op == syntax.RegexFold)
	if fault != nil {
		c.errorf(m.Patterns[i].Pos, fault.hint, "%s", fault.msg)
	}
	c.regexes[m] = re
}

func (c *compiler) call(call *syntax.Call) Type {
	f, ok := functions[strings.ToLower(call.Name)]
	if !ok {
		for _, arg := range call.Args {
			c.expr(arg)
		}
		hint := foreign[strings.ToLower(call.Name)]
		if near := syntax.Nearest(call.Name, maps.Keys(functions)); hint == "" && near != "" {
			hint = "did you mean " + functions[near].name + "?"
		}
		c.errorf(call.Pos, hint, "unknown function %s", call.Name)
		return broken
	}
	if call.Fold && !f.fold {
		c.errorf(call.Pos, "", "%s has no case-insensitive form", f.name)
	}
	if n := len(call.Args); n < f.min || n > len(f.params) && !f.variadic {
		c.errorf(call.Pos, "", "%s takes %s, not %d", f.name, f.arity(), n)
	}
	for i, arg := range call.Args {
		t := c.expr(arg)
		if i >= len(f.params) && !f.variadic {
			continue
		}
		param := f.params[min(i, len(f.params)-1)]
		if t < null && param&(1<<t) == 0 {
			c.errorf(arg.Position(), "", "argument %d of %s must be %s; %s is %s", i+1, f.name, param, subject(arg), noun(t))
		} else if t != broken && f.name == cidrMatch && i > 0 {
			c.block(call, arg)
		}
	}
	return f.result
}

// block checks an argument of cidrMatch. With null all of it is null.
func (c *compiler) block(call *syntax.Call, arg syntax.Expr) {
	switch l, ok := arg.(*syntax.Literal); {
	case !ok:
		c.errorf(arg.Position(), "", "a block of addresses must be a constant")
	case l.Value == nil:
		c.constants[call] = Value{}
	default:
		c.standsFor(IP, l)
	}
}

func (f *function) arity() string {
	switch n := len(f.params); {
	case f.variadic:
		return fmt.Sprintf("at least %s", count(f.min))
	case n > f.min:
		return fmt.Sprintf("%d to %d arguments", f.min, n)
	default:
		return count(n)
	}
}

func count(n int) string {
	if n == 1 {
		return "1 argument"
	}
	return fmt.Sprintf("%d arguments", n)
}

func (k kinds) String() string {
	var types []string
	for _, t := range []Type{Keyword, IP, Double, Boolean} {
		if k&(1<<t) != 0 {
			types = append(types, noun(t))
		}
	}
	return strings.Join(types, " or ")
}
