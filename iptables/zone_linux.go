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
// they are now.
func forget(f Family) error {
	family := netlink.InetFamily(unix.AF_INET)
	if f == IPv6 {
		family = unix.AF_INET6
	}
	// Of one whose next packet comes from the service the tracker thinks that the service has begun it.
	for _, which := range []netlink.CustomConntrackFilter{direct{}, reversed{}} {
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, which)
		if err != nil && !errors.Is(err, syscall.ENOENT) { // one ended meanwhile
			return fmt.Errorf("have the connection tracker forget the daemon's connections: %w", err)
		}
	}
	return nil
}

// direct matches connections to link-local services, and to those that AWS has in IPv6, which go where they were meant
// to. Others than the daemon's lose nothing by it.
type direct struct{}

var services = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fd00:ec2::/32")}

func (direct) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	return ok && flow.Forward.Protocol == unix.IPPROTO_TCP && flow.Reverse.SrcIP.Equal(flow.Forward.DstIP) &&
		slices.ContainsFunc(services, func(p netip.Prefix) bool { return p.Contains(to.Unmap()) })
}

// reversed matches what the tracker takes for connections from those services, which they never make: it was asked to
// forget one, and then came an answer. Whoever has its port next would go past the redirect.
type reversed struct{}

func (reversed) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	from, ok := netip.AddrFromSlice(flow.Forward.SrcIP)
	return ok && flow.Forward.Protocol == unix.IPPROTO_TCP && flow.Reverse.DstIP.Equal(flow.Forward.SrcIP) && flow.Forward.SrcPort < 1024 &&
		slices.ContainsFunc(services, func(p netip.Prefix) bool { return p.Contains(from.Unmap()) })
}
