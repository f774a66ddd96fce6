package e2e

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

var update = flag.Bool("update", false, "write testdata/status")

// varies is what differs from run to run, and what is shown in its place.
var varies = []struct {
	of *regexp.Regexp
	by string
}{
	{regexp.MustCompile(`/tmp/imdsgate-gate\d+`), "DIR"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC`), "TIME"},
	{regexp.MustCompile(`sha256:[0-9a-f]+`), "sha256:DIGEST"},
	{regexp.MustCompile(`\b\d+ of \d+ descriptors|of \d+ descriptors|by the kernel`), "PLACE"},
	{regexp.MustCompile(`\b[\d.]+(ns|µs|ms|h|m|s)([\d.]+(ms|m|s))*\b`), "TOOK"},
	{regexp.MustCompile(`BPF map of \w+`), "BPF map"},
	{regexp.MustCompile(`self-test .*\n`), ""}, // the first comes a moment after the start
	{regexp.MustCompile(`.*! a search may take .*\n`), ""},
	{regexp.MustCompile(`pid \d+`), "pid N"},
	{regexp.MustCompile(`\d+ MB resident`), "N MB resident"},
	{regexp.MustCompile(`\d+ full searches`), "N full searches"},
	{regexp.MustCompile(`(\d+) written`), "N written"},
	{regexp.MustCompile(`\d+ repairs`), "N repairs"},
	{regexp.MustCompile(`(\d+) sockets, room for \d+`), "N sockets, room for N"},
	{regexp.MustCompile(`[^\S\n]+\n`), "\n"},
	{regexp.MustCompile(`[^\S\n]{2,}`), "  "},
}

// What an operator sees in each state that a daemon can be in, and the exit status on
// which his scripts rely.
func TestStatus(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		code  int
		begin func(t *testing.T) *host
		as    uint32
	}{
		{"audit", 0, func(t *testing.T) *host {
			h := start(t, netlab.Options{}, "")
			h.curl(client{uid: ordinaryUser}, role)
			h.decided(role, "curl")
			return h
		}, 0},
		{"enforce", 0, func(t *testing.T) *host {
			h := start(t, netlab.Options{}, "name: web\nrevision: 3f2a9c1\nmode: enforce\nposture: strict\n")
			h.curl(client{uid: ordinaryUser}, role)
			h.decided(role, "curl")
			return h
		}, 0},
		{"level-0", 0, func(t *testing.T) *host {
			h := prepare(t, netlab.Options{})
			h.startWith(gate.Settings{Config: "mode: enforce\n", Lacks: attribution.Level1})
			return h
		}, 0},
		{"off", 1, func(t *testing.T) *host {
			h := start(t, netlab.Options{}, "mode: off\n")
			h.logged("serving")
			return h
		}, 0},
		{"foreign-rule", 1, func(t *testing.T) *host {
			h := start(t, netlab.Options{}, "mode: enforce\n")
			if err := h.Instance.Do(func() error {
				return exec.Command("iptables", "-A", "OUTPUT", "-d", "169.254.169.254", "-j", "REJECT").Run()
			}); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Await("the lock", func(d gate.Document) bool { return d.At("event.action") == "redirect-hook-not-taken" }); err != nil {
				t.Fatal(err)
			}
			return h
		}, 0},
		{"dead", 3, func(t *testing.T) *host {
			h := start(t, netlab.Options{}, "mode: enforce\n")
			h.Kill()
			return h
		}, 0},
		{"stopped", 3, func(t *testing.T) *host {
			h := start(t, netlab.Options{}, "")
			h.Stop()
			return h
		}, 0},
		{"no-permission", 77, func(t *testing.T) *host { return start(t, netlab.Options{}, "") }, ordinaryUser},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := c.begin(t)
			h.t = t
			got, code := h.run(client{uid: c.as, args: []string{h.gate.Command, "--config", h.Config, "status"}})
			if code != c.code {
				t.Errorf("exit status %d, want %d", code, c.code)
			}
			text := got + "\n"
			for _, v := range varies {
				text = v.of.ReplaceAllString(text, v.by)
			}
			file := filepath.Join("testdata", "status", c.name+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if text != string(want) {
				t.Errorf("it says\n%s\nand %s has\n%s", text, file, want)
			}
			if lines := strings.Count(text, "\n"); lines > 24 {
				t.Errorf("%d lines are more than one screen", lines)
			}

			asJSON, code := h.run(client{uid: c.as, args: []string{h.gate.Command, "--config", h.Config, "status", "--json"}})
			if code != c.code {
				t.Errorf("with --json: exit status %d, want %d", code, c.code)
			}
			var s struct {
				Protected *bool
				Summary   string
			}
			first, _, _ := strings.Cut(asJSON, "\n")
			if err := json.Unmarshal([]byte(first), &s); code != 77 && (err != nil || s.Protected == nil || *s.Protected != strings.HasPrefix(got, "protected:")) {
				t.Errorf("with --json: %v, %+v\n%s", err, s, asJSON)
			}
		})
	}
}

// A daemon that does not answer is neither well nor dead.
func TestStatusUnknown(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	h.Signal(syscall.SIGSTOP)
	defer h.Signal(syscall.SIGCONT)
	out, code := h.imdsgate("status")
	if code != 4 || !strings.HasPrefix(out, "unknown: ") {
		t.Errorf("%d, %s", code, out)
	}
}
