package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A Drift is a time during which the host was not as planned.
type Drift struct {
	Found    []Difference
	AtMost   time.Duration // since it was last seen to be right
	Repaired bool
	Err      error  // why not, or why the host could not be read
	Report   Report // Locks: a rule of somebody else's that appeared is respected, and its hook given back
}

const (
	// DefaultInterval is for Watch. Where changes are notified it is for what nobody notifies: legacy rules, and rules
	// lost in a notification that the kernel dropped. Shorter costs 50 ms of one core each time; longer is a longer
	// window in which a flush of legacy rules leaves the metadata service open.
	DefaultInterval = 15 * time.Second

	// quiet is how long nothing must change before a look, so that a program that rewrites its rules in steps is not
	// looked at in between; but a stream of changes is looked at after mostDelay.
	quiet     = 50 * time.Millisecond
	mostDelay = 250 * time.Millisecond

	// Looks are minGap apart, or as far as makes them a twentieth of the time (one takes 0.2 s on a host with 10 000
	// rules), but not farther than maxGap: during it a flush goes unseen.
	minGap    = time.Second
	maxGap    = 2 * time.Second
	dutyCycle = 20
)

// Watch keeps the plan true until ctx ends: it looks at once, then when the kernel notifies a change of rules or of
// our link, and every interval (0 means DefaultInterval). What differs is repaired and handed to report, as is the
// first look that does not fail after one that has. It is called from this goroutine; its own repairs are not reported. The legacy back end notifies nothing, so there only
// the interval counts.
func (r *Redirect) Watch(ctx context.Context, interval time.Duration, report func(Drift)) error {
	if interval == 0 {
		interval = DefaultInterval
	}
	changed := make(chan struct{}, 1)
	var readers sync.WaitGroup
	defer readers.Wait()
	for _, s := range []struct {
		protocol int
		groups   []uint
		concerns func(syscall.NetlinkMessage) bool
	}{
		{unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}, aboutRules},
		{unix.NETLINK_ROUTE, []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR}, r.aboutLink},
	} {
		socket, err := nl.Subscribe(s.protocol, s.groups...)
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			continue // a kernel without nf_tables; the interval must do
		}
		if err != nil {
			return fmt.Errorf("subscribe to changes: %w", err)
		}
		defer socket.Close()
		readers.Go(func() { notify(socket, s.concerns, changed) })
	}

	timer := time.NewTicker(interval)
	defer timer.Stop()
	right, failed := time.Now(), false
	for {
		began := time.Now()
		if d, drifted := r.look(ctx, &right); (drifted || failed) && ctx.Err() == nil {
			report(d)
			failed = d.Err != nil
		}
		if !sleep(ctx, min(max(minGap, dutyCycle*time.Since(began)), maxGap)) {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-changed:
			settled := time.Now().Add(mostDelay)
			for waiting := true; waiting && time.Now().Before(settled); {
				select {
				case <-changed:
				case <-time.After(quiet):
					waiting = false
				}
			}
		}
	}
}

// look reads the host and repairs it. right is when it was last as it should be.
func (r *Redirect) look(ctx context.Context, right *time.Time) (d Drift, drifted bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	began := time.Now()
	s, err := r.survey(ctx)
	if err == nil {
		d.Found, err = r.differences(s)
	}
	if err == nil && len(d.Found) > 0 {
		_, err = r.apply(ctx, s)
		d.Repaired = err == nil
	}
	if s != nil {
		d.Report = s.report
	}
	d.Err, d.AtMost = err, time.Since(*right)
	if err == nil {
		*right = began
		if d.Repaired {
			*right = time.Now()
		}
	}
	return d, err != nil || len(d.Found) > 0
}

// notify reads a subscription until its socket is closed.
func notify(socket *nl.NetlinkSocket, concerns func(syscall.NetlinkMessage) bool, changed chan<- struct{}) {
	for {
		messages, _, err := socket.Receive()
		// The kernel drops notifications that are not read in time, and says so once (netlink(7)).
		lost := errors.Is(err, unix.ENOBUFS)
		if err != nil && !lost {
			return
		}
		if lost || slices.ContainsFunc(messages, concerns) {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}
}

// aboutRules keeps the elements of sets out, which some programs change all the time.
func aboutRules(m syscall.NetlinkMessage) bool {
	return m.Header.Type&0xff <= unix.NFT_MSG_DELRULE
}

func (r *Redirect) aboutLink(m syscall.NetlinkMessage) bool {
	var skip int
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		skip = unix.SizeofIfInfomsg
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		skip = unix.SizeofIfAddrmsg
	default:
		return false
	}
	if len(m.Data) < skip {
		return false
	}
	attributes, err := nl.ParseRouteAttr(m.Data[skip:])
	if err != nil {
		return true
	}
	for _, a := range attributes {
		switch {
		case skip == unix.SizeofIfAddrmsg && a.Attr.Type == unix.IFA_ADDRESS:
			address, _ := netip.AddrFromSlice(a.Value)
			// The host hook of audit mode comes and goes with ::1.
			return m.Header.Type == unix.RTM_DELADDR && slices.Contains(r.config.ForwardedAddrs, address) ||
				address == netip.IPv6Loopback()
		case skip == unix.SizeofIfInfomsg && a.Attr.Type == unix.IFLA_IFNAME:
			return unix.ByteSliceToString(a.Value) == LinkName
		}
	}
	return false
}
