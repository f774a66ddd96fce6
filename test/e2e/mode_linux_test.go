package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// verified reports whether the rules are what `imdsgate redirect verify` says that they
// should be, with an account for the daemon as packages make it.
func (h *host) verified() (string, bool) {
	h.t.Helper()
	passwd := filepath.Join(h.Dir, "passwd")
	if err := os.WriteFile(passwd, []byte("root:x:0:0::/root:/bin/sh\nimdsgate:x:61080:61080::/:/bin/false\n"), 0o644); err != nil {
		h.t.Fatal(err)
	}
	// In the daemon's cgroup namespace, where the cgroup that the rules name is.
	out, code := h.run(client{args: []string{"nsenter", "-t", fmt.Sprint(h.PID()), "-m", "-C", "--", "unshare", "-m", "sh", "-c", "mount --bind " + passwd + " /etc/passwd && exec " + h.gate.Command + " --config " + h.Config + " redirect verify"}})
	return out, code == 0
}

func (h *host) redirected() bool { return strings.Contains(h.output("iptables-save"), "IMDSGATE") }

// guarded reports whether packets past the redirect are refused.
func (h *host) guarded() bool {
	return strings.Contains(h.output("iptables-save"), "-A IMDSGATE-OUTPUT -p tcp -j REJECT")
}

func (h *host) setMode(args ...string) {
	h.t.Helper()
	if out, code := h.imdsgate(append([]string{"mode", "set", "--reason", "INC-123"}, args...)...); code != 0 {
		h.t.Fatalf("%v: %d, %s", args, code, out)
	}
}

// inMode waits until the daemon says that it is in a mode.
func (h *host) inMode(want string) {
	h.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		s, err := h.Status()
		if err == nil && s.Mode == want {
			return
		}
		if time.Now().After(end) {
			h.t.Fatalf("%v, %+v\n%s", err, s.Modes, h.Log())
		}
	}
}

// A mode is set for a time. What is weaker lets everything pass, and when the time is
// over everything is there again that enforce mode has from the start.
func TestModeSet(t *testing.T) {
	t.Parallel()
	h := start(t, takesTime(), "mode: enforce\n")
	const curl = "/usr/bin/curl"
	h.asksAs(curl, "403", 0)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"audit", "--reason", "x"}, "--for 30m"},
		{[]string{"off", "--reason", "x"}, "--for 30m"},
		{[]string{"off", "--for", "1h"}, "reason"},
		{[]string{"off", "--for", "8d", "--reason", "x"}, "7 days"},
		{[]string{"enforce", "--for", "1h", "--reason", "x"}, "leave out --for"},
		{[]string{"block", "--reason", "x"}, "block"},
	} {
		if out, code := h.imdsgate(append([]string{"mode", "set"}, c.args...)...); code != 2 || !strings.Contains(out, c.says) {
			t.Errorf("%v: %d, %s", c.args, code, out)
		}
	}

	h.setMode("audit", "--for", "8s")
	h.asksAs(curl, "200", 0)
	if h.guarded() {
		t.Errorf("the guard of enforce mode is there:\n%s", h.output("iptables-save"))
	}
	if out, ok := h.verified(); !ok {
		t.Errorf("in audit mode: %s", out)
	}
	if out, code := h.imdsgate("mode"); code != 0 || !strings.HasPrefix(out, "audit, since") || !strings.Contains(out, "root") || !strings.Contains(out, "INC-123") || !strings.Contains(out, "then enforce") {
		t.Errorf("%d, %s", code, out)
	}
	if out, _ := h.imdsgate("status"); !strings.Contains(out, "the configuration asks for enforce") {
		t.Errorf("%s", out)
	}
	// Something that cannot be read, which passes now and must not go on passing.
	tunnel, err := h.dial("169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Close()
	fmt.Fprintf(tunnel, "GET %s HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", silent)
	if _, err := h.Await("the tunnel", func(d gate.Document) bool { return d.At("imdsgate.request.malformed") != nil }); err != nil {
		t.Fatal(err)
	}
	h.Signal(syscall.SIGHUP) // which keeps the mode
	h.logged("reloaded")
	h.asksAs(curl, "200", 0)

	h.inMode("enforce")
	h.asksAs(curl, "403", 0)
	tunnel.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := io.Copy(io.Discard, tunnel); n > 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the tunnel: %d bytes, %v", n, err)
	}
	if out, ok := h.verified(); !ok || !h.guarded() {
		t.Errorf("back in enforce mode: %s\n%s", out, h.output("iptables-save"))
	}
	changed := h.told("mode-changed", func(d gate.Document) bool { return d.At("imdsgate.mode") == "audit" })
	if changed.At("imdsgate.previous_mode") != "enforce" || changed.At("imdsgate.actor.user.id") != "0" || changed.At("event.reason") != "INC-123" || changed.At("imdsgate.until") == nil {
		t.Errorf("%v", changed)
	}
	h.told("mode-changing", func(d gate.Document) bool { return d.At("imdsgate.mode") == "enforce" })
	h.told("mode-changed", func(d gate.Document) bool {
		return d.At("imdsgate.mode") == "enforce" && d.At("imdsgate.previous_mode") == "audit"
	})

	// Back before it is over, as soon as all is well.
	h.setMode("audit", "--for", "1h")
	h.asksAs(curl, "200", 0)
	h.setMode("enforce")
	h.asksAs(curl, "403", 0)
	if out, code := h.imdsgate("mode"); code != 0 || !strings.HasPrefix(out, "enforce, since") || strings.Contains(out, "then") {
		t.Errorf("%d, %s", code, out)
	}

	// off, through a restart, and back.
	h.setMode("off", "--for", "8s")
	if h.redirected() {
		t.Errorf("the redirect is there:\n%s", h.output("iptables-save"))
	}
	h.asksAs(curl, "200", 0)
	h.Kill()
	h.startWith(gate.Settings{Config: "mode: enforce\n", Dir: h.Dir})
	h.inMode("off")
	if h.redirected() {
		t.Errorf("the redirect is there:\n%s", h.output("iptables-save"))
	}
	h.inMode("enforce")
	h.asksAs(curl, "403", 0)
	if out, ok := h.verified(); !ok {
		t.Errorf("after off: %s", out)
	}

	// Over before the daemon starts again.
	h.setMode("off", "--for", "2s")
	h.Kill()
	time.Sleep(2 * time.Second)
	h.startWith(gate.Settings{Config: "mode: enforce\n", Dir: h.Dir})
	h.inMode("enforce")
	h.asksAs(curl, "403", 0)
	h.told("mode-changed", func(d gate.Document) bool {
		reason, _ := d.At("event.reason").(string)
		return d.At("imdsgate.previous_mode") == "off" && strings.Contains(reason, "over when the daemon started")
	})

	// The configuration weakens by a reload, and nothing but its own mode is left then.
	if err := h.Write("mode: audit\n"); err != nil {
		t.Fatal(err)
	}
	if out, code := h.imdsgate("reload"); code != 0 || !strings.Contains(out, "mode audit, was enforce\n") || strings.Contains(out, "unchanged") {
		t.Errorf("%d, %s", code, out)
	}
	h.inMode("audit")
	h.asksAs(curl, "200", 0)
	if out, code := h.imdsgate("mode", "set", "off", "--reason", "x"); code != 2 || !strings.Contains(out, "audit is the configured mode, and off protects less") {
		t.Errorf("off without an end: %d, %s", code, out)
	}
	h.setMode("off", "--for", "1h")
	began := time.Now()
	h.setMode("audit")
	if !h.redirected() {
		t.Error("back from off before it was over, and there is no redirect")
	}
	for ; ; time.Sleep(20 * time.Millisecond) { // long before the next time that it is due anyhow
		s, err := h.Status()
		if passed := s.SelfTest.Passed; err == nil && passed != nil && passed.After(began) && s.SelfTest.NoRoute == "" {
			break
		}
		if time.Since(began) > 5*time.Second {
			t.Fatalf("back from off the way here is not tested: %+v, %v", s.SelfTest, err)
		}
	}
	// What it says goes back does, whatever is configured.
	out, _ := h.imdsgate("mode", "set", "enforce", "--reason", "x")
	_, back, _ := strings.Cut(out, "; imdsgate mode set ")
	back, _, _ = strings.Cut(back, " --reason TEXT goes back")
	h.setMode(strings.Fields(back)...)
	h.inMode("audit")
	h.setMode("enforce", "--for", "3s")
	h.asksAs(curl, "403", 0)
	h.inMode("audit")
	if out, ok := h.verified(); !ok || h.guarded() {
		t.Errorf("back in audit mode: %s", out)
	}
}

// A way to off that fails half-way, and cannot be gone back, leaves enforce mode without its guard only for as long as
// nothing can be written.
func TestOffFails(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	dir := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink("/usr/sbin/"+name, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	broken := filepath.Join(dir, "broken")
	restore := "#!/bin/sh\n[ -e " + broken + " ] && ! iptables-save | grep -q -e '-A IMDSGATE-OUTPUT -p tcp -j REJECT' && echo no rules today >&2 && exit 1\n" +
		"exec /usr/sbin/iptables-restore \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "iptables-restore"), []byte(restore), 0o755); err != nil {
		t.Fatal(err)
	}
	h.startWith(gate.Settings{Config: "mode: enforce\n", Env: []string{"PATH=" + dir + ":/usr/sbin:/usr/bin:/sbin:/bin"}})
	if err := os.WriteFile(broken, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	out, code := h.imdsgate("mode", "set", "off", "--for", "1h", "--reason", "x")
	if code == 0 || !strings.Contains(out, "the mode stays enforce") || !strings.Contains(out, "no rules today") || h.guarded() {
		t.Fatalf("%d, %s\n%s", code, out, h.output("iptables-save"))
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); !h.guarded(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in enforce mode there is no guard:\n%s", h.output("iptables-save"))
		}
	}
	h.asksAs("/usr/bin/curl", "403", 10*time.Second)
}

// A daemon that has started in mode off and guards since tells of the time after its end.
func TestAbsenceAfterOff(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: off\n")
	h.setMode("audit")
	h.Stop()
	h.startWith(gate.Settings{Config: "mode: audit\n", Dir: h.Dir})
	h.told("requests-unguarded", says("the redirect was removed"))
}

// Without the evidence that is required for it there is no enforce mode, however it is
// asked for.
func TestModeRequiresLevel(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.startWith(gate.Settings{Config: "mode: audit\nattribution: {require_level: L2}\n", Lacks: attribution.Level2})
	out, code := h.imdsgate("mode", "set", "enforce", "--reason", "x")
	if code != 2 || !strings.Contains(out, "require_level is L2") {
		t.Errorf("%d, %s", code, out)
	}
	if err := h.Write("mode: enforce\nattribution: {require_level: L2}\n"); err != nil {
		t.Fatal(err)
	}
	h.Signal(syscall.SIGHUP)
	h.logged("require_level is L2")
	h.inMode("audit")
	if h.guarded() {
		t.Error("the guard of enforce mode is there")
	}
	h.asksAs("/usr/bin/curl", "200", 0)
	h.Stop()

	// One that was set where the level was there does not keep the daemon from starting.
	const config = "mode: audit\nattribution: {require_level: L2}\n"
	h.startWith(gate.Settings{Config: config, Dir: h.Dir})
	h.setMode("enforce")
	h.asksAs("/usr/bin/curl", "403", 0)
	h.Kill()
	h.startWith(gate.Settings{Config: config, Dir: h.Dir})
	h.inMode("enforce")
	h.Stop()
	h.startWith(gate.Settings{Config: config, Dir: h.Dir, Lacks: attribution.Level2})
	h.inMode("audit")
	h.logged("cannot be taken up")
	h.asksAs("/usr/bin/curl", "200", 0)
	if h.guarded() {
		t.Error("the guard of enforce mode is there")
	}
	if out, _ := h.imdsgate("mode"); !strings.Contains(out, "require_level is L2") {
		t.Error(out)
	}
}
