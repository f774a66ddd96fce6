package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// examined is what `imdsgate doctor --json` says.
type examined struct {
	Findings []struct{ ID, Severity, Message, Fix string }
	Probes   []struct{ Way, As, From, Result, Detail string }
	code     int
	text     string
}

// doctor runs it where it sees no processes but its own: it tries from the network
// namespaces of all that it sees, and the machine's own is none of the lab's business.
func (h *host) doctor(args ...string) examined {
	h.t.Helper()
	var e examined
	// A process of each container, which it sees.
	script := `exec "$@"`
	cmd := exec.Command("unshare", "--fork", "--pid", "--mount-proc", "--kill-child", "--", "sh", "-ec")
	for _, n := range []*netlab.Namespace{h.Bridged, h.Routed} {
		if n == nil {
			continue
		}
		f, err := os.Open(n.Path())
		if err != nil {
			h.t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		script = fmt.Sprintf("nsenter --net=/proc/self/fd/%d -- sleep 60 >/dev/null 2>&1 & sleep 0.3; ", 2+len(cmd.ExtraFiles)) + script
	}
	cmd.Args = append(cmd.Args, script, "sh", h.gate.Command, "--config", h.Config, "doctor", "--json")
	cmd.Args = append(cmd.Args, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	h.Instance.Run(cmd)
	e.text, e.code = out.String(), cmd.ProcessState.ExitCode()
	if err := json.Unmarshal([]byte(e.text), &e); err != nil {
		h.t.Fatalf("%d, %v\n%s", e.code, err, e.text)
	}
	for _, f := range e.Findings {
		if f.ID == "" || f.Message == "" || f.Fix == "" && f.Severity != "info" {
			h.t.Errorf("a finding without what to do: %+v", f)
		}
	}
	return e
}

func (e examined) has(id string) bool {
	for _, f := range e.Findings {
		if f.ID == id {
			return true
		}
	}
	return false
}

// past are the ways that got past the daemon.
func (e examined) past() (all []string) {
	for _, p := range e.Probes {
		if p.Result == "past" {
			all = append(all, p.Way+", as "+p.As+", from "+p.From)
		}
	}
	return all
}

func (e examined) count(result string) (n int) {
	for _, p := range e.Probes {
		if p.Result == result {
			n++
		}
	}
	return n
}

// The redirect is whole: whatever doctor tries is recorded, or has no answer.
func TestDoctor(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"enforce", "audit"} {
		t.Run(mode, func(t *testing.T) {
			h := start(t, netlab.Options{Containers: true}, "mode: "+mode+"\n")
			h.t = t
			e := h.doctor()
			if past := e.past(); len(past) > 0 || e.has("got-past") || e.has("daemon-not-running") || e.has("imds-silent") {
				t.Errorf("got past: %v\n%s", past, e.text)
			}
			if e.count("recorded") < 33 {
				t.Errorf("%d recorded, %d without an answer\n%s", e.count("recorded"), e.count("none"), e.text)
			}
			for _, f := range e.Findings {
				if f.Severity == "error" && f.ID != "config-writable" { // it is below /tmp
					t.Errorf("%+v", f)
				}
			}
			for _, p := range e.Probes {
				if strings.Contains(p.From, "sleep") && strings.HasSuffix(p.Way, "plainly") && p.Result != "recorded" {
					t.Errorf("a container: %+v", p)
				}
			}
			if !strings.Contains(e.text, "the network namespace of sleep") {
				t.Error("nothing was tried from containers")
			}
			for _, want := range []string{"ordinary user", "root", "mark of the daemon", "bound to eth0", "::ffff:", "2852039166", "0251.0376", "new network namespace", "[fd00:ec2::254]:80", "escape"} {
				if !strings.Contains(e.text, want) {
					t.Errorf("nothing was tried with %s", want)
				}
			}
		})
	}
}

// Each hole that somebody makes is found, by what gets through it.
func TestDoctorFindsHoles(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, h *host, script string) {
		t.Helper()
		if err := h.Instance.Do(func() error { return exec.Command("sh", "-ec", script).Run() }); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, config, script string
		ids                  []string
		past                 string // among the ways
		not                  string // and this is not
	}{
		{"a rule is deleted", "redirect: {backend: legacy}\n", "iptables-legacy -t nat -F OUTPUT", []string{"redirect-changed"}, "", ""}, // and repaired before it is tried
		{"IPv6 is left out", "redirect: {endpoints: ['169.254.169.254:80']}\n", "", []string{"got-past"}, "[fd00:ec2::254]:80 plainly", "169.254.169.254:80 plainly"},
		{"a rule keeps packets from the connection tracker", "", "iptables -t raw -I OUTPUT -d 169.254.169.254 -j NOTRACK", []string{"got-past"}, "169.254.169.254:80 plainly", "[fd00:ec2::254]:80 plainly"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, netlab.Options{}, c.config)
			h.t = t
			h.logged("serving")
			var e examined
			for range 20 { // until the first look is over, which would repair it
				if c.script != "" {
					run(t, h, c.script)
				}
				if e = h.doctor(); e.has(c.ids[0]) {
					break
				}
			}
			for _, id := range c.ids {
				if !e.has(id) {
					t.Errorf("no %s\n%s", id, e.text)
				}
			}
			past := e.past()
			if c.past != "" && !slices.ContainsFunc(past, func(w string) bool { return strings.HasPrefix(w, c.past) }) || c.not != "" && slices.ContainsFunc(past, func(w string) bool { return strings.HasPrefix(w, c.not) }) {
				t.Errorf("got past: %v", past)
			}
			if e.code != 1 {
				t.Errorf("exit status %d", e.code)
			}
		})
	}
}

// Rules in both back ends are told of, and rules in one are not.
func TestDoctorTwoBackends(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "redirect: {backend: nft}\n")
	h.t = t
	if e := h.doctor("--preflight"); e.has("two-backends") {
		t.Errorf("before there are any: %s", e.text)
	}
	if err := h.Instance.Do(func() error {
		return exec.Command("iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "ACCEPT").Run()
	}); err != nil {
		t.Fatal(err)
	}
	if e := h.doctor("--preflight"); !e.has("two-backends") {
		t.Errorf("%s", e.text)
	}
}

// Without a daemon it says so, and with --preflight it tries nothing.
func TestDoctorWithoutDaemon(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	h.Stop()
	if e := h.doctor(); !e.has("daemon-not-running") || !e.has("got-past") || e.code != 1 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
	if e := h.doctor("--preflight"); e.has("daemon-not-running") || len(e.Probes) != 0 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
	h.Instance.Do(func() error {
		return exec.Command("iptables", "-A", "OUTPUT", "-d", "169.254.169.254", "-j", "REJECT").Run()
	})
	if e := h.doctor("--preflight"); !e.has("redirect-lock") || e.code != 1 {
		t.Errorf("a lock: %d\n%s", e.code, e.text)
	}
}
