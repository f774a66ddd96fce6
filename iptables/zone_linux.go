package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// zoned reports whether p keeps our connections apart from clients' in the tracker.
func (p FamilyPlan) zoned() bool {
	return slices.ContainsFunc(p.Jumps, func(j Jump) bool { return j.Table == "raw" }) &&
		slices.ContainsFunc(p.Chains, func(c Chain) bool { return c.Table == "raw" && len(c.Rules) > 0 })
}

// redirects reports whether p leads clients anywhere, for which the kernel tracks connections.
func (p FamilyPlan) redirects() bool {
	return slices.ContainsFunc(p.Jumps, func(j Jump) bool { return j.Table == "nat" })
}

// tryZone asks the kernel for such a rule, in a chain to which nothing leads, and says why it has none.
func (t *tools) tryZone(ctx context.Context) error {
	const chain = own + "-ZONE"
	err := t.restore(ctx, IPv4, "*raw\n:"+chain+" - [0:0]\n-A "+chain+" "+zone+"\nCOMMIT\n")
	if err != nil {
		return err
	}
	return t.restore(context.WithoutCancel(ctx), IPv4, "*raw\n-F "+chain+"\n-X "+chain+"\nCOMMIT\n")
}

// forget deletes what the tracker knows of connections to the metadata service that were not redirected, which are the
// daemon's, and those that are older than the redirect: their next packet makes the tracker know them again, as what
// they are now. And what it still knows of those that have ended: while it does not track, somebody else may get the
// port of one, and afterwards it would take him for that one, whose packets went elsewhere (measured: the service's
// answer got another port on its way in, and was reset).
//
// Those of containers whose address is masqueraded lose an answer that is under way; without masked they are left alone.
func forget(f Family, masked bool) ([]Lost, error) {
	var lost []Lost
	// Of one whose next packet comes from the service the tracker then thinks that the service has begun it.
	err := errors.Join(forgetAny(f, ended{}, direct{&lost, masked}), forgetAny(f, reversed{}))
	return lost, err
}

// Lost is a connection of this host's to which the tracker had given another local port, since the same one in the other
// zone had the same answers, and which has its own again. The other end does not know that: it answers with a reset, or,
// if it still waits for the last packets of an earlier connection with this port, not at all.
type Lost struct{ Local, Remote netip.AddrPort }

// forgetEnded does that for those alone which have ended.
func forgetEnded(f Family) error { return forgetAny(f, ended{}) }

func forgetAny(f Family, which ...netlink.CustomConntrackFilter) error {
	family := netlink.InetFamily(unix.AF_INET)
	if f == IPv6 {
		family = unix.AF_INET6
	}
	_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, which...)
	if err != nil && !errors.Is(err, syscall.ENOENT) { // one ended meanwhile
		return fmt.Errorf("have the connection tracker forget connections to the metadata service: %w", err)
	}
	return nil
}

// direct matches connections to link-local services, and to those that AWS has in IPv6, which go where they were meant
// to. Of this host's own, those lose something that it adds to lost.
type direct struct {
	lost   *[]Lost // may be nil
	masked bool    // also those that the service sees under another address
}

var services = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fd00:ec2::/32")}

func (d direct) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if !toService(flow) || !flow.Reverse.SrcIP.Equal(flow.Forward.DstIP) {
		return false
	}
	if !flow.Reverse.DstIP.Equal(flow.Forward.SrcIP) {
		return d.masked
	}
	if d.lost != nil && flow.Reverse.DstPort != flow.Forward.SrcPort {
		local, _ := netip.AddrFromSlice(flow.Forward.SrcIP)
		remote, _ := netip.AddrFromSlice(flow.Forward.DstIP)
		*d.lost = append(*d.lost, Lost{
			netip.AddrPortFrom(local.Unmap(), flow.Forward.SrcPort), netip.AddrPortFrom(remote.Unmap(), flow.Forward.DstPort),
		})
	}
	return true
}

func toService(flow *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	return ok && flow.Forward.Protocol == unix.IPPROTO_TCP &&
		slices.ContainsFunc(services, func(p netip.Prefix) bool { return p.Contains(to.Unmap()) })
}

// ended matches those of which hardly a packet is to come, wherever they went. The states from
// TCP_CONNTRACK_LAST_ACK on are of connections that both ends have closed, or one has reset
// (include/uapi/linux/netfilter/nf_conntrack_tcp.h).
type ended struct{}

const (
	lastAck = 6
	closed  = 8
)

func (ended) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	tcp, ok := flow.ProtoInfo.(*netlink.ProtoInfoTCP)
	return ok && tcp.State >= lastAck && tcp.State <= closed && toService(flow)
}

// reversed matches what the tracker takes for connections from those services, which they never make: it was asked to
// forget one, and then came an answer. Whoever has its port next would go past the redirect.
type reversed struct{}

func (reversed) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	from, ok := netip.AddrFromSlice(flow.Forward.SrcIP)
	return ok && flow.Forward.Protocol == unix.IPPROTO_TCP && flow.Reverse.DstIP.Equal(flow.Forward.SrcIP) && flow.Forward.SrcPort < 1024 &&
		slices.ContainsFunc(services, func(p netip.Prefix) bool { return p.Contains(from.Unmap()) })
}
