package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/test/shared"
)

// alone asks one rule after the other, each stage about each document, and keeps
// nothing of the answers. It is the definition of what a ruleSet says.
type alone struct {
	rules    []*rule
	machines []*eql.Machine
	started  map[*event.Process]bool
}

func newAlone(rules []*rule) *alone {
	a := &alone{rules: rules, started: map[*event.Process]bool{}}
	for _, r := range rules {
		a.machines = append(a.machines, r.Query.NewMachine(maxChains))
	}
	return a
}

func (a *alone) blocks(r *rule, ev *event.Event, subject *event.Process) bool {
	holds := func(adopted bool) bool {
		for _, s := range r.blocking {
			if !slices.ContainsFunc(s.documents, func(d event.Document) bool {
				about := &document{event.View{Event: ev, Document: d, Subject: subject, Adopted: adopted}}
				return (d != event.ProcessStart || subject != nil) && s.Match(about)
			}) {
				return false
			}
		}
		return true
	}
	return len(r.blocking) > 0 && (holds(false) || subject != nil && subject.ParentNow != nil && holds(true))
}

func (a *alone) literal(i int, ev *event.Event, subject *event.Process, start bool) bool {
	r := a.rules[i]
	matched := false
	for d := range documentKinds {
		if d == event.ProcessStart && !start || d == event.ConnectionAttempt && !ev.Connection.First {
			continue
		}
		about := &document{event.View{Event: ev, Document: d, Subject: subject}}
		if r.Query.IsSequence() {
			matched = len(a.machines[i].Observe(about)) > 0 || matched
			continue
		}
		for _, s := range r.literal {
			matched = matched || slices.Contains(s.documents, d) && s.Match(about)
		}
	}
	return matched
}

// matches is what Judge and Observe have to say of an event.
func (a *alone) matches(ev *event.Event) []string {
	var bound, late []string
	literals := map[string]bool{}
	for i, r := range a.rules {
		for j, subject := range subjects(ev) {
			start := subject != nil && !a.started[subject]
			if a.literal(i, ev, subject, start) {
				literals[fmt.Sprint(r.ID, j)] = true
			}
		}
	}
	for j, subject := range subjects(ev) {
		for _, r := range a.rules {
			if a.blocks(r, ev, subject) {
				bound = append(bound, fmt.Sprintf("%s of %d, bound %v, literal %v", r.ID, j, true, literals[fmt.Sprint(r.ID, j)]))
				delete(literals, fmt.Sprint(r.ID, j))
			}
		}
	}
	for _, r := range a.rules {
		for j := range subjects(ev) {
			if literals[fmt.Sprint(r.ID, j)] {
				late = append(late, fmt.Sprintf("%s of %d, bound %v, literal %v", r.ID, j, false, true))
			}
		}
	}
	for _, subject := range ev.Subjects {
		a.started[subject] = true
	}
	return append(bound, late...)
}

func told(ev *event.Event) []string {
	var all []string
	for _, m := range ev.Decision.Matches {
		all = append(all, fmt.Sprintf("%s of %d, bound %v, literal %v", m.Rule.ID, slices.Index(subjects(ev), m.Subject), m.Bound, m.Literal))
	}
	return all
}

// ruleFiles writes rules that alert, one for each query.
func ruleFiles(t testing.TB, queries []string) string {
	t.Helper()
	dir := t.TempDir()
	for i, q := range queries {
		text := fmt.Sprintf("[imdsgate]\naction = \"alert\"\n[rule]\nrule_id = \"rule-%03d\"\nname = \"n\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = '''\n%s\n'''\n", i, q)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%03d.toml", i)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// random makes rules and requests from so few words that they often meet.
type random struct{ *rand.Rand }

func newRandom(seed uint64) random { return random{rand.New(rand.NewPCG(seed, 0))} }

func (r random) pick(words ...string) string { return words[r.IntN(len(words))] }

func (r random) condition(depth int) string {
	if depth > 0 {
		switch r.IntN(5) {
		case 0:
			return "not (" + r.condition(depth-1) + ")"
		case 1:
			return "(" + r.condition(depth-1) + " or " + r.condition(depth-1) + ")"
		case 2:
			return r.condition(depth-1) + " and " + r.condition(depth-1)
		}
	}
	return r.pick(
		`process.name : ("curl", "py*", "agent")`, `process.name == "bash"`, `process.executable like ("/usr/*", "/tmp/*")`,
		`process.parent.name in ("bash", "cron")`, `process.parent.executable != null`, `process.parent.pid > 20`,
		`process.args == "-s"`, `process.args_count >= 2`, `length(process.command_line) > 12`, `process.command_line : "*169.254*"`,
		`user.id == "0"`, `container.id == null`, `imdsgate.executable.root_owned == true`, `imdsgate.ancestors.executable : "/usr/*"`, `?process.gone == null`,
		`destination.ip == "169.254.169.254"`, `destination.port == 80`, `event.action == "connection_attempted"`, `event.action == "exec"`, `event.type == "start"`,
		`event.outcome == "success"`, `imdsgate.request.guarded == true`, `imdsgate.request.api == "v1"`, `url.path : ("*credentials*", "/latest/*")`,
		`http.request.method in ("PUT", "GET")`, `user_agent.original : "curl*"`, `user_agent.original == null`, `process.name == null`, `host.os.type == "linux"`,
		`concat(process.name, http.request.method) : "*GET"`, `startsWith(process.executable, "/usr")`, `imdsgate.token.state == "foreign"`)
}

func (r random) rule() string {
	stage := func() string { return r.pick("process", "network", "any", "network") + " where " + r.condition(3) }
	if r.IntN(3) > 0 {
		return stage()
	}
	by, item := r.pick("", " by process.entity_id", " by host.id, process.parent.entity_id"), func() string {
		return " [" + stage() + "]" + r.pick("", "", "", " with runs=2")
	}
	src := "sequence" + by + r.pick("", " with maxspan=1s", " with maxspan=3s") + item() + item()
	if r.IntN(4) == 0 {
		src = "sequence" + by + " with maxspan=2s ![" + stage() + "]" + item() + r.pick("", " !["+stage()+"]") + item()
	}
	if r.IntN(3) == 0 {
		src += " until [" + stage() + "]"
	}
	return src
}

// processes are a dozen, some of which have been adopted.
func (r random) processes() []*event.Process {
	var all []*event.Process
	for i := range 12 {
		name := r.pick("curl", "python3", "agent", "bash", "cron", "systemd")
		p := &event.Process{
			EntityID: fmt.Sprint("e", i), PID: int64(10 + 3*i), Executable: r.pick("/usr/bin/", "/tmp/", "/opt/") + name, Name: name, Known: true,
			Args: []string{name, r.pick("-s", "-c")}[:1+r.IntN(2)], UserID: r.pick("0", "1000"), RootOwned: r.IntN(2) == 0, HostVerified: r.IntN(2) == 0,
			Container: r.pick("", "", "c1"),
		}
		p.CommandLine = strings.Join(append(p.Args, r.pick("", "http://169.254.169.254/")), " ")
		if i > 2 && r.IntN(4) > 0 {
			p.Parent = all[r.IntN(i)]
			if r.IntN(3) == 0 {
				p.ParentNow = all[r.IntN(i)]
			}
		}
		all = append(all, p)
	}
	return all
}

func (r random) request(host *event.Host, who []*event.Process, at time.Time) *event.Event {
	ev := &event.Event{
		Host: host, Time: at.Add(2 * time.Millisecond),
		Connection: event.Connection{
			Source:      netip.MustParseAddrPort("10.0.0.1:40000"),
			Destination: netip.MustParseAddrPort(r.pick("169.254.169.254:80", "[fd00:ec2::254]:80")),
			First:       r.IntN(2) == 0, Accepted: at.Add(time.Millisecond),
		},
		Request: event.Request{
			Method: r.pick("GET", "PUT"), Path: r.pick("/latest/meta-data/iam/security-credentials/role", "/latest/api/token", "/"),
			UserAgent: r.pick("", "curl/8", "aws-sdk-go"), Guarded: r.IntN(2) == 0, Token: r.IntN(2) == 0,
		},
	}
	for range r.IntN(3) {
		if p := who[r.IntN(len(who))]; !slices.Contains(ev.Subjects, p) {
			if p.Start.IsZero() {
				p.Start = at // before the rules have it
			}
			ev.Subjects = append(ev.Subjects, p)
		}
	}
	return ev
}

// TestRuleSet compares what an Engine says of requests with what its rules say when
// each is asked alone: bound and literally, of processes that come back.
func TestRuleSet(t *testing.T) {
	for seed := range uint64(40) {
		r := newRandom(seed)
		var queries []string
		for range 1 + r.IntN(30) {
			queries = append(queries, r.rule())
		}
		c := Config{Rules: RulesConfig{Paths: []string{ruleFiles(t, queries)}, WithoutShipped: true}}
		p, err := Compile(c, classes)
		if err != nil {
			t.Fatal(err)
		}
		compare(t, r, p, 150)
		if t.Failed() {
			t.Fatal("seed", seed)
		}
	}
}

// TestRuleSetOfRules does so with the shipped rules and Elastic's.
func TestRuleSetOfRules(t *testing.T) {
	c := Config{Rules: RulesConfig{Actions: map[string]RuleAction{}}}
	for _, name := range []string{
		"seed-2025-02-credential_access_unusual_instance_metadata_service_api_request.toml",
		"2026-08-credential_access_cloud_imds_credential_http_request.toml",
	} {
		c.Rules.Paths = append(c.Rules.Paths, filepath.Join(shared.Dir(t), "rules", name))
	}
	alert := Alert
	for _, r := range compile(t, c).Rules() {
		c.Rules.Actions[r.ID] = RuleAction{Action: &alert}
	}
	compare(t, newRandom(1), compile(t, c), 3000)
}

func compare(t *testing.T, r random, p *Policy, requests int) {
	t.Helper()
	e, a := NewEngine(p), newAlone(p.rules)
	host, who := &event.Host{ID: "h"}, r.processes()
	for i := range requests {
		ev := r.request(host, who, base.Add(time.Duration(i)*300*time.Millisecond))
		want := a.matches(ev)
		got := told(judge(e, ev))
		for _, rule := range p.rules {
			if rule.NewTerms != nil { // which remembers, and has tests of its own
				isIts := func(s string) bool { return strings.HasPrefix(s, rule.ID) }
				got, want = slices.DeleteFunc(got, isIts), slices.DeleteFunc(want, isIts)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("request %d:\ngot  %q\nwant %q", i, got, want)
			for _, rule := range p.Rules() {
				if slices.ContainsFunc(slices.Concat(got, want), func(s string) bool {
					return strings.HasPrefix(s, rule.ID) && !(slices.Contains(got, s) && slices.Contains(want, s))
				}) {
					t.Errorf("%s: %s", rule.ID, rule.Query.Stages()[0].Conjuncts()[0].Text)
				}
			}
			return
		}
	}
}

// TestNothingStale is how a process could profit from what was settled about another,
// or about itself before: none of it is to be believed.
func TestNothingStale(t *testing.T) {
	blocked := func(e *Engine, ev *event.Event) bool {
		judge(e, ev)
		return ev.Decision.WouldBe == event.Deny
	}
	app := func() *event.Event { return asking("/opt/app/bin/app", nil) }
	curl := func() *event.Event { return asking("/usr/bin/curl", nil) }

	t.Run("it executes another program", func(t *testing.T) {
		e := NewEngine(compile(t, Config{}))
		ev := app()
		if blocked(e, ev) {
			t.Fatal("the app is blocked")
		}
		// The same entity in another image, which attribution reports as another Process.
		next := curl()
		next.Subjects[0].EntityID = ev.Subjects[0].EntityID
		if !blocked(e, next) {
			t.Error("curl is not")
		}
	})
	t.Run("it asks for something else", func(t *testing.T) {
		e := NewEngine(compile(t, Config{}))
		ev := app()
		if blocked(e, ev) {
			t.Fatal("the app is blocked")
		}
		ev.Request.Token = false
		if !blocked(e, ev) {
			t.Error("IMDSv1 is not")
		}
		// The latch is for rules about processes: this one was about the request.
		if ev.Request.Token = true; blocked(e, ev) {
			t.Error("the app is blocked for what it asked before")
		}
	})
	t.Run("it is adopted", func(t *testing.T) {
		query := `sequence by process.entity_id with maxspan=1s [process where process.parent.name == "cron"] [network where true]`
		block := Block
		e := NewEngine(compile(t, Config{Rules: RulesConfig{WithoutShipped: true, Paths: []string{ruleFiles(t, []string{query})},
			Actions: map[string]RuleAction{"rule-000": {Action: &block}}}}))
		ev := app()
		if blocked(e, ev) {
			t.Fatal("the app is blocked")
		}
		next := app()
		next.Subjects[0].ParentNow = &event.Process{EntityID: "cron", Name: "cron", Executable: "/usr/sbin/cron", Known: true}
		if !blocked(e, next) {
			t.Error("the child of cron is not")
		}
	})
	t.Run("the policy is replaced", func(t *testing.T) {
		e := NewEngine(compile(t, Config{Rules: RulesConfig{WithoutShipped: true}}))
		ev := curl()
		if blocked(e, ev) {
			t.Fatal("curl is blocked without rules")
		}
		e.SetPolicy(compile(t, Config{}))
		if !blocked(e, ev) {
			t.Error("curl is not with them")
		}
		if !ev.Decision.Matches[0].Literal {
			t.Error("the new rules have not been told of its start")
		}
	})
	t.Run("the same policy is set again", func(t *testing.T) {
		p := compile(t, Config{})
		e := NewEngine(p)
		ev := curl()
		blocked(e, ev)
		e.SetPolicy(p)
		blocked(e, ev)
		if m, _ := matched(ev, oddClient); m.Literal {
			t.Error("sequences that go on were told of its start once more")
		}
	})
	t.Run("two engines", func(t *testing.T) {
		strict, none := NewEngine(compile(t, Config{})), NewEngine(compile(t, Config{Rules: RulesConfig{WithoutShipped: true}}))
		ev := curl()
		for range 3 {
			if blocked(none, ev) || !blocked(strict, ev) {
				t.Error("one judges by the rules of the other")
			}
		}
	})
	t.Run("it was asked about when little was known", func(t *testing.T) {
		e := NewEngine(compile(t, Config{}))
		ev := curl()
		ev.Kind = event.Started
		p := ev.Subjects[0]
		whole := [3]string{p.Executable, p.Name, p.CommandLine}
		p.Executable, p.Name, p.CommandLine = "", "", ""
		if e.Concerns(ev) {
			t.Fatal("a rule is about a program without a name")
		}
		p.Executable, p.Name, p.CommandLine = whole[0], whole[1], whole[2]
		if ev.Kind = event.Asked; !e.Concerns(ev) || !blocked(e, ev) {
			t.Error("curl is not blocked")
		}
	})
	t.Run("another host", func(t *testing.T) {
		e := NewEngine(compile(t, Config{Rules: RulesConfig{WithoutShipped: true, Paths: []string{ruleFiles(t, []string{`network where host.id == "prod"`})}}}))
		ev := app()
		judge(e, ev)
		ev.Host = &event.Host{ID: "prod"}
		if judge(e, ev); len(ev.Decision.Matches) == 0 {
			t.Error("the rule sees the host of before")
		}
	})
	t.Run("nobody is known", func(t *testing.T) {
		e := NewEngine(compile(t, Config{}))
		ev := curl()
		blocked(e, ev)
		ev.Subjects = nil
		if judge(e, ev); len(ev.Decision.Matches) > 0 {
			t.Errorf("matches %v", told(ev))
		}
	})
}
