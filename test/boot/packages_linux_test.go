package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/imdsgate/imdsgate/test/debian"
)

// nextVersion is after all that there are.
const nextVersion = "99.0.0"

// next puts the package of nextVersion into the machine, which is made of the source as a
// release is, once.
func (m *machine) next(suffix string) (path string) {
	m.T.Helper()
	dir := filepath.Join(m.Image, "next")
	if _, err := os.Stat(dir + "/SHA256SUMS"); err != nil {
		cmd := exec.Command("../../packaging/packages.sh")
		cmd.Env = append(os.Environ(), "OUT="+dir, "VERSION="+nextVersion, "ARCHES="+runtime.GOARCH)
		if out, err := cmd.CombinedOutput(); err != nil {
			m.T.Fatalf("make the next version: %v\n%s", err, out)
		}
	}
	packed, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil || len(packed) != 1 {
		m.T.Fatalf("of %s there are %v, %v", suffix, packed, err)
	}
	path = "/opt/next" + suffix
	m.put(path, packed[0])
	return path
}

// put copies a file into the machine.
func (m *machine) put(path, from string) {
	m.T.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(m.file(path), b, 0o644)
	}
	if err != nil {
		m.T.Fatal(err)
	}
}

// journald are its units: of one that is stopped alone, the others start it again.
const journald = "systemd-journald.socket systemd-journald-dev-log.socket systemd-journald-audit.socket systemd-journald.service"

// upgradable is the configuration of a machine that is upgraded.
var upgradable = map[string]string{
	"/etc/imdsgate/config.yaml":           config("audit") + "events: {journal: true}\n",
	"/etc/imdsgate/config.d/50-mine.yaml": "denies:\n  - {name: mine, user: games, reason: x}\n",
}

// upgrade installs a later version under load, which refuses nobody, and what is the operator's
// and the daemon's stays, also what is not passed on yet.
func (m *machine) upgrade(mode string, install ...string) {
	t := m.T
	t.Helper()
	if mode == "enforce" {
		m.Do("imdsgate", "mode", "set", mode, "--for", "1h", "--reason", "x")
	}
	m.Do("imdsgate", "decisions", "add", "deny", "--user", "daemon", "--for", "1h", "--reason", "x")
	refused := map[string]string{"audit": "200", "enforce": "403"}[mode]
	kept := func() string {
		t.Helper()
		var mode struct {
			Mode, Configured string
			Set              any
		}
		if err := json.Unmarshal([]byte(m.Do("imdsgate", "mode", "--json")), &mode); err != nil {
			t.Error(err)
		}
		return fmt.Sprintln(mode) + m.Do("imdsgate", "decisions", "list", "--json") +
			m.Do("sh", "-ec", "find /etc/imdsgate -type f -exec stat -c '%n %a %U %G' {} + -exec sha256sum {} +") +
			m.Do("systemctl", "is-enabled", "imdsgated.socket", "imdsgated.service")
	}
	before, old := kept(), m.daemon()

	// What the journal does not take is to come when it does.
	m.Do("sh", "-ec", "systemctl stop "+journald)
	for _, user := range []string{"daemon", "games"} {
		if got := m.Curl(user, role); got != refused {
			t.Errorf("before the upgrade %s got %s", user, got)
		}
	}
	var status struct {
		Version string
		Events  struct{ Journal struct{ Error string } }
	}
	ask := func() {
		t.Helper()
		if err := json.Unmarshal([]byte(m.Do("imdsgate", "status", "--json")), &status); err != nil {
			t.Fatal(err)
		}
	}
	var waiting []any
	m.Await("the events of both, which nobody takes", func() bool {
		if ask(); status.Events.Journal.Error == "" {
			return false
		}
		waiting = waiting[:0]
		for _, d := range m.Documents() {
			if d.At("url.path") == role && d.At("data_stream.dataset") == "imdsgate.decision" {
				waiting = append(waiting, d.At("event.id"))
			}
		}
		return len(waiting) == 2
	})
	spool := m.Spool()
	if m.daemon() != old {
		t.Error("a daemon whose log nobody takes has ended")
	}

	load := m.everywhere(8*time.Second, "-late", late)
	time.Sleep(time.Second)
	m.Do(install...)
	m.guarded(old)
	m.served(load())
	window := map[string]string{"audit": "requests-unguarded", "enforce": "requests-held"}[mode]
	t.Logf("%s", m.Event(window).At("message"))
	if n := m.count(window); n != 1 {
		t.Errorf("%d events tell of a time without a daemon", n)
	}

	if ask(); status.Version != nextVersion {
		t.Errorf("the version %s runs", status.Version)
	}
	if after := kept(); after != before {
		t.Errorf("before the upgrade:\n%s\nafter it:\n%s", before, after)
	}
	if !strings.HasPrefix(m.Spool(), spool) {
		t.Errorf("what was recorded before the upgrade is not all there:\n%s\nafter it:\n%s", spool, m.Spool())
	}
	for _, user := range []string{"daemon", "games"} {
		if got := m.Curl(user, role); got != refused {
			t.Errorf("after the upgrade %s got %s", user, got)
		}
	}
	m.Do("sh", "-ec", "systemctl start "+journald)
	for _, id := range waiting {
		m.Await("the event in the journal, once", func() bool {
			return m.Do("journalctl", "--no-pager", "--output=cat", "--output-fields=IMDSGATE_EVENT_ID", fmt.Sprintf("IMDSGATE_EVENT_ID=%s", id)) == id
		})
	}
}

// unguarded complains where clients do not reach the service itself, or our rules are there.
func (m *machine) unguarded() {
	m.T.Helper()
	if left := m.Do("iptables-save") + m.Do("ip6tables-save"); strings.Contains(left, "IMDSGATE") {
		m.T.Errorf("left:\n%s", left)
	}
	for from, o := range m.everywhere(0)() {
		if o.Failed != 0 {
			m.T.Errorf("after the removal, from %s: %+v", from, o)
		}
	}
}

// others is what others have on the host, in the same places as we. Where they have rules of
// iptables, its built-in chains are there, which stay when ours have gone.
const others = `for ip in iptables ip6tables; do
	for table in raw nat filter; do
		$ip -t $table -N OTHERS
		$ip -t $table -A OUTPUT -p tcp --dport 8080 -j OTHERS
	done
done
nft add table inet others
nft add chain inet others output '{ type filter hook output priority 0; }'
nft add rule inet others output tcp dport 8080 counter
ip link add others type bridge # not every kernel has dummy
echo 'net.ipv4.ip_forward = 1' >/etc/sysctl.d/others.conf
`

// host prints what of a host we, or a removal, could change: rules, links, addresses and routes,
// what /proc/sys says of the network, and files that are not ours in /etc.
const host = `for save in iptables-save ip6tables-save iptables-legacy-save ip6tables-legacy-save; do $save | sed '/^#/d; s/ \[[0-9:]*\]$//'; done
nft list table inet others | sed 's/packets.*//'
ip -brief link
ip -brief address
for ip in "ip -4" "ip -6"; do $ip rule; $ip route show table all | sort; done
grep -rs . /proc/sys/net/core /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf /proc/sys/net/netfilter | grep -v nf_conntrack_count | sort
find /etc -type f -not -path '/etc/imdsgate/*' -not -path '/etc/*-' -not -regex '/etc/\(passwd\|group\|shadow\|gshadow\)' -exec sha256sum {} + | sort -k 2
`

// A purge takes all that is ours, after an upgrade, too, and nothing else: the host is as it was
// before the daemon had run for the first time, and has the users of one without the package.
func TestUpgradeAndPurge(t *testing.T) {
	const later = "/etc/systemd/system/imdsgated.service.d"
	for _, mode := range []string{"audit", "enforce"} {
		t.Run(mode, func(t *testing.T) {
			files := maps.Clone(upgradable)
			files[later+"/later.conf"] = "[Unit]\nConditionPathExists=/nowhere\n"
			m := boot(t, settings{files: files, lab: withContainer})
			m.Do("sh", "-ec", "rm -r "+later+"; systemctl daemon-reload\n"+others)
			before := m.Do("sh", "-ec", host)
			m.Do("systemctl", "start", "imdsgated.service")
			m.upgrade(mode, "dpkg", "--force-confold", "--install", m.next(".deb"))
			if during := m.Do("sh", "-ec", host); !strings.Contains(during, "nf_conntrack_timestamp:1\n") || !strings.Contains(during, "IMDSGATE") {
				t.Errorf("nothing of ours is there:\n%s", cmp.Diff(before, during))
			}

			m.Do("dpkg", "--purge", "imdsgate")
			if left := m.Do("sh", "-c", "find / /run /tmp /dev/shm /sys/fs/cgroup -xdev -iname '*imdsgate*' -not -path '/proc/*' -not -path '"+debian.Package+"'; "+
				"systemctl --all --plain --no-legend list-units '*imdsgate*'; systemctl --no-legend list-unit-files '*imdsgate*'; ss -Hltn 'sport = 253 or sport = 254'; dpkg --list imdsgate 2>&- || true"); left != "" {
				t.Errorf("left:\n%s", left)
			}
			if after := m.Do("sh", "-ec", host); after != before {
				t.Errorf("before (-) and after (+):\n%s", cmp.Diff(before, after))
			}
			for _, name := range []string{"/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"} {
				without, err := os.ReadFile(filepath.Join(image.Tree, "root", name))
				with, err2 := os.ReadFile(m.file(name))
				if err := errors.Join(err, err2); err != nil || string(with) != string(without) {
					t.Errorf("%s: %v\n%s", name, err, cmp.Diff(string(without), string(with)))
				}
			}
			m.unguarded()
		})
	}
}

// The same with Debian's rpm in place of dpkg. It does not look for iptables, which dpkg has brought.
func TestRPM(t *testing.T) {
	packed, err := filepath.Glob("../../bin/packages/*." + map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH] + ".rpm")
	if err != nil || len(packed) != 1 {
		t.Fatalf("%v, %v", packed, err)
	}
	for _, mode := range []string{"audit", "enforce"} {
		t.Run(mode, func(t *testing.T) {
			m := boot(t, settings{config: config("audit"), lab: withContainer})
			m.put("/opt/this.rpm", packed[0])
			m.Do("sh", "-ec", "dpkg --purge imdsgate; rpm --initdb; rpm --install --nodeps /opt/this.rpm")
			if out, code := m.Try("systemctl", "is-enabled", "imdsgated.socket", "imdsgated.service"); code == 0 || out != "disabled\ndisabled" || m.redirected() {
				t.Errorf("after the installation the units are %s", out)
			}
			for name, text := range upgradable {
				if err := os.WriteFile(m.file(name), []byte(text), 0o640); err != nil {
					t.Fatal(err)
				}
			}
			m.Do("sh", "-ec", "chgrp -R imdsgate /etc/imdsgate; systemctl enable --now imdsgated.socket imdsgated.service")
			m.upgrade(mode, "rpm", "--upgrade", "--nodeps", m.next(".rpm"))
			m.Do("rpm", "--erase", "imdsgate")
			m.unguarded()
		})
	}
}

// A version that refuses the configuration does not take the place of one that runs, and says
// so: the package manager has installed it, and the old one serves on, until somebody has
// corrected the configuration.
func TestUpgradeRefused(t *testing.T) {
	for mode, refused := range map[string]string{"audit": "200", "enforce": "403"} {
		t.Run(mode, func(t *testing.T) {
			m := boot(t, settings{config: config(mode), lab: withContainer})
			deb := m.next(".deb")
			// It no longer has a profile that the configuration names.
			m.Do("sh", "-ec", "dpkg-deb --raw-extract $0 /opt/next; rm $0 /opt/next/usr/lib/imdsgate/profiles/cloud-init.yaml; dpkg-deb -Zgzip -z1 --build /opt/next $0", deb)
			old := m.daemon()
			load := m.everywhere(8 * time.Second)
			time.Sleep(time.Second)
			out := m.Do("dpkg", "--install", deb)
			for _, says := range []string{"/etc/imdsgate/config.yaml:2:12: no profile \"cloud-init\"", "the old one keeps running", "then: systemctl restart imdsgated.service"} {
				if !strings.Contains(out, says) {
					t.Errorf("it does not say %s:\n%s", says, out)
				}
			}
			m.served(load())
			if m.daemon() != old {
				t.Error("the old version does not run any more")
			}
			if status, _ := m.Try("imdsgate", "status"); !strings.Contains(status, "cloud-init.yaml is gone") || !strings.Contains(status, "imdsgated is not what is in force") {
				t.Errorf("status:\n%s", status)
			}
			m.Event("program-changed")
			if got := m.Curl("nobody", role); got != refused {
				t.Errorf("a thief got %s", got)
			}

			m.Do("sed", "-i", "s/cloud-init, //", "/etc/imdsgate/config.yaml")
			m.Do("systemctl", "restart", "imdsgated.service")
			if status := m.Do("imdsgate", "status", "--json"); !strings.Contains(status, `"version":"`+nextVersion+`"`) {
				t.Errorf("afterwards:\n%s", status)
			}
			if got := m.Curl("nobody", role); got != refused {
				t.Errorf("from the new version a thief got %s", got)
			}
		})
	}
}

// What only the start of the new version finds out is told, too. In enforce mode clients are
// refused then: the operator has said that there is to be no less.
func TestUpgradeDoesNotStart(t *testing.T) {
	m := boot(t, settings{config: config("enforce")})
	deb := m.next(".deb")
	level := "attribution:\n  require_level: L2\n"
	if err := os.WriteFile(m.file("/etc/imdsgate/config.yaml"), []byte(config("enforce")+level), 0o644); err != nil {
		t.Fatal(err)
	}
	out := m.Do("dpkg", "--force-confold", "--install", deb)
	if !strings.Contains(out, "the new version did not start: journalctl -u imdsgated.service") {
		t.Errorf("it does not say so:\n%s", out)
	}
	m.refusedOrOpen("enforce")
	m.Do("sed", "-i", "s/L2/L0/", "/etc/imdsgate/config.yaml")
	m.Do("systemctl", "reset-failed", "imdsgated.socket", "imdsgated.service")
	m.Do("systemctl", "start", "imdsgated.service")
	m.Event("requests-refused")
	if o := m.load(0)(); o.Failed != 0 {
		t.Errorf("afterwards: %+v", o)
	}
}
