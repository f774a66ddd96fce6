package iptables

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// The IPv6 rules are installed wherever the kernel has IPv6, whether it is on or not. The switch
// net.ipv6.conf.all.disable_ipv6 says nothing: writing it writes those of all interfaces and of new ones, and from
// then on each interface obeys its own (net/ipv6/addrconf.c, addrconf_disable_ipv6). With it set and eth0's cleared
// afterwards, fd00:ec2::254 answers (measured). Nor does default's: links whose driver or manager clears their own
// switch exist, ours among them. Rules that are there already cover an interface that is switched on later.
//
// REDIRECT sends this host's packets to ::1, which needs IPv6 on lo. With it off there, the packet leaves by another
// interface for ::1 or is dropped, and the client's connect times out; so does one that the guard would reset, since
// the reset has to pass lo too (both measured). In enforce that is the safe side. In audit it would be a failure of
// our making, so the hook is not taken there until lo has IPv6.

// presence is how much IPv6 this network namespace has.
type presence uint8

const (
	absent  presence = iota // none until the next boot: not compiled in, or ipv6.disable=1
	dormant                 // off on every interface and for new ones, until somebody switches it on
	awake
)

// ipv6Presence reads it. Where it cannot be told, IPv6 is awake.
func ipv6Presence() (presence, error) {
	// This loads the module, where IPv6 is one, as any user's socket would.
	fd, noSocket := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if noSocket == nil {
		unix.Close(fd)
	}
	const dir = "/proc/sys/net/ipv6/conf/"
	switches, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && errors.Is(noSocket, unix.EAFNOSUPPORT):
		return absent, nil
	case errors.Is(err, fs.ErrNotExist) && noSocket == nil:
		return awake, nil
	case err != nil:
		return awake, fmt.Errorf("is there IPv6: %w", errors.Join(err, noSocket))
	}
	for _, s := range switches {
		if s.Name() == "all" || s.Name() == LinkName {
			continue
		}
		off, err := readInt(dir + s.Name() + "/disable_ipv6")
		if errors.Is(err, fs.ErrNotExist) {
			continue // the interface is gone
		}
		if err != nil {
			return awake, fmt.Errorf("is there IPv6: %w", err)
		}
		if off == 0 {
			return awake, nil
		}
	}
	return dormant, nil
}

// ipv6Skipped says why IPv6 is left out, "" if it is not. Where rules cannot be written it is, for as long as there is
// nothing that they would be for. It is called with r.mu held.
func (r *Redirect) ipv6Skipped() (string, error) {
	has, err := ipv6Presence()
	switch {
	case err != nil:
		return "", err
	case has == absent:
		return "the kernel has no IPv6", nil
	case has == awake:
		r.broken = nil
	case r.broken != nil:
		return "IPv6 is off on every interface and its rules cannot be installed", nil
	}
	return "", nil
}

// unlessDormant calls fn, and once more without IPv6 if it failed and IPv6 is dormant: a host whose owner has switched
// IPv6 off may have no ip6tables modules, or a /proc/sys that cannot be written. It is called with r.mu held.
func (r *Redirect) unlessDormant(fn func() error) error {
	err := fn()
	if err == nil || r.broken != nil {
		return err
	}
	if has, unknown := ipv6Presence(); unknown != nil || has != dormant {
		return err
	}
	r.broken = err
	if fn() != nil {
		r.broken = nil
		return err
	}
	return nil
}

// loopbackHas reports whether packets of this host arrive at the family's localhost.
func (r *Redirect) loopbackHas(f Family) bool {
	routes, err := r.route.RouteGet(f.localhost().AsSlice())
	return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
}

// loopbackWarning says what becomes of this host's clients where IPv6 is on, but not on lo.
func (r *Redirect) loopbackWarning() string {
	outcome := "reach the metadata service over IPv6 past the daemon"
	if r.config.Enforce {
		outcome = "get no answer over IPv6"
	}
	return fmt.Sprintf("IPv6 is off on lo, where the redirect leads, and on elsewhere: clients of this host %s; "+
		"set net.ipv6.conf.lo.disable_ipv6 to 0", outcome)
}
