package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// two is a policy with a sequence, and a rule about starts, each with a version of its
// text.
func two(t *testing.T, sequence, start string) *Policy {
	dir := t.TempDir()
	for name, query := range map[string]string{
		"sequence": `sequence by process.entity_id with maxspan=1m
  [process where event.type == "start" and process.name == "app"]
  [network where event.action == "connection_attempted" and user.name == "app"] // ` + sequence,
		"start": `process where event.type == "start" and process.name == "app" // ` + start,
	} {
		text := fmt.Sprintf("[rule]\nrule_id = %q\nname = %[1]q\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = '''\n%s\n'''\n", name, query)
		if err := os.WriteFile(filepath.Join(dir, name+".toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return compile(t, Config{Rules: RulesConfig{WithoutShipped: true, Paths: []string{dir}}})
}

func raised(ev *event.Event) string {
	var ids []string
	for _, m := range ev.Decision.Matches {
		if m.Alert {
			ids = append(ids, m.Rule.ID)
		}
	}
	return strings.Join(ids, " ")
}

// What a reload leaves as it is goes on where it was, and what it changes begins anew.
func TestReloadKeepsSequences(t *testing.T) {
	started := func(e *Engine) *event.Event {
		ev := asking("/opt/app/bin/app", nil)
		ev.Kind = event.Started
		e.ObserveStart(ev)
		return ev
	}
	asked := func(e *Engine) string { return raised(judge(e, asking("/opt/app/bin/app", nil))) }

	e := NewEngine(two(t, "1", "1"))
	if got := raised(started(e)); got != "start" {
		t.Fatalf("the start raises %q", got)
	}
	e.SetPolicy(two(t, "1", "1"))
	if got := raised(started(e)); got != "" {
		t.Errorf("the same start after a reload raises %q", got)
	}
	if got := asked(e); got != "sequence" {
		t.Errorf("the connection of a process that started before the reload raises %q", got)
	}

	e = NewEngine(two(t, "1", "1"))
	started(e)
	e.SetPolicy(two(t, "2", "1"))
	if got := asked(e); got != "sequence" { // which was told of the start with the connection, as it would have been without the first
		t.Errorf("a sequence that is new: %q", got)
	}

	e = NewEngine(two(t, "1", "1"))
	started(e)
	e.SetPolicy(two(t, "1", "2"))
	if got := raised(started(e)); got != "start" {
		t.Errorf("a rule about starts that is new raises %q", got)
	}
	e.SetPolicy(two(t, "1", "2"))
	if got := raised(started(e)); got != "" {
		t.Errorf("and once more: %q", got)
	}
}

// Reloads and requests at the same time: nothing is lost that an unchanged rule knew.
func TestReloadWhileAsked(t *testing.T) {
	e := NewEngine(compile(t, Config{Mode: Enforce}))
	if ev := judge(e, asking("/usr/bin/curl", nil)); ev.Decision.Verdict != event.Deny {
		t.Fatal(ev.Decision)
	}
	var clients sync.WaitGroup
	end := time.Now().Add(300 * time.Millisecond)
	for range 4 {
		clients.Go(func() {
			for time.Now().Before(end) {
				ev := asking("/opt/app/bin/app", func(_ *event.Event, p *event.Process) { p.EntityID = "entity-/usr/bin/curl" })
				if judge(e, ev); ev.Decision.Verdict != event.Deny {
					t.Errorf("%+v", ev.Decision)
					return
				}
			}
		})
	}
	p := []*Policy{compile(t, Config{Mode: Enforce}), compile(t, Config{Mode: Enforce, Posture: Strict})}
	for i := 0; time.Now().Before(end); i++ {
		e.SetPolicy(p[i%2])
	}
	clients.Wait()
}

func TestChanges(t *testing.T) {
	a, b, c := grantFor("/opt/a"), grantFor("/opt/b"), grantFor("/opt/c")
	a.Name, b.Name, c.Name = "a", "b", "c"
	other := b
	other.Executable = OneOrMore{"/opt/b", "/opt/b2"}
	log := Log
	before := compile(t, Config{Revision: "1", Grants: []Grant{a, b}, Denies: []Deny{{Name: "d", Who: Who{User: "x"}, Reason: "r"}}, Classes: map[string]Posture{"token": Default}})
	after := compile(t, Config{Revision: "2", Posture: Strict, Grants: []Grant{other, c}, Tokens: TokensConfig{Scope: event.ScopeProcess},
		Rules: RulesConfig{Actions: map[string]RuleAction{oddClient: {Action: &log}}}, Classes: map[string]Posture{"inventory": Strict}})
	got := strings.Join(before.Changes(after), "\n")
	for _, want := range []string{"~ rule " + oddClient, "~ grant b", "+ grant c", "- grant a", "- deny d", "posture strict, was default",
		"posture of inventory: strict, was not set", "posture of token: not set, was default", "scope of tokens process, was unit", `revision "2", was "1"`} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if n := len(strings.Split(got, "\n")); n != 10 {
		t.Errorf("%d changes:\n%s", n, got)
	}
	if got := before.Changes(before); got != nil {
		t.Errorf("no change: %v", got)
	}
}

// What a policy is called fits a label and a line.
func TestCalled(t *testing.T) {
	long := strings.Repeat("a", 65)
	for _, c := range []struct {
		config Config
		wrong  string // key
	}{
		{Config{Name: "web-tier (eu)", Revision: strings.Repeat("0", 64)}, ""},
		{Config{Name: long}, "name"},
		{Config{Revision: long}, "revision"},
		{Config{Name: "a\nb"}, "name"},
		{Config{Revision: "\x1b[2J"}, "revision"},
	} {
		p, err := Compile(c.config, nil)
		if key, ok := errors.AsType[*KeyError](err); ok != (c.wrong != "") || ok && key.Key != c.wrong {
			t.Errorf("%q: %v", c.config.Name+c.config.Revision, err)
		}
		if err == nil && (p.Name != c.config.Name || p.Revision != c.config.Revision) {
			t.Errorf("it is %q %q", p.Name, p.Revision)
		}
	}
}
