// Package iptables brings the host's metadata traffic to the daemon, and takes itself away again.
//
// A [Config] makes a [Plan]: the rules of both families as data, in the very text that iptables-save prints, and the
// link with our addresses. [Open] finds this host's tools and gives a [Redirect], whose Install makes the plan true,
// whose Verify says in words where it is not, and whose Watch keeps it true. [Remove] needs nothing but a host: it
// finds whatever an installation has left, by the names of our chains. Only chains called IMDSGATE-… and jumps to
// them are ever written or deleted, in one iptables-restore run per family.
//
// Before a hook is taken, other people's rules are read. Where one of them keeps somebody from the metadata service
// and would no longer match once the traffic goes through us, that is a [Lock], and its hook is left alone.
//
// A host that saves its rules while ours are among them (netfilter-persistent, iptables-services) gets them back at
// boot, and until the daemon is there its clients are refused.
//
// It is the wrong tool on a host without iptables: native nftables rules are read, never written. What it does not
// read: ipsets, tc, XDP and other BPF programs, bridge and netdev tables. It works in the network namespace of the
// calling thread; namespaces that own an interface of the instance never cross its hooks.
package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// How one connection walks through the rules.
//
// A client of this host connects to 169.254.169.254:80. The first packet passes nat OUTPUT, where REDIRECT sends it to
// 127.0.0.1 port A. Only --syn matches, so a connection that is older than the rules does not change its destination
// in the middle, which would reset it. Within the OUTPUT hook the packet keeps its old output device: filter OUTPUT
// sees it leave by eth0 for 127.0.0.1, and "-o lo -j ACCEPT" does not match it (measured). It comes in again on lo, and
// filter INPUT lets it through to the listener because the connection tracker says that it was an endpoint's.
//
// A client in another namespace passes nat PREROUTING and is sent to our own address, port B. REDIRECT would use the
// first address of the interface it came in by, and drops it where there is none, as with the AWS VPC CNI (measured).
// Our address is on a link of ours rather than on lo, so that it can be told from the operator's and taken back; it
// has host scope (IPv4) or is deprecated (IPv6), so that the kernel never chooses it as a source.
//
// The daemon's own packets to the endpoint must not come back to it. They carry its mark and come from a socket of its
// user in its cgroup. The last packets of a closed socket have no owner any more, or that of the kernel (before Linux
// 6.13): with mark, uid and cgroup alone they would be refused and every upstream connection would hang in LAST-ACK
// (measured), so the filter guard also lets pass what has the mark and is no user's: without a socket, or of one
// without a file (owner_mt in net/netfilter/xt_owner.c). That opens nothing: such a packet cannot start a connection.
//
// They have a zone of the connection tracker of their own for the way out (nf_ct_zone_id; iptables-extensions(8), CT),
// and nobody else gets into it by the mark, for which CAP_NET_RAW is enough since Linux 5.17.
// An entry stays for ten seconds when the other end has reset its connection, and a new connection with the same
// addresses and ports takes it over, with its destination (tcp_in_window and nf_conntrack_tcp_packet in
// nf_conntrack_proto_tcp.c): a client with the port of one of ours that the service had reset went past the redirect
// (measured), and any user can make that happen where we pass on what cannot be read. The other way round, one of
// ours with the port of a client that was reset was led to ourselves. When these rules come or go, the tracker's
// entries of our connections go, too: the next packet would not be found, and be taken for a new connection that
// clashes with the old one and gets another port (measured). A packet that is sent in between, such as a delayed
// acknowledgement, has its connection reset.
//
// What still reaches filter OUTPUT or FORWARD for an endpoint came past the redirect: connections older than it,
// packets that are not tracked, forged marks. The guard answers those with a reset, or counts them in audit.
//
// The cgroup match holds the cgroup itself, not its name (net/netfilter/xt_cgroup.c), while iptables-save prints the
// name. After a restart of the unit the text would be right and the match dead, and the daemon would be redirected to
// itself. The comment with the cgroup's number makes the two texts differ.

// own is the prefix of every chain of ours. Whoever names a chain like this gives it to us.
const own = "IMDSGATE"

// A Plan is what should exist on a host. It is data: printing and comparing it needs no privilege.
type Plan struct {
	Families []FamilyPlan
	Link     []netip.Addr // addresses of the link LinkName
}

// A FamilyPlan is our part of one family's rule set. Rules are as iptables-save prints them, without "-A CHAIN".
type FamilyPlan struct {
	Family Family
	Chains []Chain
	Jumps  []Jump
}

func (p FamilyPlan) empty() bool { return len(p.Chains)+len(p.Jumps) == 0 }

// A Chain is one of our chains.
type Chain struct {
	Table, Name string
	Rules       []string
}

// A Jump is a rule of a chain that is not ours, with its place, counted from 1.
type Jump struct {
	Table, Chain string
	At           int
	Rule         string
}

// Coverage says which hooks a plan takes. It is the outcome of reading a host; FullCoverage is that of an empty one.
type Coverage struct {
	IPv4, IPv6 Hooks
	CgroupID   uint64 // inode number of the directory of Config.Cgroup
	Zone       bool   // the kernel can keep our connections apart from clients'
}

// Hooks are the ways to the endpoints of one family.
type Hooks struct {
	Host      bool // locally generated packets
	Forwarded bool // packets from other namespaces and machines

	// Admit is needed where filter OUTPUT lets packets to the endpoint pass for everybody, and would drop them once
	// they are for 127.0.0.1, as an egress allow-list does.
	Admit bool
}

// FullCoverage takes every hook.
var FullCoverage = Coverage{IPv4: Hooks{Host: true, Forwarded: true}, IPv6: Hooks{Host: true, Forwarded: true}, Zone: true}

func (c Coverage) of(f Family) Hooks {
	if f == IPv6 {
		return c.IPv6
	}
	return c.IPv4
}

// Plan returns what c asks for on a host that allows on.
func (c Config) Plan(on Coverage) Plan {
	c = c.WithDefaults()
	p := Plan{}
	for _, f := range Families {
		p.Families = append(p.Families, c.familyPlan(f, on.of(f), on))
		if len(c.endpoints(f)) > 0 {
			p.Link = append(p.Link, c.forwarded(f)...)
		}
	}
	return p
}

// without returns p less one family.
func (p Plan) without(f Family) Plan {
	p.Families = slices.DeleteFunc(p.Families, func(of FamilyPlan) bool { return of.Family == f })
	p.Link = slices.DeleteFunc(p.Link, func(a netip.Addr) bool { return familyOf(a) == f })
	return p
}

// withoutTable returns p less one table.
func (p FamilyPlan) withoutTable(name string) FamilyPlan {
	p.Chains = slices.DeleteFunc(slices.Clone(p.Chains), func(c Chain) bool { return c.Table == name })
	p.Jumps = slices.DeleteFunc(slices.Clone(p.Jumps), func(j Jump) bool { return j.Table == name })
	return p
}

const (
	syn     = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
	refuse  = "-p tcp -j REJECT --reject-with tcp-reset"
	pass    = "-j RETURN"
	zone    = "-j CT --zone-orig 254"
	outputs = own + "-OUTPUT"
	arrives = own + "-PREROUTING"
	forward = own + "-FORWARD"
	inputs  = own + "-INPUT"
	admits  = own + "-ADMIT"
)

func (c Config) familyPlan(f Family, on Hooks, host Coverage) FamilyPlan {
	p := FamilyPlan{Family: f}
	endpoints := c.endpoints(f)
	if len(endpoints) == 0 {
		return p
	}
	hostListener := netip.AddrPortFrom(f.localhost(), c.HostPort)
	forwardedListener := netip.AddrPortFrom(c.forwarded(f)[0], c.ForwardedPort)

	ours := fmt.Sprintf("-m mark --mark %#x -m owner --uid-owner %d", c.Mark, c.UID)
	if c.Cgroup != "" {
		ours += fmt.Sprintf(` -m cgroup --path "%s" -m comment --comment "cgroup %d"`, c.Cgroup, host.CgroupID)
	}
	ownerless := fmt.Sprintf("-m mark --mark %#x -m owner ! --uid-owner 0-4294967294", c.Mark)
	oursPass := pass
	if c.OverrideForeign {
		oursPass = "-j ACCEPT"
	}
	guard := pass
	if c.Enforce {
		guard = refuse
	}
	var redirected []string
	for _, e := range endpoints {
		redirected = append(redirected, fmt.Sprintf(
			"-m conntrack --ctstate DNAT --ctorigdst %s --ctorigdstport %d -j ACCEPT", e.Addr(), e.Port()))
	}

	p.chain("filter", inputs, append(redirected[:len(redirected):len(redirected)], refuse)...)
	if on.Host && host.Zone {
		p.chain("raw", outputs, ours+" "+zone, ownerless+" "+zone)
	}
	if on.Host {
		p.chain("nat", outputs,
			ours+" "+oursPass,
			fmt.Sprintf("%s -j REDIRECT --to-ports %d", syn, hostListener.Port()))
		p.chain("filter", outputs,
			ours+" "+oursPass,
			ownerless+" "+oursPass,
			guard)
	}
	if on.Host && on.Admit {
		p.chain("filter", admits, redirected...)
	}
	if on.Forwarded {
		p.chain("nat", arrives, fmt.Sprintf("%s -j DNAT --to-destination %s", syn, forwardedListener))
		p.chain("filter", forward, guard)
	}

	for _, l := range []netip.AddrPort{hostListener, forwardedListener} {
		p.jump("filter", "INPUT", to(l), inputs)
	}
	for _, e := range endpoints {
		if on.Host && host.Zone {
			p.jump("raw", "OUTPUT", to(e), outputs)
		}
		if on.Host {
			p.jump("nat", "OUTPUT", to(e), outputs)
			p.jump("filter", "OUTPUT", to(e), outputs)
		}
		if on.Forwarded {
			p.jump("nat", "PREROUTING", toBut(e, "! -i lo"), arrives)
			p.jump("filter", "FORWARD", to(e), forward)
		}
	}
	if on.Host && on.Admit {
		p.jump("filter", "OUTPUT", to(hostListener), admits)
	}
	return p
}

func to(a netip.AddrPort) string { return toBut(a, "") }

// toBut is the match on packets for a, with a condition in the place where iptables-save prints interfaces.
func toBut(a netip.AddrPort, condition string) string {
	if condition != "" {
		condition = " " + condition
	}
	return fmt.Sprintf("-d %s/%d%s -p tcp -m tcp --dport %d", a.Addr(), a.Addr().BitLen(), condition, a.Port())
}

func (p *FamilyPlan) chain(table, name string, rules ...string) {
	p.Chains = append(p.Chains, Chain{table, name, rules})
}

func (p *FamilyPlan) jump(table, chain, match, target string) {
	at := 1
	for _, j := range p.Jumps {
		if j.Table == table && j.Chain == chain {
			at++
		}
	}
	p.Jumps = append(p.Jumps, Jump{table, chain, at, match + " -j " + target})
}

// String returns the input for iptables-restore --noflush that would make p on an empty host, family by family, and
// the link's addresses.
func (p Plan) String() string {
	var b strings.Builder
	for _, f := range p.Families {
		fmt.Fprintf(&b, "# %s\n%s", f.Family, compare(new(ruleset), f).script())
	}
	if len(p.Link) > 0 {
		fmt.Fprintf(&b, "# link %s\n", LinkName)
	}
	for _, a := range p.Link {
		fmt.Fprintf(&b, "# %s/%d\n", a, a.BitLen())
	}
	return b.String()
}
