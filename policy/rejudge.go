package policy

import (
	"fmt"
	"slices"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
)

// Doubt is what keeps a verdict on a document from being certain. The zero value is
// none.
type Doubt struct {
	About Doubtful
	Why   string
}

// Doubtful is what a doubt is about.
type Doubtful uint8

const (
	Nothing    Doubtful = iota
	TheRule             // refused in any case, perhaps by another rule
	TheVerdict          // undecidable
)

// Rejudge decides about an event that was read back, completes its Decision, and
// remembers whom a rule has blocked. It is given the events of a host in order. Sequences
// are not told, and no alert is raised: what Judge says does not rest on them.
//
// What the document does not tell (event.Gaps) matters if it could turn the verdict:
// redaction hides the token in curl's command line, and leaves every rule as certain as
// it was that does not look there, or that fails for another reason. Nothing is guessed:
// a condition that rests on a gap may hold or not.
//
// Decisions of operators hold for a time, and are in no policy. Of one that decided the
// record tells, and with decided it does so again, where judging comes to it; else it is
// as if there had been none. Of decisions that something before them made needless the
// record tells nothing.
func (e *Engine) Rejudge(r *event.Record, decided bool) Doubt {
	ev := &r.Event
	e.Judge(ev)
	p := e.state.Load()
	doubt := p.doubt(ev)
	if decided && r.Decision.Operator != "" {
		doubt = p.redecide(r, doubt)
	}
	if ev.Decision.Rule != nil && doubt.About == Nothing {
		for k := range ev.Decision.Matches {
			if m := &ev.Decision.Matches[k]; m.Rule == ev.Decision.Rule && m.Action == actionNames[Block] {
				p.latch(m)
			}
		}
	}
	return p.unsureLatch(r, doubt)
}

// redecide has the decision of an operator that a record tells of decide again.
func (p *state) redecide(r *event.Record, doubt Doubt) Doubt {
	was, d := &r.Decision, &r.Event.Decision
	if r.Event.Request.Malformed != "" {
		return doubt
	}
	if was.WouldBe == event.Allow {
		switch {
		case d.Deny != "", d.Grant != "": // which go before it, or are as good
			return doubt
		case was.Grant != "" && d.WouldBe == event.Deny:
			return Doubt{TheVerdict, "the decision of an operator and grants have let it pass together, and grants do not cover all who held the connection now"}
		case len(p.denies) > 0 && p.gaps(&r.Event)&(p.rests|event.GapSubjects) != 0:
			return doubt // it may be denied
		}
	}
	*d = event.Decision{Mode: d.Mode, Verdict: d.Verdict, WouldBe: was.WouldBe, Reason: was.Reason, Operator: was.Operator, Matches: d.Matches}
	return Doubt{}
}

// NewReplayEngine makes an Engine for Rejudge, in audit mode. It has no rules but those that
// may block, since no other decides anything, and room for the processes of many hosts,
// whose events it is given: with less, one that was blocked would be forgotten when so many
// others are.
func NewReplayEngine(p *Policy) *Engine {
	deciding := *p
	deciding.rules = slices.DeleteFunc(slices.Clone(p.rules), func(r *rule) bool { return !r.mayBlock() })
	deciding.set = newRuleSet(deciding.rules)
	e := NewEngine(&deciding)
	e.SetMode(Audit)
	m := e.state.Load().memory
	m.blocked.max, m.doubted.max = maxRememberedOfFleet, maxRememberedOfFleet
	return e
}

// maxRememberedOfFleet takes some 40 MB.
const maxRememberedOfFleet = 1 << 18

// unsureLatch is about a rule that may have blocked a process before: one of which that
// was in doubt, or one of which the record says so, from before the first event that was
// read.
func (p *state) unsureLatch(r *event.Record, doubt Doubt) Doubt {
	m, ev := p.memory, &r.Event
	m.mu.Lock()
	defer m.mu.Unlock()
	if doubt.About != Nothing {
		for _, s := range ev.Subjects {
			if s.EntityID != "" {
				m.doubted.put(s.EntityID, struct{}{})
			}
		}
	}
	if doubt.About != Nothing || ev.Decision.Grant != "" || ev.Decision.Operator != "" || ev.Request.Malformed != "" {
		return doubt
	}
	about := TheVerdict
	if ev.Decision.WouldBe == event.Deny {
		about = TheRule
	}
	for _, s := range ev.Subjects {
		if m.doubted.has(s.EntityID) {
			return Doubt{about, "a rule may have blocked the process before, which is not certain either"}
		}
	}
	if latched := r.Decision.Rule; r.Decision.Latched && latched != nil && about == TheVerdict {
		for _, own := range p.rules {
			if own.ID == latched.ID && own.on(&ev.Request) == Block && own.aboutProcess {
				return Doubt{TheVerdict, fmt.Sprintf("rule %q had blocked the process before the first event that was read", own.Name)}
			}
		}
	}
	return doubt
}

func (p *state) doubt(ev *event.Event) Doubt {
	d, q := &ev.Decision, &ev.Request
	if q.Malformed != "" {
		return Doubt{} // refused whatever else is known
	}
	gaps := p.gaps(ev)
	if gaps&(p.rests|p.rulesRest|event.GapSubjects) == 0 && !p.mayDepend {
		return Doubt{} // nothing looks there
	}
	if d.Deny != "" && gaps&p.rests == 0 {
		return Doubt{}
	}
	granted := d.Grant != ""
	if ev.Gaps&event.GapSubjects != 0 && (granted || len(p.denies) > 0 && d.WouldBe == event.Allow) {
		return Doubt{TheVerdict, "the document does not have all who held the connection, and a grant must cover, a deny can refuse, each of them"}
	}
	if gaps &= p.rests; gaps != 0 {
		return Doubt{TheVerdict, fmt.Sprintf("grants and denies look at what the document does not have whole: %s", gaps)}
	}
	if granted {
		return Doubt{}
	}
	doubt := p.ruleDoubt(ev)
	if doubt.About != Nothing && d.WouldBe == event.Deny && (d.Rule == nil || p.certain(ev)) {
		doubt.About = TheRule // nobody known, posture strict, or another rule
	}
	return doubt
}

// gaps are those of an event and of all its subjects, as the children of the one parent
// or the other.
func (p *state) gaps(ev *event.Event) event.Gaps {
	all := ev.Gaps
	for _, subject := range ev.Subjects {
		about := event.View{Event: ev, Subject: subject}
		if all |= about.Gaps(); subject.ParentNow != nil {
			about.Adopted = true
			all |= about.Gaps()
		}
	}
	return all
}

// restsOf are the facts at which grants and denies look.
func restsOf(grants []Grant, denies []Deny) (rests event.Gaps) {
	who := func(w *Who) {
		if len(w.Executable) > 0 {
			rests |= event.GapExecutable
		}
		if w.User != "" || w.Group != "" {
			rests |= event.GapUser
		}
		if w.Unit != "" || w.contained() {
			rests |= event.GapPlace
		}
		if w.Parent != "" {
			rests |= (event.GapExecutable | event.GapFile).OfParent()
		}
	}
	what := func(w *What) {
		if len(w.Paths) > 0 {
			rests |= event.GapPath
		}
		if len(w.Classes) > 0 {
			rests |= event.GapRequest
		}
	}
	for i := range grants {
		who(&grants[i].Who)
		what(&grants[i].What)
		rests |= event.GapPlace // outside of containers alone
	}
	for i := range denies {
		who(&denies[i].Who)
		what(&denies[i].What)
		if denies[i].Parent != "" {
			rests |= event.GapExecutable.OfPresentParent()
		}
	}
	return rests
}

// ruleDoubt is about the first rule of which it is not certain whether it blocks, if
// none blocks for certain before.
func (p *state) ruleDoubt(ev *event.Event) Doubt {
	for _, subject := range subjects(ev) {
		for _, r := range p.rules {
			if r.on(&ev.Request) != Block || len(r.blocking) == 0 {
				continue
			}
			if p.blocksFor(r, ev, subject) {
				return Doubt{}
			}
			if why := r.unsure(ev, subject); why != "" {
				return Doubt{TheVerdict, fmt.Sprintf("rule %q %s", r.Name, why)}
			}
		}
	}
	if ev.Gaps&event.GapSubjects != 0 && slices.ContainsFunc(p.rules, func(r *rule) bool { return r.on(&ev.Request) == Block && len(r.blocking) > 0 }) {
		return Doubt{TheVerdict, "the document does not have all who held the connection, and a rule may be about one of them"}
	}
	return Doubt{}
}

// certain reports whether some rule blocks for certain.
func (p *state) certain(ev *event.Event) bool {
	for _, subject := range subjects(ev) {
		for _, r := range p.rules {
			if r.on(&ev.Request) == Block && p.blocksFor(r, ev, subject) {
				return true
			}
		}
	}
	return false
}

// blocksFor reports whether a rule has matched a subject, and that for certain.
func (p *state) blocksFor(r *rule, ev *event.Event, subject *event.Process) bool {
	if !slices.ContainsFunc(ev.Decision.Matches, func(m event.Match) bool { return m.Rule == &r.Rule.Rule && m.Subject == subject }) {
		return false
	}
	return p.memory.hasBlocked(r, p.rules, subject) || r.unsure(ev, subject) == ""
}

// unsure says why it is not certain whether a rule that blocks is about a subject; ""
// if it is, or is not, whatever the gaps hide.
func (r *rule) unsure(ev *event.Event, subject *event.Process) string {
	about := event.View{Event: ev, Subject: subject}
	gaps := about.Gaps()
	about.Adopted = true
	if (gaps|about.Gaps())&r.rests == 0 && r.NewTerms == nil {
		return ""
	}
	rests, may := event.Gaps(0), false
	for _, adopted := range [...]bool{false, true} {
		if adopted && (subject == nil || subject.ParentNow == nil) {
			break
		}
		all, here := true, event.Gaps(0)
		for _, s := range r.blocking {
			holds, gaps := s.mayHold(ev, subject, adopted)
			all, here = all && holds, here|gaps
		}
		switch {
		case !all:
			continue
		case here == 0 && r.NewTerms == nil:
			return ""
		}
		may, rests = true, rests|here
	}
	switch {
	case rests != 0:
		return "looks at what the document does not have whole: " + rests.String()
	case may:
		return "depends on what it had seen before"
	}
	return ""
}

// mayHold reports whether a stage holds, or may hold, for one of the documents that it is
// about. It is certain if it rests on no gaps.
func (s *stage) mayHold(ev *event.Event, subject *event.Process, adopted bool) (may bool, rests event.Gaps) {
	for _, kind := range s.documents {
		if kind == event.ProcessStart && subject == nil {
			continue
		}
		about := document{event.View{Event: ev, Document: kind, Subject: subject, Adopted: adopted}}
		gaps := about.Gaps() & s.rests
		switch s.Known(&about, func(f eql.Field) bool { return event.Fields[f.Slot].Rests()&gaps == 0 }) {
		case eql.True:
			return true, 0
		case eql.Maybe:
			may, rests = true, rests|gaps
		}
	}
	return may, rests
}
