package policy

import (
	"testing"

	"github.com/imdsgate/imdsgate/event"
)

func TestFileIs(t *testing.T) {
	for _, c := range []struct {
		written, file string
		want          bool
	}{
		{"/usr/bin/a", "/usr/bin/a", true},
		{"/usr/bin/a", "/usr/bin/b", false},
		{"/snap/a/*/a", "/snap/a/7993/a", true},
		{"/snap/a/*/a", "/snap/a//a", false},
		{"/snap/a/*/a", "/snap/a/1/2/a", false},
		{"/snap/a/*/a", "/snap/a/1/b", false},
		{"/snap/a/*/a", "/snap/b/1/a", false},
		{"/snap/a/*/a", "/snap/a/a", false},
		{"/opt/e/data/e-*/bin/e", "/opt/e/data/e-9.1.0-abc/bin/e", true},
		{"/opt/e/data/e-*/bin/e", "/opt/e/data/e-/bin/e", false},
		{"/opt/e/data/e-*/bin/e", "/opt/e/data/f-9/bin/e", false},
		{"/opt/e/data/e-*/bin/e", "/opt/e/data/e-9/x/bin/e", false},
		{"/snap/a/*/a", "", false},
	} {
		if got := fileIs(c.written, c.file); got != c.want {
			t.Errorf("%s is %s: %v", c.file, c.written, got)
		}
	}
}

func TestUnitIs(t *testing.T) {
	for _, c := range []struct {
		written, unit string
		want          bool
	}{
		{"a.service", "a.service", true},
		{"a.service", "b.service", false},
		{"a.service", "", false},
		{"a@.service", "a@x.service", true},
		{"a@.service", "a@x.y.service", true},
		{"a@.service", "a@.service", true},
		{"a@.service", "a@x.scope", false},
		{"a@.service", "ab@x.service", false},
		{"a@.service", "a.service", false},
		{"a@x.service", "a@x.service", true},
		{"a@x.service", "a@y.service", false},
		{"a@x.service", "a@xy.service", false},
		{"a@.service", "", false},
	} {
		if got := unitIs(c.written, c.unit); got != c.want {
			t.Errorf("%s is %s: %v", c.unit, c.written, got)
		}
	}
}

// A grant is found under what it has of a name that changes, and holds for nobody else.
func TestGrantsByPattern(t *testing.T) {
	p := compile(t, Config{Mode: Enforce, Posture: Strict, Grants: []Grant{
		{Name: "other", Who: Who{Executable: OneOrMore{"/opt/app/bin/app"}, Unit: "other@.service"}, Owner: "o", Reason: "r"},
		{Name: "both", Who: Who{Executable: OneOrMore{"/snap/app/*/app", "/opt/app/v*/app"}, Unit: "app@.service"}, Owner: "o", Reason: "r"},
		{Name: "child", Who: Who{Executable: OneOrMore{"/usr/bin/helper"}, User: "app", Parent: "/snap/app/*/app"}, Owner: "o", Reason: "r"},
	}})
	for _, c := range []struct {
		executable, unit, parent, want string
	}{
		{"/snap/app/12/app", "app@eth0.service", "/usr/lib/systemd/systemd", "both"},
		{"/opt/app/v2/app", "app@eth0.service", "/usr/lib/systemd/systemd", "both"},
		{"/snap/app/12/app", "app.service", "/usr/lib/systemd/systemd", ""},
		{"/snap/app/12/app", "other@a.service", "/usr/lib/systemd/systemd", ""},
		{"/snap/other/12/app", "app@eth0.service", "/usr/lib/systemd/systemd", ""},
		{"/tmp/app", "app@eth0.service", "/usr/lib/systemd/systemd", ""},
		{"/usr/bin/helper", "app@eth0.service", "/snap/app/3/app", "child"},
		{"/usr/bin/helper", "app@eth0.service", "/snap/app/app", ""},
	} {
		ev := asking(c.executable, func(_ *event.Event, p *event.Process) {
			p.Unit, p.Ancestry = c.unit, "birth"
			p.Parent = &event.Process{EntityID: "parent", PID: 2, Executable: c.parent, Known: true, HostVerified: true, RootOwned: true}
		})
		if judge(NewEngine(p), ev); ev.Decision.Grant != c.want {
			t.Errorf("%s in %s has %q: %s", c.executable, c.unit, ev.Decision.Grant, ev.Decision.Reason)
		}
	}
	for _, of := range []string{"/snap/app/12/app", "/snap/app/12/app2"} {
		deny := compile(t, Config{Mode: Enforce, Denies: []Deny{{Name: "d", Who: Who{Executable: OneOrMore{"/snap/app/*/app"}, Unit: "app@.service"}, Reason: "r"}}})
		ev := judge(NewEngine(deny), asking(of, func(_ *event.Event, p *event.Process) { p.Unit = "app@1.service" }))
		if want := map[bool]event.Verdict{true: event.Deny}[of == "/snap/app/12/app"]; ev.Decision.WouldBe != want {
			t.Errorf("%s: %v", of, ev.Decision.Reason)
		}
	}
}
