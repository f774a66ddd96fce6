package chroot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// used is what the operator and the daemon add to what was installed.
const used = `
	systemctl enable imdsgated.socket imdsgated.service 2>/dev/null
	echo 'mode: enforce' >/etc/imdsgate/config.yaml
	echo 'profiles: [cloud-init]' >/etc/imdsgate/config.d/50-mine.yaml
	install -d -m 0750 -o imdsgate -g imdsgate /var/log/imdsgate /var/lib/imdsgate
	echo '{}' >/var/log/imdsgate/events.ndjson
	echo '{}' >/var/lib/imdsgate/decisions.json
	chown imdsgate:imdsgate /var/log/imdsgate/events.ndjson /var/lib/imdsgate/decisions.json`

// installed complains where an installation is not as it has to be: nothing is enabled, the
// user is there, the configuration is his group's, and holds.
func installed(t *testing.T, s *system) {
	t.Helper()
	if out := s.run("stat -c '%A %U:%G' /etc/imdsgate /etc/imdsgate/config.d /etc/imdsgate/config.yaml"); out != "drwxr-x--- root:imdsgate\ndrwxr-x--- root:imdsgate\n-rw-r----- root:imdsgate\n" {
		t.Errorf("the configuration is %s", out)
	}
	if out, err := s.try("systemctl is-enabled imdsgated.socket imdsgated.service"); err == nil || out != "disabled\ndisabled\n" {
		t.Errorf("the units are %s", out)
	}
	if out := s.run("getent passwd imdsgate"); !strings.HasSuffix(out, ":Instance metadata gate:/nonexistent:/usr/sbin/nologin\n") {
		t.Errorf("the user is %s", out)
	}
	s.run("imdsgated -check")
	s.run("setpriv --reuid imdsgate --regid imdsgate --clear-groups imdsgated -check") // it can read what it is given
	s.run("systemd-analyze verify --man=no /usr/lib/systemd/system/imdsgated.socket")
}

// kept complains where an upgrade has changed what is the operator's or the daemon's.
func kept(t *testing.T, s *system) {
	t.Helper()
	s.run(`grep -qx 'mode: enforce' /etc/imdsgate/config.yaml
		test -s /etc/imdsgate/config.d/50-mine.yaml -a -s /var/log/imdsgate/events.ndjson -a -s /var/lib/imdsgate/decisions.json
		test "$(stat -c '%a %G' /etc/imdsgate/config.yaml)" = '640 imdsgate'`)
	if out, _ := s.try("systemctl is-enabled imdsgated.socket imdsgated.service"); out != "enabled\nenabled\n" {
		t.Errorf("after the upgrade the units are %s", out)
	}
}

func TestDeb(t *testing.T) {
	s := open(t)
	before := s.files()
	deb := only(t, ".deb")
	s.run("dpkg --install " + deb)
	installed(t, s)
	s.run(used)
	// The next version has another configuration, whose question is answered by the old one staying.
	s.run(`dpkg-deb --raw-extract ` + deb + ` /tmp/next
		sed -i 's/^Version: .*/&.next/' /tmp/next/DEBIAN/control
		echo '# new' >>/tmp/next/etc/imdsgate/config.yaml
		dpkg-deb --root-owner-group --build /tmp/next /tmp/next.deb
		dpkg --force-confold --install /tmp/next.deb`)
	kept(t, s)
	s.run("dpkg --remove imdsgate")
	if out, err := s.try("find /etc/systemd -name '*imdsgate*' | grep ."); err == nil {
		t.Errorf("left: %s", out)
	}
	s.run("test -s /etc/imdsgate/config.yaml -a -s /var/log/imdsgate/events.ndjson")
	s.run("dpkg --purge imdsgate")
	same(t, before, s.files())
}

// Removed again without having been used, by --purge at once.
func TestDebPurge(t *testing.T) {
	s := open(t)
	before := s.files()
	s.run("dpkg --install " + only(t, ".deb") + "; dpkg --purge imdsgate")
	same(t, before, s.files())
}

// Debian's systemd-sysusers makes the user; where there is none, useradd makes the same.
func TestUserWithoutSysusers(t *testing.T) {
	s := open(t)
	s.run("rm /usr/bin/systemd-sysusers; dpkg --install " + only(t, ".deb"))
	installed(t, s)
}

// rpm is told not to look for iptables, which dpkg has brought.
func TestRPM(t *testing.T) {
	s := open(t)
	s.run("rpm --initdb")
	before := s.files()
	rpm := only(t, ".rpm")
	if out, err := s.try("rpm --install " + rpm); err == nil || !strings.Contains(out, "/usr/sbin/iptables is needed") {
		t.Errorf("it installs without iptables: %v, %s", err, out)
	}
	s.run("rpm --install --nodeps " + rpm)
	installed(t, s)
	if out, err := s.try("rpm --verify --nodeps imdsgate"); err != nil {
		t.Errorf("what is installed is not what the package says: %v\n%s", err, out)
	}
	s.run(used)
	s.run("rpm --upgrade --nodeps --replacepkgs --replacefiles " + rpm)
	kept(t, s)
	s.run("rpm --erase imdsgate")
	if out, err := s.try("find /etc/systemd -name '*imdsgate*' | grep ."); err == nil {
		t.Errorf("left: %s", out)
	}
	// rpm has no purge: what was changed and what was recorded is left, with the user whose it is.
	after := s.files()
	for _, dir := range []string{"/usr/share/fish", "/usr/share/fish/vendor_completions.d", "/usr/share/zsh/site-functions"} {
		delete(after, dir) // Fedora's package filesystem has them
	}
	same(t, before, after, "/etc/imdsgate", "/etc/imdsgate/config.yaml.rpmsave", "/etc/imdsgate/config.d", "/etc/imdsgate/config.d/50-mine.yaml",
		"/var/log/imdsgate", "/var/log/imdsgate/events.ndjson", "/var/lib/imdsgate", "/var/lib/imdsgate/decisions.json",
		"/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow")
}

func TestTarball(t *testing.T) {
	for _, prefix := range []string{"/usr", "/usr/local"} {
		s := open(t)
		before := s.files()
		s.run("mkdir /tmp/t; tar --extract --gzip --strip-components=1 --directory /tmp/t --file /packages/*-linux-$(dpkg --print-architecture).tar.gz; /tmp/t/install.sh '' " + prefix)
		if prefix == "/usr" {
			installed(t, s)
		}
		s.run(used + "\n/tmp/t/install.sh '' " + prefix)
		kept(t, s)
		s.run("/tmp/t/uninstall.sh '' " + prefix)
		s.run("test -s /etc/imdsgate/config.yaml -a -s /var/log/imdsgate/events.ndjson; getent passwd imdsgate")
		s.run("/tmp/t/uninstall.sh '' " + prefix + " purge")
		after := s.files()
		// Directories of the prefix that were not there before are anybody's now.
		for path := range after {
			if _, ok := before[path]; !ok && strings.HasPrefix(after[path], "d") && !strings.Contains(path, "imdsgate") {
				delete(after, path)
			}
		}
		same(t, before, after)
	}
}

// Two of them would be in each other's way.
func TestTarballBesidePackage(t *testing.T) {
	s := open(t)
	s.run("dpkg --install " + only(t, ".deb"))
	s.run("mkdir /tmp/t; tar --extract --gzip --strip-components=1 --directory /tmp/t --file /packages/*-linux-$(dpkg --print-architecture).tar.gz")
	if out, err := s.try("/tmp/t/install.sh"); err == nil || !strings.Contains(out, "the package imdsgate is installed here") {
		t.Errorf("%v: %s", err, out)
	}
	// Of a package that was removed, and not purged, the configuration alone is there.
	s.run("dpkg --remove imdsgate; /tmp/t/install.sh")
	installed(t, s)
}

func TestLint(t *testing.T) {
	s := open(t)
	if out := s.run("lintian --allow-root --fail-on error,warning --tag-display-limit 0 " + only(t, ".deb")); strings.Contains(out, "imdsgate:") {
		t.Errorf("lintian:\n%s", out)
	}
	if out, err := s.try("rpmlint --config /source/rpmlint.toml " + only(t, ".rpm")); err != nil || !strings.Contains(out, " 0 errors, 0 warnings") {
		t.Errorf("rpmlint: %v\n%s", err, out)
	}
}

// What is said to compile, does.
func TestPolicies(t *testing.T) {
	s := open(t)
	s.run("dpkg --install " + only(t, ".deb"))
	s.run("apparmor_parser --skip-kernel-load --skip-cache /usr/share/imdsgate/apparmor/imdsgated")
	s.run("cp -R /usr/share/imdsgate/selinux /tmp/selinux; cd /tmp/selinux; make --file /usr/share/selinux/devel/Makefile imdsgate.pp")
	if info, err := os.Stat(filepath.Join(s.root, "tmp/selinux/imdsgate.pp")); err != nil || info.Size() == 0 {
		t.Errorf("no module: %v", err)
	}
}
