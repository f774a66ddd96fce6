package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
)

// ErrNotForwarded says that without the redirect this host would not have forwarded a client's packets.
var ErrNotForwarded = errors.New("this host would not have forwarded it")

// Forwardable reports whether the host would have forwarded packets of a client to an endpoint if they had not been
// redirected: whether forwarding is on for the interface that the client is behind, whether a route lets them through,
// and whether the filter rules do, as they were when last read (by Install, Verify, Status or Watch). It is asked for
// each accepted connection on a forwarded listener. nil means yes, or that nothing certain speaks against it; an error
// that is not ErrNotForwarded means that the kernel could not be asked.
//
// It takes three questions to the kernel and a walk through the rules, and may be called from any goroutine. A host
// whose routes to a client and from it differ gets the answer for the interface of the way to it.
func (r *Redirect) Forwardable(client, endpoint netip.AddrPort) error {
	client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
	f := familyOf(client.Addr())
	in, err := r.behind(client.Addr())
	if err != nil {
		return fmt.Errorf("find the interface of %s: %w", client.Addr(), err)
	}
	if err := forwards(f, in.Attrs().Name); err != nil {
		return err
	}
	// Given an incoming interface, the kernel walks the way of a forwarded packet, source validation included.
	source := client.Addr().WithZone("").AsSlice()
	routes, err := r.route.RouteGetWithOptions(endpoint.Addr().AsSlice(),
		&netlink.RouteGetOptions{IifIndex: in.Attrs().Index, SrcAddr: source})
	switch {
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH),
		errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.EINVAL):
		return fmt.Errorf("%w: route from %s to %s: %w", ErrNotForwarded, in.Attrs().Name, endpoint.Addr(), err)
	case err != nil:
		return fmt.Errorf("route from %s to %s: %w", in.Attrs().Name, endpoint.Addr(), err)
	}
	p := packet{src: client, dst: endpoint, in: in.Attrs().Name}
	if out, err := r.route.LinkByIndex(routes[0].LinkIndex); err == nil {
		p.out = out.Attrs().Name
	}
	foreign := r.foreign.Load()
	if foreign == nil {
		return errors.New("the rules of this host have not been read yet")
	}
	if s, refused := foreign.refusal(f, p, r.config.OverrideForeign); refused {
		return fmt.Errorf("%w: %s, table %s, chain %s, rule %q", ErrNotForwarded, s.base.store, s.base.table, s.chain, s.rule)
	}
	return nil
}

// behind returns the interface that leads to a client.
func (r *Redirect) behind(client netip.Addr) (netlink.Link, error) {
	if zone := client.Zone(); zone != "" {
		return r.route.LinkByName(zone)
	}
	routes, err := r.route.RouteGetWithOptions(client.AsSlice(), nil)
	if err != nil {
		return nil, err
	}
	return r.route.LinkByIndex(routes[0].LinkIndex)
}

// forwards reads the switches that ip_forward (net/ipv4/ip_forward.c: the interface's) and ip6_forward
// (net/ipv6/ip6_output.c: the one for all, and since Linux 6.17 the interface's force_forwarding) read.
func forwards(f Family, in string) error {
	names := []string{"ipv4/conf/" + in + "/forwarding"}
	if f == IPv6 {
		names = []string{"ipv6/conf/all/forwarding", "ipv6/conf/" + in + "/force_forwarding"}
	}
	for _, name := range names {
		on, err := readInt("/proc/sys/net/" + name)
		if on != 0 || err != nil && name == names[0] {
			return err
		}
	}
	return fmt.Errorf("%w: net.%s is 0", ErrNotForwarded, strings.ReplaceAll(names[0], "/", "."))
}
