package policytest

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// Result is what became of one request of a case.
type Result struct {
	File    string       `json:"file"`
	Line    int          `json:"line"`
	Name    string       `json:"name"` // of the case
	Request string       `json:"request"`
	Subject string       `json:"subject"`
	OK      bool         `json:"ok"`
	Wrong   []Difference `json:"wrong,omitempty"`
	Verdict string       `json:"verdict"`
	Reason  string       `json:"reason,omitempty"`
	Class   string       `json:"class,omitempty"`
	// Rules by the names of their files, as cases name them.
	Rule    string        `json:"rule,omitempty"` // that decided
	Grants  []string      `json:"grants,omitempty"`
	Matches []string      `json:"matches,omitempty"`
	Alerts  []string      `json:"alerts,omitempty"`
	Took    time.Duration `json:"took_ns"`

	// Of a case that failed, what each rule and grant says of the subject.
	RuleFindings  []policy.RuleFinding  `json:"rule_findings,omitempty"`
	GrantFindings []policy.GrantFinding `json:"grant_findings,omitempty"`
}

// Difference is an expectation that did not come true.
type Difference struct {
	Key      string `json:"key"` // of Expect
	Expected string `json:"expected"`
	Got      string `json:"got"`
}

// Run judges the cases of a file by a policy, each with a memory of its own. Now is the
// day of cases that do not name one. A rule or grant that is expected and not in the
// policy is an error, because the case would never fail, or always.
func (f *File) Run(p *policy.Policy, now time.Time) ([]Result, error) {
	var errs []error
	var results []Result
	for i := range f.Cases {
		c := &f.Cases[i]
		if err := f.known(p, i); err != nil {
			errs = append(errs, err)
			continue
		}
		for j := range c.Request {
			r := f.judge(p, c, &c.Request[j], now)
			r.File, r.Line = f.Name, f.source.Line([]string{"cases", strconv.Itoa(i)})
			results = append(results, r)
		}
	}
	return results, errors.Join(errs...)
}

// judge asks one request of a case.
func (f *File) judge(p *policy.Policy, c *Case, r *Request, now time.Time) Result {
	began := time.Now()
	if !c.At.IsZero() {
		now = c.At.Time
	}
	a := newCast(f, now)
	engine := policy.NewEngine(p)
	engine.SetMode(policy.Enforce)
	if c.Mode != nil {
		engine.SetMode(*c.Mode)
	}
	asks := a.process(c.Subject)
	did := make([]*event.Process, len(c.Before))
	for i, step := range c.Before {
		if did[i] = asks; step.Subject.set() {
			did[i] = a.process(step.Subject)
		}
		a.older(did[i], step)
	}
	for i, step := range c.Before {
		for range max(step.Times, 1) {
			a.before(engine, did[i], step)
		}
	}
	others := make([]*event.Process, len(c.Others))
	for i, r := range c.Others {
		others[i] = a.process(r)
	}
	ev := a.event(asks, others, r, now)
	if ev.Attribution.Complete = c.Evidence == Complete; !ev.Attribution.Complete {
		ev.Attribution.Reason = "search_incomplete"
	}
	if asks == nil {
		ev.Attribution.Complete, ev.Attribution.Reason = false, "no_holder"
	}
	engine.Judge(ev)
	engine.Observe(ev)
	result := result(p, ev)
	result.Name, result.Request, result.Subject = c.Name, r.String(), subject(asks)
	result.Wrong = c.Expect.differences(p, ev, &result)
	if result.OK = len(result.Wrong) == 0; !result.OK {
		again := *ev
		x := engine.Explain(&again)
		if of := x.Steps[policy.StepRule].Of; len(of) > 0 {
			result.RuleFindings = of[0].Rules
		}
		if of := x.Steps[policy.StepGrant].Of; len(of) > 0 {
			result.GrantFindings = of[0].Grants
		}
	}
	result.Took = time.Since(began)
	return result
}

// older starts a process at the time of a step that is its start, and before one that is
// a request.
func (a *cast) older(who *event.Process, step Step) {
	at := a.now.Add(-step.Ago)
	switch {
	case step.Request == nil:
		who.Start = at
	case who != nil && who.Start.After(at):
		who.Start = at.Add(-defaultAge)
	}
}

// before does what happened before.
func (a *cast) before(engine *policy.Engine, who *event.Process, step Step) {
	at := a.now.Add(-step.Ago)
	if step.Request == nil {
		engine.ObserveStart(&event.Event{Kind: event.Started, Host: host, Time: at, Subjects: []*event.Process{who}})
		return
	}
	ev := a.event(who, nil, step.Request, at)
	ev.Attribution.Complete = who != nil
	engine.Judge(ev)
	engine.Observe(ev)
}

var host = &event.Host{ID: "policytest", Name: "policytest"}

// event is a request of a process, and of others who have its connection.
func (a *cast) event(asks *event.Process, others []*event.Process, r *Request, at time.Time) *event.Event {
	ev := &event.Event{
		Host: host, Time: at, Request: r.read(),
		Connection: event.Connection{
			Source: netip.MustParseAddrPort("10.0.0.1:40000"), Destination: r.endpoint(), First: !r.Kept, Accepted: at,
		},
		Attribution: event.Attribution{Level: "L3", Confidence: "high"},
	}
	if asks != nil {
		ev.Subjects, ev.Roles = []*event.Process{asks}, []string{"connector"}
		ev.Connection.Forwarded = a.forwarded[asks]
	}
	for _, o := range others {
		ev.Subjects, ev.Roles = append(ev.Subjects, o), append(ev.Roles, "holder")
	}
	if !ev.Request.Token {
		return ev
	}
	switch r.Token {
	case unknown:
	case own, "":
		if asks != nil {
			ev.Token.Issuers = []*event.Issuer{event.NewIssuer(asks)}
		}
	default:
		ev.Token.Issuers = []*event.Issuer{event.NewIssuer(a.process(Ref{Name: r.Token}))}
	}
	return ev
}

// result is what an event says.
func result(p *policy.Policy, ev *event.Event) Result {
	d := &ev.Decision
	r := Result{Verdict: d.WouldBe.String(), Reason: d.Reason, Class: ev.Request.Class, Grants: grants(d)}
	if d.Rule != nil {
		r.Rule = label(p, d.Rule)
	}
	for _, m := range d.Matches {
		name := label(p, m.Rule)
		if !slices.Contains(r.Matches, name) {
			r.Matches = append(r.Matches, name)
		}
		if m.Alert && !slices.Contains(r.Alerts, name) {
			r.Alerts = append(r.Alerts, name)
		}
	}
	return r
}

// grants are those that decided, each once.
func grants(d *event.Decision) []string {
	if d.Grant == "" {
		return nil
	}
	names := strings.Split(d.Grant, ",")
	slices.Sort(names)
	return slices.Compact(names)
}

// subject is a process in one line.
func subject(p *event.Process) string {
	if p == nil {
		return Nobody
	}
	text := cmp.Or(p.Executable, "a program that could not be read") + ", user " + cmp.Or(p.UserName, p.UserID)
	for _, part := range []struct{ what, value string }{{"unit ", p.Unit}, {"user unit ", p.UserUnit}, {"container ", p.Container}, {"pod ", p.Pod}} {
		if part.value != "" {
			text += ", " + part.what + part.value
		}
	}
	if p.Parent != nil {
		text += ", forked by " + p.Parent.Executable
	}
	return text
}

// differences are the expectations that did not come true.
func (e *Expect) differences(p *policy.Policy, ev *event.Event, r *Result) []Difference {
	var all []Difference
	d := &ev.Decision
	differ := func(key, expected, got string) { all = append(all, Difference{key, expected, cmp.Or(got, none)}) }
	if e.Verdict != nil && e.Verdict.String() != r.Verdict {
		differ("verdict", e.Verdict.String(), r.Verdict)
	}
	if e.Rule != "" {
		id := ""
		if d.Rule != nil {
			id = d.Rule.ID
		}
		if ids(p, Names{e.Rule})[0] != id {
			differ("rule", e.Rule, r.Rule)
		}
	}
	if e.Grant != nil && !same(e.Grant.without(none), r.Grants) {
		differ("grant", e.Grant.String(), Names(r.Grants).String())
	}
	if e.Class != "" && e.Class != r.Class {
		differ("class", e.Class, r.Class)
	}
	if e.Alert != nil {
		switch {
		case e.Alert.Rules == nil && e.Alert.Any != (len(r.Alerts) > 0):
			differ("alert", fmt.Sprint(e.Alert.Any), Names(r.Alerts).String())
		case e.Alert.Rules != nil && !same(ids(p, e.Alert.Rules.without(none)), matched(d, true)):
			differ("alert", e.Alert.Rules.String(), Names(r.Alerts).String())
		}
	}
	if e.Matches != nil && !same(ids(p, e.Matches.without(none)), matched(d, false)) {
		differ("matches", e.Matches.String(), Names(r.Matches).String())
	}
	if !strings.Contains(r.Reason, e.Reason) {
		differ("reason", e.Reason, r.Reason)
	}
	return all
}

// none is the name of no rule and no grant.
const none = "none"

func (n Names) without(name string) Names {
	return slices.DeleteFunc(slices.Clone(n), func(s string) bool { return s == name })
}

func (n Names) String() string {
	if len(n) == 0 {
		return none
	}
	return strings.Join(n, ", ")
}

// same compares without order and repetition.
func same(a, b []string) bool {
	for _, s := range a {
		if !slices.Contains(b, s) {
			return false
		}
	}
	for _, s := range b {
		if !slices.Contains(a, s) {
			return false
		}
	}
	return true
}

// matched are the ids of the rules that match, or raise an alert.
func matched(d *event.Decision, alerts bool) (ids []string) {
	for _, m := range d.Matches {
		if m.Alert || !alerts {
			ids = append(ids, m.Rule.ID)
		}
	}
	return ids
}

// ids are the rule_ids of rules, "" of none.
func ids(p *policy.Policy, names Names) []string {
	all := make([]string, len(names))
	for i, name := range names {
		if r := find(p, name); r != nil {
			all[i] = r.ID
		}
	}
	return all
}

// find is the rule of this id, name or file.
func find(p *policy.Policy, name string) *policy.Rule {
	for _, r := range p.Rules() {
		if r.ID == name || r.Name == name || stem(r) == name {
			return r
		}
	}
	return nil
}

// label is the name of the file of an event's rule.
func label(p *policy.Policy, rule *event.Rule) string { return stem(find(p, rule.ID)) }

// stem is the name of a rule's file.
func stem(r *policy.Rule) string { return strings.TrimSuffix(filepath.Base(r.File), ".toml") }

// known is about what a case expects and the policy does not have.
func (f *File) known(p *policy.Policy, i int) error {
	e := &f.Cases[i].Expect
	at := element("cases", i) + ".expect."
	rules := map[string]Names{"rule": {e.Rule}}
	if e.Alert != nil {
		rules["alert"] = e.Alert.Rules
	}
	if e.Matches != nil {
		rules["matches"] = *e.Matches
	}
	var errs []error
	for _, key := range []string{"rule", "alert", "matches"} {
		for _, name := range rules[key] {
			if name != "" && name != none && find(p, name) == nil {
				var have []string
				for _, r := range p.Rules() {
					have = append(have, stem(r))
				}
				errs = append(errs, f.wrong(at+key, "the policy has no rule %q; there are %s", name, strings.Join(have, ", ")))
			}
		}
	}
	for _, name := range e.Grant {
		if name == none || slices.ContainsFunc(p.Grants(), func(g policy.Grant) bool { return g.Name == name }) {
			continue
		}
		var have Names
		for _, g := range p.Grants() {
			have = append(have, g.Name)
		}
		errs = append(errs, f.wrong(at+"grant", "the policy has no grant %q; there are %s", name, have))
	}
	return errors.Join(errs...)
}

// Compile makes the policy that the file brings. What is wrong with it is shown where it
// is written.
func (f *File) Compile() (*policy.Policy, error) {
	var classes []string
	for _, c := range imds.Classes() {
		classes = append(classes, c.String())
	}
	p, err := policy.Compile(*f.Policy, classes)
	return p, f.locate(err)
}

// locate gives complaints about the policy their places.
func (f *File) locate(err error) error {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		var errs []error
		for _, err := range all.Unwrap() {
			errs = append(errs, f.locate(err))
		}
		return errors.Join(errs...)
	}
	complaint := (*policy.KeyError)(nil)
	switch {
	case err == nil:
		return nil
	case errors.As(err, new(*yamlfile.Fault)): // of a profile
		return err
	case !errors.As(err, &complaint):
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	return f.wrong("policy."+complaint.Key, "%w", complaint.Err)
}
