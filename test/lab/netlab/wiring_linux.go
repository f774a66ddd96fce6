package netlab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A cable is a veth pair; each end is made directly inside its namespace.
type cable struct {
	from *Namespace
	dev  string
	to   *Namespace
	peer string
}

// A setup is what one namespace looks like, in the order in which it is made.
type setup struct {
	sysctls    [][2]string
	bridge     string // made with ports as its ports; "" means none
	ports      []string
	up         []string
	addresses  [][2]string // device, prefix
	neighbours []neighbour
	routes     []route
}

type furnished struct {
	in   *Namespace
	with *setup
}

// A neighbour is a permanent entry of the ARP or neighbour table. Its hardware address is that of device dev of
// namespace in.
type neighbour struct {
	dev, ip string
	in      *Namespace
	of      string
}

type route struct {
	to, via, dev string // via "" means on-link
}

// The sysctls of conf/default must be set before the devices are made, those of conf/NAME before they are up.
// IPv4's are set though they look like the kernel's defaults: a new namespace copies those of the initial one
// (Documentation/admin-guide/sysctl/net.rst, devconf_inherit_init_net). Without accept_dad=0 an IPv6 address is
// unusable for its first second or two.
var everywhere = [][2]string{
	{"ipv4/ip_forward", "0"},
	{"ipv4/conf/all/rp_filter", "0"},
	{"ipv4/conf/default/rp_filter", "0"},
	{"ipv6/conf/all/accept_dad", "0"},
	{"ipv6/conf/default/accept_dad", "0"},
	{"ipv6/conf/default/accept_ra", "0"},
}

func (l *Lab) wire() error {
	cables := []cable{{l.Instance, "eth0", l.Metadata, "ec2"}}
	metadata := setup{
		up: []string{"lo", "ec2"},
		addresses: [][2]string{
			{"ec2", "169.254.169.254/32"}, {"ec2", "fd00:ec2::254/128"},
			{"ec2", "172.31.0.1/32"}, {"ec2", "fe80::1/64"},
		},
		routes: []route{{"172.31.0.0/20", "", "ec2"}, {"fd00:ec2:1::/64", "", "ec2"}},
	}
	// AWS announces the IPv6 default router by its link-local address; the IPv4 one is the subnet's first address
	// (VPC User Guide, "Subnet route tables" and "Subnet sizing").
	instance := setup{
		up:        []string{"lo", "eth0"},
		addresses: [][2]string{{"eth0", "172.31.0.10/20"}, {"eth0", "fd00:ec2:1::10/64"}},
		routes: []route{
			{"169.254.169.254/32", "", "eth0"}, {"fd00:ec2::254/128", "", "eth0"},
			{"0.0.0.0/0", "172.31.0.1", "eth0"}, {"::/0", "fe80::1", "eth0"},
		},
	}
	all := []furnished{{l.Metadata, &metadata}, {l.Instance, &instance}}

	if l.Bridged != nil {
		cables = append(cables,
			cable{l.Instance, "port0", l.Bridged, "eth0"},
			cable{l.Instance, "pod0", l.Routed, "eth0"})
		metadata.routes = append(metadata.routes,
			route{"172.17.0.0/16", "172.31.0.10", "ec2"}, route{"fd00:ec2:17::/64", "fd00:ec2:1::10", "ec2"},
			route{"172.31.0.77/32", "172.31.0.10", "ec2"}, route{"fd00:ec2:1::77/128", "fd00:ec2:1::10", "ec2"})
		instance.sysctls = [][2]string{
			{"ipv4/ip_forward", "1"}, {"ipv6/conf/all/forwarding", "1"},
			{"ipv6/conf/pod0/addr_gen_mode", "1"}, // 1 is none: no link-local address either
		}
		instance.bridge, instance.ports = "br-lab", []string{"port0"}
		instance.up = append(instance.up, "br-lab", "port0", "pod0")
		instance.addresses = append(instance.addresses,
			[2]string{"br-lab", "172.17.0.1/16"}, [2]string{"br-lab", "fd00:ec2:17::1/64"})
		// Without an address on pod0 the kernel has no source for a neighbour solicitation.
		instance.neighbours = []neighbour{{"pod0", "fd00:ec2:1::77", l.Routed, "eth0"}}
		instance.routes = append(instance.routes,
			route{"172.31.0.77/32", "", "pod0"}, route{"fd00:ec2:1::77/128", "", "pod0"})
		bridged := setup{
			up:        []string{"lo", "eth0"},
			addresses: [][2]string{{"eth0", "172.17.0.2/16"}, {"eth0", "fd00:ec2:17::2/64"}},
			routes:    []route{{"0.0.0.0/0", "172.17.0.1", "eth0"}, {"::/0", "fd00:ec2:17::1", "eth0"}},
		}
		routed := setup{
			up:        []string{"lo", "eth0"},
			addresses: [][2]string{{"eth0", "172.31.0.77/32"}, {"eth0", "fd00:ec2:1::77/128"}},
			neighbours: []neighbour{
				{"eth0", "169.254.1.1", l.Instance, "pod0"}, {"eth0", "fe80::1", l.Instance, "pod0"},
			},
			routes: []route{
				{"169.254.1.1/32", "", "eth0"},
				{"0.0.0.0/0", "169.254.1.1", "eth0"}, {"::/0", "fe80::1", "eth0"},
			},
		}
		all = append(all, furnished{l.Bridged, &bridged}, furnished{l.Routed, &routed})
	}

	for _, f := range all {
		if err := f.in.Do(func() error { return setSysctls(everywhere) }); err != nil {
			return fmt.Errorf("%s: %w", f.in, err)
		}
	}
	for _, c := range cables {
		if err := c.plug(); err != nil {
			return fmt.Errorf("link %s of %s to %s of %s: %w", c.dev, c.from, c.peer, c.to, err)
		}
	}
	for _, f := range all {
		if err := f.in.Do(f.with.apply); err != nil {
			return fmt.Errorf("%s: %w", f.in, err)
		}
	}
	return nil
}

// unplug takes the links out of an instance that outlasts the lab.
func (l *Lab) unplug() error {
	return l.Instance.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("%s: list links: %w", l.Instance, err)
		}
		for _, link := range links {
			switch link.Type() {
			case "veth", "bridge", "dummy":
				err = errors.Join(err, netlink.LinkDel(link))
			}
		}
		return err
	})
}

func (c cable) plug() error {
	return c.from.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = c.dev
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs, PeerName: c.peer, PeerNamespace: netlink.NsFd(c.to.handle),
		})
	})
}

// apply makes the calling thread's namespace look like s.
func (s *setup) apply() error {
	if err := setSysctls(s.sysctls); err != nil {
		return err
	}
	if s.bridge != "" {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = s.bridge
		bridge := &netlink.Bridge{LinkAttrs: attrs}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("add bridge %s: %w", s.bridge, err)
		}
		for _, port := range s.ports {
			link, err := netlink.LinkByName(port)
			if err != nil {
				return fmt.Errorf("find %s: %w", port, err)
			}
			if err := netlink.LinkSetMaster(link, bridge); err != nil {
				return fmt.Errorf("add port %s to %s: %w", port, s.bridge, err)
			}
		}
	}
	for _, dev := range s.up {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return fmt.Errorf("find %s: %w", dev, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", dev, err)
		}
	}
	for _, a := range s.addresses {
		if err := addAddress(a[0], a[1]); err != nil {
			return fmt.Errorf("add address %s to %s: %w", a[1], a[0], err)
		}
	}
	for _, n := range s.neighbours {
		if err := n.add(); err != nil {
			return fmt.Errorf("add neighbour %s to %s: %w", n.ip, n.dev, err)
		}
	}
	for _, r := range s.routes {
		if err := r.add(); err != nil {
			return fmt.Errorf("add route to %s: %w", r.to, err)
		}
	}
	return nil
}

// setSysctls writes below /proc/sys/net, which shows the calling thread's namespace (proc_sys(5)).
func setSysctls(settings [][2]string) error {
	for _, s := range settings {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", s[0]), []byte(s[1]), 0); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	return nil
}

func addAddress(dev, prefix string) error {
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	if addr.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(link, addr)
}

func (n neighbour) add() error {
	link, err := netlink.LinkByName(n.dev)
	if err != nil {
		return err
	}
	var mac net.HardwareAddr
	err = n.in.Do(func() error {
		of, err := netlink.LinkByName(n.of)
		if err != nil {
			return err
		}
		mac = of.Attrs().HardwareAddr
		return nil
	})
	if err != nil {
		return err
	}
	return netlink.NeighAdd(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(n.ip), HardwareAddr: mac,
	})
}

func (r route) add() error {
	link, err := netlink.LinkByName(r.dev)
	if err != nil {
		return err
	}
	_, to, err := net.ParseCIDR(r.to)
	if err != nil {
		return err
	}
	nr := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK}
	if r.via != "" {
		nr.Gw, nr.Scope, nr.Flags = net.ParseIP(r.via), netlink.SCOPE_UNIVERSE, int(netlink.FLAG_ONLINK)
	}
	return netlink.RouteAdd(nr)
}
