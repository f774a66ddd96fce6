package eql

import (
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// What holds
//
// The operators and, or and not are two-valued. Their operands, as far as these
// are not and, or and not themselves, are the atoms of a condition, and an atom
// either holds or does not.
//
// Inside an atom there are values, and null among them. Null goes in where a
// field has no value, and comes out of every operator and function that needed
// one, until the atom as a whole is true, false or null. It holds only if it is
// true. So with f missing
//
//	f == "x"          does not hold
//	not f == "x"      holds: it is the negation of an atom that does not
//	f != "x"          holds: != is short for not ==, and not in for not in
//	null == (f > 1)   holds: comparing with null asks whether there is a value
//
// A field may have several values. The atom then is tried with each of them, and
// holds if it is true for any. If it mentions several fields, every combination
// of their values is tried. Hence
//
//	args == "-f"      some argument is -f
//	args != "-f"      none is
//	args == "a" and args == "b"   two atoms, and two arguments
//
// Most atoms compare one field with constants. Such a comparison becomes a test,
// a function of one value that is there, and nothing else is needed. The general
// case evaluates terms in an environment with the values that are being tried.

// test is a condition on one single value: str on a string, val on any other.
type test struct {
	str   func(string) bool
	val   func(Value) bool
	words *words // if that is all there is to str
}

// passes reports whether a field of type t, whose value is v, has one that passes.
func (t *test) passes(v *Value, of Type) bool {
	if of == Keyword {
		switch v.kind {
		case isString:
			return t.str(v.str())
		case isStrings:
			return slices.ContainsFunc(v.strs(), t.str)
		case isList:
			return slices.ContainsFunc(v.list(), func(v Value) bool { return v.kind == isString && t.str(v.str()) })
		}
		return false
	}
	if v.kind == isList {
		return slices.ContainsFunc(v.list(), func(v Value) bool { return v.fits(of) && t.val(v) })
	}
	return v.fits(of) && t.val(*v)
}

// term is a compiled expression.
type term func(*env) Value

// env is what the terms of one atom are evaluated in.
type env struct {
	fields []Value // the fields' values
	tried  []Value // one single value of each, or none
	args   []Value // stack of arguments
	left   int     // combinations that may still be tried
}

// maxCombinations bounds the effort for an atom. A list of arguments has at most a
// million of them, so that no single array can hide a value behind its length; two
// long arrays in one atom, which no known rule has, are not tried to the end.
const maxCombinations = 1 << 20

// holds compiles a condition.
func (c *compiler) holds(e syntax.Expr) *cond {
	switch e := e.(type) {
	case *syntax.Logic:
		k := &cond{op: opAnd, cost: cost(e)}
		if e.Op == syntax.Or {
			k.op = opOr
		}
		for _, x := range e.X {
			k.of = append(k.of, c.holds(x))
		}
		slices.SortStableFunc(k.of, cheaper)
		return k
	case *syntax.Not:
		return not(c.holds(e.X))
	case *syntax.Binary:
		if e.Op == syntax.Ne {
			return not(c.atom(c.positive(e)))
		}
	case *syntax.In:
		if e.Not {
			return not(c.atom(c.positive(e)))
		}
	}
	return c.atom(e)
}

// positive is the comparison that != or not in negates, or e.
func (c *compiler) positive(e syntax.Expr) syntax.Expr {
	switch e := e.(type) {
	case *syntax.Binary:
		if e.Op == syntax.Ne {
			p := *e
			p.Op = syntax.Eq
			return c.derived(&p, e)
		}
	case *syntax.In:
		if e.Not {
			p := *e
			p.Not = false
			return c.derived(&p, e)
		}
	}
	return e
}

// derived gives a new expression what check found out about a similar one.
func (c *compiler) derived(e, from syntax.Expr) syntax.Expr {
	c.types[e], c.varies[e] = c.types[from], c.varies[from]
	return e
}

// cost estimates what it takes to evaluate a condition.
func cost(e syntax.Expr) int {
	sum := 1
	syntax.Walk(e, func(n syntax.Node) bool {
		switch n := n.(type) {
		case *syntax.In:
			sum++
			return false
		case *syntax.Match:
			if sum += 5 + len(n.Patterns); n.Op >= syntax.Regex {
				sum += 50
			}
		case *syntax.Call:
			sum += 20
		case *syntax.Binary:
			sum++
		}
		return true
	})
	return sum
}

func (c *compiler) atom(e syntax.Expr) *cond {
	a := &atom{expr: e}
	k := &cond{op: opAtom, atom: a, cost: cost(e)}
	if !c.varies[e] {
		v := c.constant(e)
		return constant(v.kind == isBool && v.bool())
	}
	if f, ok := e.(*syntax.Field); ok {
		return a.on(c.fields[f], test{val: func(v Value) bool { return v.bool() }}, k)
	}
	if x, ok := c.existence(e); ok {
		if f, ok := x.(*syntax.Field); ok {
			return a.without(c.fields[f], k)
		}
	}
	if x, ok := c.operand(e); ok {
		if f, ok := x.(*syntax.Field); ok {
			return a.on(c.fields[f], c.test(e), k)
		}
	}
	a.fields, a.pred = c.general(e)
	return k
}

// existence returns x if e is x == null, where an optional field that no event has is
// null, too.
func (c *compiler) existence(e syntax.Expr) (syntax.Expr, bool) {
	if b, ok := e.(*syntax.Binary); ok && b.Op == syntax.Eq {
		for _, side := range [][2]syntax.Expr{{b.X, b.Y}, {b.Y, b.X}} {
			switch y := side[1].(type) {
			case *syntax.Literal:
				if y.Value == nil {
					return side[0], true
				}
			case *syntax.Field:
				if !c.varies[y] {
					return side[0], true
				}
			}
		}
	}
	return nil, false
}

// operand returns x if e is a condition on x and otherwise constants: one that has
// a test for the values of x that are not null, and with null is null. Negations
// must have been removed from e.
func (c *compiler) operand(e syntax.Expr) (x syntax.Expr, ok bool) {
	switch e := e.(type) {
	case *syntax.Binary:
		if _, ok := c.existence(e); ok || e.Op >= syntax.Add {
			return nil, false
		}
		_, x, y := c.constantLast(e)
		return x, c.constant(y).kind != none
	case *syntax.In:
		return e.X, c.varies[e.X] || !c.varies[e]
	case *syntax.Match:
		return e.X, true
	case *syntax.Call:
		f := functions[strings.ToLower(e.Name)]
		if f.part != nil {
			return e.Args[0], !c.varies[e.Args[1]] && c.constant(e.Args[1]).kind != none
		}
		return e.Args[0], f.name == cidrMatch
	}
	return nil, false
}

// test compiles a condition that has an operand.
func (c *compiler) test(e syntax.Expr) test {
	switch e := e.(type) {
	case *syntax.Binary:
		op, x, y := c.constantLast(e)
		return compareWith(op, c.types[x], c.constantFor(c.types[x], y))
	case *syntax.In:
		return c.oneOf(e)
	case *syntax.Match:
		return c.matches(e)
	case *syntax.Call:
		f := functions[strings.ToLower(e.Name)]
		if f.part == nil {
			return inBlocks(e.Args[1:])
		}
		k := c.constant(e.Args[1])
		part := k.str()
		if e.Fold {
			part = lower(part)
		}
		return test{str: func(s string) bool { return f.part(s, part, e.Fold) }, words: f.words(part, e.Fold)}
	}
	panic("unreachable: a condition without an operand")
}

// constantLast turns a comparison around if need be.
func (c *compiler) constantLast(e *syntax.Binary) (op syntax.Op, x, y syntax.Expr) {
	if c.varies[e.Y] {
		return mirrored(e.Op), e.Y, e.X
	}
	return e.Op, e.X, e.Y
}

func mirrored(op syntax.Op) syntax.Op {
	switch op {
	case syntax.Lt:
		return syntax.Gt
	case syntax.Le:
		return syntax.Ge
	case syntax.Gt:
		return syntax.Lt
	case syntax.Ge:
		return syntax.Le
	}
	return op
}

// constant evaluates an expression without fields.
func (c *compiler) constant(e syntax.Expr) Value {
	v, ok := c.constants[e]
	if !ok {
		v = c.term(e, nil)(&env{})
		c.constants[e] = v
	}
	return v
}

// constantFor evaluates one that is compared with a value of type t. Dates are
// written as strings, or as milliseconds since 1970.
func (c *compiler) constantFor(t Type, e syntax.Expr) Value {
	v := c.constant(e)
	switch {
	case t == Date && v.kind == isString:
		d, _ := parseDate(v.str())
		return instant(d)
	case t == Date && v.kind == isInt:
		return instant(time.UnixMilli(v.int()))
	}
	return v
}

// compareWith tests values of type t against a constant.
func compareWith(op syntax.Op, t Type, k Value) test {
	if t == IP && k.kind == isString {
		b, _ := parseBlock(k.str())
		return test{val: blocks{b}.contain}
	}
	if k.kind == isString {
		s := k.str()
		if op == syntax.Eq {
			return test{str: func(v string) bool { return v == s }, words: &words{exact: []string{s}}}
		}
		return test{str: func(v string) bool { return holdsFor(op, strings.Compare(v, s)) }}
	}
	if k.kind == isInt && op == syntax.Eq {
		return test{val: func(v Value) bool {
			if v.kind == isInt {
				return v.lo == k.lo
			}
			return v.kind == isFloat && v.float() == k.float()
		}}
	}
	return test{val: func(v Value) bool {
		order, ok := compare(&v, &k)
		return ok && holdsFor(op, order)
	}}
}

func holdsFor(op syntax.Op, order int) bool {
	switch op {
	case syntax.Eq:
		return order == 0
	case syntax.Lt:
		return order < 0
	case syntax.Le:
		return order <= 0
	case syntax.Gt:
		return order > 0
	}
	return order >= 0
}

// oneOf is the test of in.
func (c *compiler) oneOf(e *syntax.In) test {
	t := c.types[e.X]
	ks := make([]Value, len(e.List))
	for i, y := range e.List {
		ks[i] = c.constantFor(t, y)
	}
	switch t {
	case Keyword:
		w := &words{fold: e.Fold}
		for _, k := range ks {
			if k.kind != none {
				w.exact = append(w.exact, w.spelled(k.str()))
			}
		}
		s := newSet(w.exact, e.Fold)
		return test{str: s.has, words: w}
	case IP:
		var bs blocks
		for _, k := range ks {
			if b, ok := parseBlock(k.str()); ok {
				bs = append(bs, b)
			}
		}
		return test{val: bs.contain}
	}
	return test{val: func(v Value) bool {
		return slices.ContainsFunc(ks, func(k Value) bool {
			order, ok := compare(&v, &k)
			return ok && order == 0
		})
	}}
}

// matches is the test of :, like and regex.
func (c *compiler) matches(m *syntax.Match) test {
	if re := c.regexes[m]; re != nil {
		return test{str: re.MatchString}
	}
	patterns := make([]string, len(m.Patterns))
	for i, p := range m.Patterns {
		patterns[i] = p.Value.(string)
	}
	w := sortByShape(patterns, m.Op != syntax.Like)
	return test{str: w.compile(&c.tables), words: w}
}

// inBlocks is the test of cidrMatch. It is also true of strings that are addresses.
func inBlocks(args []syntax.Expr) test {
	var bs blocks
	for _, arg := range args {
		b, _ := parseBlock(arg.(*syntax.Literal).Value.(string))
		bs = append(bs, b)
	}
	return test{
		str: func(s string) bool {
			b, ok := parseBlock(s)
			return ok && !strings.Contains(s, "/") && bs.contain(Value{hi: b.hi, lo: b.lo})
		},
		val: bs.contain,
	}
}

// general compiles any atom, and lists its fields.
func (c *compiler) general(e syntax.Expr) (fields []Field, p pred) {
	slots := map[string]int{}
	syntax.Walk(e, func(n syntax.Node) bool {
		if f, ok := n.(*syntax.Field); ok {
			if _, seen := slots[f.Name]; !seen {
				slots[f.Name] = len(fields)
				fields = append(fields, c.fields[f])
			}
		}
		return true
	})
	t := c.evaluate(e, slots)
	pool := &sync.Pool{New: func() any {
		return &env{fields: make([]Value, len(fields)), tried: make([]Value, len(fields))}
	}}
	return fields, func(event Event) bool {
		env := pool.Get().(*env)
		defer pool.Put(env)
		for i, f := range fields {
			if f.Slot >= 0 {
				env.fields[i] = event.Value(f.Slot)
			}
		}
		env.left = maxCombinations
		return env.try(fields, 0, t)
	}
}

// try reports whether t is true for some values of fields[n:].
func (env *env) try(fields []Field, n int, t term) bool {
	if n == len(fields) {
		env.left--
		v := t(env)
		return v.kind == isBool && v.bool()
	}
	v := &env.fields[n]
	if !v.present(fields[n].Type) {
		env.tried[n] = Value{}
		return env.try(fields, n+1, t)
	}
	for i := range v.len() {
		x := v.single(i)
		if !x.fits(fields[n].Type) {
			continue
		}
		env.tried[n] = x
		if env.try(fields, n+1, t) {
			return true
		}
		if env.left <= 0 {
			return false
		}
	}
	return false
}

// evaluate compiles an expression. The slots are the places of its fields in an
// env; a part without fields is evaluated now.
func (c *compiler) evaluate(e syntax.Expr, slots map[string]int) term {
	if !c.varies[e] {
		v := c.constant(e)
		return func(*env) Value { return v }
	}
	return c.term(e, slots)
}

func (c *compiler) term(e syntax.Expr, slots map[string]int) term {
	if p := c.positive(e); p != e {
		return negation(c.term(p, slots))
	}
	if x, ok := c.operand(e); ok {
		xt, t := c.evaluate(x, slots), c.test(e)
		return func(env *env) Value {
			switch v := xt(env); v.kind {
			case none:
				return v
			case isString:
				return Bool(t.str(v.str()))
			default:
				return Bool(t.val(v))
			}
		}
	}
	if x, ok := c.existence(e); ok {
		xt := c.evaluate(x, slots)
		return func(env *env) Value { return Bool(isNull(xt(env))) }
	}
	switch e := e.(type) {
	case *syntax.Logic:
		ts := make([]term, len(e.X))
		for i, x := range e.X {
			ts[i] = c.evaluate(x, slots)
		}
		return logic(ts, e.Op == syntax.Or)
	case *syntax.Not:
		return negation(c.evaluate(e.X, slots))
	case *syntax.Binary:
		if e.Op >= syntax.Add {
			return apply(arithmetic(e.Op.String()[0]), false, []term{c.evaluate(e.X, slots), c.evaluate(e.Y, slots)})
		}
		return func(*env) Value { return Value{} } // one side is a constant that is null
	case *syntax.Unary:
		x := c.evaluate(e.X, slots)
		if e.Op == syntax.Add {
			return x
		}
		return func(env *env) Value { return negative(x(env)) }
	case *syntax.In:
		return c.in(e, slots)
	case *syntax.Call:
		args := make([]term, len(e.Args))
		for i, arg := range e.Args {
			args[i] = c.evaluate(arg, slots)
		}
		return apply(functions[strings.ToLower(e.Name)].call, e.Fold, args)
	case *syntax.Field:
		slot := slots[e.Name]
		return func(env *env) Value { return env.tried[slot] }
	case *syntax.Literal:
		v := literal(e)
		return func(*env) Value { return v }
	}
	panic("unreachable: an expression of an unknown kind")
}

func literal(l *syntax.Literal) Value {
	switch v := l.Value.(type) {
	case string:
		return String(v)
	case int64:
		return Int(v)
	case float64:
		return Float(v)
	case bool:
		return Bool(v)
	}
	return Value{}
}

func negation(t term) term {
	return func(env *env) Value {
		v := t(env)
		if v.kind == isBool {
			v.lo ^= 1
		}
		return v
	}
}

// logic is and and or inside an atom, where null is a third truth value. An
// operand that decides the matter, true for or and false for and, does.
func logic(ts []term, decisive bool) term {
	return func(env *env) Value {
		unknown := false
		for _, t := range ts {
			switch v := t(env); {
			case v.kind == none:
				unknown = true
			case v.bool() == decisive:
				return v
			}
		}
		if unknown {
			return Value{}
		}
		return Bool(!decisive)
	}
}

func negative(v Value) Value {
	switch {
	case v.kind == isFloat:
		return Float(-v.float())
	case v.kind == isInt && v.int() != math.MinInt64:
		return Int(-v.int())
	}
	return Value{}
}

// in is "constant in (...)" with fields in the list. Each element is asked whether
// it is the constant.
func (c *compiler) in(e *syntax.In, slots map[string]int) term {
	if k := c.constant(e.X); k.kind == none {
		return func(*env) Value { return k }
	}
	ts := make([]term, len(e.List))
	for i, y := range e.List {
		is := &syntax.In{Pos: e.Pos, OpPos: e.OpPos, X: y, Fold: e.Fold, List: []syntax.Expr{e.X}}
		ts[i] = c.evaluate(c.derived(is, y), slots)
	}
	return func(env *env) Value {
		for _, t := range ts {
			if v := t(env); v.bool() {
				return v
			}
		}
		return Bool(false)
	}
}

// apply calls f. The arguments lie on a stack, since what is handed to a function
// value would otherwise be allocated.
func apply(f func([]Value, bool) Value, fold bool, args []term) term {
	return func(env *env) Value {
		base := len(env.args)
		for _, arg := range args {
			v := arg(env)
			env.args = append(env.args, v)
		}
		v := f(env.args[base:], fold)
		env.args = env.args[:base]
		return v
	}
}
