package iptables

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// The ways in which an owner of a host switches IPv6 off and, for one interface, on again.
const (
	allOff = "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
	loOn   = "echo 0 >/proc/sys/net/ipv6/conf/lo/disable_ipv6"
	eth0On = "echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip addr add fd00:ec2:1::10/64 dev eth0 nodad; " +
		"ip -6 route replace fd00:ec2::254 dev eth0"
)

// TestIPv6SwitchedOnAgain has IPv6 on one interface where it is off for "all", before the redirect and after. A
// client of the host must be redirected or get nothing; "metadata" is the hole.
func TestIPv6SwitchedOnAgain(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		ask := func() string { return s.ask(s.lab.Instance, client{uid: 1001}, endpoint[IPv6]) }
		s.sh(allOff)
		s.expect("with IPv6 off", ask(), "EADDRNOTAVAIL")
		r := s.open(Config{UID: uid, Backend: b, Enforce: true})
		s.daemon(r)
		s.expect("hooks with IPv6 off", hooksOf(s.install(r)), "IPv4: host forwarded; IPv6: host forwarded")

		s.sh(eth0On)
		s.expect("switched on after Install", ask(), "timeout")
		s.expect("and the daemon", s.ask(s.lab.Instance, client{uid: uid, mark: defaultMark}, endpoint[IPv6]), "metadata")
		s.expect("differences", inWords(s.verify(r)), "")
		s.sh(loOn)
		s.expect("with IPv6 on lo too", ask(), "host [fd00:ec2::254]:80")
		s.remove()
		s.expect("IPv6 rules after removal", s.rules(b), "")
		s.expect("without us", ask(), "metadata")

		s.sh(allOff + "; " + eth0On)
		s.expect("without us, with IPv6 off on lo", ask(), "metadata")
		if got := s.warnings(s.install(r)); !strings.Contains(got, "IPv6 is off on lo") || !strings.Contains(got, "get no answer") {
			s.Errorf("warnings: %q", got)
		}
		s.expect("switched on before Install", ask(), "timeout")
		s.sh("ip -6 route replace default dev eth0")
		s.expect("where a route leads anywhere, ::1 included", ask(), "timeout")
		s.sh("ip6tables-" + b.String() + " -t nat -F")
		s.expect("with the guard alone", ask(), "timeout")
		s.install(r)
		s.sh(loOn)
		s.expect("with IPv6 on lo too", ask(), "host [fd00:ec2::254]:80")
	})
}

// TestIPv6OnLaterInterface attaches a second network card to a host on which new interfaces have no IPv6.
func TestIPv6OnLaterInterface(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		s.sh("echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6; ip link set eth0 down")
		r := s.open(Config{UID: uid, Backend: b, Enforce: true})
		s.daemon(r)
		s.install(r)
		s.sh("ip link add eth1 type veth peer name ec3; ip link set ec3 netns " + s.lab.Metadata.Path() + "; ip link set eth1 up")
		s.shIn(s.lab.Metadata, "ip link set ec3 up; ip addr add fd00:ec2:2::1/64 dev ec3 nodad")
		s.sh("echo 0 >/proc/sys/net/ipv6/conf/eth1/disable_ipv6; ip addr add fd00:ec2:2::10/64 dev eth1 nodad; " +
			"ip -6 route add fd00:ec2::254 via fd00:ec2:2::1")
		ask := func() string { return s.ask(s.lab.Instance, client{uid: 1001}, endpoint[IPv6]) }
		s.expect("with the redirect", ask(), "host [fd00:ec2::254]:80")
		s.remove()
		s.expect("without", ask(), "metadata")
	})
}

// TestIPv6OffForContainers is a host that forwards IPv6 and has none on lo.
func TestIPv6OffForContainers(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		s.sh("echo 1 >/proc/sys/net/ipv6/conf/lo/disable_ipv6")
		r := s.open(Config{UID: uid, Backend: b, Enforce: true})
		s.daemon(r)
		s.install(r)
		for _, ns := range []*netlab.Namespace{s.lab.Bridged, s.lab.Routed} {
			s.expect(ns.String(), s.ask(ns, client{}, endpoint[IPv6]), "forwarded [fd00:ec2::254]:80")
		}
	})
}

// TestIPv6OffOnLoInAudit keeps away from what it would break.
func TestIPv6OffOnLoInAudit(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		s.sh(allOff + "; " + eth0On)
		ask := func() string { return s.ask(s.lab.Instance, client{uid: 1001}, endpoint[IPv6]) }
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		report := s.install(r)
		s.expect("hooks", hooksOf(report), "IPv4: host forwarded; IPv6: forwarded")
		if got := s.warnings(report); !strings.Contains(got, "IPv6 is off on lo") || !strings.Contains(got, "past the daemon") {
			s.Errorf("warnings: %q", got)
		}
		s.expect("with IPv6 off on lo", ask(), "metadata")

		drifts := s.watch(r, time.Hour) // a change of ::1 is notified
		s.sh(loOn)
		select {
		case d := <-drifts:
			s.expect("hooks", hooksOf(d.Report), "IPv4: host forwarded; IPv6: host forwarded")
		case <-time.After(20 * time.Second):
			s.Fatal("IPv6 on lo was not noticed")
		}
		s.expect("with IPv6 on lo", ask(), "host [fd00:ec2::254]:80")
	})
}

// TestDormantIPv6 is a host without IPv6 whose ip6tables does not work, or lets nothing pass.
func TestDormantIPv6(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		s.sh(allOff)
		s.load(b, IPv6, "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT DROP [0:0]\nCOMMIT\n")
		before := s.rules(b)
		r := s.open(Config{UID: uid, Backend: b})
		s.do(r.EnsureLink)
		s.expect("hooks where ip6tables lets nothing pass", hooksOf(s.install(r)), "IPv4: host forwarded; IPv6: forwarded")
		s.expect("differences", inWords(s.verify(r)), "")
		s.remove()
		s.expect("rules after removal", s.rules(b), before)

		r = s.open(Config{UID: uid, Backend: b, Enforce: true})
		report := s.install(r)
		s.expect("hooks in enforce", hooksOf(report), "IPv4: host forwarded; IPv6: forwarded")
		if len(report.Locks) > 0 {
			s.Errorf("locks: %v", report.Locks)
		}
		s.sh("echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6")
		if len(s.install(r).Locks) == 0 {
			s.Error("no locks with IPv6 on eth0")
		}
		s.remove()
		s.sh(allOff)

		broken := *r.use
		broken.byFamily[IPv6].restore = "/bin/false"
		r.all[slices.Index(r.all, r.use)] = &broken
		r.use = &broken
		report = s.install(r)
		s.expect("hooks", hooksOf(report), "IPv4: host forwarded; IPv6: IPv6 is off on every interface and its rules cannot be installed")
		if got := s.warnings(report); !strings.Contains(got, "there is no IPv6 redirect (change IPv6 rules: run false") {
			s.Errorf("warnings: %q", got)
		}
		s.expect("differences", inWords(s.verify(r)), "")
		s.sh(loOn)
		if got := inWords(s.verify(r)); !strings.Contains(got, "IPv6 nat IMDSGATE-PREROUTING: chain missing") {
			s.Errorf("differences with IPv6 on lo: %q", got)
		}
		if err := s.lab.Instance.Do(func() error {
			_, err := r.Install(context.Background())
			return err
		}); err == nil {
			s.Error("Install succeeds without IPv6 rules where there is IPv6")
		}
	})
}

// TestInstalledWithoutIPv6 asks a host on which ip6tables-save fails.
func TestInstalledWithoutIPv6(t *testing.T) {
	s := newHost(t)
	dir := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		path, err := exec.LookPath(strings.Replace(name, "tables", "tables-nft", 1))
		if err != nil {
			t.Fatal(err)
		}
		if name == "ip6tables-save" {
			path = "/bin/false"
		}
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for _, off := range []bool{false, true} {
		if off {
			s.sh(allOff)
		}
		err := s.lab.Instance.Do(func() error {
			_, _, err := Installed(context.Background())
			return err
		})
		if (err == nil) != off {
			s.Errorf("Installed with IPv6 off %v: %v", off, err)
		}
		err = s.lab.Instance.Do(func() error {
			_, err := Remove(context.Background())
			return err
		})
		if (err == nil) != off {
			s.Errorf("Remove with IPv6 off %v: %v", off, err)
		}
	}
}

func (s *site) warnings(r Report) string { return strings.Join(r.Warnings, "\n") }
