package iptables

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linkGroup marks the link as ours, so that one that merely has its name is never touched. Of all marks it is the one
// that the kernel sets together with making the link (net/core/rtnetlink.c, rtnl_newlink_create); an alias is not.
const linkGroup = 0x696d6473

// ensureLink makes the link and its addresses, as far as they are missing.
func ensureLink(h *netlink.Handle, addrs []netip.Addr) (made bool, err error) {
	link, err := ourLink(h)
	if err != nil {
		return false, err
	}
	if link == nil {
		link, err = addLink(h)
		if made = err == nil; errors.Is(err, unix.EEXIST) {
			link, err = ourLink(h)
		}
		if err != nil || link == nil {
			return false, err
		}
	}
	for _, a := range addrs {
		if err := allowFamily(familyOf(a)); err != nil {
			return made, err
		}
		if err := h.AddrReplace(link, linkAddr(a)); err != nil {
			return made, fmt.Errorf("add address %s to link %s: %w", a, LinkName, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return made, fmt.Errorf("set link %s up: %w", LinkName, err)
	}
	return made, nil
}

// allowFamily turns IPv6 on for the link where net.ipv6.conf.default has it off for new ones.
func allowFamily(f Family) error {
	const path = "/proc/sys/net/ipv6/conf/" + LinkName + "/disable_ipv6"
	if f == IPv4 {
		return nil
	}
	if off, err := readInt(path); err != nil || off == 0 {
		return err
	}
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		return fmt.Errorf("allow IPv6 on link %s: %w", LinkName, err)
	}
	return nil
}

// addLink makes a dummy link or, on a kernel without that driver, a bridge without ports: both keep addresses and
// carry nothing.
func addLink(h *netlink.Handle) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = LinkName
	attrs.Group = linkGroup
	var link netlink.Link = &netlink.Dummy{LinkAttrs: attrs}
	err := h.LinkAdd(link)
	if errors.Is(err, unix.EOPNOTSUPP) {
		link = &netlink.Bridge{LinkAttrs: attrs}
		err = h.LinkAdd(link)
	}
	if err != nil {
		return nil, fmt.Errorf("add link %s: %w", LinkName, err)
	}
	return link, nil
}

// ourLink returns nil if there is no link of the name.
func ourLink(h *netlink.Handle) (netlink.Link, error) {
	link, err := h.LinkByName(LinkName)
	if _, absent := errors.AsType[netlink.LinkNotFoundError](err); absent {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for link %s: %w", LinkName, err)
	}
	if link.Attrs().Group != linkGroup {
		return nil, fmt.Errorf("link %s is somebody else's: its group is not %d; rename it", LinkName, linkGroup)
	}
	return link, nil
}

// linkAddr has the scope or lifetime that keeps the kernel from choosing the address as a source by itself.
func linkAddr(a netip.Addr) *netlink.Addr {
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}}
	if a.Is4() {
		addr.Scope = int(netlink.SCOPE_HOST)
	} else {
		addr.Flags = unix.IFA_F_NODAD
		addr.ValidLft, addr.PreferedLft = math.MaxUint32, 0
	}
	return addr
}

func verifyLink(h *netlink.Handle, want []netip.Addr) ([]Difference, error) {
	link, err := ourLink(h)
	if err != nil || link == nil {
		if err == nil && len(want) > 0 {
			return []Difference{{Problem: "link " + LinkName + " missing"}}, nil
		}
		return nil, err
	}
	var found []Difference
	if link.Attrs().Flags&net.FlagUp == 0 {
		found = append(found, Difference{Problem: "link " + LinkName + " down"})
	}
	have, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of link %s: %w", LinkName, err)
	}
	for _, a := range want {
		if !slices.ContainsFunc(have, func(h netlink.Addr) bool { return h.IP.Equal(a.AsSlice()) }) {
			found = append(found, Difference{Family: familyOf(a), Problem: fmt.Sprintf("address %s of link %s missing", a, LinkName)})
		}
	}
	return found, nil
}

func removeLink(h *netlink.Handle) (removed bool, err error) {
	link, err := ourLink(h)
	if err != nil || link == nil {
		return false, err
	}
	if err := h.LinkDel(link); err != nil && !errors.Is(err, syscall.ENODEV) {
		return false, fmt.Errorf("delete link %s: %w", LinkName, err)
	}
	return true, nil
}
