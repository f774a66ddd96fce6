// Package replay judges recorded events by another policy, and tells what would have
// been different: what would newly be refused, what would newly pass, and what cannot be
// decided from what was recorded.
//
// Events are taken as they stand in the files of a host, which is the order in which the
// daemon has judged them; those of different hosts may come in any order. What is
// remembered is bounded, however many there are: see MaxGroups.
package replay

import (
	"cmp"
	"fmt"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// Options say what is compared with what.
type Options struct {
	Policy *policy.Policy // that is tried
	// Against is the policy with which it is compared; nil for the verdicts that were
	// recorded: what enforce mode did, or would have done.
	Against *policy.Policy
	// Actual compares with what became of the requests, instead of Against: in audit
	// mode all of them passed.
	Actual bool
	// WithoutDecisions judges as if operators had not decided anything: what will be when
	// the time of their decisions is over.
	WithoutDecisions bool
	// Since and Until bound the requests that are counted; zero for no bound. What came
	// before is remembered all the same: whom a rule had blocked.
	Since, Until time.Time
}

// Replay is a comparison that goes on. It must be used by one goroutine.
type Replay struct {
	options Options
	after   side
	before  *side // nil for what was recorded
	diff    *collector
}

// side is a policy that judges. Each reads lines for itself, because what is settled of
// a process is kept with it for one policy.
type side struct {
	reader *event.Reader
	engine *policy.Engine
	record event.Record
}

func newSide(p *policy.Policy) side {
	return side{reader: event.NewReader(), engine: policy.NewReplayEngine(p)}
}

// New begins a comparison.
func New(o Options) *Replay {
	r := &Replay{options: o, after: newSide(o.Policy), diff: newCollector()}
	if o.Against != nil && !o.Actual {
		before := newSide(o.Against)
		r.before = &before
	}
	return r
}

// Line takes a line of a file of events. Documents that are not the decision on a
// request are counted and passed over. The error is what is wrong with the line: it is
// event.ErrForeign if it is somebody else's.
func (r *Replay) Line(line []byte) error {
	rec := &r.after.record
	if err := r.after.reader.Read(line, rec); err != nil {
		return err
	}
	if rec.Document != event.RequestDecision {
		r.diff.passed++
		return nil
	}
	at := rec.Event.Time
	if !r.options.Until.IsZero() && !at.Before(r.options.Until) {
		return nil
	}
	before, doubt := outcomeOf(&rec.Event.Request, &rec.Decision), policy.Doubt{}
	if r.before != nil {
		if err := r.before.reader.Read(line, &r.before.record); err != nil {
			return fmt.Errorf("read again: %w", err)
		}
		doubt = r.before.engine.Rejudge(&r.before.record, !r.options.WithoutDecisions)
		before = outcomeOf(&rec.Event.Request, &r.before.record.Event.Decision)
	}
	if r.options.Actual && rec.Decision.Verdict == event.Allow {
		before.verdict = event.Allow
	}
	if now := r.after.engine.Rejudge(rec, !r.options.WithoutDecisions); now.About >= doubt.About {
		doubt = now
	}
	if at.Before(r.options.Since) {
		return nil
	}
	after := outcomeOf(&rec.Event.Request, &rec.Event.Decision)
	r.diff.add(r.after.engine.Policy(), rec, before, after, doubt)
	return nil
}

// outcome is a verdict and what it rests on.
type outcome struct {
	verdict event.Verdict
	basis   policy.Basis
}

func outcomeOf(q *event.Request, d *event.Decision) outcome {
	b := policy.BasisOf(q, d)
	b.Name, b.ID = short(b.Name), short(b.ID)
	return outcome{d.WouldBe, b}
}

// Newly returns how many requests would newly be refused as far as the comparison has
// come.
func (r *Replay) Newly() uint64 { return r.diff.sections[NewlyBlocked].Requests }

// Requests returns how many were compared.
func (r *Replay) Requests() uint64 { return r.diff.requests }

// place is where a process runs, as far as that tells it apart from others.
func place(p *event.Process) string {
	switch {
	case p.Pod != "":
		return "pod " + p.Pod
	case p.Container != "":
		return "container " + p.Container[:min(12, len(p.Container))]
	case p.Unit != "":
		return "unit " + p.Unit
	case p.UserUnit != "":
		return "user unit " + p.UserUnit
	}
	return ""
}

func user(p *event.Process) string { return cmp.Or(p.UserName, p.UserID) }
