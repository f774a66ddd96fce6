package iptables

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// TestTraffic follows connections of all kinds of clients through audit, enforce and removal.
func TestTraffic(t *testing.T) {
	for _, b := range backends {
		for _, f := range Families {
			t.Run(fmt.Sprintf("%s %s", b, f), func(t *testing.T) { testTraffic(newSite(t), b, f) })
		}
	}
}

func testTraffic(s *site, b Backend, f Family) {
	instance, bridged, routed := s.lab.Instance, s.lab.Bridged, s.lab.Routed
	imds := endpoint[f]
	everywhere := []*netlab.Namespace{instance, bridged, routed}
	for _, ns := range everywhere {
		s.expect(ns.String()+" without us", s.ask(ns, client{}, imds), "metadata")
	}
	oldHost, _ := s.dial(instance, client{}, imds)
	oldForwarded, _ := s.dial(bridged, client{}, imds)

	r := s.open(Config{UID: uid, Backend: b})
	s.daemon(r)
	report := s.install(r)
	s.expect("hooks", hooksOf(report), "IPv4: host forwarded; IPv6: host forwarded")

	asHost, asForwarded := "host "+imds.String(), "forwarded "+imds.String()
	s.expect("host client", s.ask(instance, client{}, imds), asHost)
	if f == IPv4 {
		s.expect("host client with a mapped address", s.ask(instance, client{mapped: true}, imds), asHost)
	}
	s.expect("bridged container", s.ask(bridged, client{}, imds), asForwarded)
	s.expect("container on a link without addresses", s.ask(routed, client{}, imds), asForwarded)

	s.expect("the daemon", s.ask(instance, client{uid: uid, mark: defaultMark}, imds), "metadata")
	s.expect("its mark alone", s.ask(instance, client{mark: defaultMark}, imds), asHost)
	s.expect("its uid alone", s.ask(instance, client{uid: uid}, imds), asHost)

	hostListener := netip.AddrPortFrom(f.localhost(), defaultHostPort)
	forwardedListener := netip.AddrPortFrom(r.config.forwarded(f)[0], defaultForwardedPort)
	s.expect("host client straight to port A", s.ask(instance, client{}, hostListener), "ECONNREFUSED")
	s.expect("host client straight to port B", s.ask(instance, client{}, forwardedListener), "ECONNREFUSED")
	s.expect("container straight to port B", s.ask(bridged, client{}, forwardedListener), "ECONNREFUSED")

	before := s.status(r).Families[f].Guard
	s.expect("old host connection in audit", oldHost.alive(), "alive")
	s.expect("old forwarded connection in audit", oldForwarded.alive(), "alive")
	after := s.status(r).Families[f].Guard
	if after.Host <= before.Host || after.Forwarded <= before.Forwarded || before.Listener < 3 {
		s.Errorf("guard counts %+v before and %+v after packets of old connections", before, after)
	}

	r = s.open(Config{UID: uid, Backend: b, Enforce: true})
	s.install(r)
	s.expect("old host connection in enforce", oldHost.alive(), "ECONNRESET")
	s.expect("old forwarded connection in enforce", oldForwarded.alive(), "ECONNRESET")
	s.expect("host client in enforce", s.ask(instance, client{}, imds), asHost)
	s.expect("bridged container in enforce", s.ask(bridged, client{}, imds), asForwarded)
	s.expect("the daemon in enforce", s.ask(instance, client{uid: uid, mark: defaultMark}, imds), "metadata")
	s.upstreamCloses(imds)

	s.remove()
	for _, ns := range everywhere {
		s.expect(ns.String()+" after removal", s.ask(ns, client{}, imds), "metadata")
	}
}

// upstreamCloses ends connections of the daemon in each order, 40 of each. When the daemon closes first, its last
// acknowledgement comes from a socket without owner, and without it the service's end hangs in LAST-ACK.
func (s *site) upstreamCloses(imds netip.AddrPort) {
	for _, first := range []string{"daemon", "service", "half"} {
		for range 40 {
			d, greeting := s.dial(s.lab.Instance, client{uid: uid, mark: defaultMark}, imds)
			if d == nil {
				s.Fatal(greeting)
			}
			switch first {
			case "service":
				io.WriteString(d, "bye\n")
				s.expect("the service's goodbye", d.hear(), "EOF")
			case "half":
				d.Conn.(interface{ CloseWrite() error }).CloseWrite()
				s.expect("the service's goodbye", d.hear(), "EOF")
			}
			d.Close()
		}
	}
	family := map[bool]uint8{true: netlink.FAMILY_V4, false: netlink.FAMILY_V6}[imds.Addr().Is4()]
	hanging := func() (where []string) {
		for _, ns := range []*netlab.Namespace{s.lab.Instance, s.lab.Metadata} {
			err := ns.Do(func() error {
				sockets, err := netlink.SocketDiagTCP(family)
				for _, socket := range sockets {
					if socket.INode == 0 && socket.State != netlink.TCP_TIME_WAIT &&
						(socket.ID.DestinationPort == imds.Port() || socket.ID.SourcePort == imds.Port()) {
						where = append(where, fmt.Sprintf("%s, state %d", ns, socket.State))
					}
				}
				return err
			})
			if err != nil {
				s.Fatal(err)
			}
		}
		return where
	}
	deadline := time.Now().Add(2 * time.Second)
	for len(hanging()) > 0 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
	}
	if where := hanging(); len(where) > 0 {
		s.Errorf("%d closed upstream connections hang, the first in %s", len(where), where[0])
	}
}

// TestSamePort has the service reset connections of the daemon, and clients come with their ports, also from the other
// side: the tracker remembers both for ten seconds, and must not take one for the other.
func TestSamePort(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		imds, daemon := endpoint[IPv4], client{uid: uid, mark: defaultMark}
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		s.install(r)
		for range 5 {
			d, greeting := s.dial(s.lab.Instance, daemon, imds)
			s.expect("the daemon", greeting, "metadata")
			io.WriteString(d, "reset\n")
			s.expect("the service's goodbye", d.hear(), "ECONNRESET")
			port := d.LocalAddr().(*net.TCPAddr).Port
			d.Close()
			s.expect("a client with the daemon's port", s.ask(s.lab.Instance, client{prepare: from(port)}, imds), "host "+imds.String())
		}
		for range 5 {
			d, _ := s.dial(s.lab.Instance, daemon, imds)
			io.WriteString(d, "reset\n")
			s.expect("the service's goodbye", d.hear(), "ECONNRESET")
			port := d.LocalAddr().(*net.TCPAddr).Port
			d.Close()
			s.expect("and with its mark", s.ask(s.lab.Instance, client{mark: defaultMark, prepare: from(port)}, imds), "host "+imds.String())
		}
		for range 5 {
			c, greeting := s.dial(s.lab.Instance, client{}, imds)
			s.expect("a client", greeting, "host "+imds.String())
			io.WriteString(c, "reset\n")
			s.expect("the daemon's goodbye", c.hear(), "ECONNRESET")
			port := c.LocalAddr().(*net.TCPAddr).Port
			c.Close()
			s.expect("the daemon with a client's port", s.ask(s.lab.Instance, client{uid: uid, mark: defaultMark, prepare: from(port)}, imds), "metadata")
		}
	})
}

// TestZoneComesAndGoes keeps connections of the daemon while its rules in table raw come and go, on a host where others
// use the tracker, too, so that it goes on without ours.
func TestZoneComesAndGoes(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		imds, tool := endpoint[IPv4], "iptables-"+b.String()
		s.sh(tool + " -A INPUT -m conntrack --ctstate INVALID -j DROP; " + tool + " -t nat -A POSTROUTING -d 203.0.113.0/24 -j MASQUERADE")
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		daemon := func(when string) *dialogue {
			d, greeting := s.dial(s.lab.Instance, client{uid: uid, mark: defaultMark}, imds)
			s.expect("the daemon "+when, greeting, "metadata")
			return d
		}
		before := daemon("before the rules")
		s.install(r)
		s.expect("from before the rules", before.alive(), "alive")
		during := daemon("with the rules")
		all := map[string]*dialogue{"from before": before, "from with": during}
		for _, chain := range []string{"OUTPUT", "IMDSGATE-OUTPUT"} {
			s.sh(tool + " -t raw -F " + chain)
			gap := daemon("without its zone")
			s.install(r) // the repair
			s.expect("from without its zone, of which "+chain+" was empty", gap.alive(), "alive")
			s.expect("with the rules, silent in between", during.alive(), "alive")
			all["from when "+chain+" was empty"] = gap
		}
		s.remove()
		for name, d := range all {
			s.expect(name+", after removal", d.alive(), "alive")
		}
	})
}

// TestForgets has the tracker lose a connection of the daemon's and then see an answer, so that it believes the service
// to have begun it. That is forgotten, too, or else a client with that port would go past the redirect.
func TestForgets(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		imds := endpoint[IPv4]
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		s.install(r)
		d, greeting := s.dial(s.lab.Instance, client{uid: uid, mark: defaultMark}, imds)
		s.expect("the daemon", greeting, "metadata")
		near := d.LocalAddr().(*net.TCPAddr)
		s.do(func() error {
			_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.FAMILY_V4, direct{})
			return err
		})
		s.sh(fmt.Sprintf("conntrack -I -p tcp -s %s -d %s --sport 80 --dport %d --state ESTABLISHED -t 100", imds.Addr(), near.IP, near.Port))
		s.do(func() error { _, err := forget(IPv4, true); return err })
		s.expect("the daemon's connection", d.alive(), "alive")
		d.Conn.(*net.TCPConn).SetLinger(0)
		d.Close()
		s.expect("a client with its port", s.ask(s.lab.Instance, client{prepare: from(near.Port)}, imds), "host "+imds.String())
	})
}

// over makes a connection to the service that the other end closes first, and returns its port once the tracker has seen
// that it has ended.
func (s *site) over(as client, want string) (port int) {
	s.Helper()
	d, greeting := s.dial(s.lab.Instance, as, endpoint[IPv4])
	s.expect("the one before", greeting, want)
	fmt.Fprintln(d, "bye")
	s.expect("the end of it", d.hear(), "EOF")
	d.Close()
	s.eventually("the tracker to see that it has ended", func() bool {
		return strings.Contains(s.sh("conntrack -L -p tcp 2>/dev/null"), "TIME_WAIT")
	})
	return d.LocalAddr().(*net.TCPAddr).Port
}

// TestPortOfTheLastOne has a client go to the service itself, after removal, from the port of one that was redirected and
// has ended. When there are rules again the tracker must not take it for that one.
func TestPortOfTheLastOne(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		imds := endpoint[IPv4]
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		s.install(r)
		old := s.over(client{}, "host "+imds.String())
		s.remove()
		direct, greeting := s.dial(s.lab.Instance, client{prepare: from(old)}, imds)
		s.expect("after removal", greeting, "metadata")
		s.install(r)
		s.expect("after the next installation", direct.alive(), "alive")
	})
}

// TestReleaseWithAnOldPort has a client go to the service itself, when the redirect is gone and the daemon still serves,
// from the port of a connection of the daemon's that has ended. The tracker must not give it another port, which it would
// lose with the last rules.
func TestReleaseWithAnOldPort(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		imds := endpoint[IPv4]
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		s.install(r)
		old := s.over(client{uid: uid, mark: defaultMark}, "metadata")
		s.do(func() error { return Release(t.Context()) })
		direct, greeting := s.dial(s.lab.Instance, client{prepare: from(old)}, imds)
		s.expect("after release", greeting, "metadata")
		s.remove()
		s.expect("after removal", direct.alive(), "alive")
	})
}

// TestUnderMasquerade has the rules go, and come in audit mode, while an answer is under way to a container that went to
// the service itself.
func TestUnderMasquerade(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		s.sh("iptables-" + b.String() + " -t nat -A POSTROUTING -s 172.17.0.0/16 -d 169.254.169.254 -j MASQUERADE")
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		asks := func() *dialogue {
			d, greeting := s.dial(s.lab.Bridged, client{}, endpoint[IPv4])
			s.expect("a container", greeting, "metadata")
			fmt.Fprintln(d, "later")
			return d
		}
		d := asks()
		s.install(r)
		s.expect("its answer after the installation", d.hear(), "later")
		s.do(func() error { return Release(t.Context()) })
		d = asks()
		s.remove()
		s.expect("its answer after the removal", d.hear(), "later")
	})
}

// TestLost has the daemon make a connection without its zone, from the port of an earlier one. With the zone it loses the
// other port that the tracker has given it.
func TestLost(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		imds, as := endpoint[IPv4], client{uid: uid, mark: defaultMark}
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		s.install(r)
		as.prepare = from(s.over(as, "metadata"))
		s.sh("iptables-" + b.String() + " -t raw -F OUTPUT")
		d, greeting := s.dial(s.lab.Instance, as, imds)
		s.expect("without its zone", greeting, "metadata")
		other, _ := s.dial(s.lab.Instance, client{uid: uid, mark: defaultMark}, imds)
		report := s.install(r)
		s.expect("what is lost", fmt.Sprint(report.Lost), fmt.Sprint([]Lost{{d.LocalAddr().(*net.TCPAddr).AddrPort(), imds}}))
		s.expect("another one, meanwhile", other.alive(), "alive")
	})
}

// TestZoneIsTried shows that the kernel says when it has no such rules, and that trying leaves nothing.
func TestZoneIsTried(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		r := s.open(Config{UID: uid, Backend: b})
		s.do(func() error { return r.use.tryZone(t.Context()) })
		s.expect("what is left", s.rules(b), "")
	})
}

// TestZoneAgain has the rule of the zone refused once: the next install has it.
func TestZoneAgain(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		r := s.open(Config{UID: uid, Backend: b})
		restore := &r.use.byFamily[IPv4].restore
		real, broken := *restore, filepath.Join(t.TempDir(), "restore")
		if err := os.WriteFile(broken, fmt.Appendf(nil, "#!/bin/sh\nin=$(cat)\ncase $in in *--zone*) exit 4;; esac\nprintf '%%s\\n' \"$in\" | exec %s \"$@\"\n", real), 0o755); err != nil {
			t.Fatal(err)
		}
		*restore = broken
		zoneless := func() bool {
			return strings.Contains(strings.Join(s.install(r).Warnings, "\n"), "does not keep the daemon's connections apart")
		}
		if !zoneless() {
			s.Error("the rule is refused, and it does not say so")
		}
		*restore = real
		if zoneless() || !strings.Contains(s.rules(b), "--zone") {
			s.Errorf("the rule is not tried again:\n%s", s.rules(b))
		}
	})
}

// from has a socket connect from a port.
func from(port int) func(fd int) error {
	return func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrInet4{Port: port})
	}
}

// TestInputDrop is a host as the CIS benchmarks want it: the redirected packets of containers come in by no interface
// that it lets in.
func TestInputDrop(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		s.load(b, IPv4, readLockCase(s.T, "testdata/locks/cis.rules").rules)
		s.load(b, IPv6, readLockCase(s.T, "testdata/locks/cis-ipv6.rules").rules)
		r := s.open(Config{UID: uid})
		if r.use.backend != b {
			s.Errorf("back end %s, want the one with the host's rules", r.use.backend)
		}
		s.daemon(r)
		s.install(r)
		for _, f := range Families {
			s.expect("host client", s.ask(s.lab.Instance, client{}, endpoint[f]), "host "+endpoint[f].String())
			s.expect("bridged container", s.ask(s.lab.Bridged, client{}, endpoint[f]), "forwarded "+endpoint[f].String())
			s.expect("container on a link without addresses", s.ask(s.lab.Routed, client{}, endpoint[f]), "forwarded "+endpoint[f].String())
			s.expect("the daemon", s.ask(s.lab.Instance, client{uid: uid, mark: defaultMark}, endpoint[f]), "metadata")
		}
	})
}

// TestEgressAllowList is a host that lets port 80 out and not port 254, on any interface but lo. A redirected packet
// does not leave by lo yet when it is filtered.
func TestEgressAllowList(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		s.load(b, IPv4, readLockCase(s.T, "testdata/locks/egress-allow-list.rules").rules)
		r := s.open(Config{UID: uid, Backend: b})
		s.daemon(r)
		s.expect("hooks", hooksOf(s.install(r)), "IPv4: host admit forwarded; IPv6: host forwarded")
		s.expect("differences", inWords(s.verify(r)), "")
		s.expect("host client", s.ask(s.lab.Instance, client{}, endpoint[IPv4]), "host 169.254.169.254:80")

		s.sh("iptables-" + b.String() + " -F IMDSGATE-ADMIT")
		s.expect("host client if we did not let it out", s.ask(s.lab.Instance, client{}, endpoint[IPv4]), "ECONNREFUSED")
	})
}

// TestFirewalldIPv6 shows that what is said about firewalld's rule against ::/96 is true.
func TestFirewalldIPv6(t *testing.T) {
	s := newSite(t)
	s.sh("nft -f testdata/native/firewalld.nft")
	r := s.open(Config{UID: uid, Backend: BackendNFT})
	s.expect("hooks", hooksOf(s.status(r)), "IPv4: host forwarded; IPv6: forwarded")
	s.daemon(r)
	s.do(func() error {
		survey, err := r.survey(context.Background())
		if err != nil {
			return err
		}
		survey.plan = r.config.Plan(FullCoverage)
		_, err = r.apply(context.Background(), survey)
		return err
	})
	s.expect("host client", s.ask(s.lab.Instance, client{}, endpoint[IPv4]), "host 169.254.169.254:80")
	s.expect("IPv6 host client", s.ask(s.lab.Instance, client{}, endpoint[IPv6]), "EHOSTUNREACH")
	s.expect("bridged container", s.ask(s.lab.Bridged, client{}, endpoint[IPv6]), "forwarded [fd00:ec2::254]:80")
}

// TestOnlyTheEndpoint sends packets that are nearly metadata traffic, and those of the other services that an instance
// has at link-local addresses (EC2 User Guide, "Link-local addresses"): nothing of them is touched, unless it is
// configured as an endpoint.
func TestOnlyTheEndpoint(t *testing.T) {
	s := newSite(t)
	var others []netip.AddrPort
	for _, a := range []string{
		"172.31.0.1:80", "169.254.169.254:8080",
		"169.254.170.2:80",                       // credentials of ECS tasks
		"169.254.170.23:80", "[fd00:ec2::23]:80", // and of EKS pods
		"169.254.169.253:53", "[fd00:ec2::253]:53", // DNS
		"169.254.169.123:123", "[fd00:ec2::123]:123", // NTP
		"169.254.169.250:1688", // KMS
	} {
		to := netip.MustParseAddrPort(a)
		if a := to.Addr(); a.IsLinkLocalUnicast() && a != endpoint[IPv4].Addr() || a.Is6() { // the lab has the others
			s.shIn(s.lab.Metadata, fmt.Sprintf("ip addr add %s/%d dev ec2 nodad", to.Addr(), to.Addr().BitLen()))
			s.sh(fmt.Sprintf("ip route add %s/%d dev eth0", to.Addr(), to.Addr().BitLen()))
		}
		s.serve(s.lab.Metadata, to, "metadata")
		others = append(others, to)
	}
	datagrams := s.echo(s.lab.Metadata, "169.254.169.254:80", "169.254.169.253:53", "169.254.169.123:123", "[fd00:ec2::253]:53")
	r := s.open(Config{UID: uid, Enforce: true})
	s.daemon(r)
	s.install(r)
	for _, ns := range []*netlab.Namespace{s.lab.Instance, s.lab.Bridged} {
		for _, to := range others {
			s.expect(fmt.Sprintf("%s to %s", ns, to), s.ask(ns, client{}, to), "metadata")
		}
		for _, to := range datagrams {
			c, err := ns.Dial(t.Context(), new(net.Dialer), "udp", to)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 8)
			c.SetDeadline(time.Now().Add(2 * time.Second))
			io.WriteString(c, "ping")
			n, err := c.Read(b)
			s.expect(fmt.Sprintf("%s to %s, a datagram", ns, to), fmt.Sprint(string(b[:n]), err), "ping<nil>")
			c.Close()
		}
	}
	listed := netip.MustParseAddrPort("169.254.170.2:80")
	r = s.open(Config{UID: uid, Enforce: true, Endpoints: []netip.AddrPort{endpoint[IPv4], listed}})
	s.expect("what is told of the one that is not", s.warnings(s.install(r)),
		"[fd00:ec2::254]:80 is not among redirect.endpoints, so the instance's own metadata service is reached there past the daemon")
	s.expect("one that is configured", s.ask(s.lab.Instance, client{}, listed), "host "+listed.String())
	s.expect("and from a container", s.ask(s.lab.Bridged, client{}, listed), "forwarded "+listed.String())
}

// echo answers datagrams until the test ends.
func (s *site) echo(ns *netlab.Namespace, at ...string) []string {
	s.Helper()
	for _, a := range at {
		var conn net.PacketConn
		if err := ns.Do(func() (err error) {
			conn, err = net.ListenPacket("udp", a)
			return err
		}); err != nil {
			s.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			b := make([]byte, 64)
			for {
				n, from, err := conn.ReadFrom(b)
				if err != nil {
					return
				}
				conn.WriteTo(b[:n], from)
			}
		}()
		s.Cleanup(func() { conn.Close(); <-done })
	}
	return at
}
