// Package eql judges events by queries written in EQL, with the semantics of
// Elasticsearch.
//
// A query is compiled once, against a Schema that says which fields events have,
// and is then immutable; any number of goroutines may use it. A Stage of it
// answers whether one event matches; a Set asks many stages about it at once. A
// Machine holds what a sequence remembers between events: make one for each stream
// of events and feed it from one goroutine. Judging an event never fails. It takes
// time in proportion to the rule and to the length of the values that the rule
// reads, and where nothing matches it allocates nothing (concat and string, which
// make new strings, excepted).
//
//	tree, err := syntax.Parse("curl.eql", src)
//	query, err := eql.Compile(tree, schema)
//	machine := query.NewMachine(0)
//	for _, match := range machine.Observe(event) { ... }
//
// Where a field has no value, or several, the answer is Elasticsearch's, which is
// not python-eql's: compile.go explains it. In short, every comparison with a
// missing value does not hold, its negation therefore does, and a comparison
// with an array holds if it does for any of the values.
//
// Differences to Elasticsearch, all of them intended:
//
//   - An unknown field marked optional (?name) is a warning, and is treated as a
//     field that this event lacks; only == and != have null for it, as there.
//     Elasticsearch lets it silence the whole rule.
//   - number("x"), division by zero and integer overflow are null rather than
//     failures. Where between finds nothing it is null, which is what
//     Elasticsearch's tests expect; its manual says "".
//   - Letters are folded in ASCII only, everywhere.
//   - Events are taken as they come, not sorted; Machine says what that means for
//     a late one.
//   - An atom over several long arrays is tried a million times and then given up.
//   - in takes several fields: "x" in (a, b). Otherwise, as there, a field is not
//     compared with another.
//   - There are no versions, and no dates relative to now.
//
// Samples and pipes need to see the end of a stream. Compile checks them like
// everything else and then refuses them with an error that is
// errors.ErrUnsupported, because nobody can be kept waiting for them inline;
// CompileBatch takes them, for a Batch. That an event is missing at the end of a
// sequence is known when its time is over: see Query.Late.
//
// This package knows no schema. It is the wrong tool for queries in KQL or ES|QL.
package eql

import (
	"cmp"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Type is what kind of values a field has.
type Type uint8

// The types of fields.
const (
	Keyword Type = iota // a string, compared as a whole
	IP
	Long
	Double
	Boolean
	Date

	null // only of expressions: the literal, and unknown optional fields
)

func (t Type) String() string {
	return [...]string{"keyword", "ip", "long", "double", "boolean", "date", "null"}[t]
}

// Field is one field of the events that a query is asked about.
type Field struct {
	Name string
	Type Type
	Slot int // the number by which an Event knows it; negative for one that no event has, which is worth a warning unless it is optional
}

// A Schema says which fields there are.
type Schema interface {
	// Field finds a field by its full name.
	Field(name string) (Field, bool)
	// Category is the keyword field that "process where ..." tests.
	Category() Field
	// Names lists the fields, for suggestions.
	Names() iter.Seq[string]
}

// An Event is what a query is asked about. A Machine keeps the events of its
// unfinished chains, so an Event must not change once it has been observed.
type Event interface {
	// Value is the value of the field with this slot. It is called once for each
	// condition, so it should be as cheap as a look into an array.
	Value(slot int) Value
	// Time is when it happened.
	Time() time.Time
}

// Compile checks a query against a schema and translates it. Its error is a
// syntax.ErrorList of all that is wrong.
func Compile(tree *syntax.Query, schema Schema) (*Query, error) {
	c := check(tree, schema)
	if len(c.errs) == 0 {
		c.refuseBatch()
	}
	if s, ok := tree.Body.(*syntax.Sequence); ok && s.MaxSpan == 0 {
		c.warnf(s.Pos, "add with maxspan=...", "a sequence without maxspan may wait for ever for its next event")
	}
	return c.query()
}

func (c *compiler) query() (*Query, error) {
	if len(c.errs) > 0 {
		c.errs.Sort()
		return nil, c.errs
	}
	c.warnings.Sort()
	q := &Query{warnings: c.warnings, pipes: c.tree.Pipes}
	switch body := c.tree.Body.(type) {
	case *syntax.Event:
		q.stages = []*Stage{c.stage(body, nil)}
		q.slots = q.stages
	case *syntax.Sequence:
		q.sequence, q.maxSpan = true, body.MaxSpan
		c.items(q, body.By, body.Items)
		if body.Until != nil {
			q.until = c.stage(body.Until.Event, slices.Concat(body.By, body.Until.By))
		}
	case *syntax.Sample:
		q.sample = true
		c.items(q, body.By, body.Items)
	}
	q.arrange()
	return q, nil
}

func (c *compiler) items(q *Query, by []*syntax.Field, items []*syntax.Item) {
	for _, it := range items {
		s := c.stage(it.Event, slices.Concat(by, it.By))
		s.missing = it.Missing
		q.stages = append(q.stages, s)
		for range it.Runs {
			q.slots = append(q.slots, s)
		}
	}
}

// arrange separates the missing events from the others.
func (q *Query) arrange() {
	for _, s := range q.slots {
		if s.missing {
			q.missing = append(q.missing, hole{s, len(q.steps)})
		} else {
			q.steps = append(q.steps, s)
		}
	}
}

// Query is a compiled query.
type Query struct {
	stages   []*Stage
	slots    []*Stage // stages, each as often as it runs
	steps    []*Stage // the slots without those that ought to be missing
	missing  []hole
	until    *Stage
	sequence bool
	sample   bool
	maxSpan  time.Duration
	pipes    []*syntax.Pipe
	warnings syntax.ErrorList
}

// IsSequence reports whether q is a sequence rather than a condition on single
// events.
func (q *Query) IsSequence() bool { return q.sequence }

// IsSample reports whether q is a sample, events with equal keys in any order.
func (q *Query) IsSample() bool { return q.sample }

// Late reports whether q is a sequence that ends in a missing event. Its matches
// are known only when its span is over: nothing can be stopped by them.
func (q *Query) Late() bool {
	return len(q.missing) > 0 && q.missing[len(q.missing)-1].after == len(q.steps)
}

// Stages are the events that q describes, as written: one unless q is a sequence
// or a sample, and one for "with runs=3" too.
func (q *Query) Stages() []*Stage { return slices.Clone(q.stages) }

// Counts reports whether a sequence has events "with runs", which say more together
// than each by itself.
func (q *Query) Counts() bool { return len(q.slots) > len(q.stages) }

// Until is the event that ends the chains of a sequence, or nil.
func (q *Query) Until() *Stage { return q.until }

// MaxSpan is how long a sequence may take, inclusive; zero means for ever.
func (q *Query) MaxSpan() time.Duration { return q.maxSpan }

// Warnings are what the author of the query should know although it works: fields
// that no event has, conditions that are never true, sequences without an end.
func (q *Query) Warnings() []*syntax.Error { return slices.Clone(q.warnings) }

// A Stage is one event that a query describes. Its methods may be called from
// any goroutine.
type Stage struct {
	event     *syntax.Event
	category  Field // that inCat reads, unless any will do
	inCat     pred
	conjuncts []Conjunct // as written
	match     pred       // all of them, the cheapest first
	keys      []Field
	optional  []bool // which of the keys may be missing
	fields    []Field
	missing   bool
}

// Missing reports whether a sequence has the stage as ![...]: as an event that
// must not come.
func (s *Stage) Missing() bool { return s.missing }

// Category is the category that the event must have, or any.
func (s *Stage) Category() (name string, any bool) { return s.event.Category, s.event.Any }

// Fields are the fields that the stage reads, its keys included and the category
// not, by name. Those that no event has are not among them.
func (s *Stage) Fields() []Field { return slices.Clone(s.fields) }

// Match reports whether an event has the category and satisfies the condition.
func (s *Stage) Match(e Event) bool { return s.inCat(e) && s.match(e) }

// Known is Match for an event of which not all fields are known. The category is.
func (s *Stage) Known(e Event, known func(Field) bool) Truth {
	if !s.inCat(e) {
		return False
	}
	all := True
	for _, c := range s.conjuncts {
		all = min(all, c.cond.truth(e, known))
	}
	return all
}

// Conjuncts are the parts of the condition that must all hold, as written: the
// operands of its "and", and of those among them that are joined by "and"
// themselves. The category is not one.
func (s *Stage) Conjuncts() []Conjunct { return slices.Clone(s.conjuncts) }

// Plan is the conjuncts in the order in which Match asks them: the cheapest first, and
// the next only while all hold.
func (s *Stage) Plan() []Conjunct {
	return slices.SortedStableFunc(slices.Values(s.conjuncts), func(a, b Conjunct) int { return cmp.Compare(cost(a.expr), cost(b.expr)) })
}

// Conjunct is a part of a condition, for those who want to know which part an
// event fails.
type Conjunct struct {
	syntax.Pos
	Text  string // canonical
	match pred
	cond  *cond
	expr  syntax.Expr
}

// Match reports whether an event satisfies the part.
func (c Conjunct) Match(e Event) bool { return c.match(e) }

// Fields are the fields that the part reads.
func (c Conjunct) Fields() []Field { return c.cond.fields(nil) }

func (c *compiler) stage(e *syntax.Event, keys []*syntax.Field) *Stage {
	s := &Stage{event: e, inCat: always}
	if !e.Any {
		s.category = c.schema.Category()
		a := &atom{}
		s.inCat = a.on(s.category, test{str: func(v string) bool { return v == e.Category }}, &cond{atom: a}).pred()
	}
	for _, x := range conjuncts(e.Where, nil) {
		k := c.holds(x)
		s.conjuncts = append(s.conjuncts, Conjunct{x.Position(), syntax.Format(x), k.pred(), k, x})
	}
	s.match = s.all()
	for _, k := range keys {
		s.keys = append(s.keys, c.fields[k])
		s.optional = append(s.optional, k.Optional)
		s.read(c.fields[k])
	}
	syntax.Walk(e.Where, func(n syntax.Node) bool {
		if f, ok := n.(*syntax.Field); ok {
			s.read(c.fields[f])
		}
		return true
	})
	return s
}

func (s *Stage) read(f Field) {
	i, found := slices.BinarySearchFunc(s.fields, f.Name, func(f Field, name string) int { return strings.Compare(f.Name, name) })
	if f.Slot >= 0 && !found {
		s.fields = slices.Insert(s.fields, i, f)
	}
}

// all joins the conjuncts.
func (s *Stage) all() pred {
	k := &cond{op: opAnd}
	for _, c := range s.conjuncts {
		k.of = append(k.of, c.cond)
	}
	slices.SortStableFunc(k.of, cheaper)
	return k.pred()
}

// conjuncts appends to list the conditions that e requires all of.
func conjuncts(e syntax.Expr, list []syntax.Expr) []syntax.Expr {
	l, ok := e.(*syntax.Logic)
	if !ok || l.Op != syntax.And {
		return append(list, e)
	}
	for _, x := range l.X {
		list = conjuncts(x, list)
	}
	return list
}

// Split cuts the condition of a stage in two: the category with the conjuncts that
// read no fields but those that fixed reports, and what is left, which any category
// has; neither has the keys. An event matches the stage if it matches both parts. The
// first can be asked once about many events that have these fields in common.
func (s *Stage) Split(fixed func(Field) bool) (first, second *Stage) {
	first = &Stage{event: s.event, category: s.category, inCat: s.inCat}
	second = &Stage{event: &syntax.Event{Pos: s.event.Pos, Any: true}, inCat: always}
	for _, c := range s.conjuncts {
		part := first
		if slices.ContainsFunc(c.cond.fields(nil), func(f Field) bool { return !fixed(f) }) {
			part = second
		}
		part.conjuncts = append(part.conjuncts, c)
		for _, f := range c.cond.fields(nil) {
			part.read(f)
		}
	}
	first.match, second.match = first.all(), second.all()
	return first, second
}
