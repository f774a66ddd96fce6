package iptables

import (
	"encoding/binary"
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

// A Writer is a process that has changed rules, as the kernel names it to those who listen: by its pid in the initial
// pid namespace, and its name then. Most have ended when this is read.
type Writer struct {
	PID  int
	Name string
}

func (w Writer) String() string { return fmt.Sprintf("%s (pid %d)", w.Name, w.PID) }

const (
	// maxWriters bounds those that a look tells of.
	maxWriters = 8
	// maxWritings bounds what is remembered between two looks. One reload of firewalld's, with iptables as its back end,
	// is some dozens; with too few it would be told as having begun when all was last seen to be right.
	maxWritings = 128
)

// writers remembers who has changed rules since the last look. Its methods may be called from any goroutine.
type writers struct {
	mu     sync.Mutex
	recent []writing
	own    [maxWriters]int // pids of our own last writers
	next   int
	missed bool // since the last look there were more than are remembered, or than the kernel has told of
}

type writing struct {
	by   Writer // of pid 0 if the kernel does not name it
	at   time.Time
	ours bool // of our rules, or of a chain in which we have some
}

// started remembers one of our own.
func (w *writers) started(pid int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.own[w.next%len(w.own)] = pid
	w.next++
}

func (w *writers) isOwn(pid int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Contains(w.own[:], pid)
}

func (w *writers) add(by Writer, ours bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.recent) == maxWritings {
		w.recent = slices.Delete(w.recent, 0, 1)
		w.missed = true
	}
	w.recent = append(w.recent, writing{by, time.Now(), ours})
}

func (w *writers) miss() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.missed = true
}

// since is when somebody has begun to change what is ours, of all changes since the last look; false if it is not known.
func (w *writers) since() (time.Time, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	first := slices.IndexFunc(w.recent, func(one writing) bool { return one.ours })
	if first < 0 || w.missed {
		return time.Time{}, false
	}
	return w.recent[first].at, true
}

// forget is for a look that began at a time and found nothing wrong: who wrote before it has done no harm.
func (w *writers) forget(before time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.recent = slices.DeleteFunc(w.recent, func(one writing) bool { return one.at.Before(before) })
	w.missed = false
}

// take returns who can have made a difference, without ourselves, and forgets all.
func (w *writers) take() (all []Writer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	anyOfOurs := slices.ContainsFunc(w.recent, func(one writing) bool { return one.ours })
	for _, one := range w.recent {
		if one.by.PID != 0 && one.ours == anyOfOurs && len(all) < maxWriters && !slices.Contains(w.own[:], one.by.PID) && !slices.Contains(all, one.by) {
			all = append(all, one.by)
		}
	}
	w.recent, w.missed = nil, false
	return all
}

// A subscription is one socket that hears of changes.
type subscription struct {
	socket *nl.NetlinkSocket
	hear   func([]syscall.NetlinkMessage) (concerns bool)
	missed func()
}

// subscribe opens the sockets, in the network namespace of the calling thread. wrote is told of each who changes
// rules, at once.
func (r *Redirect) subscribe(wrote func(Writer)) (all []subscription, err error) {
	defer func() {
		if err != nil {
			for _, s := range all {
				s.socket.Close()
			}
		}
	}()
	rules := &transaction{redirect: r, wrote: wrote, initial: inInitialPIDNamespace()}
	for _, s := range []struct {
		protocol int
		groups   []uint
		hear     func([]syscall.NetlinkMessage) bool
	}{
		{unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}, rules.hear},
		{unix.NETLINK_ROUTE, []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_TC,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE},
			func(messages []syscall.NetlinkMessage) bool { return slices.ContainsFunc(messages, r.aboutWay) }},
	} {
		socket, err := nl.Subscribe(s.protocol, s.groups...)
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			continue // a kernel without nf_tables; the interval must do
		}
		if err != nil {
			return all, fmt.Errorf("subscribe to changes: %w", err)
		}
		all = append(all, subscription{socket, s.hear, r.writers.miss})
		// So that the end of a long transaction, which says whose it was, is not dropped.
		if err := socket.SetReceiveBufferSize(receiveBuffer, true); err != nil {
			return all, fmt.Errorf("subscribe to changes: %w", err)
		}
	}
	return all, nil
}

// receiveBuffer holds the notifications of some ten thousand rules.
const receiveBuffer = 4 << 20

// listen reads a subscription until its socket is closed.
func (s subscription) listen(changed chan<- struct{}) {
	for {
		messages, _, err := s.socket.Receive()
		// The kernel drops notifications that are not read in time, and says so once (netlink(7)).
		lost := errors.Is(err, unix.ENOBUFS)
		if err != nil && !lost {
			return
		}
		if lost {
			s.missed()
		}
		if s.hear(messages) || lost {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}
}

// A transaction is what the kernel tells of one batch of changes of rules: first what has changed, then who changed
// it (nf_tables_commit in net/netfilter/nf_tables_api.c).
type transaction struct {
	redirect *Redirect
	wrote    func(Writer)
	initial  bool

	rules, ours bool // seen in the batch that is being told of
}

func (t *transaction) hear(messages []syscall.NetlinkMessage) (concerns bool) {
	for _, m := range messages {
		if m.Header.Type&0xff == unix.NFT_MSG_NEWGEN {
			concerns = t.end(m) || concerns
			continue
		}
		// Not elements of sets, which some programs change all the time.
		if m.Header.Type&0xff <= unix.NFT_MSG_DELRULE {
			t.rules, t.ours = true, t.ours || touchesOurs(m)
		}
	}
	return concerns
}

func (t *transaction) end(m syscall.NetlinkMessage) (concerns bool) {
	rules, ours := t.rules, t.ours
	t.rules, t.ours = false, false
	if !rules {
		return false
	}
	var by Writer
	for a := range attributes(m) {
		switch a.Attr.Type {
		case unix.NFTA_GEN_PROC_PID:
			by.PID = int(binary.BigEndian.Uint32(a.Value))
		case unix.NFTA_GEN_PROC_NAME:
			by.Name = unix.ByteSliceToString(a.Value)
		}
	}
	if by.PID == 0 || !t.initial {
		t.redirect.writers.add(Writer{}, ours) // perhaps ourselves: since may be too early then, and never too late
		return true
	}
	if t.redirect.writers.isOwn(by.PID) {
		return false
	}
	t.redirect.writers.add(by, ours)
	t.wrote(by)
	return true
}

// touchesOurs reports whether a change is of our rules, or in a chain where a jump of ours could be: it may have moved
// it, or have deleted it with the chain.
func touchesOurs(m syscall.NetlinkMessage) bool {
	if len(m.Data) == 0 || m.Data[0] != unix.AF_INET && m.Data[0] != unix.AF_INET6 {
		return false
	}
	tableAttr, chainAttr := uint16(unix.NFTA_RULE_TABLE), uint16(unix.NFTA_RULE_CHAIN)
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_DELTABLE:
		tableAttr, chainAttr = unix.NFTA_TABLE_NAME, 0
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		tableAttr, chainAttr = unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
	default:
		return false
	}
	var table, chain string
	for a := range attributes(m) {
		switch a.Attr.Type {
		case tableAttr:
			table = unix.ByteSliceToString(a.Value)
		case chainAttr:
			chain = unix.ByteSliceToString(a.Value)
		}
	}
	if chainAttr == 0 {
		_, known := priorities[table]
		return known
	}
	_, _, isBase := builtIn(table, chain)
	return isBase || ours(chain)
}

// attributes are those of a message of nfnetlink.
func attributes(m syscall.NetlinkMessage) func(func(syscall.NetlinkRouteAttr) bool) {
	return func(yield func(syscall.NetlinkRouteAttr) bool) {
		if len(m.Data) < nl.SizeofNfgenmsg {
			return
		}
		all, err := nl.ParseRouteAttr(m.Data[nl.SizeofNfgenmsg:])
		if err != nil {
			return
		}
		for _, a := range all {
			if !yield(a) {
				return
			}
		}
	}
}

// inInitialPIDNamespace reports whether the pids that the kernel tells are ours (task_pid_nr in
// nf_tables_fill_gen_info). The number is fixed (PROC_PID_INIT_INO, include/linux/proc_ns.h).
func inInitialPIDNamespace() bool {
	var st unix.Stat_t
	return unix.Stat("/proc/self/ns/pid", &st) == nil && st.Ino == 0xEFFFFFFC
}

// aboutWay keeps those out that cannot concern our link, or how packets get to an endpoint.
func (r *Redirect) aboutWay(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWRULE, unix.RTM_DELRULE, unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
		return true
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return r.aboutRoute(m)
	default:
		return r.aboutLink(m)
	}
}

// aboutRoute reports whether packets to an endpoint can take a route.
func (r *Redirect) aboutRoute(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofRtMsg {
		return false
	}
	bits := int(m.Data[1]) // rtmsg.rtm_dst_len
	attributes, err := nl.ParseRouteAttr(m.Data[unix.SizeofRtMsg:])
	if err != nil {
		return true
	}
	for _, a := range attributes {
		if a.Attr.Type == unix.RTA_DST {
			address, _ := netip.AddrFromSlice(a.Value)
			to := netip.PrefixFrom(address, bits)
			return slices.ContainsFunc(r.config.Endpoints, func(e netip.AddrPort) bool { return to.Contains(e.Addr()) })
		}
	}
	return bits == 0
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
		case skip == unix.SizeofIfInfomsg && a.Attr.Type == unix.IFLA_XDP:
			if len(a.Value) > 5 && a.Value[4] != 0 { // IFLA_XDP_ATTACHED comes first, and is not "none"
				return true
			}
		case skip == unix.SizeofIfInfomsg && a.Attr.Type == unix.IFLA_IFNAME && unix.ByteSliceToString(a.Value) == LinkName:
			return true
		}
	}
	return false
}
