package iptables

import (
	"fmt"
	"net/netip"
)

// A Prohibition is a route that keeps everybody on this host from an endpoint before netfilter sees a packet, as the
// lock of systemd 261 does (src/imds/85-imds-early.network, systemd.imds.network=locked): local connections fail with
// EACCES, and packets of containers would not have been forwarded. Who has a mark that a rule of routing lets through is
// redirected like everybody without a lock.
type Prohibition struct {
	Endpoint netip.Addr
	Mark     uint32
	Daemon   string // why the daemon's own connections fail, too, in spite of its mark; "" if they do not
}

func (p Prohibition) String() string { return p.Message() + ": " + p.Fix() }

// Message says whom it keeps from what.
func (p Prohibition) Message() string {
	m := fmt.Sprintf("a route prohibits %s, as systemd's metadata lock does: local connections fail before they reach the redirect", p.Endpoint)
	if p.Daemon != "" {
		m += fmt.Sprintf(", and so do the daemon's, in spite of its mark %#x (%s)", p.Mark, p.Daemon)
	}
	return m
}

// Fix says what to do about it.
func (p Prohibition) Fix() string {
	if p.Daemon != "" {
		family := ""
		if p.Endpoint.Is6() {
			family = "-6 "
		}
		return fmt.Sprintf("delete the route, or give the mark a way past it: ip %[1]sroute add %[2]s dev DEVICE table %[3]d; ip %[1]srule add fwmark %#[3]x lookup %[3]d", family, p.Endpoint, p.Mark)
	}
	return "systemd.imds.network=unlocked on the kernel's command line has policy decide instead; with the lock nobody is served but systemd-imdsd, and below level 2 of attribution who takes its mark"
}
