package policy

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/firstseen"
)

// Engine applies the present policy. Its methods may be called from any
// goroutine.
type Engine struct {
	state     atomic.Pointer[state]
	mode      atomic.Uint32
	decisions atomic.Pointer[Decisions]
	terms     *firstseen.Store // what rules of the type new_terms have seen

	mu   sync.Mutex                    // guards told
	told remembered[imageID, struct{}] // process images whose start an event tells of
}

// state is a policy with what its rules remember.
type state struct {
	*Policy
	memory *memory
}

// NewEngine makes an Engine with a policy, in the mode that it asks for.
func NewEngine(p *Policy) *Engine {
	e := &Engine{terms: firstseen.New()}
	e.SetPolicy(p)
	e.SetMode(p.Mode)
	return e
}

// SetPolicy replaces the policy, and leaves the mode as it is. A rule that is in both,
// with the same text and action, goes on with what it remembers: the sequences that
// have begun, the processes that it has blocked. Others begin anew. It must not be
// called by two at once.
func (e *Engine) SetPolicy(p *Policy) {
	e.terms.Rules(p.windows())
	m := newMemory(p, e.terms)
	if old := e.state.Load(); old != nil {
		m.inherit(p, old)
	}
	e.state.Store(&state{p, m})
}

// Policy is the present policy.
func (e *Engine) Policy() *Policy { return e.state.Load().Policy }

// Mode is the present mode.
func (e *Engine) Mode() Mode { return Mode(e.mode.Load()) }

// SetMode changes the mode alone.
func (e *Engine) SetMode(m Mode) { e.mode.Store(uint32(m)) }

// Decisions are those of operators that are judged by.
func (e *Engine) Decisions() *Decisions { return e.decisions.Load() }

// SetDecisions replaces them all at once.
func (e *Engine) SetDecisions(ds *Decisions) { e.decisions.Store(ds) }

// Evicted is how often the sequences of the present policy have given something up that
// they were waiting with, because there was too much (eql.Machine.Evicted).
func (e *Engine) Evicted() (n uint64) {
	for _, m := range e.state.Load().memory.machines {
		if m != nil {
			m.mu.Lock()
			n += m.Machine.Evicted()
			m.mu.Unlock()
		}
	}
	return n
}

// Decisive reports whether policy may refuse a request of this kind, so that
// it must be known for certain who asks.
func (e *Engine) Decisive(q *event.Request) bool {
	if q.Guarded || e.Decisions().deny() {
		return true
	}
	return e.Policy().decisive[q.Class]
}

// stage is one stage of a rule with the documents that it may be about.
type stage struct {
	*eql.Stage
	documents []event.Document
	rests     event.Gaps // facts that its conditions look at
}

func stages(q *eql.Query) []*stage {
	var all []*stage
	for _, s := range q.Stages() {
		category, any := s.Category()
		st := &stage{Stage: s}
		for _, f := range s.Fields() {
			st.rests |= event.Fields[f.Slot].Rests()
		}
		if any || category == "process" {
			st.documents = append(st.documents, event.ProcessStart)
		}
		if any || category == "network" {
			st.documents = append(st.documents, event.ConnectionAttempt, event.RequestDecision)
		}
		all = append(all, st)
	}
	return all
}

// subjects are those who are judged: nobody, if nobody is known.
func subjects(ev *event.Event) []*event.Process {
	if len(ev.Subjects) == 0 {
		return nobody
	}
	return ev.Subjects
}

var nobody = []*event.Process{nil}

// Judge decides about an event and completes its Decision. The subject on whom
// it turned comes first. It may be called again when more is known. The mode is the one
// that the Decision has, if any: what becomes of a request was settled when it came, and
// another mode since then does not change what its record says.
func (e *Engine) Judge(ev *event.Event) {
	mode := ev.Decision.Mode
	if mode == "" {
		mode = e.Mode().String()
	}
	ev.Decision = event.Decision{Mode: mode}
	ev.Decision.WouldBe = e.state.Load().outcome(ev, e.Decisions())
	if ev.Attribution.Unawaited && ev.Decision.WouldBe == event.Allow && ev.Request.Guarded {
		ev.Decision.Reason = strings.TrimPrefix(ev.Decision.Reason+"; the client left before every process was searched, for which enforce mode makes it wait", "; ")
	}
	if mode == Enforce.String() {
		ev.Decision.Verdict = ev.Decision.WouldBe
	}
}

// outcome is the verdict of enforce mode. The order of the reasons: what cannot be
// read; a decision that denies, or a deny; a decision that allows, or a grant; a rule
// that blocks; nobody known; the posture of the class.
func (p *state) outcome(ev *event.Event, decisions *Decisions) event.Verdict {
	d, q := &ev.Decision, &ev.Request
	ev.Token.Scope = p.tokenScope
	if q.Malformed != "" {
		d.Reason = q.Malformed
		return event.Deny
	}
	var blocked *event.Match
	how := ""
	a := p.set.asker()
	defer a.done()
	var matches []event.Match // which rules do not see before all are asked
	for _, subject := range subjects(ev) {
		a.blocks(ev, subject)
		p.memory.latched(subject, a.latched)
		for i := range a.matching.or(a.latched) {
			r := p.rules[i]
			if r.NewTerms != nil && !a.latched.has(i) && !p.memory.novel(r, ev, subject) {
				continue
			}
			m := event.Match{Rule: &r.Rule.Rule, Subject: subject, Action: r.on(q).String(), Bound: true}
			matches = append(matches, m)
			if how == "" && m.Action == actionNames[Block] {
				if how = "matches"; !a.matching.has(i) {
					how = "has blocked before"
				}
			}
		}
	}
	d.Matches = matches
	for i := range d.Matches {
		if d.Matches[i].Action == actionNames[Block] {
			blocked = &d.Matches[i]
			break
		}
	}
	if by, subject := decisions.denies(ev); by != nil {
		d.Operator, d.Reason = by.ID, by.because
		p.first(ev, subject)
		return event.Deny
	}
	for _, subject := range subjects(ev) {
		if deny := p.denied.find(subject, ev); deny != nil {
			d.Deny = deny.Name
			d.Reason = fmt.Sprintf("denied by %q: %s", deny.Name, deny.Reason)
			p.first(ev, subject)
			return event.Deny
		}
	}
	if p.allCovered(ev, decisions) {
		return event.Allow
	}
	switch {
	case blocked != nil:
		d.Rule, d.Latched = blocked.Rule, how != "matches"
		d.Reason = "rule " + strconv.Quote(blocked.Rule.Name) + " " + how + " " + describe(blocked.Subject)
		p.first(ev, blocked.Subject)
		return event.Deny
	case !q.Guarded && p.posture(q) == Default:
		return event.Allow
	case len(ev.Subjects) == 0:
		d.Reason = unattributed + ev.Attribution.Reason
		return event.Deny
	case !ev.Attribution.Sufficient():
		d.Reason = unattributed + "somebody else may hold the connection: " + ev.Attribution.Reason
		return event.Deny
	case p.posture(q) == Strict:
		d.Reason = postureStrict + "no grant covers " + describe(ev.Subjects[0])
		return event.Deny
	}
	return event.Allow
}

// Final reports whether a judged event is refused whatever else may be found out
// about who asks: a decision or a deny is about one of those who are known, or a rule
// blocks one whom neither a decision nor a grant covers.
func (e *Engine) Final(ev *event.Event) bool {
	p, decisions := e.Policy(), e.Decisions()
	if ev.Decision.WouldBe != event.Deny {
		return false
	}
	return ev.Decision.Operator != "" || ev.Decision.Deny != "" || ev.Decision.Rule != nil && slices.ContainsFunc(ev.Subjects, func(subject *event.Process) bool {
		_, ok := p.Granted(subject, ev)
		return !ok && decisions.allows(subject, ev.Time) == nil
	})
}

// allCovered reports whether every subject has a decision that allows it or a grant,
// on sufficient evidence, and says so in the event.
func (p *Policy) allCovered(ev *event.Event, decisions *Decisions) bool {
	if !ev.Attribution.Sufficient() || len(ev.Subjects) == 0 {
		return false
	}
	var decided *standing
	var grants []string
	for _, subject := range ev.Subjects {
		if by := decisions.allows(subject, ev.Time); by != nil {
			decided = by
			continue
		}
		name, ok := p.Granted(subject, ev)
		if !ok {
			return false
		}
		grants = append(grants, name)
	}
	d := &ev.Decision
	if d.Grant = strings.Join(grants, ","); d.Grant != "" {
		d.Reason = "granted by " + d.Grant
	}
	if decided != nil {
		d.Operator, d.Reason = decided.ID, decided.because
	}
	return true
}

// first puts the subject that decided to the front.
func (p *Policy) first(ev *event.Event, subject *event.Process) {
	for i, s := range ev.Subjects {
		if s == subject {
			ev.Subjects[0], ev.Subjects[i] = ev.Subjects[i], ev.Subjects[0]
			if i < len(ev.Roles) {
				ev.Roles[0], ev.Roles[i] = ev.Roles[i], ev.Roles[0]
			}
		}
	}
}

func describe(p *event.Process) string {
	if p == nil {
		return "a process that is not known"
	}
	parent := ""
	if p.Parent != nil {
		parent = ", parent " + p.Parent.Executable
	}
	return p.Executable + " (pid " + strconv.FormatInt(p.PID, 10) + parent + ")"
}

// Observe gives a judged event to the rules as they are written, settles which
// matches raise an alert, and remembers whom a rule has blocked. The event then tells of
// the processes whose start no event has told of: its subjects, and those whose start is
// a part of what a sequence has matched. It is called once for each event, after the
// last Judge.
func (e *Engine) Observe(ev *event.Event) {
	p := e.state.Load()
	m, d := p.memory, &ev.Decision
	a := p.set.asker()
	defer a.done()
	all := a.news(m, ev)
	for h := range a.literally(m, ev, all) {
		r, subject := p.rules[h.rule], all[h.subject].subject
		k := 0
		for k < len(d.Matches) && (d.Matches[k].Rule != &r.Rule.Rule || d.Matches[k].Subject != subject) {
			k++
		}
		if k == len(d.Matches) {
			d.Matches = append(d.Matches, event.Match{Rule: &r.Rule.Rule, Subject: subject, Action: r.on(&ev.Request).String()})
		}
		d.Matches[k].Literal = true
	}
	m.seen(all)
	for i := range all {
		e.tell(a, ev, all[i].subject)
	}
	e.tell(a, ev, a.matched...)
	p.settle(ev)
}

// ObserveAgain is Observe for an event that was observed, and then judged once more because
// its subjects have changed. Rules as they are written are not given it a second time; what
// they had matched, as the decision before has it, has still happened.
func (e *Engine) ObserveAgain(ev *event.Event, before event.Decision) {
	p, d := e.state.Load(), &ev.Decision
	a := p.set.asker()
	defer a.done()
	for _, was := range before.Matches {
		if !was.Literal {
			continue
		}
		k := slices.IndexFunc(d.Matches, func(m event.Match) bool { return m.Rule == was.Rule && m.Subject == was.Subject })
		if k < 0 {
			d.Matches = append(d.Matches, was)
			continue
		}
		d.Matches[k].Literal = true
	}
	e.tell(a, ev, ev.Subjects...)
	p.settle(ev)
}

// settle says which matches raise an alert, and remembers whom a rule has blocked.
func (p *state) settle(ev *event.Event) {
	d := &ev.Decision
	for k := range d.Matches {
		match := &d.Matches[k]
		if d.WouldBe == event.Deny && match.Bound && match.Rule == d.Rule && match.Action == actionNames[Block] {
			p.latch(match)
		}
		r := p.find(match.Rule)
		if r == nil || match.Action == actionNames[Log] {
			continue
		}
		blocked := d.Verdict == event.Deny && match.Bound && match.Action == actionNames[Block]
		match.Alert = match.Literal || blocked || match.Bound && r.action.AlertOn == Either
	}
}

// Concerns reports whether a rule is about a start of a program like this one. Of an
// event of the kind event.Started it needs the subject, and may be told little of
// that: what is not known is asked as if it were not there.
func (e *Engine) Concerns(ev *event.Event) bool {
	a := e.Policy().set.asker()
	defer a.done()
	return a.concerned(ev, ev.Subjects[0])
}

// ObserveStart gives the start of a program to the rules as they are written, so that
// a sequence knows of it before, or without, a request of the same process. It reports
// whether one raises an alert, and completes the event with it.
func (e *Engine) ObserveStart(ev *event.Event) (alert bool) {
	p := e.state.Load()
	m, d := p.memory, &ev.Decision
	d.Mode = e.Mode().String()
	a := p.set.asker()
	defer a.done()
	all := a.news(m, ev)
	if !all[0].adds[event.ProcessStart] {
		return false // a request of it was faster
	}
	for h := range a.literally(m, ev, all) {
		r := p.rules[h.rule]
		action := r.on(&ev.Request)
		d.Matches = append(d.Matches, event.Match{Rule: &r.Rule.Rule, Subject: all[0].subject, Action: action.String(), Literal: true, Alert: action != Log})
		alert = alert || action != Log
	}
	m.seen(all)
	if alert {
		e.tell(a, ev, all[0].subject)
		e.tell(a, ev, a.matched...)
	}
	return alert
}

// tell makes the event tell of processes of which none has told. One whose time is not
// known cannot be put in order.
func (e *Engine) tell(a *asker, ev *event.Event, processes ...*event.Process) {
	for _, p := range processes {
		if p == nil || p.Start.IsZero() && p.Executed.IsZero() {
			continue
		}
		s := a.settled(ev.Host, p)
		if s.told.Load() {
			continue
		}
		e.mu.Lock()
		if !e.told.has(s.image) {
			e.told.put(s.image, struct{}{})
			ev.Starts = append(ev.Starts, p)
		}
		e.mu.Unlock()
		s.told.Store(true)
	}
}

func (p *Policy) find(r *event.Rule) *rule {
	for _, own := range p.rules {
		if &own.Rule.Rule == r {
			return own
		}
	}
	return nil
}

const (
	// maxRemembered bounds the processes whose start the rules have seen, and
	// those that a rule has blocked. When one more comes, the oldest is
	// forgotten: it is judged anew then, once it is another event.Process.
	maxRemembered = 16 << 10
	// maxChains bounds what one sequence remembers: processes that started and
	// whose connection may follow within the span. Each keeps its event.
	maxChains = 1 << 10
)

// memory is what rules remember from one event to the next.
type memory struct {
	machines []*machine       // nil of a rule that is no sequence
	terms    *firstseen.Store // of the engine
	policy   int              // how many there were before
	since    []int            // by rule: the policy that brought it

	mu      sync.Mutex                   // guards the following
	swept   time.Time                    // when sequences last forgot what is too old
	started remembered[imageID, int]     // process images that rules have seen start, and those of which policy
	blocked remembered[string, bitset]   // rules that have blocked a process, by its entity ID
	doubted remembered[string, struct{}] // processes that a rule may have blocked, for all that was read of them

	latches atomic.Bool // whether anything is in blocked
}

type machine struct {
	mu sync.Mutex
	*eql.Machine
}

func newMemory(p *Policy, terms *firstseen.Store) *memory {
	m := &memory{machines: make([]*machine, len(p.rules)), terms: terms, since: make([]int, len(p.rules))}
	for i, r := range p.rules {
		if r.Query.IsSequence() {
			m.machines[i] = &machine{Machine: r.Query.NewMachine(maxChains)}
		}
	}
	return m
}

// news is what an event tells the rules of one subject that they have not been told
// before.
type news struct {
	subject *event.Process
	*settled
	adds [documentKinds]bool // which of the documents are new
	told int                 // the last policy whose rules know of its start; -1 if none does
}

// news lists what an event adds: the start of a process when it is first seen, and
// of a request its connection once, and itself. It is valid until the next call.
func (a *asker) news(m *memory, ev *event.Event) []news {
	a.fresh = a.fresh[:0]
	asked := ev.Kind == event.Asked
	for _, subject := range subjects(ev) {
		n := news{subject: subject, settled: a.settled(ev.Host, subject), told: m.policy}
		if subject != nil && n.started.Load() != m {
			if n.told = m.told(n.image); n.told == m.policy {
				n.started.Store(m)
			}
			n.adds[event.ProcessStart] = n.told < m.policy
		}
		n.adds[event.ConnectionAttempt] = asked && ev.Connection.First
		n.adds[event.RequestDecision] = asked
		a.fresh = append(a.fresh, n)
	}
	return a.fresh
}

// literally lists the rules that match as they are written, each once for a subject,
// in order. Sequences are told of what one of their stages matches. Whose start they have
// matched is in a.matched when all are listed.
func (a *asker) literally(m *memory, ev *event.Event, all []news) iter.Seq[literalHit] {
	m.sweep(ev.Time)
	a.hits, a.matched = a.hits[:0], a.matched[:0]
	for j := range all {
		a.written(m, ev, j, &all[j])
	}
	slices.SortFunc(a.hits, func(x, y literalHit) int {
		return cmp.Or(x.rule-y.rule, x.subject-y.subject, int(x.document)-int(y.document))
	})
	return func(yield func(literalHit) bool) {
		matched := false
		for i, h := range a.hits {
			d := &document{event.View{Event: ev, Document: h.document, Subject: all[h.subject].subject}}
			switch s, r := m.machines[h.rule], a.rules[h.rule]; {
			case s != nil:
				for _, match := range s.observe(d) { // and keeps it while it waits for more
					matched = true
					for _, e := range match.Events {
						if of, ok := e.(*document); ok && of.Document == event.ProcessStart {
							a.matched = append(a.matched, of.Subject)
						}
					}
				}
			case r.NewTerms != nil:
				matched = m.observeTerms(r, d) || matched
			default:
				matched = true
			}
			if next := i + 1; next < len(a.hits) && a.hits[next].rule == h.rule && a.hits[next].subject == h.subject {
				continue
			}
			if matched && !yield(h) {
				return
			}
			matched = false
		}
	}
}

func (m *machine) observe(d *document) []eql.Match {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.Observe(d)
}

// sweepEvery is how long a sequence keeps what exceeds its span, if nothing comes that
// one of its stages matches. It is a matter of memory alone.
const sweepEvery = time.Second

func (m *memory) sweep(now time.Time) {
	m.mu.Lock()
	due := now.Sub(m.swept) >= sweepEvery
	if due {
		m.swept = now
	}
	m.mu.Unlock()
	if !due {
		return
	}
	for _, s := range m.machines {
		if s != nil {
			s.mu.Lock()
			s.Tick(now) // decides nothing: no rule ends in a missing event
			s.mu.Unlock()
		}
	}
}

// imageOf names a process in one image. The command line can be long and is the
// process's own choice, so that a digest is kept instead.
func imageOf(p *event.Process) imageID {
	text := make([]byte, 0, 512) // not allocated, if that is enough
	text = append(append(text, p.EntityID...), 0)
	text = append(append(append(text, p.Executable...), 0), p.CommandLine...)
	digest := sha256.Sum256(text)
	return imageID(digest[:])
}

// imageID is half a digest, since thousands are kept: who finds two programs of his own
// that have the same has gained nothing.
type imageID [16]byte

// told is the last policy whose rules know that a process has started, or -1.
func (m *memory) told(image imageID) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started.has(image) {
		return -1
	}
	return m.started.keys[image]
}

// seen remembers the subjects of an event.
func (m *memory) seen(all []news) {
	for i := range all {
		if n := &all[i]; n.adds[event.ProcessStart] {
			m.mu.Lock()
			m.started.put(n.image, m.policy)
			m.mu.Unlock()
			n.started.Store(m)
		}
	}
}

// latch keeps a block for the life of the process, so that nothing it does
// to its own facts undoes it. A rule that looks at requests alone says nothing
// about the process: somebody else may have forged one of them.
func (p *state) latch(match *event.Match) {
	if match.Subject == nil || match.Subject.EntityID == "" {
		return
	}
	for i, r := range p.rules {
		if &r.Rule.Rule == match.Rule && r.aboutProcess {
			p.memory.latch(i, len(p.rules), match.Subject.EntityID)
		}
	}
}

func (m *memory) latch(rule, of int, entity string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.blocked.has(entity) {
		m.blocked.put(entity, newBitset(of))
		m.latches.Store(true)
	}
	m.blocked.keys[entity].set(rule)
}

// latched sets to to the rules that have blocked a process before.
func (m *memory) latched(p *event.Process, to bitset) {
	clear(to)
	if p == nil || !m.latches.Load() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	to.add(m.blocked.keys[p.EntityID])
}

// hasBlocked reports whether a rule has blocked a process before.
func (m *memory) hasBlocked(r *rule, rules []*rule, p *event.Process) bool {
	if p == nil || !m.latches.Load() {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	of, ok := m.blocked.keys[p.EntityID]
	return ok && of.has(slices.Index(rules, r))
}

// remembered is a map that forgets its oldest keys.
type remembered[K comparable, V any] struct {
	max   int // maxRemembered if 0
	keys  map[K]V
	order []K
	next  int
}

func (r *remembered[K, V]) has(key K) bool {
	_, ok := r.keys[key]
	return ok
}

// put sets what belongs to a key.
func (r *remembered[K, V]) put(key K, value V) {
	if r.has(key) {
		r.keys[key] = value
		return
	}
	if r.keys == nil {
		r.keys = map[K]V{}
	}
	if len(r.order) < cmp.Or(r.max, maxRemembered) {
		r.order = append(r.order, key)
	} else {
		delete(r.keys, r.order[r.next])
		r.order[r.next] = key
		r.next = (r.next + 1) % len(r.order)
	}
	r.keys[key] = value
}
