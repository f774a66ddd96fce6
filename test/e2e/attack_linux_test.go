package e2e

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// Ways round the redirect, tried by an ordinary user and by root without the
// daemon's user.
func TestWaysRoundTheRedirect(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	for _, c := range []struct {
		name string
		uid  uint32
		args []string
	}{
		{"the daemon's mark, as an ordinary user", ordinaryUser, []string{"mark"}},
		{"the daemon's mark, as root", 0, []string{"mark"}},
		{"the daemon's port", ordinaryUser, []string{"direct", "127.0.0.1"}},
		{"the daemon's port over IPv6", ordinaryUser, []string{"direct", "::1"}},
		{"the port for containers", ordinaryUser, []string{"direct", "169.254.213.80"}},
		{"the port for containers over IPv6", ordinaryUser, []string{"direct", "fd69:6d64:7367::80"}},
	} {
		out, code := h.run(client{uid: c.uid, args: append([]string{h.attacker}, c.args...)})
		if code == 0 && !strings.Contains(out, "403") {
			t.Errorf("%s: %s", c.name, out)
		}
	}
	for _, c := range h.IMDS.Transcript().Connections {
		if seen := string(c.Received()); strings.Contains(seen, "credentials") {
			t.Errorf("the service saw %q", seen)
		}
	}
}

// Other spellings of the address are the same address.
func TestSpellingsOfTheAddress(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	for _, host := range []string{"2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.16689662", "[::ffff:169.254.169.254]", "[fd00:ec2:0:0::254]"} {
		if got := h.curl(client{uid: ordinaryUser}, "http://"+host+credentials); got != "403" {
			t.Errorf("%s: %s", host, got)
		}
	}
}

// A host on which IPv6 is off when the daemon starts, and switched on later.
func TestIPv6SwitchedOn(t *testing.T) {
	t.Parallel()
	for mode, want := range map[string]string{"audit": "200", "enforce": "403"} {
		h := prepare(t, netlab.Options{})
		sh := func(script string) {
			t.Helper()
			if err := h.Instance.Run(exec.Command("sh", "-ec", script)); err != nil {
				t.Fatalf("%s: %v", script, err)
			}
		}
		sh("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
		h.start("mode: " + mode + "\n")
		sh("echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6; ip addr add fd00:ec2:1::10/64 dev eth0 nodad; ip -6 route replace fd00:ec2::254 dev eth0")
		if mode == "audit" { // which takes the hook only now
			if _, err := h.Await("::1", func(d gate.Document) bool { return d.At("event.action") == "redirect-rule-changed" }); err != nil {
				t.Fatal(err)
			}
		}
		if got := h.curl(client{uid: ordinaryUser}, service6+role); got != want {
			t.Errorf("%s: %s, want %s", mode, got, want)
		}
		h.decided(role, "curl")
	}
}

// Clients that speak multipath TCP are attributed and judged as any other.
func TestMultipathTCP(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	out, code := h.run(client{uid: ordinaryUser, args: []string{h.attacker, "multipath"}})
	if code != 0 || !strings.Contains(out, "403") {
		t.Errorf("%d, %s", code, out)
	}
	h.decided(credentials, "attacker")
}

// A program that connects and hides the socket, or hands it to a granted program
// that it starts, gets nothing.
func TestHiding(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	granted := h.install("/bin/cat")
	h.start("mode: enforce\n" + grant(granted, ordinaryUser))
	token := h.token()
	for _, way := range []string{"flight", "inherit"} {
		out, _ := h.run(client{uid: ordinaryUser, args: []string{h.attacker, way, token, granted}})
		if !strings.Contains(out, "403") || strings.Contains(out, "imdsgate-lab-role") {
			t.Errorf("%s: %s", way, out)
		}
	}
}
