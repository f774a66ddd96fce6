package iptables

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// TestForwardable asks about hosts that forward, and about some that do not. Nothing is installed, so that what the
// containers really get shows whether the answer is right.
func TestForwardable(t *testing.T) {
	for _, c := range []struct {
		name            string
		do              string
		bridged, routed string // part of the reason, "" if forwarded
		family          Family
	}{
		{name: "a router", do: "true"},
		{name: "an IPv6 router", do: "true", family: IPv6},
		{name: "ip_forward=0", do: "echo 0 > /proc/sys/net/ipv4/ip_forward",
			bridged: "net.ipv4.conf.br-lab.forwarding is 0", routed: "net.ipv4.conf.pod0.forwarding is 0"},
		{name: "one interface off", do: "echo 0 > /proc/sys/net/ipv4/conf/br-lab/forwarding",
			bridged: "net.ipv4.conf.br-lab.forwarding is 0"},
		{name: "IPv6 forwarding=0", do: "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding", family: IPv6,
			bridged: "net.ipv6.conf.all.forwarding is 0", routed: "net.ipv6.conf.all.forwarding is 0"},
		{name: "policy", do: "iptables -P FORWARD DROP; iptables -A FORWARD -i br-lab -j ACCEPT; iptables -A FORWARD -o br-lab -j ACCEPT",
			routed: `table filter, chain FORWARD, rule ""`},
		{name: "legacy policy", do: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 172.31.0.77 -j ACCEPT; iptables-legacy -A FORWARD -d 172.31.0.77 -j ACCEPT",
			bridged: `iptables-legacy, table filter, chain FORWARD, rule ""`},
		{name: "native rule", do: "nft 'add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f ip saddr 172.17.0.0/16 ip daddr 169.254.0.0/16 reject with tcp reset'",
			bridged: "nft, table inet t, chain f, rule \"handle"},
		{name: "IPv6 rule", do: "ip6tables -t mangle -A PREROUTING -i pod0 -d fd00:ec2::254 -j DROP", family: IPv6,
			routed: `table mangle, chain PREROUTING`},
		{name: "prohibit route", do: "ip route replace prohibit 169.254.169.254", bridged: "permission denied", routed: "permission denied"},
		{name: "blackhole rule", do: "ip rule add from 172.17.0.2 blackhole", bridged: "invalid argument"},
		{name: "IPv6 prohibit route", do: "ip -6 route replace prohibit fd00:ec2::254", family: IPv6, bridged: "permission denied", routed: "permission denied"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.sh(c.do)
			r := s.open(Config{UID: uid})
			s.status(r)
			addresses := map[*netlab.Namespace][len(Families)]string{
				s.lab.Bridged: {"172.17.0.2", "fd00:ec2:17::2"},
				s.lab.Routed:  {"172.31.0.77", "fd00:ec2:1::77"},
			}
			for ns, reason := range map[*netlab.Namespace]string{s.lab.Bridged: c.bridged, s.lab.Routed: c.routed} {
				from := netip.AddrPortFrom(netip.MustParseAddr(addresses[ns][c.family]), 40000)
				var err error
				s.do(func() error { err = r.Forwardable(from, endpoint[c.family]); return nil })
				switch {
				case reason == "" && err != nil:
					s.Errorf("%s: %v", ns, err)
				case reason != "" && (!errors.Is(err, ErrNotForwarded) || !strings.Contains(err.Error(), reason)):
					s.Errorf("%s: %v, want %q", ns, err, reason)
				}
				if really := s.ask(ns, client{}, endpoint[c.family]); (really == "metadata") != (reason == "") {
					s.Errorf("%s really gets %q", ns, really)
				}
			}
		})
	}
}
