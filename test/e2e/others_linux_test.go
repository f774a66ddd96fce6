package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// restore writes rules of others, which package iptables has in files with comments for its own tests, to a back end.
func (h *host) restore(backend, family, file string) {
	h.t.Helper()
	text, err := os.ReadFile("../../iptables/testdata/locks/" + file + ".rules")
	if err != nil {
		h.t.Fatal(err)
	}
	var rules strings.Builder
	for line := range strings.Lines(strings.ReplaceAll(string(text), "docker0", "br-lab")) {
		line, _, _ = strings.Cut(strings.TrimSuffix(line, "\n"), " #! ")
		rules.WriteString(line + "\n")
	}
	cmd := exec.Command(family+"-"+backend+"-restore", "--noflush")
	cmd.Stdin = strings.NewReader(rules.String())
	if err := h.Instance.Do(func() error {
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}); err != nil {
		h.t.Fatalf("%s: %v", file, err)
	}
}

// rules are those of everybody, or of the others, of both families.
func (h *host) rules(backend string, ours bool) string {
	h.t.Helper()
	var kept []string
	for line := range strings.Lines(h.output("sh", "-ec", "iptables-"+backend+"-save; ip6tables-"+backend+"-save")) {
		// A table that somebody has used stays, with its chains that accept.
		if (strings.HasPrefix(line, "-A ") || strings.Contains(line, " DROP [")) && (ours || !strings.Contains(line, "IMDSGATE")) {
			line, _, _ = strings.Cut(line, " [") // counters
			kept = append(kept, strings.TrimSpace(line))
		}
	}
	return strings.Join(kept, "\n")
}

// TestBesideOthers has the daemon enforce on hosts that Docker, kube-proxy and a hardening guide have written rules of
// both families to, each of which writes again while it runs.
func TestBesideOthers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name            string
		again           string // for one family, whose command is $I
		bridged, routed string // what becomes of a container's request
	}{
		{"docker", `$I -t nat -F DOCKER; $I -t nat -I OUTPUT -m addrtype --dst-type LOCAL -j DOCKER; $I -D FORWARD -j DOCKER-USER; $I -I FORWARD -j DOCKER-USER`,
			"200", "000"}, // its FORWARD DROP has exceptions for bridges of its own alone
		{"kube-proxy", `printf '*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n-A KUBE-SERVICES -p udp -j KUBE-SVC-X\n-A KUBE-SVC-X -j RETURN\n-I OUTPUT 1 -m comment --comment "kubernetes again" -j KUBE-SERVICES\nCOMMIT\n' | $I-restore --noflush`,
			"200", "200"},
		{"cis", `$I -F; $I -P INPUT DROP; $I -P FORWARD DROP; $I -P OUTPUT DROP; $I -A INPUT -i lo -j ACCEPT; $I -A OUTPUT -o lo -j ACCEPT
			case $I in ip6*) $I -A INPUT -s ::1 -j DROP; $I -A INPUT -p ipv6-icmp -j ACCEPT; $I -A OUTPUT -p ipv6-icmp -j ACCEPT;; *) $I -A INPUT -s 127.0.0.0/8 -j DROP;; esac
			$I -A OUTPUT -p tcp -m state --state NEW,ESTABLISHED -j ACCEPT; $I -A INPUT -p tcp -m state --state ESTABLISHED -j ACCEPT`,
			"000", "000"},
	} {
		for _, backend := range []string{"nft", "legacy"} {
			t.Run(c.name+" with "+backend, func(t *testing.T) {
				h := prepare(t, netlab.Options{Containers: true, IMDS: &imdstest.Config{HopLimit: 2}})
				h.t = t
				h.restore(backend, "iptables", c.name)
				h.restore(backend, "ip6tables", c.name+"-ipv6")
				before := h.rules(backend, true)
				h.start("mode: enforce\n") // which finds the back end by their rules
				asks := func(when string) {
					t.Helper()
					for _, base := range []string{service, service6} {
						for _, one := range []struct {
							who  client
							gets string
						}{{client{uid: ordinaryUser}, "200"}, {client{in: h.Bridged}, c.bridged}, {client{in: h.Routed}, c.routed}} {
							if got := h.curl(one.who, base+instanceID); got != one.gets {
								t.Errorf("%s: %v asks %s: %s, want %s", when, one.who.in, base, got, one.gets)
							}
							if one.gets == "200" {
								one.gets = "403"
							}
							if got := h.curl(one.who, base+role); got != one.gets {
								t.Errorf("%s: a thief, %v, asks %s: %s, want %s", when, one.who.in, base, got, one.gets)
							}
						}
					}
				}
				asks("at the start")
				if after := h.rules(backend, false); after != before {
					t.Errorf("rules of others were\n%s\nand are\n%s", before, after)
				}
				s, err := h.Status()
				if err != nil || !s.Redirect.Installed || len(s.Redirect.Locks)+len(s.Redirect.Differences) > 0 {
					t.Errorf("%v, %+v", err, s.Redirect)
				}
				for _, family := range []string{"iptables", "ip6tables"} {
					h.output("sh", "-ec", "I="+family+"-"+backend+"\n"+c.again)
					for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
						now, err := h.Status()
						out, repaired := h.verified()
						if err == nil && now.Redirect.Repairs > s.Redirect.Repairs && repaired {
							s = now
							break
						}
						if time.Now().After(end) {
							t.Fatalf("%s are not repaired: %v, %s, %+v", family, err, out, now.Redirect)
						}
					}
					asks("after " + family + " again")
				}
				before = h.rules(backend, false)
				h.Stop()
				if out, code := h.imdsgate("redirect", "remove"); code != 0 {
					t.Error(out)
				}
				if after := h.rules(backend, true); after != before {
					t.Errorf("rules of others were\n%s\nand after we have left\n%s", before, after)
				}
			})
		}
	}
}
