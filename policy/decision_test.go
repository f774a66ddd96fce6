package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// decided is a decision that counts at the time of asking, and is about what change
// says.
func decided(e Effect, change func(*Decision)) Decision {
	d := Decision{ID: "k3f9x2", Effect: e, Reason: "INC-123", By: Actor{UID: 0, PID: 77, Name: "root"}, Added: base, Expires: base.Add(4 * time.Hour)}
	change(&d)
	return d
}

func decisions(t testing.TB, all ...Decision) *Decisions {
	t.Helper()
	for i := range all {
		all[i].ID = fmt.Sprint("d", i)
	}
	ds, err := NewDecisions(all)
	if err != nil {
		t.Fatal(err)
	}
	return ds
}

const (
	curl      = "/usr/bin/curl"
	ssmAgent  = "/usr/bin/amazon-ssm-agent"
	container = "4f3c2b1a0123456789abcdef0123456789abcdef0123456789abcdef01234567"
)

// What is denied is denied to the program that it describes, whatever has a grant or is
// nobody's business, and to no other.
func TestDecisionDenies(t *testing.T) {
	granted := Config{Mode: Enforce, Grants: []Grant{{Name: "agent", Who: Who{Executable: OneOrMore{ssmAgent}, Unit: "app.service"}, Owner: "o", Reason: "r"}}}
	type change = func(*event.Event, *event.Process)
	inventory := func(ev *event.Event, _ *event.Process) {
		ev.Request.Class, ev.Request.Guarded = "inventory", false
	}
	another := func(ev *event.Event, p *event.Process) {
		ev.Subjects = []*event.Process{{EntityID: "other", PID: 1, Executable: "/usr/bin/other", Known: true, HostVerified: true, RootOwned: true,
			UserID: "7", RealUserID: "7", SavedUserID: "7"}, p}
		ev.Roles = []string{"connector", "holder"}
	}
	for _, c := range []struct {
		name string
		d    func(*Decision)
		ev   change
		deny bool
	}{
		{"executable", func(d *Decision) { d.Executable = ssmAgent }, nil, true},
		{"inventory, which is not guarded", func(d *Decision) { d.Executable = ssmAgent }, inventory, true},
		{"another executable", func(d *Decision) { d.Executable = "/usr/bin/other" }, nil, false},
		{"unit", func(d *Decision) { d.Unit = "app.service" }, nil, true},
		{"user", func(d *Decision) { d.User = "1000" }, nil, true},
		{"one who is it by a setuid program", func(d *Decision) { d.User = "1000" }, func(_ *event.Event, p *event.Process) { p.UserID, p.SavedUserID = "0", "0" }, true},
		{"another user", func(d *Decision) { d.User = "1001" }, nil, false},
		{"container", func(d *Decision) { d.Container = container }, func(_ *event.Event, p *event.Process) { p.Container = container }, true},
		{"another container", func(d *Decision) { d.Container = strings.Repeat("0", 64) }, func(_ *event.Event, p *event.Process) { p.Container = container }, false},
		{"all that it names must hold", func(d *Decision) { d.Executable, d.User = ssmAgent, "1001" }, nil, false},
		{"and holds", func(d *Decision) { d.Executable, d.User, d.Unit = ssmAgent, "1000", "app.service" }, nil, true},
		{"a unit whose name its user chose", func(d *Decision) { d.Unit = "evil.service" }, func(_ *event.Event, p *event.Process) { p.Unit, p.UserUnit = "", "evil.service" }, true},
		{"a file that is not the host's", func(d *Decision) { d.Executable = ssmAgent }, func(_ *event.Event, p *event.Process) { p.HostVerified, p.RootOwned = false, false }, true},
		{"an earlier image", func(d *Decision) { d.Executable = ssmAgent }, func(_ *event.Event, p *event.Process) { p.Earlier = true }, true},
		{"any of the subjects", func(d *Decision) { d.Executable = ssmAgent }, another, true},
		{"evidence that is not complete", func(d *Decision) { d.Executable = ssmAgent }, func(ev *event.Event, _ *event.Process) { ev.Attribution.Complete = false }, true},
		{"over", func(d *Decision) { d.Executable, d.Expires = ssmAgent, base.Add(time.Millisecond) }, nil, false},
		{"added later, by a clock that is behind", func(d *Decision) {
			d.Executable, d.Added, d.Expires = ssmAgent, base.Add(time.Hour), base.Add(2*time.Hour)
		}, nil, true},
	} {
		e := NewEngine(compile(t, granted))
		if e.Decisive(&event.Request{Class: "inventory"}) {
			t.Errorf("%s: nothing is denied yet", c.name)
		}
		e.SetDecisions(decisions(t, decided(Denies, c.d)))
		if !e.Decisive(&event.Request{Class: "inventory"}) {
			t.Errorf("%s: it is not looked for everybody", c.name)
		}
		ev := judge(e, asking(ssmAgent, c.ev))
		if denied := ev.Decision.Operator == "d0" && ev.Decision.Verdict == event.Deny; denied != c.deny || denied != e.Final(ev) {
			t.Errorf("%s: %+v, final %v", c.name, ev.Decision, e.Final(ev))
		}
		if c.deny && (ev.Subjects[0].PID != 4711 || !strings.Contains(ev.Decision.Reason, "INC-123") || !strings.Contains(ev.Decision.Reason, "root")) {
			t.Errorf("%s: first %+v, %q", c.name, ev.Subjects[0], ev.Decision.Reason)
		}
	}
}

// What is allowed passes in spite of a rule that blocks, if it is the program that was
// meant, on the evidence that a grant takes.
func TestDecisionAllows(t *testing.T) {
	type change = func(*event.Event, *event.Process)
	unit := func(d *Decision) { d.Executable, d.Unit = curl, "app.service" }
	anyIn := func(d *Decision) { d.Container, d.AcceptRisk = container, true }
	second := func(executable string) change {
		return func(ev *event.Event, _ *event.Process) {
			other := asking(executable, nil).Subjects[0]
			other.EntityID, other.PID = "second", 4712
			ev.Subjects, ev.Roles = append(ev.Subjects, other), []string{"connector", "holder"}
		}
	}
	for _, c := range []struct {
		name  string
		d     func(*Decision)
		ev    change
		allow bool
	}{
		{"executable and unit", unit, nil, true},
		{"executable and user", func(d *Decision) { d.Executable, d.User, d.AcceptRisk = curl, "1000", true }, nil, true},
		{"setuid", func(d *Decision) { d.Executable, d.User, d.AcceptRisk = curl, "0", true }, func(_ *event.Event, p *event.Process) { p.UserID, p.SavedUserID = "0", "0" }, false},
		{"another unit", unit, func(_ *event.Event, p *event.Process) { p.Unit = "web.service" }, false},
		{"a unit whose name its user chose", unit, func(_ *event.Event, p *event.Process) { p.Unit, p.UserUnit = "", "app.service" }, false},
		{"not the host's file", unit, func(_ *event.Event, p *event.Process) { p.HostVerified, p.RootOwned = false, false }, false},
		{"not only root's", unit, func(_ *event.Event, p *event.Process) { p.RootOwned = false }, false},
		{"the loader", unit, func(_ *event.Event, p *event.Process) { p.Loader = true }, false},
		{"an earlier image", unit, func(_ *event.Event, p *event.Process) { p.Earlier = true }, false},
		{"evidence that is not complete", unit, func(ev *event.Event, _ *event.Process) { ev.Attribution.Complete = false }, false},
		{"nobody known", unit, func(ev *event.Event, _ *event.Process) { ev.Subjects = nil }, false},
		{"two subjects, of which one is allowed", unit, second("/usr/bin/wget"), false},
		{"two subjects, both allowed", unit, second(curl), true},
		{"two subjects, the other by a grant", unit, second(ssmAgent), true},
		{"malformed", unit, func(ev *event.Event, _ *event.Process) { ev.Request.Malformed = "two lengths" }, false},
		{"over", func(d *Decision) { unit(d); d.Expires = base.Add(time.Millisecond) }, nil, false},
		{"over to the moment", func(d *Decision) { unit(d); d.Expires = base.Add(50 * time.Millisecond) }, nil, false},
		{"added later, by a clock that is behind", func(d *Decision) { unit(d); d.Added = base.Add(time.Hour) }, nil, false},
		{"a whole container", anyIn, func(_ *event.Event, p *event.Process) {
			p.Container, p.HostVerified, p.RootOwned = container, false, false
		}, true},
		{"a whole container, from outside", anyIn, nil, false},
		{"in a container without the risk, its own file", func(d *Decision) { d.Executable, d.Container = curl, container }, func(_ *event.Event, p *event.Process) {
			p.Container, p.HostVerified, p.RootOwned = container, false, false
		}, false},
		{"a user at all events, with a file of his own", func(d *Decision) { d.User, d.AcceptRisk = "1000", true }, func(_ *event.Event, p *event.Process) { p.RootOwned = false }, false},
	} {
		e := NewEngine(compile(t, Config{Mode: Enforce, Grants: []Grant{{Name: "agent", Who: Who{Executable: OneOrMore{ssmAgent}, Unit: "app.service"}, Owner: "o", Reason: "r"}}}))
		if ev := judge(e, asking(curl, nil)); ev.Decision.Verdict != event.Deny {
			t.Fatalf("%+v", ev.Decision)
		}
		e.SetDecisions(decisions(t, decided(Allows, c.d)))
		ev := judge(e, asking(curl, c.ev))
		if allowed := ev.Decision.Verdict == event.Allow; allowed != c.allow || allowed != (ev.Decision.Operator == "d0") {
			t.Errorf("%s: %+v", c.name, ev.Decision)
		}
		if c.allow && e.Final(ev) {
			t.Errorf("%s: final", c.name)
		}
	}
}

// A denial comes before what allows the same.
func TestDecisionOrder(t *testing.T) {
	e := NewEngine(compile(t, Config{Mode: Enforce}))
	about := func(d *Decision) { d.Executable, d.Unit = curl, "app.service" }
	e.SetDecisions(decisions(t, decided(Allows, about), decided(Denies, func(d *Decision) { d.User = "1000" })))
	if ev := judge(e, asking(curl, nil)); ev.Decision.Verdict != event.Deny || ev.Decision.Operator != "d1" {
		t.Errorf("%+v", ev.Decision)
	}
	e.SetDecisions(decisions(t, decided(Allows, about)))
	if ev := judge(e, asking(curl, nil)); ev.Decision.Verdict != event.Allow {
		t.Errorf("%+v", ev.Decision)
	}
	e.SetDecisions(nil)
	if ev := judge(e, asking(curl, nil)); ev.Decision.Verdict != event.Deny {
		t.Errorf("%+v", ev.Decision)
	}
}

func TestDecisionCheck(t *testing.T) {
	long := strings.Repeat("x", maxText+1)
	for _, c := range []struct {
		name   string
		e      Effect
		change func(*Decision)
		want   string // "" is none
		risk   bool
	}{
		{"deny an executable", Denies, func(d *Decision) { d.Executable = curl }, "", false},
		{"deny a user", Denies, func(d *Decision) { d.User = "4321" }, "", false},
		{"deny everybody", Denies, func(*Decision) {}, "is about", false},
		{"no reason", Denies, func(d *Decision) { d.User, d.Reason = "1", " " }, "reason", false},
		{"no end", Denies, func(d *Decision) { d.User, d.Expires = "1", time.Time{} }, "when it ends", false},
		{"an end before", Denies, func(d *Decision) { d.User, d.Expires = "1", base.Add(-time.Second) }, "when it ends", false},
		{"31 days", Denies, func(d *Decision) { d.User, d.Expires = "1", base.Add(31*24*time.Hour) }, "at most 30 days", false},
		{"30 days", Denies, func(d *Decision) { d.User, d.Expires = "1", base.Add(30*24*time.Hour) }, "", false},
		{"a user's name", Denies, func(d *Decision) { d.User = "app" }, "not a uid", false},
		{"a relative path", Denies, func(d *Decision) { d.Executable = "curl" }, "absolute", false},
		{"a path with dots", Denies, func(d *Decision) { d.Executable = "/usr/../bin/curl" }, "absolute", false},
		{"half a unit", Denies, func(d *Decision) { d.Unit = "app" }, "whole name", false},
		{"half a container", Denies, func(d *Decision) { d.Container = "4f3c2b1a0123" }, "whole id", false},
		{"a long reason", Denies, func(d *Decision) { d.User, d.Reason = "1", long }, "bytes", false},
		{"allow an executable", Allows, func(d *Decision) { d.Executable = ssmAgent }, "LD_PRELOAD", true},
		{"allow it for a user", Allows, func(d *Decision) { d.Executable, d.User = ssmAgent, "1000" }, "", false},
		{"allow a user", Allows, func(d *Decision) { d.User = "1000" }, "without an executable", true},
		{"allow a unit", Allows, func(d *Decision) { d.Unit = "app.service" }, "without an executable", true},
		{"allow a container", Allows, func(d *Decision) { d.Container = container }, "without an executable", true},
		{"allow python for a user", Allows, func(d *Decision) { d.Executable, d.User = "/usr/bin/python3.11", "1000" }, "arguments", true},
		{"allow curl for a user", Allows, func(d *Decision) { d.Executable, d.User = curl, "1000" }, "arguments", true},
		{"allow a dynamic loader", Allows, func(d *Decision) {
			d.Executable, d.Unit = "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "app.service"
		}, "dynamic loader", false},
		{"allow a user's manager", Allows, func(d *Decision) { d.Executable, d.Unit = ssmAgent, "user@1000.service" }, "names units as he likes", false},
		{"deny a user's manager", Denies, func(d *Decision) { d.Unit = "user@1000.service" }, "", false},
		{"allow a login", Allows, func(d *Decision) { d.Executable, d.Unit = ssmAgent, "session-3.scope" }, "is a login", true},
		{"allow curl for a user in a login", Allows, func(d *Decision) { d.Executable, d.Unit, d.User = curl, "session-3.scope", "1000" }, "arguments", true},
		{"allow it for a user in a login", Allows, func(d *Decision) { d.Executable, d.Unit, d.User = ssmAgent, "session-3.scope", "1000" }, "", false},
		{"deny the root directory", Denies, func(d *Decision) { d.Executable = "/" }, "absolute", false},
		{"allow python in a unit", Allows, func(d *Decision) { d.Executable, d.Unit = "/usr/bin/python3.11", "app.service" }, "", false},
	} {
		d := decided(c.e, c.change)
		err := d.Check()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) || errors.Is(err, ErrRisk) != c.risk {
			t.Errorf("%s: %v", c.name, err)
		}
		if d.AcceptRisk = true; c.risk && d.Check() != nil {
			t.Errorf("%s, with the risk accepted: %v", c.name, d.Check())
		}
	}
}

func TestDecisionsChange(t *testing.T) {
	var ds *Decisions
	add := func(id string, e Effect, change func(*Decision)) (*Decision, error) {
		d := decided(e, change)
		d.ID = id
		next, replaced, err := ds.With(d)
		if err == nil {
			ds = next
		}
		return replaced, err
	}
	about := func(d *Decision) { d.Executable, d.Unit = curl, "app.service" }
	if replaced, err := add("a", Allows, about); replaced != nil || err != nil {
		t.Fatal(replaced, err)
	}
	if replaced, err := add("b", Denies, about); replaced != nil || err != nil {
		t.Fatal(replaced, err)
	}
	before := ds
	longer := func(d *Decision) { about(d); d.Expires = base.Add(8 * time.Hour) }
	if replaced, err := add("c", Allows, longer); err != nil || replaced == nil || replaced.ID != "a" {
		t.Fatal(replaced, err)
	}
	if _, err := add("c", Denies, func(d *Decision) { d.User = "1" }); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Error(err)
	}
	if all := before.All(); len(all) != 2 || all[0].ID != "a" {
		t.Errorf("what was there has changed: %+v", all)
	}
	left, gone := ds.Without(func(d *Decision) bool { return d.Over(base.Add(4 * time.Hour)) })
	if len(gone) != 1 || gone[0].ID != "b" || len(left.All()) != 1 || left.deny() {
		t.Errorf("%+v, %+v", gone, left.All())
	}
	for i := 1; i < MaxDecisions; i++ {
		d := decided(Denies, func(d *Decision) { d.User = fmt.Sprint(i) })
		d.ID = fmt.Sprint(i)
		next, _, err := left.With(d)
		if err != nil {
			t.Fatal(i, err)
		}
		if left = next; i%100 == 0 && len(left.All()) != i+1 {
			t.Fatal(i, len(left.All()))
		}
	}
	if _, _, err := left.With(decided(Denies, func(d *Decision) { d.User = "99999" })); err == nil {
		t.Error("there is no bound")
	}
	if _, _, err := left.With(decided(Denies, func(d *Decision) { d.User = "99" })); err != nil {
		t.Errorf("at the bound one cannot be prolonged: %v", err)
	}
}

// BenchmarkDecisions is a verdict with no decisions, and with many, of which none is
// about the caller: it takes as long. "of all kinds" is each combination that there can
// be of what a decision names.
func BenchmarkDecisions(b *testing.B) {
	e := NewEngine(compile(b, Config{Mode: Enforce}))
	some := func(n, kinds int) *Decisions {
		var all []Decision
		for i := range n {
			d := decided(Effect(i%2), func(d *Decision) {
				kind := i / 2 % kinds
				d.Executable = fmt.Sprintf("/opt/app%d/bin/app", i)
				d.AcceptRisk = d.Effect == Allows
				if kind&1 != 0 {
					d.Unit = fmt.Sprintf("app%d.service", i)
				}
				if kind&2 != 0 {
					d.User = "1000"
				}
				if kind&4 != 0 {
					d.Container = container
				}
			})
			all = append(all, d)
		}
		return decisions(b, all...)
	}
	for _, c := range []struct {
		name string
		ds   *Decisions
	}{{"0", nil}, {"2", some(2, 1)}, {"500", some(500, 1)}, {"1000 of all kinds", some(1000, 8)}} {
		b.Run(c.name, func(b *testing.B) {
			e.SetDecisions(c.ds)
			ev := asking("/opt/app/bin/app", func(_ *event.Event, p *event.Process) { p.Container = container })
			b.ReportAllocs()
			for b.Loop() {
				e.Judge(ev)
			}
			if ev.Decision.Operator != "" {
				b.Fatal(ev.Decision)
			}
		})
	}
}

// What becomes of a request was settled when it came: another mode since then, and more
// that is known of it, do not make its record say otherwise.
func TestJudgeInItsMode(t *testing.T) {
	e := NewEngine(compile(t, Config{Mode: Audit}))
	ev := asking(curl, nil)
	if e.Judge(ev); ev.Decision.Verdict != event.Allow || ev.Decision.WouldBe != event.Deny {
		t.Fatalf("%+v", ev.Decision)
	}
	e.SetMode(Enforce)
	if e.Judge(ev); ev.Decision.Mode != "audit" || ev.Decision.Verdict != event.Allow {
		t.Errorf("%+v", ev.Decision)
	}
	if ev := judge(e, asking(curl, nil)); ev.Decision.Mode != "enforce" || ev.Decision.Verdict != event.Deny {
		t.Errorf("%+v", ev.Decision)
	}
	e.SetPolicy(compile(t, Config{Mode: Audit}))
	if e.Mode() != Enforce {
		t.Error("another policy has changed the mode")
	}
}
