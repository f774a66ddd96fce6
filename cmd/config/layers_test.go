package config

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/imdsgate/imdsgate/policy"
)

// below writes files below a root of their own.
func below(t *testing.T, files map[string]string) (root string) {
	t.Helper()
	root = t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func grantIn(name string) string {
	return "grants:\n- name: " + name + "\n  executable: /opt/" + name + "\n  unit: app.service\n  owner: o\n  reason: r\n"
}

const oddClient = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a01"

// The vendor's files, the operator's, and drop-ins, each over what was before.
func TestLayers(t *testing.T) {
	root := below(t, map[string]string{
		"usr/lib/imdsgate/config.yaml":           "posture: strict\nlog: {level: warn}\nlimits: {connections: 10, burst: 3}\n" + grantIn("vendor") + "rules:\n  actions:\n    " + oddClient + ": {action: block, alert_on: either}\n",
		"usr/lib/imdsgate/config.d/10-a.yaml":    grantIn("a"),
		"usr/lib/imdsgate/config.d/20-gone.yaml": grantIn("gone"),
		"usr/lib/imdsgate/config.d/30-new.yaml":  grantIn("replaced"),
		"etc/imdsgate/config.yaml":               "mode: enforce\nlimits: {connections: 20}\nclasses: {inventory: strict}\n" + grantIn("own"),
		"etc/imdsgate/config.d/05-late.yaml":     "log: {level: debug}\nclasses: {token: default}\nrules:\n  actions:\n    " + oddClient + ": {action: alert}\n    5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a03: {action: log}\n",
		"etc/imdsgate/config.d/20-gone.yaml":     "",
		"etc/imdsgate/config.d/30-new.yaml":      grantIn("new"),
		"etc/imdsgate/config.d/.hidden.yaml":     "nonsense",
		"etc/imdsgate/config.d/x.yaml~":          "nonsense",
		"etc/imdsgate/config.d/readme":           "nonsense",
	})
	c, err := LoadFrom(root)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, g := range c.Grants {
		names = append(names, g.Name)
	}
	if got := strings.Join(names, " "); got != "vendor a own new" {
		t.Errorf("grants %s", got)
	}
	if c.Mode != policy.Enforce || c.Posture != policy.Strict || c.Log.Level != "debug" || c.Limits.Connections != 20 || c.Limits.Burst != 3 {
		t.Errorf("%+v", c)
	}
	if c.Classes["inventory"] != policy.Strict || len(c.Classes) != 2 {
		t.Errorf("%v", c.Classes)
	}
	if a := c.Rules.Actions; len(a) != 2 || *a[oddClient].Action != policy.Alert || a[oddClient].AlertOn != policy.Literal {
		t.Errorf("the last file's entry of a rule holds, whole: %+v", a)
	}
	if _, err := c.Policy(); err != nil {
		t.Error(err)
	}
	for key, want := range map[string]string{
		"mode":                              "/etc/imdsgate/config.yaml:1",
		"posture":                           "/usr/lib/imdsgate/config.yaml:1",
		"limits.connections":                "/etc/imdsgate/config.yaml:2",
		"limits.burst":                      "/usr/lib/imdsgate/config.yaml:3",
		"grants[0].name":                    "/usr/lib/imdsgate/config.yaml:5",
		"grants[2].executable":              "/etc/imdsgate/config.yaml:6",
		"grants[3].name":                    "/etc/imdsgate/config.d/30-new.yaml:2",
		"rules.actions." + oddClient:        "/etc/imdsgate/config.d/05-late.yaml:5",
		"classes.inventory":                 "/etc/imdsgate/config.yaml:3",
		"events.path":                       "",
		"limits.dial_ahead":                 "",
		"grants[4].name":                    "",
		"rules.actions." + oddClient + ".x": "",
	} {
		if got := strings.TrimPrefix(c.Origin(key), root); got != want {
			t.Errorf("%s is from %q, want %q", key, got, want)
		}
	}
	if _, err := LoadFrom(t.TempDir()); err != nil {
		t.Errorf("no files: %v", err)
	}
}

// All that is wrong, in whatever file, is said at once, and a name that is there twice
// with both places.
func TestErrorsOfLayers(t *testing.T) {
	root := below(t, map[string]string{
		"usr/lib/imdsgate/config.yaml":    "mdoe: audit\n",
		"etc/imdsgate/config.yaml":        "posture: loose\n",
		"etc/imdsgate/config.d/10-a.yaml": "log: [\n",
	})
	_, err := LoadFrom(root)
	for _, want := range []string{"usr/lib/imdsgate/config.yaml:1:1:", "etc/imdsgate/config.yaml:1:10:", "10-a.yaml:"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("does not say %q: %v", want, err)
		}
	}
	root = below(t, map[string]string{
		"etc/imdsgate/config.yaml":        grantIn("app"),
		"etc/imdsgate/config.d/10-a.yaml": "# more\n" + grantIn("app"),
		"etc/imdsgate/config.d/20-b.yaml": "grants:\n- name: b\n  executable: /tmp/b\n  user: b\n  owner: o\n  reason: r\n",
	})
	c, err := LoadFrom(root)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Policy()
	for _, want := range []string{"config.d/10-a.yaml:3:9:", "see " + root + "/etc/imdsgate/config.yaml:2", "config.d/20-b.yaml:3:15:"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("does not say %q: %v", want, err)
		}
	}
}

// What is dumped means the same, with and without where it is from.
func TestDump(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"nothing": {},
		"two": {
			"usr/lib/imdsgate/config.yaml": "tokens: {scope: parent, action: block}\n" + grantIn("vendor"),
			"etc/imdsgate/config.yaml": `
mode: enforce
classes: {inventory: strict}
rules: {paths: [/etc/a, /etc/b], skip_refused: true, actions: {` + oddClient + `: {action: log, classes: {inventory: block}, alert_on: either}}}
grants:
- name: "odd: #name"
  executable: [/opt/a, /opt/b]
  container: "012345678901"
  user: "1000"
  paths: ["/latest/meta-data/iam/*"]
  api: v2
  owner: o
  reason: 'it''s "so"'
  expires: 2027-01-01
denies: [{name: d, user: "007", reason: r}]
redirect: {endpoints: ["169.254.169.254:80"], backend: legacy}
limits: {connections: 0}
events: {max_age: 48h, fsync: never, layout: defend}
`},
	} {
		root := below(t, files)
		c, err := LoadFrom(root)
		if err != nil {
			t.Fatal(err)
		}
		for _, origin := range []bool{false, true} {
			var text bytes.Buffer
			if err := c.Dump(&text, origin); err != nil {
				t.Fatal(err)
			}
			again, err := Parse("dump", text.Bytes())
			if err != nil {
				t.Fatalf("%s: %v\n%s", name, err, &text)
			}
			want := c
			want.Redirect = want.Redirect.WithDefaults()
			if diff := cmp.Diff(want, again, configOptions); diff != "" {
				t.Errorf("%s: %s\n%s", name, diff, &text)
			}
			if has := strings.Contains(text.String(), "# "+root+"/etc/imdsgate/config.yaml:"); has != (origin && name == "two") {
				t.Errorf("%s, origin %v:\n%s", name, origin, &text)
			}
			var object bytes.Buffer
			if err := c.DumpJSON(&object, origin); err != nil {
				t.Fatal(err)
			}
			var parsed map[string]any
			if err := json.Unmarshal(object.Bytes(), &parsed); err != nil {
				t.Errorf("%s: %v\n%s", name, err, &object)
			}
			if _, has := parsed["origin"]; has != origin {
				t.Errorf("%s: %s", name, &object)
			}
		}
	}
}

// configOptions compare what two configurations say.
var configOptions = cmp.Options{cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateComparable(netip.AddrPort{}, netip.Addr{}), cmpopts.IgnoreFields(Config{}, "Redirect.Mark"), cmpopts.EquateEmpty()}

func sameConfig(a, b Config) bool { return cmp.Equal(a, b, configOptions) }
