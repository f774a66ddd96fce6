package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	goiptables "github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// newHost is a site without containers and metadata service.
func newHost(t *testing.T) *site {
	return &site{t, labtest.Start(t, netlab.Options{NoIMDS: true})}
}

func onHosts(t *testing.T, test func(s *site, b Backend)) {
	for _, b := range backends {
		t.Run(b.String(), func(t *testing.T) { test(newHost(t), b) })
	}
}

// TestWhatIsWrittenIsPrinted installs every form of plan: Install fails if iptables prints a rule differently.
func TestWhatIsWrittenIsPrinted(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		for _, c := range []Config{
			{},
			{Enforce: true, Cgroup: s.cgroup()},
			{Enforce: true, OverrideForeign: true, HostPort: 900, ForwardedPort: 901, Mark: 1},
		} {
			c.UID, c.Backend = uid, b
			r := s.open(c)
			if !s.install(r).Changed {
				s.Errorf("%+v: nothing changed", c)
			}
			s.expect("differences", inWords(s.verify(r)), "")
			s.secondReader(r)
			before := s.sh(fmt.Sprintf("iptables-%s-save -c | grep '^\\['; ip6tables-%[1]s-save -c | grep '^\\['", b))
			if s.install(r).Changed {
				s.Errorf("%+v: the second Install changed something", c)
			}
			s.expect("rules with counters after the second Install",
				s.sh(fmt.Sprintf("iptables-%s-save -c | grep '^\\['; ip6tables-%[1]s-save -c | grep '^\\['", b)), before)
		}
	})
}

// secondReader reads what is installed with somebody else's code.
func (s *site) secondReader(r *Redirect) {
	s.Helper()
	plan := r.config.Plan(FullCoverage)
	for _, want := range plan.Families {
		s.do(func() error {
			protocol := []goiptables.Protocol{IPv4: goiptables.ProtocolIPv4, IPv6: goiptables.ProtocolIPv6}[want.Family]
			ipt, err := goiptables.New(goiptables.IPFamily(protocol), goiptables.Path(r.use.byFamily[want.Family].iptables))
			if err != nil {
				return err
			}
			for _, chain := range want.Chains {
				rules, err := ipt.List(chain.Table, chain.Name)
				if err != nil || len(rules) != 1+len(chain.Rules) {
					s.Errorf("%s %s %s has %q, %v; want %q", want.Family, chain.Table, chain.Name, rules, err, chain.Rules)
				}
			}
			for _, jump := range want.Jumps {
				rule, err := ipt.ListById(jump.Table, jump.Chain, jump.At)
				if err != nil || rule != "-A "+jump.Chain+" "+jump.Rule {
					s.Errorf("%s %s %s: place %d has %q, %v; want %q", want.Family, jump.Table, jump.Chain, jump.At, rule, err, jump.Rule)
				}
			}
			return nil
		})
	}
}

// TestForeignRules installs among other people's rules, lets them change theirs, and removes.
func TestForeignRules(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		for _, file := range []string{"docker", "kube-proxy", "firewalld", "cis"} {
			s.load(b, IPv4, readLockCase(s.T, "testdata/locks/"+file+".rules").rules)
		}
		for _, file := range []string{"docker-ipv6", "kube-proxy-ipv6", "cis-ipv6"} {
			s.load(b, IPv6, readLockCase(s.T, "testdata/locks/"+file+".rules").rules)
		}
		s.sh("nft -f testdata/native/firewalld.nft")
		before, native := s.rules(b), s.sh("nft list table inet firewalld")

		r := s.open(Config{UID: uid, Enforce: true})
		if r.use.backend != b {
			s.Errorf("back end %s", r.use.backend)
		}
		s.install(r)
		s.expect("differences", inWords(s.verify(r)), "")
		s.remove()
		s.expect("their rules after removal", s.rules(b), before)

		s.install(r)
		s.load(b, IPv4, "*nat\n-I OUTPUT 1 -d 10.9.9.9/32 -j RETURN\n-A OUTPUT -d 10.9.9.8/32 -j RETURN\nCOMMIT\n"+
			"*filter\n-I INPUT 2 -s 10.9.9.9/32 -j DROP\n-D FORWARD -j DOCKER-USER\n-I FORWARD 1 -j DOCKER-USER\nCOMMIT\n")
		s.load(b, IPv6, "*nat\n-I PREROUTING 1 -d fd99::9/128 -j RETURN\nCOMMIT\n*filter\n-D FORWARD -j DOCKER-USER\n-I FORWARD 1 -j DOCKER-USER\nCOMMIT\n")
		s.expect("differences", inWords(s.verify(r)), strings.Join([]string{
			`IPv4 filter FORWARD: jump at place 2 instead of 1; have "-d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j IMDSGATE-FORWARD"`,
			`IPv4 filter INPUT: jump at place 3 instead of 2; have "-d 169.254.213.80/32 -p tcp -m tcp --dport 253 -j IMDSGATE-INPUT"`,
			`IPv4 nat OUTPUT: jump at place 2 instead of 1; have "-d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j IMDSGATE-OUTPUT"`,
			`IPv6 filter FORWARD: jump at place 2 instead of 1; have "-d fd00:ec2::254/128 -p tcp -m tcp --dport 80 -j IMDSGATE-FORWARD"`,
			`IPv6 nat PREROUTING: jump at place 2 instead of 1; have "-d fd00:ec2::254/128 ! -i lo -p tcp -m tcp --dport 80 -j IMDSGATE-PREROUTING"`,
		}, "\n"))
		s.install(r)
		s.expect("differences", inWords(s.verify(r)), "")
		s.remove()
		s.load(b, IPv4, "*nat\n-D OUTPUT -d 10.9.9.9/32 -j RETURN\n-D OUTPUT -d 10.9.9.8/32 -j RETURN\nCOMMIT\n"+
			"*filter\n-D INPUT -s 10.9.9.9/32 -j DROP\n-D FORWARD -j DOCKER-USER\n-I FORWARD 1 -j DOCKER-USER\nCOMMIT\n")
		s.load(b, IPv6, "*nat\n-D PREROUTING -d fd99::9/128 -j RETURN\nCOMMIT\n*filter\n-D FORWARD -j DOCKER-USER\n-I FORWARD 1 -j DOCKER-USER\nCOMMIT\n")
		s.expect("their rules after removal", s.rules(b), before)
		s.expect("their native rules", s.sh("nft list table inet firewalld"), native)
	})
}

// TestLocksOfTheRealTool loads the cases of TestLocks.
func TestLocksOfTheRealTool(t *testing.T) {
	files, err := filepath.Glob("testdata/locks/*.rules")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".rules")
		if name == "set" {
			continue // needs ipset
		}
		t.Run(name, func(t *testing.T) {
			c := readLockCase(t, file)
			onHosts(t, func(s *site, b Backend) {
				s.load(b, c.family, c.rules)
				before := s.rules(b)
				r := s.open(c.config(uid))
				report := s.install(r)
				c.check(s.T, report.Locks, report.Families[c.family].Hooks.Admit, 0)
				for _, l := range report.Locks {
					if l.Store != "iptables-"+b.String() {
						s.Errorf("store: %s", l)
					}
					if h := report.Families[c.family].Hooks; l.Hook == HostHook && h.Host || l.Hook == ForwardedHook && h.Forwarded {
						s.Errorf("the %s hook was taken", l.Hook)
					}
				}
				s.expect("differences", inWords(s.verify(r)), "")
				s.remove()
				s.expect("rules after removal", s.rules(b), before)
			})
		})
	}
}

// passing is what an element of a set has left of its time, in seconds.
var passing = regexp.MustCompile(`"expires": \d+`)

// TestNativeRules lets nft print the cases of TestParseNative.
func TestNativeRules(t *testing.T) {
	for _, file := range nativeCases(t) {
		s := newHost(t)
		commands := strings.TrimSuffix(file, ".json") + ".nft"
		golden(t, file, passing.ReplaceAllString(s.sh("nft -f "+commands+"; nft -j list ruleset"), `"expires": 1799`))
		want, tracks := statedLocks(t, commands)
		r := s.open(Config{UID: uid})
		report := s.install(r)
		var got []string
		for _, l := range report.Locks {
			got = append(got, l.asComment())
		}
		slices.Sort(got)
		s.expect(file, strings.Join(slices.Compact(got), "\n"), strings.Join(want, "\n"))
		if report.Conntrack.First == tracks {
			s.Errorf("%s: first user of connection tracking: %v", file, !tracks)
		}
		s.expect("differences", inWords(s.verify(r)), "")
	}
}

// TestStopOfTheGroup is about a Ctrl-C, which stops all of the daemon's process group.
func TestStopOfTheGroup(t *testing.T) {
	_, err := runTold(t.Context(), func(pid int) {
		if group, err := unix.Getpgid(pid); err != nil || group != pid {
			t.Errorf("it is in the group %d, want one of its own, %d (%v)", group, pid, err)
		}
	}, "", "true")
	if err != nil {
		t.Error(err)
	}
}

func TestOverrideForeign(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		c := readLockCase(s.T, "testdata/locks/drop-named.rules")
		s.load(b, IPv4, c.rules)
		s.load(b, IPv4, "*filter\n-A FORWARD -d 169.254.169.254/32 -j DROP\nCOMMIT\n")
		r := s.open(Config{UID: uid, OverrideForeign: true})
		s.daemon(r)
		report := s.install(r)
		s.expect("hooks", hooksOf(report), "IPv4: host forwarded; IPv6: host forwarded")
		if len(report.Locks) != 0 || len(report.Overridden) != 3 {
			s.Errorf("locks %v, overridden %v", report.Locks, report.Overridden)
		}
		s.expect("host client", s.ask(s.lab.Instance, client{uid: 1001}, endpoint[IPv4]), "host 169.254.169.254:80")
		s.expect("container", s.ask(s.lab.Bridged, client{}, endpoint[IPv4]), "forwarded 169.254.169.254:80")
		s.expect("the daemon", s.ask(s.lab.Instance, client{uid: uid, mark: defaultMark}, endpoint[IPv4]), "metadata")

		s.remove()
		s.sh(fmt.Sprintf("iptables-%s -F; iptables-%[1]s -F FORWARD", b))
		s.load(b, IPv4, readLockCase(s.T, "testdata/locks/egress-root-only.rules").rules)
		s.expect("hooks", hooksOf(s.install(r)), "IPv4: host admit forwarded; IPv6: host forwarded")
		s.expect("host client that had no way out", s.ask(s.lab.Instance, client{uid: 1001}, endpoint[IPv4]), "host 169.254.169.254:80")
		s.expect("the daemon", s.ask(s.lab.Instance, client{uid: uid, mark: defaultMark}, endpoint[IPv4]), "metadata")
	})
}

// TestInstalled asks the rules whether they are there, and in which mode they were installed.
func TestInstalled(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		expect := func(when string, wantInstalled, wantEnforcing bool) {
			s.Helper()
			s.do(func() error {
				installed, enforcing, err := Installed(context.Background())
				if installed != wantInstalled || enforcing != wantEnforcing {
					s.Errorf("%s: installed %v, enforcing %v", when, installed, enforcing)
				}
				return err
			})
		}
		expect("before", false, false)
		for _, enforce := range []bool{false, true, false} {
			s.install(s.open(Config{UID: uid, Backend: b, Enforce: enforce}))
			expect("installed", true, enforce)
		}
		s.do(func() error { return Release(context.Background()) })
		expect("released", true, false)
		s.remove()
		expect("removed", false, false)
	})
}

// TestLegacyOnly has a kernel without nf_tables, for which its commands are installed nevertheless: what is in the
// store of legacy is found and taken away.
func TestLegacyOnly(t *testing.T) {
	s := newHost(t)
	s.install(s.open(Config{UID: uid, Backend: BackendLegacy, Enforce: true}))
	s.expect("enforcing, released, removed", s.actor("without-nft").output(), "true <nil>, <nil>, true <nil>")
	s.expect("what is left", s.rules(BackendLegacy), "")
	s.do(func() error {
		const nothing = 200
		if !hasNFT() || netfilterHas(nothing, 0) {
			t.Error("this kernel has nf_tables, and of course nothing that nobody knows")
		}
		return nil
	})
}

// withoutNetfilter has this process's socket(2) say what it says on a kernel without nfnetlink.
func withoutNetfilter() error {
	const load, equals, is = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	filter := []unix.SockFilter{ // struct seccomp_data: the number is first, and the arguments begin at 16
		{Code: load, K: 0}, {Code: equals, K: unix.SYS_SOCKET, Jf: 5},
		{Code: load, K: 16}, {Code: equals, K: unix.AF_NETLINK, Jf: 3},
		{Code: load, K: 16 + 2*8}, {Code: equals, K: unix.NETLINK_NETFILTER, Jf: 1},
		{Code: is, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)},
		{Code: is, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	return nil
}

// TestFailure lets the IPv6 half fail after the IPv4 one has been written.
func TestFailure(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		s.load(b, IPv4, readLockCase(s.T, "testdata/locks/docker.rules").rules)
		before := s.rules(b)
		r := s.open(Config{UID: uid, Backend: b})
		broken := *r.use
		broken.byFamily[IPv6].restore = "/bin/false"
		works := r.use
		r.use = &broken
		r.all[slices.Index(r.all, works)] = &broken
		err := s.lab.Instance.Do(func() error {
			_, err := r.Install(context.Background())
			return err
		})
		if err == nil || !strings.Contains(err.Error(), "IPv6") {
			s.Errorf("error: %v", err)
		}
		s.expect("rules", s.rules(b), before)
		s.expect("link", s.sh("ip link show "+LinkName+" 2>&1 || true"), "Device \""+LinkName+"\" does not exist.\n")

		// Over an older plan, it is that which comes back.
		older := s.open(Config{UID: uid + 1, Backend: b})
		s.install(older)
		before = s.rules(b)
		ctx, cancel := context.WithCancel(context.Background())
		if err := s.lab.Instance.Do(func() error {
			_, err := r.Install(ctx)
			cancel()
			return err
		}); err == nil {
			s.Error("no error")
		}
		s.expect("rules", s.rules(b), before)
		s.expect("differences from the older plan", inWords(s.verify(older)), "")
		if err := s.lab.Instance.Do(func() error {
			_, err := r.Install(ctx)
			return err
		}); !errors.Is(err, context.Canceled) {
			s.Errorf("after cancellation: %v", err)
		}
		s.expect("rules", s.rules(b), before)
	})
}

// TestRemove is run by a successor that knows nothing of what was installed, how often, and where.
func TestRemove(t *testing.T) {
	s := newHost(t)
	if s.remove() {
		s.Error("an empty host had something to remove")
	}
	var before []string
	for _, b := range backends {
		s.load(b, IPv4, readLockCase(s.T, "testdata/locks/docker.rules").rules)
		s.load(b, IPv4, "*mangle\n:THEIRS - [0:0]\n-A OUTPUT -j THEIRS\nCOMMIT\n")
		before = append(before, s.rules(b))
	}
	for _, b := range backends {
		s.install(s.open(Config{UID: uid, Enforce: true, Backend: b}))
		// What a later version of us might have done.
		s.load(b, IPv4, "*mangle\n:IMDSGATE-A - [0:0]\n:IMDSGATE-B - [0:0]\n-A IMDSGATE-A -j IMDSGATE-B\n-A IMDSGATE-B -j DROP\n"+
			"-A OUTPUT -d 1.2.3.4/32 -j IMDSGATE-A\n-A THEIRS -p udp -g IMDSGATE-B\n-A THEIRS -p udp -g IMDSGATE-B\nCOMMIT\n")
	}
	if !s.remove() {
		s.Error("nothing was removed")
	}
	for i, b := range backends {
		s.expect("rules of "+b.String(), s.rules(b), before[i])
	}
	s.expect("link", s.sh("ip link show "+LinkName+" 2>&1 || true"), "Device \""+LinkName+"\" does not exist.\n")
	if s.remove() {
		s.Error("the second removal found something")
	}
	// With our rules gone, nothing tracks connections but Docker's rules.
	s.sh("iptables-nft -t nat -F; iptables-nft -F; iptables-legacy -t nat -F; iptables-legacy -F; ip6tables-nft -F; conntrack -F 2>/dev/null")
	s.sh("ping -c1 -W1 127.0.0.1 >/dev/null || true")
	s.expect("tracked connections", s.sh("cat /proc/sys/net/netfilter/nf_conntrack_count"), "0\n")
}

// TestOtherBackEnd moves from one back end to the other.
func TestOtherBackEnd(t *testing.T) {
	s := newHost(t)
	s.install(s.open(Config{UID: uid, Backend: BackendLegacy}))
	r := s.open(Config{UID: uid, Backend: BackendNFT})
	if words := inWords(s.verify(r)); !strings.Contains(words, "IPv4 nat IMDSGATE-OUTPUT: chain not in the plan (iptables-legacy)") {
		s.Errorf("differences:\n%s", words)
	}
	s.install(r)
	s.expect("differences", inWords(s.verify(r)), "")
	s.expect("legacy rules", s.rules(BackendLegacy), "")
}

// TestBackendAuto takes the back end with other people's rules, and looking for them makes none.
func TestBackendAuto(t *testing.T) {
	s := newHost(t)
	s.expect("with no rules", s.open(Config{UID: uid}).use.backend.String(), "nft") // Debian's choice
	s.expect("legacy tables after a look", s.sh("cat /proc/thread-self/net/ip_tables_names /proc/thread-self/net/ip6_tables_names"), "")
	s.load(BackendLegacy, IPv6, "*filter\n-A OUTPUT -d fd00::1/128 -j ACCEPT\nCOMMIT\n")
	s.expect("with legacy rules", s.open(Config{UID: uid}).use.backend.String(), "legacy")
	s.load(BackendNFT, IPv4, "*filter\n:OUTPUT DROP [0:0]\nCOMMIT\n")
	s.expect("with rules in both", s.open(Config{UID: uid}).use.backend.String(), "nft")
}

func TestNoTool(t *testing.T) {
	dir := t.TempDir()
	_, err := findTools(context.Background(), []string{dir})
	if !errors.Is(err, ErrNoTool) || !strings.Contains(err.Error(), "iptables (Debian") || !strings.Contains(err.Error(), "iptables-nft (Amazon Linux 2023") {
		t.Errorf("error: %v", err)
	}
	if _, err := readNative(context.Background(), []string{dir}); err == nil || !strings.Contains(err.Error(), "no nft command (package nftables)") {
		t.Errorf("error: %v", err)
	}
	for text, want := range map[string]string{
		"iptables v1.8.9 (nf_tables)\n": "nft",
		"iptables v1.8.4 (legacy)\n":    "legacy",
		"iptables v1.6.2\n":             "legacy",
		"iptables v1.4.21\n":            `version "v1.4.21" is too old, want 1.6.2 or later`,
		"BusyBox":                       `unknown version "BusyBox"`,
	} {
		_, b, err := parseVersion(text)
		if got := b.String(); err == nil && got != want || err != nil && err.Error() != want {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
}

// TestLink is about the link that carries our addresses.
func TestLink(t *testing.T) {
	s := newHost(t)
	r := s.open(Config{UID: uid})
	s.install(r)
	for _, c := range []struct{ do, want string }{
		{"ip link set imdsgate0 down", "link imdsgate0 down"},
		{"ip addr del 169.254.213.80/32 dev imdsgate0", "address 169.254.213.80 of link imdsgate0 missing"},
		{"ip link del imdsgate0", "link imdsgate0 missing"},
	} {
		s.sh(c.do)
		if got := inWords(s.verify(r)); !strings.Contains(got, c.want) {
			s.Errorf("%s: %q", c.do, got)
		}
		s.install(r)
		s.expect("differences", inWords(s.verify(r)), "")
	}
	// The kernel must not choose our addresses as sources.
	for _, want := range []string{"inet 169.254.213.80/32 scope host", "inet6 fd69:6d64:7367::80/128 scope global nodad deprecated"} {
		if got := s.sh("ip addr show " + LinkName); !strings.Contains(got, want) {
			s.Errorf("%q is missing in\n%s", want, got)
		}
	}
	s.remove()

	s.sh("ip link add imdsgate0 type bridge")
	if err := s.lab.Instance.Do(func() error {
		_, err := r.Install(context.Background())
		return err
	}); err == nil || !strings.Contains(err.Error(), "somebody else's") {
		s.Errorf("with a link of somebody else's: %v", err)
	}
	if err := s.lab.Instance.Do(func() error {
		_, err := Remove(context.Background())
		return err
	}); err == nil {
		s.Error("Remove says nothing about a link of somebody else's")
	}
	s.sh("ip link show imdsgate0")
}

func TestUnprivilegedPorts(t *testing.T) {
	s := newHost(t)
	s.sh("echo 253 > /proc/sys/net/ipv4/ip_unprivileged_port_start")
	install := func(c Config) (Report, error) {
		c.UID = uid
		r := s.open(c)
		var report Report
		err := s.lab.Instance.Do(func() (err error) {
			report, err = r.Install(context.Background())
			return err
		})
		return report, err
	}
	_, err := install(Config{Enforce: true})
	if err == nil || !strings.Contains(err.Error(), "ip_unprivileged_port_start is 253: raise it to 255") {
		s.Errorf("enforce: %v", err)
	}
	s.expect("rules", s.rules(BackendNFT), "")
	if report, err := install(Config{}); err != nil || !strings.Contains(strings.Join(report.Warnings, "\n"), "any user may bind ports 253 and 254") {
		s.Errorf("audit: %v, warnings %q", err, report.Warnings)
	}
	if report, err := install(Config{Enforce: true, SocketActivated: true}); err != nil || len(report.Warnings) > 0 {
		s.Errorf("enforce with sockets held: %v, warnings %q", err, report.Warnings)
	}
}

func TestConntrack(t *testing.T) {
	full := Conntrack{First: true, Sockets: 200_000, Max: 262_144}
	for _, c := range []struct {
		is       Conntrack
		override bool
		tracking bool
		refused  bool
	}{
		{is: full, refused: true},
		{is: full, override: true},
		{is: full, tracking: true},
		{is: Conntrack{Sockets: 200_000, Max: 262_144}},
		{is: Conntrack{First: true, Sockets: 131_072, Max: 262_144}},
		{is: Conntrack{First: true, Sockets: 200_000}},
	} {
		r := &Redirect{config: Config{OverrideConntrack: c.override}}
		err := r.trackerHasRoom(&survey{tracking: c.tracking, report: Report{Conntrack: c.is}})
		if (err != nil) != c.refused {
			t.Errorf("%+v: %v", c.is, err)
		}
		if err != nil && !strings.Contains(err.Error(), "200000 sockets are open, and it holds 262144 connections") || err != nil && !strings.Contains(err.Error(), "nf_conntrack_max to 400000") {
			t.Errorf("message: %v", err)
		}
	}
	if n := openSockets("sockets: used 300\nTCP: inuse 5 orphan 1 tw 7 alloc 9 mem 1\nUDP: inuse 3 mem 2\nUDPLITE: inuse 8\nRAW: inuse 9\nTCP6: inuse 20\n"); n != 35 {
		t.Errorf("%d open sockets, want 35", n)
	}

	s := newHost(t)
	r := s.open(Config{UID: uid})
	for _, when := range []string{"before", "after"} {
		if c := s.install(r).Conntrack; !c.First || c.Max == 0 {
			s.Errorf("%s: %+v", when, c)
		}
	}
	s.load(BackendNFT, IPv4, "*filter\n-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\nCOMMIT\n")
	if s.install(r).Conntrack.First {
		s.Error("with a rule that needs it: first")
	}
}

// TestConntrackCrowdedLater has the tracker grow full after our rules have switched it on: what is installed may be
// written anew and in another mode. Without them it is refused.
func TestConntrackCrowdedLater(t *testing.T) {
	s := newHost(t)
	r := s.open(Config{UID: uid, Enforce: true})
	s.install(r)
	small := filepath.Join(t.TempDir(), "max")
	if err := os.WriteFile(small, []byte("2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		ln, err := s.lab.Instance.Listen(t.Context(), nil, "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
	}
	install := func() string {
		return s.sh(fmt.Sprintf("unshare -m sh -ec 'mount --bind %s %snf_conntrack_max; exec env %s=installer %s' || true", small, trackerSysctls, role, os.Args[0]))
	}
	s.expect("with rules of ours", install(), "")
	s.remove()
	s.sh("conntrack -F 2>/dev/null")
	if out := install(); !strings.Contains(out, "half of which should be free") {
		s.Errorf("without: %q", out)
	}
}

// TestProhibitRoute is systemd's lock (85-imds-early.network): a route that prohibits the endpoint, and one for who has
// its mark.
func TestProhibitRoute(t *testing.T) {
	s := newSite(t)
	s.sh("ip route add 169.254.169.254 dev eth0 table 100; ip route replace prohibit 169.254.169.254")
	r := s.open(Config{UID: uid})
	s.daemon(r)
	warned := func() string { return fmt.Sprint(s.install(r).Prohibitions) }
	if got := warned(); !strings.Contains(got, "a route prohibits 169.254.169.254") || !strings.Contains(got, "so do the daemon's, in spite of its mark 0x7fff0815") {
		s.Errorf("warnings: %q", got)
	}
	s.sh("ip rule add fwmark 0x7fff0815 lookup 100")
	if got := warned(); !strings.Contains(got, "a route prohibits 169.254.169.254") || strings.Contains(got, "so do") {
		s.Errorf("warnings with a way for the mark: %q", got)
	}
	s.expect("host client", s.ask(s.lab.Instance, client{}, endpoint[IPv4]), "EACCES")
	s.expect("the daemon", s.ask(s.lab.Instance, client{uid: uid, mark: defaultMark}, endpoint[IPv4]), "metadata")
}

// cgroup makes a cgroup and returns its path. It needs a cgroup2 tree.
func (s *site) cgroup() string {
	s.Helper()
	name := fmt.Sprintf("imdsgate-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(mount + "/cgroup.controllers"); err == nil {
			dir := mount + "/" + name
			if err := os.Mkdir(dir, 0o755); err != nil {
				s.Fatal(err)
			}
			s.Cleanup(func() {
				if err := os.Remove(dir); err != nil {
					s.Error(err)
				}
			})
			s.Setenv("CGROUP", dir)
			return name
		}
	}
	const missing = "needs a cgroup2 tree below /sys/fs/cgroup"
	if os.Getenv("CI") != "" {
		s.Fatal(missing)
	}
	s.Skip(missing)
	return ""
}

// TestCgroup forges the daemon from outside of its cgroup, and restarts the daemon.
func TestCgroup(t *testing.T) {
	forBackends(t, func(s *site, b Backend) {
		path := s.cgroup()
		r := s.open(Config{UID: uid, Backend: b, Cgroup: path})
		s.daemon(r)
		s.install(r)
		forger := client{uid: uid, mark: defaultMark}
		s.expect("mark and uid from outside", s.ask(s.lab.Instance, forger, endpoint[IPv4]), "host 169.254.169.254:80")
		s.expect("the daemon", s.actor("daemon").output(), "metadata")

		dir := os.Getenv("CGROUP")
		s.eventually("the cgroup is empty", func() bool { return syscall.Rmdir(dir) == nil })
		if err := os.Mkdir(dir, 0o755); err != nil {
			s.Fatal(err)
		}
		s.expect("the daemon after a restart, under the old rules", s.actor("daemon").output(), "host 169.254.169.254:80")
		if got := inWords(s.verify(r)); !strings.Contains(got, "IPv4 nat IMDSGATE-OUTPUT: rule 1 altered") {
			s.Errorf("differences: %q", got)
		}
		s.install(r)
		s.expect("the daemon after a restart", s.actor("daemon").output(), "metadata")
	})
}

// An actor is this program in another process inside the instance, playing a role.
type actor struct {
	*site
	cmd *exec.Cmd
	out bytes.Buffer
}

func (s *site) actor(r string) *actor {
	a := &actor{site: s, cmd: exec.Command("/proc/self/exe")}
	a.cmd.Env = append(os.Environ(), role+"="+r)
	a.cmd.Stdout, a.cmd.Stderr = &a.out, &a.out
	return a
}

func (a *actor) start() *actor {
	a.Helper()
	if err := a.lab.Instance.Start(a.cmd); err != nil {
		a.Fatal(err)
	}
	return a
}

func (a *actor) output() string {
	a.Helper()
	if a.cmd.Process == nil {
		a.start()
	}
	if err := a.cmd.Wait(); err != nil {
		a.Errorf("%v: %s", err, a.out.String())
	}
	return strings.TrimSuffix(a.out.String(), "\n")
}

// play is what an actor does.
func play(r string) error {
	ctx := context.Background()
	backend := BackendAuto
	if b := os.Getenv("BACKEND"); b != "" {
		if err := backend.UnmarshalText([]byte(b)); err != nil {
			return err
		}
	}
	switch r {
	case "daemon": // connects as the daemon does
		if err := os.WriteFile(os.Getenv("CGROUP")+"/cgroup.procs", []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return err
		}
		conn, err := client{uid: uid, mark: defaultMark}.connect(endpoint[IPv4])
		if err != nil {
			return err
		}
		b := make([]byte, 100)
		n, err := conn.Read(b)
		fmt.Print(string(b[:n]))
		return err
	case "installer": // installs, as fast as it can
		redirect, err := Open(ctx, Config{UID: uid, Backend: backend})
		if err != nil {
			return err
		}
		for range 5 {
			if _, err := redirect.Install(ctx); err != nil {
				return err
			}
		}
		return nil
	case "user": // does everything that the daemon does with rules
		redirect, err := Open(ctx, Config{UID: uid, Backend: backend, Enforce: true})
		if err != nil {
			return err
		}
		report, err := redirect.Install(ctx)
		if err != nil {
			return err
		}
		fmt.Println(hooksOf(report), report.Warnings)
		if _, err := redirect.Status(ctx); err != nil {
			return err
		}
		if _, err := Remove(ctx); err != nil {
			return err
		}
		return nil
	}
	if r == "without-nft" {
		runtime.LockOSThread()
		if err := withoutNetfilter(); err != nil {
			return err
		}
		_, enforcing, err := Installed(ctx)
		released := Release(ctx)
		removed, removeErr := Remove(ctx)
		fmt.Printf("%v %v, %v, %v %v", enforcing, err, released, removed, removeErr)
		return nil
	}
	return fmt.Errorf("no role %q", r)
}

// TestConcurrentInstall lets four processes install at the same time.
func TestConcurrentInstall(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		s.Setenv("BACKEND", b.String())
		r := s.open(Config{UID: uid, Backend: b})
		for range 3 {
			var all []*actor
			for range 4 {
				all = append(all, s.actor("installer").start())
			}
			for _, a := range all {
				a.output()
			}
			s.expect("differences", inWords(s.verify(r)), "")
			s.remove()
		}
	})
}

// TestPrivileges installs as an ordinary user, with the capabilities that each back end needs. See redirect_linux.go.
func TestPrivileges(t *testing.T) {
	onHosts(t, func(s *site, b Backend) {
		s.Setenv("BACKEND", b.String())
		s.sh("iptables-legacy -t filter -S >/dev/null; ip6tables-legacy -S >/dev/null") // makes the lock file
		as := func(capabilities ...uintptr) *actor {
			a := s.actor("user")
			a.cmd.SysProcAttr = &syscall.SysProcAttr{
				Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: capabilities,
			}
			return a
		}
		s.expect("as a user", as(unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_DAC_READ_SEARCH).output(),
			"IPv4: host forwarded; IPv6: host forwarded []")
	})
}
