package syntax

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// maxSource bounds the text of a query. The longest rule that Elastic publishes
	// has 47 kB; a query of a megabyte is not one that somebody wrote.
	maxSource = 1 << 20

	// maxDepth bounds how deep expressions nest, and how many operators of
	// arithmetic follow each other. Published rules need 8. Too low refuses generated
	// queries; too high lets a hostile file exhaust the stack of whoever walks the tree.
	maxDepth = 200

	// maxErrors bounds the report. After twenty complaints the file was not EQL.
	maxErrors = 20

	maxRuns = 100

	// maxSteps bounds the events of a sequence, runs counted, because for each key
	// there may be as many chains. Published rules have a dozen or two.
	maxSteps = 1000

	// maxSample bounds the events of a sample, because what it takes to find one
	// grows with the fourth power of them. Published rules have up to 5.
	maxSample = 20
)

// Parse reads a query. The name is that of the file or the rule that it comes
// from and appears in errors; it may be empty. The error is an ErrorList.
func Parse(name, src string) (*Query, error) {
	p := &parser{query: &Query{Pos: Pos{1, 1}, File: name, Source: src}}
	if p.readable() {
		p.tokens()
		p.parse()
	}
	if len(p.errs) > 0 {
		p.errs.Sort()
		return nil, p.errs
	}
	return p.query, nil
}

// A parser reads one query by recursive descent. Once a part of it makes no
// sense, fail reports that and every further token reads as invalid, so that
// the functions below return without another word; what they return is dropped.
// A sequence picks itself up again at its next item.
type parser struct {
	query  *Query
	toks   []token
	next   int
	failed bool
	depth  int
	errs   ErrorList
}

func (p *parser) readable() bool {
	src := p.query.Source
	if len(src) > maxSource {
		p.report(Pos{1, 1}, "", "a query of %d bytes is too long; the limit is %d", len(src), maxSource)
		return false
	}
	for i, r := range src {
		if r == utf8.RuneError && !strings.HasPrefix(src[i:], "\uFFFD") {
			p.report(Pos{1, 1}.after(src[:i]), "", "this is not UTF-8")
			return false
		}
	}
	return true
}

func (p *parser) tokens() {
	s := scanner{src: p.query.Source, pos: Pos{1, 1}, report: p.report}
	for {
		end := s.pos
		t := s.scan()
		if t.kind == eof {
			t.pos = end // what is missing is missing here, not below blanks and comments
		}
		p.toks = append(p.toks, t)
		if t.kind == eof || len(p.errs) == maxErrors {
			return
		}
	}
}

func (p *parser) report(at Pos, hint, format string, args ...any) {
	p.add(at, hint, nil, format, args...)
}

// refuse reports what is EQL, or once was, and isn't done here.
func (p *parser) refuse(at Pos, hint, format string, args ...any) {
	p.add(at, hint, errors.ErrUnsupported, format, args...)
}

func (p *parser) add(at Pos, hint string, err error, format string, args ...any) {
	if len(p.errs) == maxErrors {
		return
	}
	e := p.query.Errorf(at, format, args...)
	e.Hint, e.Err = hint, err
	p.errs = append(p.errs, e)
}

func (p *parser) fail(at Pos, hint, format string, args ...any) {
	if !p.failed {
		p.failed = true
		p.report(at, hint, format, args...)
	}
}

// tok is the current token. The list ends with eof unless there were too many
// errors to go on.
func (p *parser) tok() token {
	if p.next >= len(p.toks) {
		return token{kind: invalid, pos: p.query.Pos}
	}
	t := p.toks[p.next]
	if p.failed {
		t.kind = invalid
	}
	return t
}

func (p *parser) at(kinds ...kind) bool { return slices.Contains(kinds, p.tok().kind) }

func (p *parser) advance() token {
	t := p.tok()
	p.next++
	return t
}

func (p *parser) got(k kind) bool {
	if p.at(k) {
		p.next++
		return true
	}
	return false
}

func (p *parser) want(k kind) bool {
	if !p.got(k) {
		p.unexpected(k.String(), k)
		return false
	}
	return true
}

// unexpected complains about the current token where something else was due. If
// it is a name close to one of the keywords that could stand here, it says so.
func (p *parser) unexpected(due string, could ...kind) {
	t := p.tok()
	var hint, found string
	switch t.kind {
	case ident, called:
		found = t.text
		words := func(yield func(string) bool) {
			for _, k := range could {
				if k >= kwAnd && !yield(k.String()) {
					return
				}
			}
		}
		if near := Nearest(t.text, words); near != "" && strings.EqualFold(near, t.text) {
			hint = "keywords are lower case: " + near
		} else if near != "" {
			hint = "did you mean " + near + "?"
		}
	case quoted:
		found = "`" + t.text + "`"
	case text:
		found = fmt.Sprintf("the string %q", abbreviate(t.text))
	case integer, float:
		found = "the number " + abbreviate(t.text)
	case assign:
		found, hint = "=", "equality is =="
	case bang:
		found, hint = "!", "negation is not"
	default:
		found = t.kind.String()
		if slices.Contains(could, ident) {
			switch t.kind {
			case kwNot:
				hint = "put parentheses around not and what it negates"
			case kwAny, kwBy, kwIn, kwJoin, kwLike, kwMaxspan, kwOf, kwRegex, kwSample, kwSequence, kwUntil, kwWhere, kwWith:
				hint = fmt.Sprintf("a name that is a keyword is written `%s`", t.kind)
			}
		}
	}
	p.fail(t.pos, hint, "expected %s, found %s", due, found)
}

func abbreviate(s string) string {
	if r := []rune(s); len(r) > 30 {
		return string(r[:30]) + "…"
	}
	return s
}

// skipPast and skipTo end a failure: they find a token outside of brackets from
// where parsing can go on.
func (p *parser) skipPast(k kind) {
	p.skipTo(k)
	p.got(k)
}

func (p *parser) skipTo(kinds ...kind) {
	p.failed = false
	for ; !p.at(eof, invalid); p.next++ {
		if p.at(lbracket) && p.next+1 < len(p.toks) && p.toks[p.next+1].kind == integer {
			p.next += 2 // an index
			continue
		}
		if p.at(kinds...) {
			return
		}
	}
}

// skipBrackets passes over what stands in brackets, others inside of them included.
func (p *parser) skipBrackets() {
	for depth := 0; !p.at(eof, invalid); p.next++ {
		switch {
		case p.at(lbracket, missing):
			depth++
		case depth == 0:
			return
		case p.at(rbracket):
			depth--
		}
	}
}

func (p *parser) parse() {
	switch p.tok().kind {
	case kwSequence:
		p.query.Body = p.sequence()
	case kwSample:
		p.query.Body = p.sample()
	case kwJoin:
		p.refuse(p.tok().pos, "use sequence or sample", "joins are not supported")
		return
	default:
		p.query.Body = p.event()
	}
	for p.got(bar) {
		p.query.Pipes = append(p.query.Pipes, p.pipe())
	}
	if !p.at(eof) {
		p.unexpected("the end of the query", kwAnd, kwOr, kwIn, kwLike, kwRegex, kwUntil)
	}
	if len(p.errs) > 0 {
		return
	}
	switch body := p.query.Body.(type) {
	case *Sequence:
		p.checkSequence(body)
	case *Sample:
		p.checkSample(body)
	}
}

func (p *parser) event() *Event {
	e := &Event{Pos: p.tok().pos}
	switch t := p.tok(); t.kind {
	case kwAny:
		e.Any = true
		p.next++
	case ident, text:
		e.Category = t.text
		p.next++
	case quoted:
		p.fail(t.pos, "write it as a string", "the category of an event cannot be back-quoted")
	case integer, float:
		p.fail(t.pos, "write it as a string", "the category of an event cannot begin with a digit")
	case lbracket, missing:
		p.fail(t.pos, "write sequence or sample before the first", "events in brackets belong to a sequence or a sample")
	default:
		p.unexpected("the category of an event", kwAny, kwSequence, kwSample)
	}
	if !e.Any && p.at(minus, dot) {
		p.fail(e.Pos, "write all of it as a string", "the category of an event has letters, digits and _ only")
	}
	p.want(kwWhere)
	e.Where = p.expr()
	return e
}

func (p *parser) sequence() *Sequence {
	s := &Sequence{Pos: p.advance().pos}
	s.By = p.by()
	if p.got(kwWith) {
		s.MaxSpan, s.SpanPos = p.maxspan()
		if p.at(kwBy) {
			p.fail(p.tok().pos, "", "by must come before with maxspan")
		}
	}
	if p.failed {
		p.skipTo(lbracket, missing)
	}
	for p.at(lbracket, missing) {
		s.Items = append(s.Items, p.item())
	}
	if len(s.Items) == 0 {
		p.unexpected("[", kwBy, kwWith)
	}
	if p.got(kwUntil) {
		if p.at(missing) {
			p.fail(p.tok().pos, "", "until cannot be a missing event")
		}
		s.Until = p.item()
	}
	return s
}

func (p *parser) checkSequence(s *Sequence) {
	steps, positive := 0, false
	var absent *Item
	for _, it := range s.Items {
		steps += it.Runs
		if it.Missing {
			absent = it
		} else {
			positive = true
		}
	}
	if steps < 2 {
		p.report(s.Pos, "", "a sequence needs at least two events")
	}
	if steps > maxSteps {
		p.report(s.Pos, "", "a sequence has at most %d events, runs counted", maxSteps)
	}
	if !positive {
		p.report(s.Pos, "", "a sequence needs at least one event that is not missing")
	}
	if absent != nil && s.MaxSpan == 0 {
		p.report(absent.Pos, "add with maxspan=...", "a sequence with missing events needs a maxspan")
	}
	items := s.Items
	if s.Until != nil {
		items = append(slices.Clone(items), s.Until)
		if s.Until.Runs != 1 {
			p.report(s.Until.Pos, "", "until cannot have runs")
		}
	}
	p.checkKeys(items)
}

func (p *parser) sample() *Sample {
	s := &Sample{Pos: p.advance().pos}
	s.By = p.by()
	if p.at(kwWith) {
		p.fail(p.tok().pos, "", "a sample has no maxspan")
	}
	if p.failed {
		p.skipTo(lbracket, missing)
	}
	for p.at(lbracket, missing) {
		s.Items = append(s.Items, p.item())
	}
	if len(s.Items) == 0 {
		p.unexpected("[", kwBy)
	}
	if p.at(kwUntil) {
		p.fail(p.tok().pos, "", "a sample has no until")
	}
	return s
}

func (p *parser) checkSample(s *Sample) {
	for _, it := range s.Items {
		if it.Missing {
			p.report(it.Pos, "", "a sample has no missing events")
		}
		if it.Runs != 1 {
			p.report(it.Pos, "", "a sample has no runs")
		}
	}
	if len(s.Items) < 2 {
		p.report(s.Pos, "", "a sample needs at least two events")
	}
	if len(s.Items) > maxSample {
		p.report(s.Pos, "", "a sample has at most %d events", maxSample)
	}
	if len(s.By)+len(s.Items[0].By) == 0 {
		p.report(s.Pos, "add by and a field", "a sample needs a key")
	}
	p.checkKeys(s.Items)
}

func (p *parser) checkKeys(items []*Item) {
	for _, it := range items[1:] {
		if n, first := len(it.By), len(items[0].By); n != first {
			p.report(it.Pos, "", "the number of keys differs: %d here, %d in the first event", n, first)
		}
	}
}

func (p *parser) item() *Item {
	it := &Item{Pos: p.tok().pos, Runs: 1}
	if it.Missing = p.got(missing); !it.Missing {
		p.want(lbracket)
	}
	it.Event = p.event()
	if !p.got(rbracket) {
		p.unexpected("]", kwAnd, kwOr, kwIn, kwLike, kwRegex)
		p.skipPast(rbracket)
	}
	if t := p.tok(); t.kind == ident && (t.text == "fork" || t.text == "as") {
		p.failed = true
		p.refuse(t.pos, "", "%s is not supported", t.text)
	}
	it.By = p.by()
	if p.got(kwWith) {
		it.Runs = p.runs()
		if p.at(kwBy) {
			p.fail(p.tok().pos, "", "by must come before with runs")
		}
	}
	if p.failed {
		p.skipTo(lbracket, missing, kwUntil, bar)
	}
	return it
}

func (p *parser) by() []*Field {
	if !p.got(kwBy) {
		return nil
	}
	var keys []*Field
	for {
		e := p.expr()
		if f, ok := e.(*Field); ok {
			keys = append(keys, f)
		} else {
			p.fail(e.Position(), "", "a key must be a field")
		}
		if !p.got(comma) {
			return keys
		}
	}
}

var units = []struct {
	name string
	span time.Duration
}{
	{"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second}, {"ms", time.Millisecond},
}

func (p *parser) maxspan() (time.Duration, Pos) {
	if p.at(ident) && p.tok().text == "runs" {
		p.fail(p.tok().pos, "", "runs belongs behind an event")
	}
	p.want(kwMaxspan)
	p.want(assign)
	t := p.tok()
	if p.got(float) {
		p.fail(t.pos, "use a smaller unit", "maxspan must be a whole number")
	}
	if !p.want(integer) {
		return 0, t.pos
	}
	n := t.num.(int64)
	u := p.tok()
	if !p.got(ident) {
		p.fail(u.pos, "ms, s, m, h or d", "maxspan needs a unit")
	}
	for _, unit := range units {
		if unit.name != u.text {
			continue
		}
		switch {
		case n == 0:
			p.fail(t.pos, "", "maxspan must be more than nothing")
		case n > math.MaxInt64/int64(unit.span):
			p.fail(t.pos, "", "maxspan is too long")
		}
		return time.Duration(n) * unit.span, t.pos
	}
	p.fail(u.pos, "ms, s, m, h or d", "unknown unit %s", u.text)
	return 0, t.pos
}

func (p *parser) runs() int {
	if p.at(kwMaxspan) {
		p.fail(p.tok().pos, "", "maxspan belongs before the first event")
	}
	if !p.at(ident) || p.tok().text != "runs" {
		p.unexpected("runs")
	}
	p.got(ident)
	p.want(assign)
	t := p.tok()
	if !p.want(integer) {
		return 1
	}
	if n := t.num.(int64); 1 <= n && n <= maxRuns {
		return int(n)
	}
	p.fail(t.pos, "", "runs must be from 1 to %d", maxRuns)
	return 1
}

func (p *parser) pipe() *Pipe {
	t := p.tok()
	pipe := &Pipe{Pos: t.pos, Name: t.text}
	if !p.got(ident) {
		p.unexpected("the name of a pipe")
		return pipe
	}
	if t.text != "head" && t.text != "tail" {
		hint := "there are head and tail"
		if near := Nearest(t.text, slices.Values([]string{"head", "tail"})); near != "" {
			hint = "did you mean " + near + "?"
		}
		p.failed = true
		p.refuse(t.pos, hint, "the pipe %s is not supported", t.text)
		return pipe
	}
	n := p.tok()
	if !p.got(integer) || !p.at(bar, eof) {
		p.fail(n.pos, "", "%s takes a whole number and nothing else", t.text)
		return pipe
	}
	if i := n.num.(int64); i <= math.MaxInt32 {
		pipe.Count = int(i)
	} else {
		p.fail(n.pos, "", "%s of so many is all of them", t.text)
	}
	return pipe
}

// Expressions, loosest operators first.

func (p *parser) expr() Expr {
	defer p.deeper()()
	return p.chain(kwOr, Or, func() Expr { return p.chain(kwAnd, And, p.not) })
}

// deeper counts a level of nesting until the function that it returns is called.
func (p *parser) deeper() (leave func()) {
	p.depth++
	if p.depth > maxDepth {
		p.fail(p.tok().pos, "", "expressions nest deeper than %d", maxDepth)
	}
	return func() { p.depth-- }
}

func (p *parser) chain(k kind, op Op, operand func() Expr) Expr {
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

func (p *parser) not() Expr {
	if !p.at(kwNot) {
		return p.comparison()
	}
	defer p.deeper()()
	return &Not{Pos: p.advance().pos, X: p.not()}
}

var (
	comparisons = map[kind]Op{eq: Eq, ne: Ne, lt: Lt, le: Le, gt: Gt, ge: Ge}
	sums        = map[kind]Op{plus: Add, minus: Sub}
	products    = map[kind]Op{star: Mul, slash: Div, percent: Mod}
	patterns    = map[kind]Op{colon: Colon, kwLike: Like, kwLikeFold: LikeFold, kwRegex: Regex, kwRegexFold: RegexFold}
)

func (p *parser) comparison() Expr {
	x := p.sum()
	t := p.tok()
	op, ok := comparisons[t.kind]
	if !ok {
		return x
	}
	p.next++
	x = &Binary{Pos: x.Position(), Op: op, OpPos: t.pos, X: x, Y: p.sum()}
	if _, ok := comparisons[p.tok().kind]; ok {
		p.fail(p.tok().pos, "join two comparisons with and", "comparisons do not chain")
	}
	return x
}

func (p *parser) sum() Expr { return p.arithmetic(sums, p.product) }

func (p *parser) product() Expr { return p.arithmetic(products, p.sign) }

func (p *parser) arithmetic(ops map[kind]Op, operand func() Expr) Expr {
	x := operand()
	for n := 1; ; n++ {
		t := p.tok()
		op, ok := ops[t.kind]
		if !ok {
			return x
		}
		if n > maxDepth {
			p.fail(t.pos, "", "more than %d operators in a row", maxDepth)
		}
		p.next++
		x = &Binary{Pos: x.Position(), Op: op, OpPos: t.pos, X: x, Y: operand()}
	}
}

func (p *parser) sign() Expr {
	if !p.at(plus, minus) {
		return p.predicate()
	}
	defer p.deeper()()
	u := &Unary{Pos: p.tok().pos, Op: Add}
	if p.advance().kind == minus {
		u.Op = Sub
	}
	u.X = p.sign()
	return u
}

// predicate is a primary with at most one of in, :, like and regex, which bind
// tighter than arithmetic.
func (p *parser) predicate() Expr {
	x := p.primary()
	t := p.tok()
	if op, ok := patterns[t.kind]; ok {
		p.next++
		return &Match{Pos: x.Position(), Op: op, OpPos: t.pos, X: x, Patterns: p.constants()}
	}
	in := &In{Pos: x.Position(), OpPos: t.pos, X: x}
	if p.at(kwNot) {
		p.next++
		in.Not = true
		if _, ok := patterns[p.tok().kind]; ok {
			p.fail(t.pos, "write not before what it negates", "there is no not %s", p.tok().kind)
		}
		if !p.at(kwIn, kwInFold) {
			p.unexpected("in", kwIn, kwInFold)
		}
	}
	switch {
	case p.got(kwIn):
	case p.got(kwInFold):
		in.Fold = true
	default:
		return x
	}
	p.want(lparen)
	in.List = p.list()
	return in
}

// constants is a constant, or a list of them in parentheses.
func (p *parser) constants() []*Literal {
	if !p.got(lparen) {
		return []*Literal{p.constant()}
	}
	lits := []*Literal{p.constant()}
	for p.got(comma) {
		p.notLast()
		lits = append(lits, p.constant())
	}
	p.want(rparen)
	return lits
}

func (p *parser) constant() *Literal {
	t := p.tok()
	if l, ok := p.primary().(*Literal); ok && t.kind != lparen {
		return l
	}
	p.fail(t.pos, "", "a pattern must be a constant")
	return &Literal{Pos: t.pos}
}

// notLast complains about a list that ends in a comma.
func (p *parser) notLast() {
	if p.at(rparen) {
		p.fail(p.tok().pos, "remove the comma before it", "the list ends where an element is due")
	}
}

// list is what follows an opening parenthesis: at least one expression.
func (p *parser) list() []Expr {
	xs := []Expr{p.expr()}
	for p.got(comma) {
		p.notLast()
		xs = append(xs, p.expr())
	}
	p.want(rparen)
	return xs
}

func (p *parser) primary() Expr {
	t := p.tok()
	lit := &Literal{Pos: t.pos}
	switch t.kind {
	case text:
		lit.Value = t.text
	case integer, float:
		lit.Value = t.num
	case kwTrue:
		lit.Value = true
	case kwFalse:
		lit.Value = false
	case kwNull:
	case lparen:
		p.next++
		x := p.expr()
		p.want(rparen)
		return x
	case ident, called:
		if p.next+1 < len(p.toks) {
			switch p.toks[p.next+1].kind {
			case lparen:
				return p.call()
			case kwOf:
				p.refuse(t.pos, "", "%s of is not supported", t.text)
				p.next += 2
				p.skipBrackets()
				lit.Value = true
				return lit
			}
		}
		if t.kind == called {
			p.fail(t.pos, "", "%s~ is not followed by the arguments of a function", t.text)
			return lit
		}
		return p.field()
	case quoted, question:
		return p.field()
	default:
		p.unexpected("an expression", ident)
		return lit
	}
	p.next++
	return lit
}

func (p *parser) call() *Call {
	t := p.advance()
	c := &Call{Pos: t.pos, Name: t.text, Fold: t.kind == called}
	p.want(lparen)
	if !p.got(rparen) {
		c.Args = p.list()
	}
	return c
}

func (p *parser) field() *Field {
	f := &Field{Pos: p.tok().pos, Optional: p.got(question)}
	for {
		t := p.tok()
		if !p.got(ident) && !p.got(quoted) {
			p.unexpected("the name of a field", ident)
			return f
		}
		f.Name += t.text
		for p.at(lbracket) && p.next+1 < len(p.toks) && p.toks[p.next+1].kind == integer {
			p.refuse(p.tok().pos, "a condition on an array holds if any of its values satisfies it", "array indices are not supported")
			p.next += 2
			p.want(rbracket)
		}
		if !p.got(dot) {
			return f
		}
		f.Name += "."
	}
}
