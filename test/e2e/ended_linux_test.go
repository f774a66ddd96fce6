package e2e

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// While there is no daemon the mode of the last one holds, whatever rules others have
// flushed or restored, until an operator removes the redirect.
func TestWithoutDaemon(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{Containers: true})
	expect := func(when, want string) {
		t.Helper()
		for name, c := range map[string]client{"IPv4": {}, "bridged": {in: h.Bridged}, "routed": {in: h.Routed}} {
			if got := h.curl(c, instanceID); got != want {
				t.Errorf("%s: %s: %s", when, name, got)
			}
		}
		if got := h.curl(client{}, service6+instanceID); got != want {
			t.Errorf("%s: IPv6: %s", when, got)
		}
	}
	says := func(which, want string) {
		t.Helper()
		if out, code := h.afterwards(which); code != 0 || !strings.Contains(out, want) {
			t.Errorf("%s: %d, %s", which, code, out)
		}
	}
	h.start("mode: enforce\n")
	h.Kill()
	says("-ended", "stays")
	for _, flush := range []string{"iptables -F; ip6tables -F", "iptables -F; iptables -t nat -F", "ip6tables -F OUTPUT; ip6tables -t nat -F OUTPUT", "iptables -t nat -F PREROUTING; iptables -F FORWARD"} {
		if err := h.Instance.Do(func() error { return exec.Command("sh", "-ec", flush).Run() }); err != nil {
			t.Fatal(err)
		}
		says("-ended", "stays")
		expect("after "+flush, "000")
		if rules := h.output("iptables-save") + h.output("ip6tables-save"); strings.Count(rules, "-j REDIRECT --to-ports 254") != 2 {
			t.Errorf("after %s there is no redirect:\n%s", flush, rules)
		}
	}
	// Whatever the configuration says by now.
	if err := h.Write("mode: audit\n"); err != nil {
		t.Fatal(err)
	}
	says("-ended", "stays")
	expect("reconfigured", "000")

	// Nobody holds the ports any more: who takes them gets nothing.
	says("-failed", "requests are refused")
	if rules := h.output("iptables-save") + h.output("ip6tables-save"); strings.Contains(rules, "-j REDIRECT") {
		t.Errorf("it is led somewhere:\n%s", rules)
	}
	var impostors []net.Listener
	for _, at := range []string{"127.0.0.1:254", "[::1]:254", "169.254.213.80:253"} {
		ln, err := h.Instance.Listen(t.Context(), nil, "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		impostors = append(impostors, ln)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				t.Errorf("%v asks at %s", c.RemoteAddr(), at)
				c.Close()
			}
		}()
	}
	expect("given up", "000")

	if out, code := h.imdsgate("redirect", "remove"); code != 0 || out != "removed" {
		t.Errorf("%d, %s", code, out)
	}
	expect("removed", "200")
	says("-failed", "removed")
	expect("removed, and given up once more", "200")

	for _, ln := range impostors {
		ln.Close()
	}
	h.startWith(gate.Settings{Config: "mode: enforce\n", Dir: h.Dir})
	expect("with its successor", "200")
	h.Kill()
	says("-ended", "stays")
	if out, code := h.imdsgate("redirect", "remove"); code != 0 || out != "removed" {
		t.Errorf("%d, %s", code, out)
	}
	h.startWith(gate.Settings{Config: "mode: enforce\n", Dir: h.Dir})
	if d, err := h.Await("that it was open", func(d gate.Document) bool { return d.At("event.action") == "requests-unguarded" }); err != nil {
		t.Error(err)
	} else if !strings.Contains(d.At("message").(string), "somebody had removed") {
		t.Error(d.At("message"))
	}
}

// Rules of enforce mode that a tool has saved do not refuse anybody in audit mode.
func TestSavedRules(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.start("mode: enforce\n")
	saved := h.output("iptables-save")
	h.Stop()
	h.start("mode: audit\n")
	h.Kill()
	if err := h.Instance.Do(func() error {
		restore := exec.Command("iptables-restore")
		restore.Stdin = strings.NewReader(saved)
		return restore.Run()
	}); err != nil {
		t.Fatal(err)
	}
	if got := h.curl(client{}, instanceID); got != "000" {
		t.Errorf("%s: the test tests nothing", got)
	}
	if out, code := h.ended(); code != 0 || !strings.Contains(out, "is removed") {
		t.Errorf("%d, %s", code, out)
	}
	if got := h.curl(client{}, instanceID); got != "200" {
		t.Errorf("afterwards: %s", got)
	}
}

// Where the rules of enforce mode cannot be written again, those that are there stay.
func TestEndedUnwritten(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	h.Kill()
	// Rules can be taken away, and not be made.
	broken := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"", "-save", "-restore"} {
			script := "#!/bin/sh\nexec " + name + "-nft" + verb + ` "$@"` + "\n"
			if verb == "-restore" {
				script = "#!/bin/sh\nin=$(cat); case $in in *'-A IMDSGATE'*) exit 3 ;; esac; echo \"$in\" | " + name + "-nft-restore \"$@\"\n"
			}
			if err := os.WriteFile(filepath.Join(broken, name+verb), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := h.Instance.Do(func() error { return exec.Command("iptables", "-t", "nat", "-F", "IMDSGATE-PREROUTING").Run() }); err != nil {
		t.Fatal(err) // so that there is something to be written
	}
	for _, which := range []string{"-ended", "-failed"} {
		out, code := h.run(client{args: []string{h.gate.Daemon, "-config", h.Config, which}, env: []string{"PATH=" + broken + ":/usr/sbin:/usr/bin:/sbin:/bin", "SERVICE_RESULT=signal"}})
		if code != 0 || !strings.Contains(out, "exit status 3") {
			t.Errorf("%s: %d, %s", which, code, out)
		}
		if got := h.curl(client{}, instanceID); got != "000" {
			t.Errorf("%s: %s\n%s", which, got, out)
		}
	}
}
