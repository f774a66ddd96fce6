package policy

import "github.com/imdsgate/imdsgate/event"

// RuleFinding is what one rule says of a process.
type RuleFinding struct {
	ID      string   `json:"id"`
	Name    string   `json:"name"`
	Matches bool     `json:"matches"`
	Clauses []Clause `json:"clauses"`
}

// Clause is one condition of a rule.
type Clause struct {
	Text  string `json:"text"`
	Holds bool   `json:"holds"`
	// Excuse marks a condition that the process can bring about itself: it
	// keeps the rule from alerting, and not from blocking.
	Excuse bool `json:"excuse,omitempty"`
}

// GrantFinding is what one grant says of a process.
type GrantFinding struct {
	Name   string `json:"name"`
	Allows bool   `json:"allows"`
	Missed string `json:"missed,omitempty"` // by what
}

// VerdictFinding is what would become of a request of one class.
type VerdictFinding struct {
	Class   string `json:"class"`
	Verdict string `json:"verdict"`
	Reason  string `json:"reason,omitempty"`
}

// Explain judges requests that a process could make now, each of which is given
// as an event, and tells how each rule and grant sees the process. It changes
// nothing.
func (e *Engine) Explain(requests []*event.Event) (rules []RuleFinding, grants []GrantFinding, verdicts []VerdictFinding) {
	p := e.Policy()
	memory := newMemory(p, e.terms)
	if len(requests) == 0 || len(requests[0].Subjects) == 0 {
		return nil, nil, nil
	}
	subject := requests[0].Subjects[0]
	a := p.set.asker()
	defer a.done()
	a.blocks(requests[0], subject)
	for i, r := range p.rules {
		f := RuleFinding{ID: r.ID, Name: r.Name, Matches: a.matching.has(i) && memory.novel(r, requests[0], subject)}
		kept := map[string]bool{}
		for _, s := range r.blocking {
			for _, c := range s.Conjuncts() {
				kept[c.Text] = true
			}
		}
		for _, s := range r.literal {
			if s.Missing() {
				continue // which no process can be asked
			}
			for _, c := range s.Conjuncts() {
				clause := Clause{Text: c.Text, Excuse: !kept[c.Text] && !r.alertsOnly}
				for _, d := range s.documents {
					about := document{event.View{Event: requests[0], Document: d, Subject: subject}}
					clause.Holds = clause.Holds || c.Match(&about)
				}
				f.Clauses = append(f.Clauses, clause)
			}
		}
		if r.NewTerms != nil {
			f.Clauses = append(f.Clauses, Clause{Text: r.NewTerms.String(), Holds: memory.novel(r, requests[0], subject)})
		}
		rules = append(rules, f)
	}
	for i := range p.grants {
		ok, missed := p.grants[i].allows(subject, requests[0])
		grants = append(grants, GrantFinding{p.grants[i].Name, ok, missed})
	}
	for _, ev := range requests {
		ev.Decision = event.Decision{}
		verdict := (&state{p, memory}).outcome(ev, e.Decisions())
		verdicts = append(verdicts, VerdictFinding{ev.Request.Class, verdict.String(), ev.Decision.Reason})
	}
	return rules, grants, verdicts
}
