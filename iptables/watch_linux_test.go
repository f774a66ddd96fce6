package iptables

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// watch runs Watch until the test ends.
func (s *site) watch(r *Redirect, interval time.Duration) <-chan Drift {
	drifts, stop := s.startWatch(r, interval)
	s.Cleanup(stop)
	return drifts
}

// startWatch runs Watch until it is stopped.
func (s *site) startWatch(r *Redirect, interval time.Duration) (drifts chan Drift, stop func()) {
	drifts = make(chan Drift, 100)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		ended <- s.lab.Instance.Do(func() error {
			return r.Watch(ctx, interval, Observer{Tell: func(d Drift) { drifts <- d }})
		})
	}()
	// Who changes rules before that is not known by name.
	s.eventually("it listens", func() (listens bool) {
		s.do(func() error {
			sockets, err := os.ReadFile("/proc/thread-self/net/netlink")
			for line := range strings.Lines(string(sockets)) {
				f := strings.Fields(line)
				listens = listens || f[1] == strconv.Itoa(unix.NETLINK_NETFILTER) && f[3] == fmt.Sprintf("%08x", 1<<(unix.NFNLGRP_NFTABLES-1))
			}
			return err
		})
		return listens
	})
	return drifts, func() {
		cancel()
		if err := <-ended; err != nil {
			s.Error(err)
		}
	}
}

func TestWatch(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		s.Parallel()
		r := s.open(Config{UID: uid, Backend: b})
		s.install(r)
		drifts := s.watch(r, time.Hour)
		tool := "iptables-" + b.String()
		for _, c := range []struct {
			do    string
			found string
			hooks string
		}{
			{tool + " -t nat -F IMDSGATE-OUTPUT", "IPv4 nat IMDSGATE-OUTPUT: rule 1 missing", "IPv4: host forwarded; IPv6: host forwarded"},
			{tool + " -F OUTPUT; ip6" + strings.TrimPrefix(tool, "ip") + " -t nat -F", "IPv4 filter OUTPUT: jump missing", "IPv4: host forwarded; IPv6: host forwarded"},
			{"ip link del " + LinkName, "link imdsgate0 missing", "IPv4: host forwarded; IPv6: host forwarded"},
			{"ip addr del 169.254.213.80/32 dev " + LinkName, "address 169.254.213.80", "IPv4: host forwarded; IPv6: host forwarded"},
			{tool + " -A FORWARD -d 169.254.169.254/32 -j DROP", "IPv4 nat PREROUTING: jump not in the plan", "IPv4: host; IPv6: host forwarded"},
			{tool + " -D FORWARD -d 169.254.169.254/32 -j DROP", "IPv4 nat PREROUTING: jump missing", "IPv4: host forwarded; IPv6: host forwarded"},
		} {
			time.Sleep(time.Second) // the rules are right meanwhile
			began := time.Now()
			s.sh(c.do)
			select {
			case d := <-drifts:
				// The kernel tells of changes of nftables.
				if told := b == BackendNFT && !strings.Contains(c.found, "169.254.213.80") && !strings.Contains(c.found, "link "); told && d.AtMost > time.Since(began) {
					s.Errorf("%s: %v ago, and for at most %v", c.do, time.Since(began), d.AtMost)
				}
				if words := inWords(d.Found); !strings.Contains(words, c.found) {
					s.Errorf("%s: found\n%s", c.do, words)
				}
				if d.Repaired != 1 || d.Err != nil || d.AtMost <= 0 || d.AtMost > 20*time.Second {
					s.Errorf("%s: repaired %v, after at most %v: %v", c.do, d.Repaired, d.AtMost, d.Err)
				}
				s.expect(c.do, hooksOf(d.Report), c.hooks)
				s.Logf("%s: seen and repaired %v after it was begun", c.do, time.Since(began).Round(time.Millisecond))
			case <-time.After(20 * time.Second):
				s.Fatalf("%s: not noticed", c.do)
			}
			s.expect("differences", inWords(s.verify(r)), "")
		}
		select {
		case d := <-drifts:
			s.Errorf("its own repair was a drift: %s, %v", inWords(d.Found), d.Err)
		case <-time.After(3 * time.Second):
		}
	})
}

// TestWatchCannotRepair keeps reporting what it cannot change.
func TestWatchCannotRepair(t *testing.T) {
	t.Parallel()
	s := newHost(t)
	r := s.open(Config{UID: uid, Backend: BackendNFT})
	s.install(r)
	r.use.byFamily[IPv6].restore = "/bin/false"
	drifts := s.watch(r, 100*time.Millisecond)
	s.sh("ip6tables-nft -t nat -F")
	var last time.Duration
	for range 2 {
		d := <-drifts
		if d.Repaired > 0 || d.Err == nil || d.AtMost <= last {
			s.Errorf("repaired %v, after at most %v: %v", d.Repaired, d.AtMost, d.Err)
		}
		last = d.AtMost
	}
}

// TestReloadThatDrops has rules that drop everything for a moment, as firewalld puts them there while it loads its own:
// in enforce the redirect is not given back. What lasts is respected.
func TestReloadThatDrops(t *testing.T) {
	t.Parallel()
	s := newHost(t)
	r := s.open(Config{UID: uid, Backend: BackendNFT, Enforce: true})
	s.install(r)
	drifts := s.watch(r, time.Hour)
	const drop = `nft 'table inet firewalld_policy_drop { chain i { type filter hook input priority 9; policy drop; }; chain o { type filter hook output priority 9; policy drop; }; }'`
	s.sh(drop + "; sleep 1; nft delete table inet firewalld_policy_drop")
	select {
	case d := <-drifts:
		t.Errorf("%s; hooks %s", inWords(d.Found), hooksOf(d.Report))
	case <-time.After(lockLasts / 2):
	}
	s.sh(drop)
	began := time.Now()
	select {
	case d := <-drifts:
		if took := time.Since(began); took < lockLasts/2 {
			t.Errorf("given back after %v", took)
		}
		s.expect("hooks", hooksOf(d.Report), "IPv4: none; IPv6: none")
	case <-time.After(60 * time.Second):
		t.Error("not respected")
	}
}
