package boot

import (
	"strings"
	"testing"
)

// lock is systemd's of the metadata service (src/imds/85-imds-early.network), which the systemd of the tree does not
// have yet, for both families.
const lock = `[Unit]
DefaultDependencies=no
ORDER=imdsgated.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'for f in "-4 169.254.169.254" "-6 fd00:ec2::254"; do set -- $f; ip $1 route del $2 dev eth0; ip $1 route add prohibit $2; ip $1 route add $2 dev eth0 table 0x7fff0815; ip $1 rule add fwmark 0x7fff0815 lookup 0x7fff0815; done'
ExecStop=/bin/sh -ec 'for f in "-4 169.254.169.254" "-6 fd00:ec2::254"; do set -- $f; ip $1 route del prohibit $2; ip $1 route add $2 dev eth0; ip $1 rule del fwmark 0x7fff0815; done'
`

// A machine boots with the lock before the daemon, and with the lock after it.
func TestLocked(t *testing.T) {
	for _, order := range []string{"Before", "After"} {
		t.Run(strings.ToLower(order), func(t *testing.T) {
			t.Parallel()
			m := boot(t, settings{config: "mode: enforce\n", files: map[string]string{
				"/etc/systemd/system/lock.service":                  strings.ReplaceAll(lock, "ORDER", order),
				"/etc/systemd/system/multi-user.target.d/lock.conf": "[Unit]\nWants=lock.service\n",
				"/etc/sysusers.d/imds.conf":                         "u systemd-imds - \"Metadata\"\n",
			}})
			for _, unit := range []string{"lock.service", "imdsgated.service"} {
				m.Await(unit, func() bool { return m.Property(unit, "ActiveState") == "active" })
			}
			if locked, served := m.monotonic("lock.service", "ActiveEnterTimestamp"), m.monotonic("imdsgated.service", "ActiveEnterTimestamp"); (locked < served) != (order == "Before") {
				t.Errorf("locked at %v, served at %v", locked, served)
			}
			m.Do("systemd-sysusers")
			m.Do("systemctl", "reload", "imdsgated.service")
			asked := func(as, base, path string) string {
				return m.Do("setpriv", "--reuid="+as, "--clear-groups", "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--", "python3", "-c", `
import socket, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)
s.settimeout(5)
s.setsockopt(socket.SOL_SOCKET, 36, 0x7fff0815) # SO_MARK
s.connect((sys.argv[1], 80))
s.sendall(('GET ' + sys.argv[2] + ' HTTP/1.1\r\nHost: imds\r\nConnection: close\r\n\r\n').encode())
print(s.recv(4096).decode().split(' ')[1])
`, base, path)
			}
			const id = "/latest/meta-data/instance-id"
			for _, to := range []string{"169.254.169.254", "fd00:ec2::254"} {
				if got := asked("systemd-imds", to, id); got != "200" {
					t.Errorf("systemd-imdsd asks %s: %s", to, got)
				}
				if got := asked("systemd-imds", to, role); got != "403" {
					t.Errorf("systemd-imdsd asks %s for credentials: %s", to, got)
				}
			}
			if got := m.Curl("nobody", id); got != "000" {
				t.Errorf("a client without the mark: %s", got)
			}
			if out := m.Do("imdsgate", "redirect", "verify"); !strings.HasPrefix(out, "the rules are as they should be") || !strings.Contains(out, "a route prohibits 169.254.169.254") || !strings.Contains(out, "a route prohibits fd00:ec2::254") {
				t.Error(out)
			}
			if out, code := m.Try("imdsgate", "doctor"); !strings.Contains(out, "imds-locked") || strings.Contains(out, "got-past") || strings.Contains(out, "in spite of its mark") {
				t.Errorf("%d\n%s", code, out)
			}
			m.Do("systemctl", "stop", "lock.service")
			if got := m.Curl("nobody", id); got != "200" {
				t.Errorf("without the lock: %s", got)
			}
			if got := m.Curl("nobody", role); got != "403" {
				t.Errorf("a thief without the lock: %s", got)
			}
			if n := m.Property("imdsgated.service", "NRestarts"); n != "0" {
				t.Errorf("the daemon was restarted %s times", n)
			}
		})
	}
}
