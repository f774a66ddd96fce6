package policy

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/firstseen"
)

// Engine applies the present policy. Its methods may be called from any
// goroutine.
type Engine struct {
	state atomic.Pointer[state]
	mode  atomic.Uint32
	terms *firstseen.Store // what rules of the type new_terms have seen
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
	return e
}

// SetPolicy replaces the policy and its mode. What sequences and latches
// remember begins anew, because it is about other rules; what a rule has seen for
// the first time it goes on to know.
func (e *Engine) SetPolicy(p *Policy) {
	e.terms.Rules(p.windows())
	e.state.Store(&state{p, newMemory(p, e.terms)})
	e.mode.Store(uint32(p.Mode))
}

// Policy is the present policy.
func (e *Engine) Policy() *Policy { return e.state.Load().Policy }

// Mode is the present mode.
func (e *Engine) Mode() Mode { return Mode(e.mode.Load()) }

// SetMode changes the mode alone.
func (e *Engine) SetMode(m Mode) { e.mode.Store(uint32(m)) }

// Decisive reports whether policy may refuse a request of this kind, so that
// it must be known for certain who asks.
func (e *Engine) Decisive(q *event.Request) bool {
	if q.Guarded {
		return true
	}
	for _, r := range e.Policy().rules {
		if r.on(q) == Block {
			return true
		}
	}
	return false
}

// stage is one stage of a rule with the documents that it may be about.
type stage struct {
	*eql.Stage
	documents []event.Document
}

func stages(q *eql.Query) []*stage {
	var all []*stage
	for _, s := range q.Stages() {
		category, any := s.Category()
		st := &stage{Stage: s}
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

// documents are what a rule may be asked about a request of one subject: the
// start of the process, its connection, and the request.
type documents [event.RequestDecision + 1]document

func documentsOf(ev *event.Event, subject *event.Process) documents {
	var all documents
	for d := range all {
		all[d].View = event.View{Event: ev, Document: event.Document(d), Subject: subject}
	}
	return all
}

// holds reports whether the conditions of all stages hold for one subject: of
// the process that owns the connection, whenever it started, and of what it does
// now.
func holds(stages []*stage, about *documents) bool {
	for _, s := range stages {
		if !s.holds(about) {
			return false
		}
	}
	return len(stages) > 0
}

// blocks reports whether a rule's conditions hold for a subject as the child of the
// process that forked it or, if that is another, of the one that has adopted it.
func (r *rule) blocks(about *documents) bool {
	if holds(r.blocking, about) {
		return true
	}
	if s := about[event.ProcessStart].Subject; s == nil || s.ParentNow == nil {
		return false
	}
	about.adopt(true)
	defer about.adopt(false)
	return holds(r.blocking, about)
}

func (d *documents) adopt(adopted bool) {
	for i := range d {
		d[i].Adopted = adopted
	}
}

func (s *stage) holds(about *documents) bool {
	for _, d := range s.documents {
		if (d != event.ProcessStart || about[d].Subject != nil) && s.Match(&about[d]) {
			return true
		}
	}
	return false
}

// subjects are those who are judged: nobody, if nobody is known.
func subjects(ev *event.Event) []*event.Process {
	if len(ev.Subjects) == 0 {
		return []*event.Process{nil}
	}
	return ev.Subjects
}

// Judge decides about an event and completes its Decision. The subject on whom
// it turned comes first. It may be called again when more is known.
func (e *Engine) Judge(ev *event.Event) {
	mode := e.Mode()
	ev.Decision = event.Decision{Mode: mode.String()}
	ev.Decision.WouldBe = e.state.Load().outcome(ev)
	if ev.Attribution.Unawaited && ev.Decision.WouldBe == event.Allow && ev.Request.Guarded {
		ev.Decision.Reason = strings.TrimPrefix(ev.Decision.Reason+"; the client left before every process was searched, for which enforce mode makes it wait", "; ")
	}
	if mode == Enforce {
		ev.Decision.Verdict = ev.Decision.WouldBe
	}
}

// outcome is the verdict of enforce mode. The order of the reasons is that of
// DESIGN: what cannot be read; a grant; a rule that blocks; nobody known; the
// class's default.
func (p *state) outcome(ev *event.Event) event.Verdict {
	d, q := &ev.Decision, &ev.Request
	ev.Token.Scope = p.tokenScope
	if q.Malformed != "" {
		d.Reason = q.Malformed
		return event.Deny
	}
	var blocked *event.Match
	how := ""
	for _, subject := range subjects(ev) {
		about := documentsOf(ev, subject)
		for i, r := range p.rules {
			verb := "matches"
			if !r.blocks(&about) || !p.memory.novel(r, &about) {
				if !p.memory.latched(i, subject) {
					continue
				}
				verb = "has blocked before"
			}
			d.Matches = append(d.Matches, event.Match{Rule: &r.Rule.Rule, Subject: subject, Action: r.on(q).String(), Bound: true})
			if how == "" && d.Matches[len(d.Matches)-1].Action == actionNames[Block] {
				how = verb
			}
		}
	}
	for i := range d.Matches {
		if d.Matches[i].Action == actionNames[Block] {
			blocked = &d.Matches[i]
			break
		}
	}
	if name, ok := p.allGranted(ev); ok {
		d.Grant = name
		d.Reason = "granted by " + name
		return event.Allow
	}
	switch {
	case blocked != nil:
		d.Rule = blocked.Rule
		d.Reason = fmt.Sprintf("rule %q %s %s", blocked.Rule.Name, how, describe(blocked.Subject))
		p.first(ev, blocked.Subject)
		return event.Deny
	case !q.Guarded:
		return event.Allow
	case len(ev.Subjects) == 0:
		d.Reason = "unattributed: " + ev.Attribution.Reason
		return event.Deny
	case !ev.Attribution.Sufficient():
		d.Reason = "unattributed: somebody else may hold the connection: " + ev.Attribution.Reason
		return event.Deny
	case p.Posture == Strict:
		d.Reason = "posture strict: no grant covers " + describe(ev.Subjects[0])
		return event.Deny
	}
	return event.Allow
}

// Final reports whether a judged event is refused whatever else may be found out
// about who asks: a rule blocks one of those who are known, and no grant covers
// him.
func (e *Engine) Final(ev *event.Event) bool {
	p := e.Policy()
	return ev.Decision.WouldBe == event.Deny && ev.Decision.Rule != nil && slices.ContainsFunc(ev.Subjects, func(subject *event.Process) bool {
		_, ok := p.granted(subject, ev)
		return !ok
	})
}

// allGranted reports whether every subject has a grant, on sufficient evidence.
func (p *Policy) allGranted(ev *event.Event) (name string, ok bool) {
	if !ev.Attribution.Sufficient() || len(ev.Subjects) == 0 {
		return "", false
	}
	var names []string
	for _, subject := range ev.Subjects {
		name, ok := p.granted(subject, ev)
		if !ok {
			return "", false
		}
		names = append(names, name)
	}
	return strings.Join(names, ","), true
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
	if p.Parent != nil {
		return fmt.Sprintf("%s (pid %d, parent %s)", p.Executable, p.PID, p.Parent.Executable)
	}
	return fmt.Sprintf("%s (pid %d)", p.Executable, p.PID)
}

// Observe gives a judged event to the rules as they are written, settles which
// matches raise an alert, and remembers whom a rule has blocked. It is called
// once for each event, after the last Judge.
func (e *Engine) Observe(ev *event.Event) {
	p := e.state.Load()
	m, d := p.memory, &ev.Decision
	all := m.news(ev)
	for i, r := range p.rules {
		for j := range all {
			n := &all[j]
			if !m.observe(i, r, n) {
				continue
			}
			k := 0
			for k < len(d.Matches) && (d.Matches[k].Rule != &r.Rule.Rule || d.Matches[k].Subject != n.subject) {
				k++
			}
			if k == len(d.Matches) {
				d.Matches = append(d.Matches, event.Match{Rule: &r.Rule.Rule, Subject: n.subject, Action: r.on(&ev.Request).String()})
			}
			d.Matches[k].Literal = true
		}
	}
	m.seen(all)
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
	about := documentsOf(ev, ev.Subjects[0])
	for _, r := range e.Policy().rules {
		for _, s := range r.literal {
			if slices.Contains(s.documents, event.ProcessStart) && s.Match(&about[event.ProcessStart]) {
				return true
			}
		}
	}
	return false
}

// ObserveStart gives the start of a program to the rules as they are written, so that
// a sequence knows of it before, or without, a request of the same process. It reports
// whether one raises an alert, and completes the event with it.
func (e *Engine) ObserveStart(ev *event.Event) (alert bool) {
	p := e.state.Load()
	m, d := p.memory, &ev.Decision
	d.Mode = e.Mode().String()
	all := m.news(ev)
	n := &all[0]
	if !n.adds[event.ProcessStart] {
		return false // a request of it was faster
	}
	for i, r := range p.rules {
		if m.observe(i, r, n) {
			action := r.on(&ev.Request)
			d.Matches = append(d.Matches, event.Match{Rule: &r.Rule.Rule, Subject: n.subject, Action: action.String(), Literal: true, Alert: action != Log})
			alert = alert || action != Log
		}
	}
	m.seen(all)
	return alert
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
	// forgotten: it is judged anew then.
	maxRemembered = 16 << 10
	// maxChains bounds what one sequence remembers: processes that started and
	// whose connection may follow within the span. Each keeps its event.
	maxChains = 1 << 10
)

// memory is what rules remember from one event to the next.
type memory struct {
	machines []machine
	terms    *firstseen.Store // of the engine

	mu      sync.Mutex          // guards the following
	started remembered[imageID] // process images that the rules have seen start
	blocked remembered[latch]
}

type machine struct {
	mu sync.Mutex
	*eql.Machine
}

func newMemory(p *Policy, terms *firstseen.Store) *memory {
	m := &memory{machines: make([]machine, len(p.rules)), terms: terms}
	for i, r := range p.rules {
		if r.Query.IsSequence() {
			m.machines[i].Machine = r.Query.NewMachine(maxChains)
		}
	}
	return m
}

// news is what an event tells the rules of one subject that they have not been told
// before. A sequence keeps it while it waits for more.
type news struct {
	subject *event.Process
	image   imageID // of the subject, if there is one
	about   documents
	adds    [len(documents{})]bool // which of the documents are new
}

// news lists what an event adds: the start of a process when it is first seen, and
// of a request its connection once, and itself.
func (m *memory) news(ev *event.Event) []news {
	about := subjects(ev)
	all := make([]news, len(about))
	asked := ev.Kind == event.Asked
	for i, subject := range about {
		n := &all[i]
		n.subject, n.about = subject, documentsOf(ev, subject)
		if subject != nil {
			n.image = imageOf(subject)
			n.adds[event.ProcessStart] = m.isNew(n.image)
		}
		n.adds[event.ConnectionAttempt] = asked && ev.Connection.First
		n.adds[event.RequestDecision] = asked
	}
	return all
}

// observe feeds one rule with what is new of a subject, and reports whether it
// matches as it is written.
func (m *memory) observe(i int, r *rule, n *news) bool {
	if r.Query.IsSequence() {
		return m.machines[i].observe(n)
	}
	if r.NewTerms != nil {
		return m.observeTerms(r, n)
	}
	return r.observed(n)
}

// observed asks a rule that is no sequence.
func (r *rule) observed(n *news) bool {
	for _, s := range r.literal {
		for _, d := range s.documents {
			if n.adds[d] && s.Match(&n.about[d]) {
				return true
			}
		}
	}
	return false
}

func (m *machine) observe(n *news) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	matched := false
	for d, added := range n.adds {
		if added {
			matched = len(m.Observe(&n.about[d])) > 0 || matched
		}
	}
	return matched
}

// imageOf names a process in one image. The command line can be long and is the
// process's own choice, so that its digest is kept instead.
func imageOf(p *event.Process) imageID {
	text := make([]byte, 0, 512) // not allocated, if that is enough
	text = append(append(append(text, p.Executable...), 0), p.CommandLine...)
	return imageID{p.EntityID, sha256.Sum256(text)}
}

type imageID struct {
	entity string
	image  [sha256.Size]byte
}

func (m *memory) isNew(image imageID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.started.has(image)
}

// seen remembers the subjects of an event.
func (m *memory) seen(all []news) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range all {
		if all[i].subject != nil {
			m.started.add(all[i].image)
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
			p.memory.mu.Lock()
			p.memory.blocked.add(latch{i, match.Subject.EntityID})
			p.memory.mu.Unlock()
		}
	}
}

func (m *memory) latched(rule int, p *event.Process) bool {
	if p == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.blocked.keys) > 0 && m.blocked.has(latch{rule, p.EntityID})
}

// latch is a rule, by its place in the policy, that has blocked a process.
type latch struct {
	rule   int
	entity string
}

// remembered is a set that forgets its oldest.
type remembered[K comparable] struct {
	keys  map[K]struct{}
	order []K
	next  int
}

func (r *remembered[K]) has(key K) bool {
	_, ok := r.keys[key]
	return ok
}

func (r *remembered[K]) add(key K) {
	if r.has(key) {
		return
	}
	if r.keys == nil {
		r.keys = map[K]struct{}{}
	}
	if len(r.order) < maxRemembered {
		r.order = append(r.order, key)
	} else {
		delete(r.keys, r.order[r.next])
		r.order[r.next] = key
		r.next = (r.next + 1) % maxRemembered
	}
	r.keys[key] = struct{}{}
}
