package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/policy"
)

func TestDefaults(t *testing.T) {
	for name, src := range map[string]string{"empty": "", "comments": "# nothing yet\n", "a part": "events: {keep: 2}\n"} {
		c, err := Parse("config.yaml", []byte(src))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if c.Mode != policy.Audit || c.Events.Path != DefaultEvents || c.FirstSeen.Path != DefaultFirstSeen || c.Control.Socket == "" || c.Log.Level != "info" {
			t.Errorf("%s: %+v", name, c)
		}
		if p, err := c.Policy(); err != nil || len(p.Rules()) == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none.yaml")); err == nil {
		t.Error("a file that is named and not there is no error")
	}
}

// Everything that an operator can set is read.
func TestEverySetting(t *testing.T) {
	const all = `
mode: enforce
posture: strict
rules:
  paths: []
  without_shipped: false
  skip_refused: true
  actions:
    5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a01:
      action: alert
      classes: {inventory: log, user-data: block}
      honour_exclusions: true
      alert_on: either
tokens: {scope: parent, action: block}
grants:
  - name: app
    executable: /opt/app/bin/app
    unit: app.service
    user: app
    own_token: true
    classes: [credentials]
    owner: platform
    reason: signs its requests
    expires: 2027-01-01
redirect:
  host_port: 251
  forwarded_port: 252
  backend: legacy
  override_foreign: true
  override_conntrack: true
  forwarded_addrs: [169.254.213.81, "fd69:6d64:7367::81"]
events: {path: /tmp/x, max_size: 1000, keep: 3, queue: 10, max_age: 24h, fsync: interval, layout: defend, journal: true}
first_seen: {path: /tmp/f}
attribution: {require_level: L2, uncovered: report}
control: {socket: /tmp/s, group: wheel}
limits: {connections: 100}
log: {level: debug}
`
	c, err := Parse("config.yaml", []byte(all))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Policy(); err != nil {
		t.Error(err)
	}
	g := c.Grants[0]
	if c.Mode != policy.Enforce || c.Posture != policy.Strict || c.Redirect.HostPort != 251 || !c.Redirect.OverrideForeign ||
		c.Redirect.ForwardedAddrs[0].String() != "169.254.213.81" || c.Events.Keep != 3 || c.FirstSeen.Path != "/tmp/f" || !c.Rules.SkipRefused || c.Limits.Connections != 100 ||
		g.Expires.Format("2006-01-02") != "2027-01-01" || g.Unit != "app.service" || c.Control.Group != "wheel" ||
		c.Attribution.RequireLevel != attribution.Level2 || c.Attribution.Uncovered != Report {
		t.Errorf("%+v", c)
	}
	if e := c.Events; e.MaxSize != 1000 || e.Queue != 10 || e.MaxAge != 24*time.Hour || e.Fsync != sink.FsyncInterval || e.Layout != event.Defend || !e.Journal {
		t.Errorf("%+v", e)
	}
	if c.Tokens.Scope != event.ScopeParent || *c.Tokens.Action != policy.TokenBlock || !g.OwnToken {
		t.Errorf("%+v", c.Tokens)
	}
	if a := c.Rules.Actions["5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a01"]; *a.Action != policy.Alert || a.Classes["user-data"] != policy.Block || a.AlertOn != policy.Either {
		t.Errorf("%+v", a)
	}
}

// A mistake is shown where it is.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		name, src string
		says      []string
	}{
		{"unknown key", "mode: audit\nmdoe: enforce\n", []string{"config.yaml:", "[2:1]", "mdoe", "^"}},
		{"unknown key below", "rules:\n  path: [x]\n", []string{"[2:3]", "path", "^"}},
		{"repeated key", "mode: audit\nmode: enforce\n", []string{"[2:1]", "mode", "^"}},
		{"unknown mode", "mode: block\n", []string{"config.yaml:[1:7]", "block", "audit, enforce, off", "^"}},
		{"wrong type", "limits: {connections: many}\n", []string{"[1:", "^"}},
		{"unknown level", "attribution: {require_level: L4}\n", []string{"config.yaml:[1:", "L4", "L0, L1, L2, L3", "^"}},
		{"unknown value", "attribution: {uncovered: allow}\n", []string{"config.yaml:[1:", "allow", "deny and report", "^"}},
		{"unknown layout", "events: {layout: both}\n", []string{"config.yaml:[1:", "both", "own and defend", "^"}},
		{"unknown fsync", "events: {fsync: sometimes}\n", []string{"config.yaml:[1:", "sometimes", "never, rotate, interval, always", "^"}},
		{"unknown scope", "tokens:\n  scope: host\n", []string{"config.yaml:[2:10]", "host", "unit, parent, process", "^"}},
		{"unknown action on tokens", "tokens: {action: deny}\n", []string{"config.yaml:[1:18]", "deny", "off, alert, block", "^"}},
		{"unknown key of tokens", "tokens: {scopes: unit}\n", []string{"[1:10]", "scopes", "^"}},
		{"not YAML", "mode: [\n", []string{"config.yaml:", "^"}},
		{"what the YAML library panics at", "grants: !00 00", []string{"config.yaml", "tag"}},
		{"a wrong date", "grants: [{name: a, expires: tomorrow}]\n", []string{"tomorrow", "2006-01-02"}},
	} {
		_, err := Parse("config.yaml", []byte(c.src))
		for _, want := range c.says {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: does not say %q: %v", c.name, want, err)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("mode: enforce\ngrants: [{name: a, expires: 2027-01-01}]\n"))
	f.Add([]byte("grants: !00 00"))
	f.Add([]byte("redirect: {endpoints: ['169.254.169.254:80']}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4096 {
			return
		}
		if c, err := Parse("fuzz", b); err == nil && c.Events.Path == "" {
			t.Errorf("%q: no event file", b)
		}
	})
}

// The example that is shipped is right.
func TestExample(t *testing.T) {
	b, err := os.ReadFile("../../packaging/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse("packaging/config.yaml", b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Policy(); err != nil {
		t.Error(err)
	}
}
