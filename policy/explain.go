package policy

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"

	"github.com/imdsgate/imdsgate/event"
)

// Explanation is how a verdict comes about.
type Explanation struct {
	Verdict string        `json:"verdict"` // of enforce mode
	Basis   Basis         `json:"basis"`
	Reason  string        `json:"reason,omitempty"`
	Steps   []StepFinding `json:"steps"` // in the order of judging
}

// StepFinding is one step of judging.
type StepFinding struct {
	Step    Step             `json:"step"`
	Decides bool             `json:"decides"`
	Reached bool             `json:"reached"` // no step before it has decided
	Looked  string           `json:"looked_at"`
	Found   string           `json:"found"`
	Of      []SubjectFinding `json:"of,omitempty"` // what denies, grants or rules say of each process
}

// SubjectFinding is what one step says of one process.
type SubjectFinding struct {
	PID        int64          `json:"pid"`
	Executable string         `json:"executable"`
	Denies     []string       `json:"denies,omitempty"` // names of those that are about it
	Grants     []GrantFinding `json:"grants,omitempty"` // the nearest first
	Rules      []RuleFinding  `json:"rules,omitempty"`  // those that match first, then the nearest
}

// RuleFinding is what one rule says of a process.
type RuleFinding struct {
	ID      string   `json:"id"`
	Name    string   `json:"name"`
	Action  string   `json:"action"` // on such a request
	Matches bool     `json:"matches"`
	Latched bool     `json:"latched,omitempty"` // has blocked the process before
	Clauses []Clause `json:"clauses"`
}

// unmet is how many of its conditions do not hold.
func (f *RuleFinding) unmet() int {
	n := 0
	for _, c := range f.Clauses {
		if !c.Holds && !c.Excuse {
			n++
		}
	}
	return n
}

// Clause is one condition of a rule.
type Clause struct {
	Text  string `json:"text"`
	Holds bool   `json:"holds"`
	// Excuse marks a condition that the process can bring about itself: it
	// keeps the rule from alerting, and not from blocking.
	Excuse bool `json:"excuse,omitempty"`
	// Gaps are what the record does not have of what the condition looks at, so that
	// whether it holds is not known.
	Gaps string `json:"unknown,omitempty"`
}

// GrantFinding is what one grant says of a process.
type GrantFinding struct {
	Name   string   `json:"name"`
	Allows bool     `json:"allows"`
	Missed []string `json:"missed,omitempty"` // by what
}

// Explain tells how the verdict on a request comes about. It changes nothing but the
// event, which is judged.
func (e *Engine) Explain(ev *event.Event) Explanation {
	p := e.state.Load()
	ev.Decision = event.Decision{Mode: e.Mode().String()}
	decisions := e.Decisions()
	ev.Decision.WouldBe = p.outcome(ev, decisions)
	d := &ev.Decision
	x := Explanation{Verdict: d.WouldBe.String(), Basis: BasisOf(&ev.Request, d), Reason: d.Reason}
	for step := StepMalformed; step <= StepClass; step++ {
		f := p.explain(step, ev, decisions)
		f.Step, f.Decides, f.Reached = step, step == x.Basis.Step, step <= x.Basis.Step
		x.Steps = append(x.Steps, f)
	}
	return x
}

func (p *state) explain(step Step, ev *event.Event, decisions *Decisions) StepFinding {
	q, a := &ev.Request, &ev.Attribution
	var f StepFinding
	switch step {
	case StepMalformed:
		f.Looked = fmt.Sprintf("%s %s", q.Method, cmp.Or(q.Path, q.Target))
		if f.Found = "it can be read in one way"; q.Malformed != "" {
			f.Found = "it is malformed: " + q.Malformed
		}
	case StepDeny:
		f.Looked = count(len(p.denies), "deny", "denies")
		if n := len(decisions.All()); n > 0 {
			f.Looked += " and " + count(n, "decision", "decisions")
		}
		f.Found = "none is about it"
		by, denied := decisions.denies(ev)
		for _, subject := range subjects(ev) {
			of := of(subject)
			for i := range p.denies {
				if p.denies[i].covers(subject, ev) {
					of.Denies = append(of.Denies, p.denies[i].Name)
				}
			}
			if by != nil && subject == denied {
				of.Denies = slices.Insert(of.Denies, 0, "decision "+by.ID)
			}
			if len(of.Denies) > 0 {
				f.Of = append(f.Of, of)
			}
		}
		if len(f.Of) > 0 {
			f.Found = fmt.Sprintf("%q is about it", f.Of[0].Denies[0])
		}
	case StepDecision:
		f.Looked, f.Found = count(len(decisions.All()), "decision", "decisions"), "none allows it"
		for _, subject := range ev.Subjects {
			if by := decisions.allows(subject, ev.Time); by != nil {
				f.Found = fmt.Sprintf("%s is %s", describe(subject), by.because)
			}
		}
	case StepGrant:
		f.Looked = count(len(p.grants), "grant", "grants")
		for _, subject := range ev.Subjects {
			of := of(subject)
			of.Grants = p.grantFindings(subject, ev)
			f.Of = append(f.Of, of)
		}
		f.Found = p.grantsFound(ev)
	case StepRule:
		f.Looked = count(len(p.rules), "rule", "rules")
		var matching []string
		for _, subject := range subjects(ev) {
			of := of(subject)
			of.Rules = p.ruleFindings(subject, ev)
			f.Of = append(f.Of, of)
			for _, r := range of.Rules {
				if r.Matches {
					matching = append(matching, fmt.Sprintf("%q (%s)", r.Name, r.Action))
				}
			}
		}
		if f.Found = "none matches"; len(matching) > 0 {
			f.Found = "matching: " + strings.Join(slices.Compact(matching), ", ")
		}
	case StepUnattributed:
		f.Looked = fmt.Sprintf("%s, evidence %s", count(len(ev.Subjects), "process", "processes"), cmp.Or(a.Level, "as given"))
		switch {
		case len(ev.Subjects) == 0:
			f.Found = "nobody is known: " + a.Reason
		case !a.Sufficient():
			f.Found = "somebody else may hold the connection: " + a.Reason
		default:
			f.Found = "who asks is known for certain"
		}
		if !q.Guarded && p.posture(q) == Default {
			f.Found += "; requests of this class need nobody to be known"
		}
	case StepClass:
		guarded := "not guarded"
		if q.Guarded {
			guarded = "guarded"
		}
		posture := p.posture(q)
		f.Looked = fmt.Sprintf("class %s, which is %s", cmp.Or(q.Class, "unknown"), guarded)
		if f.Found = "posture default: it passes"; posture == Strict {
			f.Found = "posture strict: it takes a grant"
		}
	}
	return f
}

// count says how many of something there are.
func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func of(p *event.Process) SubjectFinding {
	if p == nil {
		return SubjectFinding{}
	}
	return SubjectFinding{PID: p.PID, Executable: p.Executable}
}

func (p *Policy) grantsFound(ev *event.Event) string {
	switch {
	case len(ev.Subjects) == 0:
		return "nobody is known who could have one"
	case !ev.Attribution.Sufficient():
		return "none counts while it is not certain who asks"
	}
	var names []string
	for _, subject := range ev.Subjects {
		name, ok := p.Granted(subject, ev)
		if !ok {
			return "none covers " + describe(subject)
		}
		names = append(names, strconv.Quote(name))
	}
	return strings.Join(names, ", ") + " covers it"
}

// grantFindings is what the grants say of a process: those that cover it, then by how
// little they miss it.
func (p *Policy) grantFindings(subject *event.Process, ev *event.Event) []GrantFinding {
	var all []GrantFinding
	for i := range p.grants {
		missed := slices.Collect(p.grants[i].misses(subject, ev))
		all = append(all, GrantFinding{p.grants[i].Name, len(missed) == 0, missed})
	}
	slices.SortStableFunc(all, func(a, b GrantFinding) int { return cmp.Compare(len(a.Missed), len(b.Missed)) })
	return all
}

// NearestGrant is the grant that misses by the least to cover the first of those who ask
// whom none covers; nil if there are no grants, or each is covered.
func (p *Policy) NearestGrant(ev *event.Event) *GrantFinding {
	for _, subject := range ev.Subjects {
		if _, ok := p.Granted(subject, ev); ok {
			continue
		}
		var nearest *GrantFinding
		for i := range p.grants {
			g := &p.grants[i]
			if !slices.Contains(g.Executable, subject.Executable) {
				continue // which is another program's
			}
			if missed := slices.Collect(g.misses(subject, ev)); nearest == nil || len(missed) < len(nearest.Missed) {
				nearest = &GrantFinding{Name: g.Name, Missed: missed}
			}
		}
		return nearest
	}
	return nil
}

// ruleFindings is what the rules say of a process, nil for nobody: those that match, then
// by how little they do not.
func (p *state) ruleFindings(subject *event.Process, ev *event.Event) []RuleFinding {
	a := p.set.asker()
	defer a.done()
	a.blocks(ev, subject)
	p.memory.latched(subject, a.latched)
	var all []RuleFinding
	for i, r := range p.rules {
		f := RuleFinding{ID: r.ID, Name: r.Name, Action: r.on(&ev.Request).String(), Latched: a.latched.has(i)}
		f.Matches = f.Latched || a.matching.has(i) && p.memory.novel(r, ev, subject)
		for c := range r.clauses(subject, ev) {
			f.Clauses = append(f.Clauses, c)
		}
		if r.NewTerms != nil {
			f.Clauses = append(f.Clauses, Clause{Text: r.NewTerms.String(), Holds: p.memory.novel(r, ev, subject)})
		}
		all = append(all, f)
	}
	slices.SortStableFunc(all, func(a, b RuleFinding) int {
		if a.Matches != b.Matches {
			if a.Matches {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.unmet(), b.unmet())
	})
	return all
}

// clauses are the conditions of a rule as it is written.
func (r *rule) clauses(subject *event.Process, ev *event.Event) iter.Seq[Clause] {
	kept := map[string]bool{}
	for _, s := range r.blocking {
		for _, c := range s.Conjuncts() {
			kept[c.Text] = true
		}
	}
	return func(yield func(Clause) bool) {
		for _, s := range r.literal {
			if s.Missing() {
				continue // which no process can be asked
			}
			for _, c := range s.Conjuncts() {
				clause := Clause{Text: c.Text, Excuse: !kept[c.Text] && !r.alertsOnly}
				rests := event.Gaps(0)
				for _, f := range c.Fields() {
					rests |= event.Fields[f.Slot].Rests()
				}
				for _, d := range s.documents {
					if d == event.ProcessStart && subject == nil {
						continue
					}
					about := document{event.View{Event: ev, Document: d, Subject: subject}}
					clause.Holds = clause.Holds || c.Match(&about)
					if gaps := about.Gaps() & rests; gaps != 0 {
						clause.Gaps = gaps.String()
					}
				}
				if !yield(clause) {
					return
				}
			}
		}
	}
}
