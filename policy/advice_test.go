package policy

import (
	"strings"
	"testing"
)

func TestAdvice(t *testing.T) {
	app := Grant{Name: "app", Who: Who{Executable: OneOrMore{"/opt/app"}, Unit: "app.service"}, Owner: "o", Reason: "r"}
	with := func(name string, change func(*Grant)) Grant {
		g := app
		g.Name = name
		change(&g)
		return g
	}
	yesterday, tomorrow := Date{base.AddDate(0, 0, -2)}, Date{base.AddDate(0, 0, 1)}
	for _, c := range []struct {
		name   string
		config Config
		want   string // keys
	}{
		{"nothing", Config{Grants: []Grant{app}}, ""},
		{"expired", Config{Grants: []Grant{with("x", func(g *Grant) { g.Expires = yesterday })}}, "grants[0].expires"},
		{"an expired deny", Config{Denies: []Deny{{Name: "d", Expires: yesterday}}}, "denies[0].expires"},
		{"everybody's", Config{Grants: []Grant{with("x", func(g *Grant) { g.Unit, g.ExecutableOnly = "", true })}}, "grants[0].executable_only"},
		{"the same twice", Config{Grants: []Grant{app, with("again", func(*Grant) {})}}, "grants[1].name"},
		{"wider afterwards", Config{Grants: []Grant{with("x", func(g *Grant) { g.Classes = []string{"token"} }), app}}, "grants[0].name"},
		{"narrower by user", Config{Grants: []Grant{app, with("x", func(g *Grant) { g.User = "app" })}}, "grants[1].name"},
		{"another unit", Config{Grants: []Grant{app, with("x", func(g *Grant) { g.Unit = "b.service" })}}, ""},
		{"more executables", Config{Grants: []Grant{app, with("x", func(g *Grant) { g.Executable = OneOrMore{"/opt/app", "/opt/b"} })}}, "grants[0].name"},
		{"longer", Config{Grants: []Grant{with("x", func(g *Grant) { g.Expires = tomorrow }), app}}, "grants[0].name"},
		{"not as long", Config{Grants: []Grant{with("x", func(g *Grant) { g.Expires, g.Classes = tomorrow, []string{"token"} }), with("y", func(g *Grant) { g.Classes = []string{"token", "listing"} })}}, "grants[0].name"},
		{"other classes", Config{Grants: []Grant{with("x", func(g *Grant) { g.Classes = []string{"token"} }), with("y", func(g *Grant) { g.Classes = []string{"listing"} })}}, ""},
		{"without its own token", Config{Grants: []Grant{with("x", func(g *Grant) { g.OwnToken = true }), app}}, "grants[0].name"},
		{"made idle by one that has expired", Config{Grants: []Grant{with("x", func(g *Grant) { g.Expires = yesterday }), app}}, "grants[0].expires"},
		{"on the host and in a container", Config{Grants: []Grant{with("x", func(g *Grant) { g.Unit, g.User = "", "0" }), with("y", func(g *Grant) { g.Unit, g.User, g.Container = "", "0", containerID })}}, ""},
		{"longer ID of a container", Config{Grants: []Grant{with("x", func(g *Grant) { g.Unit, g.Container = "", containerID[:12] }), with("y", func(g *Grant) { g.Unit, g.Container = "", containerID })}}, "grants[1].name"},
		{"no session tokens", Config{Classes: map[string]Posture{"token": Strict}}, "classes.token"},
	} {
		var keys []string
		for _, a := range c.config.Advice(base) {
			keys = append(keys, a.Key)
		}
		if got := strings.Join(keys, " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
