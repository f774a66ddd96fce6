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
    group: "990"
    parent: /usr/sbin/cron
    own_token: true
    classes: [credentials]
    paths: [/latest/meta-data/iam/*]
    api: v2
    owner: platform
    reason: signs its requests
    expires: 2027-01-01
  - {name: job, executable: [/opt/a, /opt/b], container: 0123456789ab, pod: 01234567-89ab-cdef-0123-456789abcdef, owner: o, reason: r}
  - {name: any, executable: /opt/c, executable_only: true, owner: o, reason: r}
denies:
  - {name: old, user: ci, api: v1, reason: it is time}
classes: {inventory: strict}
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
	if g.Group != "990" || g.Parent != "/usr/sbin/cron" || len(g.Paths) != 1 || g.API != policy.V2 || len(g.Executable) != 1 || g.Executable[0] != "/opt/app/bin/app" {
		t.Errorf("%+v", g)
	}
	if g := c.Grants[1]; len(g.Executable) != 2 || g.Container != "0123456789ab" || g.Pod == "" || !c.Grants[2].ExecutableOnly {
		t.Errorf("%+v", c.Grants)
	}
	if d := c.Denies[0]; d.User != "ci" || d.API != policy.V1 || c.Classes["inventory"] != policy.Strict {
		t.Errorf("%+v", d)
	}
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

// A mistake is shown where it is, and what to write instead.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		name, src string
		says      []string
	}{
		{"unknown key", "mode: audit\nmdoe: enforce\n", []string{"config.yaml:2:1:", `unknown key "mdoe"; is it mode?`, ">    2 | mdoe: enforce\n       | ^"}},
		{"unknown key below", "rules:\n  path: [x]\n", []string{"config.yaml:2:3:", `"path" of rules; is it paths?`, "^"}},
		{"unknown key like nothing", "log: {x: y}\n", []string{"config.yaml:1:7:", "there are level"}},
		{"two of them", "mdoe: audit\nlog: {levle: info}\n", []string{"config.yaml:1:1:", "config.yaml:2:7:", "is it level?"}},
		{"repeated key", "mode: audit\nmode: enforce\n", []string{"config.yaml:2:1:", "mode", "^"}},
		{"unknown mode", "mode: block\n", []string{"config.yaml:1:7:", "block", "audit, enforce, off", "^"}},
		{"wrong type", "limits: {connections: many}\n", []string{"config.yaml:1:23:", "a number is wanted here, and not a text", "^"}},
		{"a list for a mapping", "rules: [a]\n", []string{"config.yaml:1:8:", "a mapping of keys is wanted here, and not a list", "^"}},
		{"unknown level", "attribution: {require_level: L4}\n", []string{"config.yaml:1:", "L4", "L0, L1, L2, L3", "^"}},
		{"unknown value", "attribution: {uncovered: allow}\n", []string{"config.yaml:1:", "allow", "deny and report", "^"}},
		{"unknown layout", "events: {layout: both}\n", []string{"config.yaml:1:", "both", "own and defend", "^"}},
		{"unknown fsync", "events: {fsync: sometimes}\n", []string{"config.yaml:1:", "sometimes", "never, rotate, interval, always", "^"}},
		{"unknown scope", "tokens:\n  scope: host\n", []string{"config.yaml:2:10:", "host", "unit, parent, process", "^"}},
		{"unknown action on tokens", "tokens: {action: deny}\n", []string{"config.yaml:1:18:", "deny", "off, alert, block", "^"}},
		{"unknown key of tokens", "tokens: {scopes: unit}\n", []string{"1:10:", "scopes", "^"}},
		{"what a caller writes himself", "grants:\n- name: a\n  comm: x\n", []string{"config.yaml:3:3:", `"comm" of grants: a process names itself`, "use executable", "^"}},
		{"the name of a class in a grant", "grants: [{name: a, api: v3}]\n", []string{"config.yaml:1:25:", "v3", "v1, v2", "^"}},
		{"unknown level of the log", "log: {level: loud}\n", []string{"config.yaml:1:14:", "loud", "debug, info, warn, error"}},
		{"a number for a text", "control: {group: 5}\ngrants: [{name: a, user: 1000, executable: 7, owner: [x]}]\n", []string{"config.yaml:"}},
		{"not YAML", "mode: [\n", []string{"config.yaml:", "^"}},
		{"what the YAML library panics at", "grants: !00 00", []string{"config.yaml", "tag"}},
		{"a wrong date", "grants: [{name: a, expires: tomorrow}]\n", []string{"tomorrow", "2006-01-02"}},
		{"a second document", "mode: audit\n---\nmode: enforce\n", []string{"config.yaml:3:1:", "second document"}},
		{"much too much in each other", strings.Repeat("[", 200_000), []string{"config.yaml:1:65: more than 64 levels", "^"}},
		{"much too much", "#" + strings.Repeat("x", 1<<20), []string{"config.yaml: more than 1048576 bytes"}},
	} {
		_, err := Parse("config.yaml", []byte(c.src))
		for _, want := range c.says {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: does not say %q: %v", c.name, want, err)
			}
		}
	}
}

// What is wrong with the policy is shown where it is written.
func TestPolicyErrors(t *testing.T) {
	const grant = "grants:\n- name: app\n  executable: /opt/app\n  unit: app.service\n  owner: o\n  reason: r\n"
	for _, c := range []struct {
		name, src string
		says      []string
	}{
		{"executable of a user", "grants:\n- name: app\n  executable: /home/x/app\n  user: x\n  owner: o\n  reason: r\n", []string{"c.yaml:3:15:", "/home", ">    3 |   executable: /home/x/app\n       |               ^"}},
		{"the second of a list", "grants:\n- {name: app, executable: [/opt/a, /tmp/b], user: x, owner: o, reason: r}\n", []string{"c.yaml:2:36:", "/tmp/b"}},
		{"what is missing", "grants:\n- name: app\n  executable: /opt/app\n  unit: app.service\n  owner: o\n", []string{"c.yaml:2:3:", "reason"}},
		{"behind a text of several lines", "grants:\n- name: app\n  reason: >-\n    one\n    two\n\n  executable: /tmp/app\n  user: x\n  owner: o\n", []string{"c.yaml:7:15:", ">    7 |   executable: /tmp/app\n"}},
		{"all of them", "grants:\n- name: app\n  executable: /opt/app\n  unit: user@1000.service\n  owner: o\n- name: app\n  executable: /usr/bin/python3\n  user: app\n  owner: o\n  reason: r\n",
			[]string{"c.yaml:2:3:", "c.yaml:4:9:", "c.yaml:6:9:", "see c.yaml:2", "c.yaml:7:15:"}},
		{"a rule that is not there", "rules:\n  actions:\n    nosuch:\n      action: log\n", []string{"c.yaml:3:5:", "nosuch"}},
		{"a class that is not there", "classes:\n  creds: strict\n", []string{"c.yaml:2:10:", "creds", "credentials"}},
		{"a class of a rule", "rules: {actions: {5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a01: {classes: {creds: log}}}}\n", []string{"c.yaml:1:", "creds"}},
		{"an anchor", grant + "- &x\n  name: b\n  executable: /tmp/x\n  unit: x.service\n  owner: o\n  reason: r\n", []string{"c.yaml:9:15:"}},
	} {
		config, err := Parse("c.yaml", []byte(c.src))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		_, err = config.Policy()
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

// Metrics are for this host alone.
func TestMetricsAddress(t *testing.T) {
	for text, complaint := range map[string]string{
		"127.0.0.1:9254": "", "127.8.0.1:1": "", "[::1]:9254": "", "unix:/run/imdsgate/metrics.sock": "",
		"0.0.0.0:9254": "can be reached from other machines", "[::]:9254": "can be reached from other machines",
		"10.0.0.7:9254": "can be reached from other machines", "169.254.169.254:80": "can be reached from other machines",
		":9254": "is not an address with a port", "localhost:9254": "write 127.0.0.1:9254", "127.0.0.1:0": "is not an address with a port",
		"9254": "is not an address with a port", "unix:metrics.sock": "is not the whole path",
	} {
		c, err := Parse("config.yaml", []byte("metrics:\n  listen: '"+text+"'\n"))
		switch {
		case complaint == "" && (err != nil || c.Metrics.Listen.String() != text):
			t.Errorf("%s: %v, %v", text, c.Metrics.Listen, err)
		case complaint != "" && (err == nil || !strings.Contains(err.Error(), complaint) || !strings.Contains(err.Error(), "config.yaml:2")):
			t.Errorf("%s: %v", text, err)
		}
	}
}
