package main

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// What systemd holds must be where the redirect leads.
func TestHeld(t *testing.T) {
	var inherited []net.Listener
	var at []netip.AddrPort
	for _, addr := range []string{"127.0.0.1:0", "127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		inherited = append(inherited, ln)
		at = append(at, ln.Addr().(*net.TCPAddr).AddrPort())
	}
	other := netip.AddrPortFrom(at[0].Addr(), 254)
	other6 := netip.AddrPortFrom(at[2].Addr(), 254)
	for _, c := range []struct {
		want      []netip.AddrPort
		inherited []net.Listener
		missing   string
	}{
		{at, inherited, ""},
		{at[:1], inherited, ""},
		{[]netip.AddrPort{at[0], other6}, inherited[:2], ""}, // a host without IPv6
		{[]netip.AddrPort{at[0], other6}, inherited, other6.String()},
		{[]netip.AddrPort{at[0], other}, inherited, other.String()},
		{at, inherited[1:], at[0].String()},
	} {
		err := held(c.want, c.inherited)
		if c.missing == "" && err != nil || c.missing != "" && (!errors.Is(err, errPorts) || !strings.Contains(err.Error(), "leads to "+c.missing+",")) {
			t.Errorf("%v, of %v: %v", c.want, at, err)
		}
	}
}
