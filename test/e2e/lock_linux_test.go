package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// The lock as systemd-networkd makes it of src/imds/85-imds-early.network, which knows IPv4 alone; the same with
// rules of routing; and what takes both away.
const (
	systemdLock = `route del $to dev eth0
		route add prohibit $to
		route add $to dev eth0 table 0x7fff0815
		rule add fwmark 0x7fff0815 lookup 0x7fff0815`
	ruleLock = `rule add pref 100 fwmark 0x7fff0815 lookup main
		rule add pref 102 to $to prohibit`
	letPass = `rule add pref 99 uidrange 4321-4321 lookup 0x1234
		route add $to dev eth0 table 0x1234`
	unlock = `route replace $to dev eth0
		rule del fwmark 0x7fff0815
		while ip $family rule del prohibit 2>/dev/null; do :; done`
)

// both runs commands of ip for both families.
func (h *host) both(commands string) {
	h.t.Helper()
	var script strings.Builder
	for family, to := range map[string]string{"-4": "169.254.169.254", "-6": "fd00:ec2::254"} {
		fmt.Fprintf(&script, "family=%s to=%s\n", family, to)
		for line := range strings.Lines(commands) {
			if line = strings.TrimSpace(line); !strings.HasPrefix(line, "while") {
				line = "ip $family " + line
			}
			script.WriteString(line + "\n")
		}
	}
	h.output("sh", "-ec", script.String())
}

// asMarked asks for a path with the mark that passes the lock, as systemd-imdsd does: with CAP_NET_ADMIN and not as
// root.
func (h *host) asMarked(uid int, base, path string) string {
	h.t.Helper()
	out, _ := h.run(client{args: []string{"setpriv", fmt.Sprint("--reuid=", uid), fmt.Sprint("--regid=", uid), "--clear-groups",
		"--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--", "python3", "-c", `
import socket, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)
s.settimeout(5)
s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK if hasattr(socket, 'SO_MARK') else 36, 0x7fff0815)
try:
	s.connect((sys.argv[1], 80))
	s.sendall(('GET ' + sys.argv[2] + ' HTTP/1.1\r\nHost: imds\r\nConnection: close\r\n\r\n').encode())
	print(s.recv(4096).decode().split(' ')[1])
except OSError as e:
	print(e.strerror)
`, strings.Trim(strings.TrimPrefix(base, "http://"), "[]"), path}})
	return out
}

// has gives the daemon's host an account, of which it hears at a reload.
func (h *host) has(user string, uid int) {
	h.t.Helper()
	passwd := filepath.Join(h.Dir, "accounts")
	if err := os.WriteFile(passwd, fmt.Appendf(nil, "root:x:0:0::/root:/bin/sh\n%s:x:%d:%d::/:/bin/false\n", user, uid, uid), 0o644); err != nil {
		h.t.Fatal(err)
	}
	h.output("nsenter", "-t", fmt.Sprint(h.PID()), "-m", "--", "mount", "--bind", passwd, "/etc/passwd")
	if out, code := h.imdsgate("reload"); code != 0 {
		h.t.Fatal(out)
	}
}

// Where mark and user are all that exempts the daemon, nobody else may have the mark: he
// could have made his socket as its user.
func TestMarkWithoutUnit(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	h.has("systemd-imds", 4323)
	if got := h.asMarked(4323, service, instanceID); got != "Operation not permitted" {
		t.Errorf("systemd-imdsd: %s", got)
	}
}

// Where no hook sees the mark, it takes nobody past the redirect.
func TestMarkBelowLevel2(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.startWith(gate.Settings{Config: "mode: enforce\n", Unit: "system.slice/imdsgated.service", Lacks: attribution.Level2})
	for _, base := range []string{service, service6} {
		for _, uid := range []int{0, ordinaryUser, gate.UID} {
			if got := h.asMarked(uid, base, instanceID); got != "200" {
				t.Errorf("uid %d asks %s: %s", uid, base, got)
			}
			if got := h.asMarked(uid, base, role); got != "403" {
				t.Errorf("uid %d asks %s for credentials: %s", uid, base, got)
			}
		}
	}
}

// TestLocked has systemd's lock of the metadata service beside the daemon.
func TestLocked(t *testing.T) {
	t.Parallel()
	const imdsd = 4323
	for _, c := range []struct {
		name, lock string
		before     bool // it is there when the daemon starts
	}{
		{"the lock first", systemdLock, true},
		{"the daemon first", systemdLock, false},
		{"rules of routing", ruleLock, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := prepare(t, netlab.Options{Containers: true})
			h.t = t
			if c.before {
				h.both(c.lock)
			}
			h.startWith(gate.Settings{Config: "mode: enforce\n", Unit: "system.slice/imdsgated.service"})
			if !c.before {
				if got := h.curl(client{uid: ordinaryUser}, instanceID); got != "200" {
					t.Errorf("without a lock: %s", got)
				}
				h.logged("came here") // or it would be looked at later again
				h.both(c.lock)
				for _, to := range []string{"169.254.169.254", "fd00:ec2::254"} {
					h.found("imds-way-changed", says("clients to "+to+": prohibited by a route, was by eth0"))
				}
			}
			h.both(letPass)
			locked := func(id string, want ...string) {
				t.Helper()
				out, intact := h.verified()
				for _, w := range append(want, "the rules are as they should be", "a route prohibits 169.254.169.254", "a route prohibits fd00:ec2::254") {
					if !intact || !strings.Contains(out, w) {
						t.Errorf("verify does not say %q: %s", w, out)
					}
				}
				e := h.doctor()
				var severities []string
				for _, f := range e.Findings {
					if f.ID == "imds-locked" {
						severities = append(severities, f.Severity)
					}
				}
				if got := strings.Join(severities, " "); got != id {
					t.Errorf("doctor's findings of the lock are %q, want %q\n%s", got, id, e.text)
				}
				if past := e.past(); len(past) > 0 || e.has("redirect-changed") || e.has("self-test") {
					t.Errorf("%v\n%s", past, e.text)
				}
			}

			// Whom the lock lets pass is served, and judged; the others get an error before they are.
			for _, base := range []string{service, service6} {
				for _, ask := range []struct {
					who  client
					path string
					want string
				}{
					{client{uid: ordinaryUser}, instanceID, "200"}, {client{uid: ordinaryUser}, role, "403"},
					{client{uid: ordinaryUser + 1}, instanceID, "000"}, {client{}, instanceID, "000"},
					{client{in: h.Bridged}, instanceID, "000"}, {client{in: h.Routed}, instanceID, "000"},
				} {
					if got := h.curl(ask.who, base+ask.path); got != ask.want {
						t.Errorf("%+v of %s: %s, want %s", ask.who, base+ask.path, got, ask.want)
					}
				}
			}
			h.IMDS.SetHopLimit(2)
			locked("warning warning")
			if e := h.doctor(); !e.has("hop-limit") {
				t.Errorf("the daemon itself does not pass: %s", e.text)
			}

			// systemd-imdsd has the daemon's mark, and is taken for a forger only where nobody has heard of it.
			for _, base := range []string{service, service6} {
				if got := h.asMarked(imdsd, base, instanceID); got != "Operation not permitted" {
					t.Errorf("with the mark: %s", got)
				}
			}
			h.found("imds-mark-forged", says("it was refused"))
			h.has("systemd-imds", imdsd)
			known := time.Now()
			for _, base := range []string{service, service6} {
				for _, ask := range []struct {
					uid        int
					path, want string
				}{{imdsd, instanceID, "200"}, {imdsd, role, "403"}, {imdsd + 1, instanceID, "Operation not permitted"}} {
					if got := h.asMarked(ask.uid, base, ask.path); got != ask.want {
						t.Errorf("uid %d with the mark, %s: %s, want %s", ask.uid, base+ask.path, got, ask.want)
					}
				}
			}
			if _, err := h.Await("systemd-imdsd that is refused credentials", func(d gate.Document) bool {
				return d.At("data_stream.dataset") == "imdsgate.decision" && d.At("url.path") == role && d.At("user.id") == fmt.Sprint(imdsd) && d.At("imdsgate.verdict") == "deny"
			}); err != nil {
				t.Error(err)
			}
			h.found("imds-mark-forged", func(d gate.Document) bool {
				if at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(d.At("@timestamp"))); err == nil && at.After(known) && d.At("imdsgate.actor.user.id") == fmt.Sprint(imdsd) {
					t.Errorf("systemd-imdsd: %v", d)
				}
				return d.At("imdsgate.actor.user.id") == fmt.Sprint(imdsd+1)
			})

			// A lock that keeps the daemon out, too.
			h.output("ip", "rule", "del", "fwmark", "0x7fff0815")
			locked("error warning", "in spite of its mark 0x7fff0815", "ip rule add fwmark 0x7fff0815")
			if got := h.curl(client{uid: ordinaryUser}, instanceID); got == "200" {
				t.Errorf("with a daemon that is kept out: %s", got)
			}
			h.output("ip", "rule", "add", "pref", "98", "fwmark", "0x7fff0815", "lookup", "0x1234")
			h.both(unlock)
			for _, base := range []string{service, service6} {
				if got := h.curl(client{uid: ordinaryUser + 1}, base+instanceID); got != "200" {
					t.Errorf("after the lock, %s: %s", base, got)
				}
			}
			if out, intact := h.verified(); !intact || out != "the rules are as they should be" {
				t.Errorf("after the lock: %s", out)
			}
		})
	}
}
