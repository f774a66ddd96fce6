package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Way is a part of how packets get from this host to an endpoint once netfilter has had them. None of it is ours,
// and any of it can lead them to somebody else: routes and rules of routing, a chain of nftables at a device, a BPF
// program or a filter of traffic control.
type Way struct {
	Of string // "the daemon to 169.254.169.254", "through eth0"
	Is string
}

func (w Way) String() string { return w.Of + ": " + w.Is }

// ways asks the kernel. What it cannot tell is left out, and so is an endpoint to which there is no way yet.
func (r *Redirect) ways(families []Family, chains map[string][]string) (ways []Way) {
	var devices []string
	for _, f := range families {
		for _, e := range r.config.endpoints(f) {
			for _, sender := range []struct {
				name string
				mark uint32
				uid  *uint32
			}{{name: "clients"}, {"the daemon", r.config.Mark, &r.config.UID}} {
				is, device := r.describe(e.Addr(), &netlink.RouteGetOptions{Mark: sender.mark, UID: sender.uid})
				if is != "" {
					ways = append(ways, Way{fmt.Sprintf("%s to %s", sender.name, e.Addr()), is})
				}
				if device != "" && !slices.Contains(devices, device) {
					devices = append(devices, device)
				}
			}
		}
	}
	for _, name := range devices {
		seen := slices.Concat(chains[""], chains[name], r.programs(name))
		slices.Sort(seen)
		is := "nothing else sees the packets"
		if len(seen) > 0 {
			is = strings.Join(seen, ", ")
		}
		ways = append(ways, Way{"through " + name, is})
	}
	return ways
}

// describe describes one route; is is "" if there is none, as before a network is up.
func (r *Redirect) describe(to netip.Addr, o *netlink.RouteGetOptions) (is, device string) {
	routes, err := r.route.RouteGetWithOptions(to.AsSlice(), o)
	switch {
	case errors.Is(err, unix.EACCES):
		return "prohibited by a route", ""
	case errors.Is(err, unix.EHOSTUNREACH):
		return "unreachable by a route", ""
	case errors.Is(err, unix.EINVAL):
		return "dropped by a route", "" // a blackhole
	case err != nil || len(routes) == 0:
		return "", ""
	}
	l, err := r.route.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", ""
	}
	device = l.Attrs().Name
	is = "by " + device
	if gw := routes[0].Gw; gw != nil {
		is += " and " + gw.String()
	}
	if routes[0].Type == unix.RTN_LOCAL {
		is += ", which is this host itself"
	}
	return is, device
}

// programs names what sees each packet at a device beside netfilter.
func (r *Redirect) programs(device string) (names []string) {
	l, err := r.route.LinkByName(device)
	if err != nil {
		return nil
	}
	if xdp := l.Attrs().Xdp; xdp != nil && xdp.Attached {
		names = append(names, fmt.Sprintf("XDP program %d", xdp.ProgId))
	}
	for _, d := range []struct {
		name   string
		parent uint32
		attach ebpf.AttachType
	}{{"ingress", netlink.HANDLE_MIN_INGRESS, ebpf.AttachTCXIngress}, {"egress", netlink.HANDLE_MIN_EGRESS, ebpf.AttachTCXEgress}} {
		filters, _ := r.route.FilterList(l, d.parent) // an error where there is no such qdisc
		for _, f := range filters {
			name := fmt.Sprintf("tc %s filter %s", d.name, f.Type())
			if b, is := f.(*netlink.BpfFilter); is {
				name = fmt.Sprintf("%s %s (program %d)", name, b.Name, b.Id)
			}
			names = append(names, name)
		}
		// Since Linux 6.6, without a qdisc (include/uapi/linux/bpf.h, BPF_TCX_INGRESS).
		attached, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: d.attach})
		if err != nil {
			continue
		}
		for _, p := range attached.Programs {
			names = append(names, fmt.Sprintf("tcx %s program %d", d.name, p.ID))
		}
	}
	return names
}

// told is what whoever installs and watches knows.
type told struct {
	evasions []Evasion
	ways     map[string]string
}

// learn takes over what a report says, and returns what is new of it. A way that there was not before is no change.
func (k *told) learn(report Report) (evasions []Evasion, before, after []Way) {
	for _, e := range report.Evasions {
		if !slices.Contains(k.evasions, e) {
			evasions = append(evasions, e)
		}
	}
	k.evasions = report.Evasions
	if k.ways == nil {
		k.ways = make(map[string]string)
	}
	for _, w := range report.Ways {
		if was, there := k.ways[w.Of]; there && was != w.Is {
			before, after = append(before, Way{w.Of, was}), append(after, w)
		}
		k.ways[w.Of] = w.Is
	}
	return evasions, before, after
}
