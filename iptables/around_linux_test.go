package iptables

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAroundTheRedirect makes sockets in every way that needs no capability and changes how packets leave. In enforce
// each is redirected or gets nothing. The service answers on source routes, and the host honours them as far as its
// defaults let interfaces do.
func TestAroundTheRedirect(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		const careless = `cd /proc/sys/net
			for f in ipv4/conf/*/accept_source_route ipv6/conf/*/seg6_enabled ipv6/conf/*/forwarding ipv4/conf/*/accept_local; do
				echo 1 >$f || true
			done
			for f in ipv4/conf/*/rp_filter; do echo 0 >$f; done
			echo 1 >ipv4/ip_forward; echo 3 >ipv4/tcp_fastopen
			`
		s.shIn(s.lab.Metadata, careless)
		s.sh(careless)
		index := 0
		s.do(func() error {
			iface, err := unix.NewIfreq("eth0")
			if err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, iface)
			index = int(iface.Uint32())
			return err
		})

		number := func(level, option, value int) func(int) error {
			return func(fd int) error { return unix.SetsockoptInt(fd, level, option, value) }
		}
		device := func(name string) func(int) error {
			return func(fd int) error { return unix.BindToDevice(fd, name) }
		}
		from := func(address string) func(int) error {
			a := netip.MustParseAddr(address)
			return func(fd int) error {
				unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1)
				if a.Is4() {
					return unix.Bind(fd, &unix.SockaddrInet4{Addr: a.As4()})
				}
				return unix.Bind(fd, &unix.SockaddrInet6{Addr: a.As16()})
			}
		}
		// Loose and strict source routes (RFC 791) by one hop; the kernel takes the destination for the last.
		sourceRoute := func(kind byte, hop string) func(int) error {
			a := netip.MustParseAddr(hop).As4()
			return func(fd int) error {
				return unix.SetsockoptString(fd, unix.SOL_IP, unix.IP_OPTIONS, string([]byte{kind, 7, 4, a[0], a[1], a[2], a[3], 0}))
			}
		}
		// A segment routing header (RFC 8754) by one hop. Segments are in reverse order; the kernel fills the last in.
		segments := func(hop string) func(int) error {
			a := netip.MustParseAddr(hop).As16()
			last := endpoint[IPv6].Addr().As16()
			header := append([]byte{0, 4, 4, 1, 1, 0, 0, 0}, append(last[:], a[:]...)...)
			return func(fd int) error {
				return unix.SetsockoptString(fd, unix.SOL_IPV6, unix.IPV6_RTHDR, string(header))
			}
		}
		networkOrder := int(binary.NativeEndian.Uint32(binary.BigEndian.AppendUint32(nil, uint32(index))))

		type way struct {
			name string
			client
			want string // "" if it gets nothing
		}
		const asHost4, asHost6 = "host 169.254.169.254:80", "host [fd00:ec2::254]:80"
		ways := [...][]way{
			IPv4: {
				{"nothing special", client{}, asHost4},
				{"bound to eth0", client{prepare: device("eth0")}, ""},
				{"bound to lo", client{prepare: device("lo")}, ""},
				{"IP_UNICAST_IF", client{prepare: number(unix.SOL_IP, unix.IP_UNICAST_IF, networkOrder)}, asHost4},
				{"SO_DONTROUTE", client{prepare: number(unix.SOL_SOCKET, unix.SO_DONTROUTE, 1)}, asHost4},
				{"loose source route by ourselves", client{prepare: sourceRoute(0x83, "172.31.0.10")}, ""},
				{"loose source route by localhost", client{prepare: sourceRoute(0x83, "127.0.0.1")}, ""},
				{"strict source route by ourselves", client{prepare: sourceRoute(0x89, "172.31.0.10")}, ""},
				{"loose source route by the endpoint", client{prepare: sourceRoute(0x83, "169.254.169.254")}, ""},
				{"TCP fast open", client{prepare: number(unix.SOL_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1)}, asHost4},
				{"multipath TCP", client{protocol: unix.IPPROTO_MPTCP}, asHost4},
				{"from localhost", client{prepare: from("127.0.0.5")}, ""},
				{"from our own address", client{prepare: from("169.254.213.80")}, asHost4},
				{"from somebody else's address", client{prepare: from("172.31.0.99")}, ""},
				{"from the endpoint's address", client{prepare: from("169.254.169.254")}, ""},
			},
			IPv6: {
				{"nothing special", client{}, asHost6},
				{"bound to eth0", client{prepare: device("eth0")}, ""},
				{"bound to lo", client{prepare: device("lo")}, ""},
				{"IPV6_UNICAST_IF", client{prepare: number(unix.SOL_IPV6, unix.IPV6_UNICAST_IF, networkOrder)}, asHost6},
				{"segments by ourselves", client{prepare: segments("fd00:ec2:1::10")}, ""},
				{"segments by localhost", client{prepare: segments("::1")}, ""},
				{"segments by the endpoint", client{prepare: segments("fd00:ec2::254")}, ""},
				{"multipath TCP", client{protocol: unix.IPPROTO_MPTCP}, asHost6},
				{"from localhost", client{prepare: from("::1")}, asHost6},
				{"from our own address", client{prepare: from("fd69:6d64:7367::80")}, asHost6},
				{"from somebody else's address", client{prepare: from("fd00:ec2:1::99")}, ""},
			},
		}
		r := s.open(Config{UID: uid, Backend: b, Enforce: true})
		s.daemon(r)
		if got := s.warnings(s.install(r)); !strings.Contains(got, "accept_source_route is 1") {
			s.Errorf("warnings: %q", got)
		}
		s.expect("source route by ourselves, of which is warned",
			s.ask(s.lab.Instance, client{prepare: sourceRoute(0x83, "172.31.0.10")}, endpoint[IPv4]), "metadata")
		s.sh("echo 0 >/proc/sys/net/ipv4/conf/all/accept_source_route")
		s.expect("warnings", s.warnings(s.install(r)), "")
		for _, f := range Families {
			var asking sync.WaitGroup
			for _, w := range ways[f] {
				asking.Go(func() {
					w.uid = 1001
					got := s.ask(s.lab.Instance, w.client, endpoint[f])
					s.Logf("%s, %s: %s", f, w.name, got)
					if got == "metadata" || w.want != "" && got != w.want {
						s.Errorf("%s, %s: %q, want %q", f, w.name, got, w.want)
					}
				})
			}
			asking.Wait()
		}
	})
}

// TestOldConntrackEntry uses the ports of a connection that the tracker knew before there was a redirect: nat rules would
// not be asked about it again, so the tracker is made to forget it.
func TestOldConntrackEntry(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		ports := [...]int{IPv4: 5554, IPv6: 5556}
		from := func(f Family) client {
			return client{uid: 1001, prepare: func(fd int) error {
				if f == IPv4 {
					return unix.Bind(fd, &unix.SockaddrInet4{Port: ports[f]})
				}
				return unix.Bind(fd, &unix.SockaddrInet6{Port: ports[f]})
			}}
		}
		// Both ends go without the tracker's notice, so that it keeps the connection for established.
		for _, f := range Families {
			s.load(b, f, "*filter\n-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\nCOMMIT\n"+
				"*raw\n-A OUTPUT -p tcp --dport 80 --tcp-flags RST RST -j DROP\n-A PREROUTING -p tcp --sport 80 --tcp-flags RST RST -j DROP\nCOMMIT\n")
			d, greeting := s.dial(s.lab.Instance, from(f), endpoint[f])
			s.expect("without us", greeting, "metadata")
			d.Conn.(*net.TCPConn).SetLinger(0)
			d.Close()
			s.shIn(s.lab.Metadata, fmt.Sprintf("ss -K dport = %d", ports[f]))
		}
		s.sh(fmt.Sprintf("iptables-%s -t raw -F; ip6tables-%[1]s -t raw -F", b))
		if entries := s.sh("conntrack -L -f ipv4 -p tcp 2>/dev/null; conntrack -L -f ipv6 -p tcp 2>/dev/null"); strings.Count(entries, " ESTABLISHED ") != 2 {
			s.Fatalf("tracked connections:\n%s", entries)
		}
		r := s.open(Config{UID: uid, Backend: b, Enforce: true})
		s.daemon(r)
		s.install(r)
		for _, f := range Families {
			s.expect(f.String()+" from the same port", s.ask(s.lab.Instance, from(f), endpoint[f]), "host "+endpoint[f].String())
		}
	})
}
