package policy

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/firstseen"
)

const firstClient = `[rule]
rule_id = "first"
name = "First"
type = "new_terms"
language = "kuery"
severity = "low"
query = '''
event.category:network and destination.ip:169.254.169.254 and not process.executable:/usr/bin/known
'''
[rule.new_terms]
field = "new_terms_fields"
value = ["host.id", "process.executable"]
[[rule.new_terms.history_window_start]]
field = "history_window_start"
value = "now-7d"
`

// only loads one rule from its text.
func only(t testing.TB, src string, c Config) Config {
	t.Helper()
	c.Rules.Paths = []string{write(t, "rule.toml", src)}
	c.Rules.WithoutShipped = true
	return c
}

func later(after time.Duration) func(*event.Event, *event.Process) {
	return func(ev *event.Event, _ *event.Process) { ev.Time = ev.Time.Add(after) }
}

func alerts(ev *event.Event, id string) bool {
	m, _ := matched(ev, id)
	return m.Alert
}

func TestNewTerms(t *testing.T) {
	e := NewEngine(compile(t, only(t, firstClient, Config{Mode: Enforce})))
	for i, c := range []struct {
		name, executable string
		change           func(*event.Event, *event.Process)
		want             bool
	}{
		{"the first time", "/opt/app", nil, true},
		{"again", "/opt/app", nil, false},
		{"another program", "/opt/other", nil, true},
		{"another host", "/opt/app", func(ev *event.Event, _ *event.Process) { ev.Host = &event.Host{ID: "other"} }, true},
		{"another process of the same program", "/opt/app", func(_ *event.Event, p *event.Process) { p.EntityID = "x" }, false},
		{"the query does not hold", "/usr/bin/known", nil, false},
		{"a week later", "/opt/app", later(week), false},
		{"a week after that", "/opt/app", later(2 * week), false},
		{"more than a week", "/opt/app", later(3*week + time.Second), true},
		{"two names, of which one is new", "/opt/app", func(ev *event.Event, p *event.Process) {
			ev.Time, p.Args = ev.Time.Add(3*week), []string{"./app"}
		}, true},
		{"two names that are known", "/opt/app", func(ev *event.Event, p *event.Process) {
			ev.Time, p.Args = ev.Time.Add(3*week), []string{"./app"}
		}, false},
		{"a field without value", "", func(_ *event.Event, p *event.Process) { p.Executable, p.Known = "", false }, false},
		{"nobody known", "/opt/app", func(ev *event.Event, _ *event.Process) { ev.Subjects, ev.Request.Guarded = nil, false }, false},
	} {
		ev := asking(c.executable, c.change)
		e.Judge(ev)
		e.Judge(ev) // as when more is known
		if ev.Decision.Verdict == event.Deny {
			t.Errorf("%s: refused, though nobody said that the rule blocks", c.name)
		}
		e.Explain(asking(c.executable, c.change))
		e.Observe(ev)
		if got := alerts(ev, "first"); got != c.want {
			t.Errorf("%d, %s: alert %v", i, c.name, got)
		}
	}
}

const week = 7 * day

// A rule that blocks what is new refuses every try, until audit mode has seen it. It
// learns neither from what it refuses nor from what passes.
func TestNewTermsBlock(t *testing.T) {
	block := Block
	config := Config{Mode: Enforce, Rules: RulesConfig{Actions: map[string]RuleAction{"first": {Action: &block}}}}
	e := NewEngine(compile(t, only(t, firstClient, config)))
	harmless := asking("/opt/app", func(ev *event.Event, p *event.Process) { ev.Request.Class, ev.Request.Guarded = "inventory", false })
	if judge(e, harmless); harmless.Decision.Verdict != event.Allow || !alerts(harmless, "first") {
		t.Errorf("a harmless request: %v", harmless.Decision)
	}
	for i := range 3 {
		ev := judge(e, asking("/opt/app", func(_ *event.Event, p *event.Process) { p.EntityID = strings.Repeat("x", i) }))
		if ev.Decision.Verdict != event.Deny || !alerts(ev, "first") {
			t.Errorf("try %d: %v", i, ev.Decision)
		}
	}
	e.SetMode(Audit)
	for i, want := range []event.Verdict{event.Deny, event.Allow} { // learned, also of this process
		if ev := judge(e, asking("/opt/app", nil)); ev.Decision.WouldBe != want || ev.Decision.Verdict != event.Allow {
			t.Errorf("try %d in audit mode: %v", i, ev.Decision)
		}
	}
	e.SetMode(Enforce)
	if ev := judge(e, asking("/opt/app", func(_ *event.Event, p *event.Process) { p.EntityID = "y" })); ev.Decision.Verdict != event.Allow {
		t.Errorf("known from audit mode: %v", ev.Decision)
	}
	for _, after := range []time.Duration{week, 2 * week} { // each sighting begins the window anew
		if ev := judge(e, asking("/opt/app", later(after))); ev.Decision.Verdict != event.Allow {
			t.Errorf("known and seen since, after %v: %v", after, ev.Decision)
		}
	}
	// What the caller could make the rule's exception of does not excuse him.
	if ev := judge(e, asking("/usr/bin/known", nil)); ev.Decision.Verdict != event.Deny {
		t.Errorf("an exception that the caller chooses: %v", ev.Decision)
	}
}

// One that only alerts does so once, whatever others make of the request.
func TestNewTermsOfRefused(t *testing.T) {
	e := NewEngine(compile(t, Config{Mode: Enforce}))
	const first = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a0d"
	for i, want := range []bool{true, false} {
		if ev := judge(e, asking("/usr/bin/curl", nil)); ev.Decision.Verdict != event.Deny || alerts(ev, first) != want {
			t.Errorf("try %d: %v, alert %v", i, ev.Decision.Verdict, alerts(ev, first))
		}
	}
}

func TestNewTermsOutlive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "first-seen.db")
	config := only(t, firstClient, Config{})
	open := func() *firstseen.Store { return firstseen.Open(path, func(err error) { t.Error(err) }) }

	store := open()
	e := NewEngine(compile(t, config))
	e.KeepTerms(store)
	if !alerts(judge(e, asking("/opt/app", nil)), "first") {
		t.Error("not the first time")
	}
	e.SetPolicy(compile(t, config))
	if alerts(judge(e, asking("/opt/app", nil)), "first") {
		t.Error("new again after a reload")
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	store = open()
	defer store.Close()
	e = NewEngine(compile(t, config))
	e.KeepTerms(store)
	if alerts(judge(e, asking("/opt/app", nil)), "first") {
		t.Error("new again after a restart")
	}
}

func TestNewTermsOfStarts(t *testing.T) {
	src := strings.NewReplacer("event.category:network and destination.ip:169.254.169.254", "event.category:process and event.action:exec",
		`"host.id", "process.executable"`, `"process.args", "user.id"`).Replace(firstClient)
	e := NewEngine(compile(t, only(t, src, Config{})))
	start := func(args ...string) bool {
		ev := asking("/opt/app", func(ev *event.Event, p *event.Process) {
			ev.Kind, p.Args, p.EntityID, p.CommandLine = event.Started, args, strings.Join(args, " "), strings.Join(args, " ")
		})
		if !e.Concerns(ev) {
			t.Error("not of its concern")
		}
		return e.ObserveStart(ev)
	}
	for _, c := range []struct {
		args string
		want bool
	}{{"app -a", true}, {"app -b", true}, {"-b -a app", false}, {"app -c", true}} {
		if got := start(strings.Fields(c.args)...); got != c.want {
			t.Errorf("%s: %v", c.args, got)
		}
	}
	many := make([]string, 10_000)
	for i := range many {
		many[i] = strings.Repeat("x", i%1000)
	}
	start(many...)
	if n := e.terms.Stats().Terms; n > 4+maxCombinations {
		t.Errorf("%d terms", n)
	}
}

func TestExplainNewTerms(t *testing.T) {
	e := NewEngine(compile(t, only(t, firstClient, Config{})))
	holds := func() bool {
		rules := e.Explain(asking("/opt/app", nil)).Steps[StepRule].Of[0].Rules
		c := rules[0].Clauses[len(rules[0].Clauses)-1]
		if c.Text != "first seen in 7d: host.id, process.executable" || c.Holds != rules[0].Matches {
			t.Errorf("%+v", rules[0])
		}
		return c.Holds
	}
	for range 2 {
		if !holds() {
			t.Error("known before it was observed")
		}
	}
	judge(e, asking("/opt/app", nil))
	if holds() {
		t.Error("new after it was observed")
	}
}

func TestParseWindow(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"now-7d": week, "now-30m": 30 * time.Minute, "now-1M": 30 * day, "now-2w": 2 * week, "now-90s": 90 * time.Second, "now-12h": 12 * time.Hour, "now-1y": 365 * day,
		"now": 0, "now-0d": 0, "now+7d": 0, "7d": 0, "now-7": 0, "now-7d/d": 0, "now-99999y": 0, "now-999999d": 0,
	} {
		if got, ok := parseWindow(s); got != want || ok != (want != 0) {
			t.Errorf("%s: %v, %v", s, got, ok)
		}
	}
}

func BenchmarkNewTerms(b *testing.B) {
	e := NewEngine(compile(b, only(b, firstClient, Config{})))
	ev := judge(e, asking("/opt/app", nil))
	b.ReportAllocs()
	for b.Loop() {
		e.Judge(ev)
	}
}
