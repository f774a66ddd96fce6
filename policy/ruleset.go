package policy

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
)

// How all rules are asked at once
//
// Most of what a rule says is about the process, and a process asks more than once.
// So the condition of each stage is cut in two for each document that it may be about:
// what rests on lasting fields (event.Field.Lasting) is asked once for each
// event.Process and kept with it, and what is left is asked of every request, if that
// can still make the rule match. Both are asked of all rules together, by an eql.Set.
//
// What is kept cannot grow stale. A Process does not change once rules have it; one
// that executes another program, or is adopted, is another event.Process. It is asked
// in a document that has nothing of the request, so that it cannot tell of it. And it
// is kept for one ruleSet and one Host, and asked anew for others.

// documentKinds are the documents that rules are asked about: the start of a process,
// its connection, and the request.
const documentKinds = event.RequestDecision + 1

// ruleSet is the rules of a policy, compiled together. It does not change; any
// goroutine may use it.
type ruleSet struct {
	rules  []*rule
	kinds  [documentKinds]kind
	first  []int // by rule, and one more: its first stage, among those that block of all rules
	askers sync.Pool
	nobody atomic.Pointer[settled] // what is settled where no process is known
}

// kind is the stages that may be about one kind of document.
type kind struct {
	lasting, rest *eql.Set
	of            []part // what the stages of both are
}

// part is one stage of a rule, about one kind of document.
type part struct {
	rule    int
	stage   int  // if it blocks, among those of all rules; else literal
	settled bool // nothing is left of it to ask of a request
}

// literal marks the stages of rules as they are written.
const literal = -1

func newRuleSet(rules []*rule) *ruleSet {
	rs := &ruleSet{rules: rules}
	for d := range documentKinds {
		var lasting, rest []*eql.Stage
		k := &rs.kinds[d]
		add := func(rule, stage int, s *eql.Stage) {
			first, second := s.Split(func(f eql.Field) bool { return event.Fields[f.Slot].Lasting(d) })
			lasting, rest = append(lasting, first), append(rest, second)
			k.of = append(k.of, part{rule, stage, len(second.Conjuncts()) == 0})
		}
		rs.first = []int{0}
		for i, r := range rules {
			n := rs.first[i]
			for _, s := range r.blocking {
				if slices.Contains(s.documents, d) {
					add(i, n, s.Stage)
				}
				n++
			}
			rs.first = append(rs.first, n)
			for _, s := range r.literal {
				// A sequence is shown whatever one of its stages matches.
				if r.Query.IsSequence() || slices.Contains(s.documents, d) {
					add(i, literal, s.Stage)
				}
			}
			if until := r.Query.Until(); until != nil {
				add(i, literal, until)
			}
		}
		k.lasting, k.rest = eql.NewSet(lasting...), eql.NewSet(rest...)
	}
	rs.askers.New = func() any {
		a := &asker{ruleSet: rs, stages: newBitset(rs.first[len(rules)]), matching: newBitset(len(rules)), latched: newBitset(len(rules))}
		for d := range rs.kinds {
			a.lasting[d], a.rest[d] = rs.kinds[d].lasting.NewMatcher(), rs.kinds[d].rest.NewMatcher()
		}
		return a
	}
	return rs
}

// asker is what it takes to ask a ruleSet: one for each goroutine that does.
type asker struct {
	*ruleSet
	lasting, rest [documentKinds]*eql.Matcher
	about         [documentKinds]document
	stages        bitset // that hold
	matching      bitset // rules
	latched       bitset // rules
	some          []int
	open          [documentKinds][]int
	hits          []literalHit
	fresh         []news
	matched       []*event.Process
}

func (rs *ruleSet) asker() *asker { return rs.askers.Get().(*asker) }

// done gives an asker back.
func (a *asker) done() {
	a.about = [documentKinds]document{}
	clear(a.fresh[:cap(a.fresh)])
	clear(a.matched[:cap(a.matched)])
	a.askers.Put(a)
}

// settled is what the rules say of one process, whatever it asks for.
type settled struct {
	rules    *ruleSet
	host     *event.Host
	image    imageID                // of the process, if there is one
	started  atomic.Pointer[memory] // that has been told of its start
	told     atomic.Bool            // an event tells of its start
	literal  [documentKinds][]int
	blocking [2]blocking // as the child of the process that forked it, and of the one that adopted it
}

// blocking is what is settled of the rules that block.
type blocking struct {
	rules  bitset // that match
	stages bitset // that hold
	// open are the parts whose rest is to be asked, of rules that are not settled.
	open [documentKinds][]int
}

// settled returns what is settled of a process, and keeps it with the process.
func (a *asker) settled(host *event.Host, subject *event.Process) *settled {
	if subject == nil {
		s := a.nobody.Load()
		if s == nil || s.host != host {
			s = a.settle(host, nil)
			a.nobody.Store(s)
		}
		return s
	}
	if s, ok := subject.Kept().(*settled); ok && s.rules == a.ruleSet && s.host == host {
		return s
	}
	s := a.settle(host, subject)
	s.image = imageOf(subject)
	subject.Keep(s)
	return s
}

// settle asks what rests on lasting fields.
func (a *asker) settle(host *event.Host, subject *event.Process) *settled {
	s := &settled{rules: a.ruleSet, host: host}
	ev := &event.Event{Host: host}
	for view := range s.blocking {
		adopted := view == 1
		if adopted && (subject == nil || subject.ParentNow == nil) {
			break
		}
		b := &s.blocking[view]
		b.rules, b.stages = newBitset(len(a.rules)), newBitset(a.first[len(a.rules)])
		possible := a.stages
		clear(possible)
		for d := range documentKinds {
			a.open[d] = a.open[d][:0]
			if d == event.ProcessStart && subject == nil {
				continue
			}
			a.about[d].View = event.View{Event: ev, Document: d, Subject: subject, Adopted: adopted}
			a.some = a.some[:0]
			for _, i := range a.lasting[d].Match(&a.about[d]) {
				switch p := &a.kinds[d].of[i]; {
				case p.stage == literal:
					a.some = append(a.some, i)
				case p.settled:
					b.stages.set(p.stage)
				default:
					possible.set(p.stage)
					a.open[d] = append(a.open[d], i)
				}
			}
			if !adopted {
				s.literal[d] = slices.Clone(a.some)
			}
		}
		possible.add(b.stages)
		for d := range b.open {
			b.open[d] = slices.Clone(slices.DeleteFunc(a.open[d], func(i int) bool {
				p := &a.kinds[d].of[i]
				return b.stages.has(p.stage) || !a.all(possible, p.rule)
			}))
		}
		for r := range a.rules {
			if a.all(b.stages, r) {
				b.rules.set(r)
			}
		}
	}
	return s
}

// all reports whether all stages of a rule are among these.
func (rs *ruleSet) all(stages bitset, rule int) bool {
	for n := rs.first[rule]; n < rs.first[rule+1]; n++ {
		if !stages.has(n) {
			return false
		}
	}
	return rs.first[rule] < rs.first[rule+1]
}

// blocks sets a.matching to the rules whose conditions all hold for one subject: of the
// process that owns the connection, whenever it started, as the child of the one that
// forked it or, if that is another, of the one that has adopted it; and of what it does
// now.
func (a *asker) blocks(ev *event.Event, subject *event.Process) {
	s := a.settled(ev.Host, subject)
	clear(a.matching)
	for view := range s.blocking {
		b := &s.blocking[view]
		if b.rules == nil {
			break
		}
		a.matching.add(b.rules)
		copy(a.stages, b.stages)
		for d, open := range b.open {
			if len(open) == 0 {
				continue
			}
			a.about[d].View = event.View{Event: ev, Document: event.Document(d), Subject: subject, Adopted: view == 1}
			for _, i := range a.rest[d].MatchOf(&a.about[d], open) {
				p := a.kinds[d].of[i]
				if a.stages.set(p.stage); a.all(a.stages, p.rule) {
					a.matching.set(p.rule)
				}
			}
		}
	}
}

// concerned reports whether a rule as it is written is about the start of a process.
// Of the process it may be told little, and so keeps nothing of the answer.
func (a *asker) concerned(ev *event.Event, subject *event.Process) bool {
	const d = event.ProcessStart
	a.about[d].View = event.View{Event: ev, Document: d, Subject: subject}
	a.some = a.some[:0]
	for _, i := range a.lasting[d].Match(&a.about[d]) {
		if a.kinds[d].of[i].stage == literal {
			a.some = append(a.some, i)
		}
	}
	return len(a.some) > 0 && len(a.rest[d].MatchOf(&a.about[d], a.some)) > 0
}

// literalHit is a rule as it is written, some stage of which matches a document.
type literalHit struct {
	rule, subject int
	document      event.Document
}

// written adds to a.hits what rules as they are written see in the new documents of a
// subject.
func (a *asker) written(m *memory, ev *event.Event, at int, n *news) {
	for d, added := range n.adds {
		if !added || len(n.literal[d]) == 0 {
			continue
		}
		a.about[d].View = event.View{Event: ev, Document: event.Document(d), Subject: n.subject}
		for _, i := range a.rest[d].MatchOf(&a.about[d], n.literal[d]) {
			h := literalHit{a.kinds[d].of[i].rule, at, event.Document(d)}
			if event.Document(d) == event.ProcessStart && m.since[h.rule] <= n.told {
				continue // it was told under an earlier policy
			}
			if k := len(a.hits); k == 0 || a.hits[k-1] != h {
				a.hits = append(a.hits, h)
			}
		}
	}
}
