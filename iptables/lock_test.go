package iptables

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A lockCase is a file of testdata/locks: what iptables-save or nft prints, with "#! HOOK KIND, …" after each line
// that is a lock, and what else is expected in comments at the top.
type lockCase struct {
	family  Family
	listed  []netip.AddrPort // endpoints beside the usual ones
	admit   bool
	unclear int
	rules   string
	want    []string // lines with their locks
}

func readLockCase(t *testing.T, file string) lockCase {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var c lockCase
	var rules strings.Builder
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		switch line {
		case "# family: IPv6":
			c.family = IPv6
		case "# admit":
			c.admit = true
		case "# unclear: 1":
			c.unclear = 1
		}
		if endpoint, ok := strings.CutPrefix(line, "# endpoint: "); ok {
			c.listed = append(c.listed, netip.MustParseAddrPort(endpoint))
		}
		line, locks, isLock := strings.Cut(line, " #! ")
		rules.WriteString(line + "\n")
		if isLock {
			for lock := range strings.SplitSeq(locks, ", ") {
				c.want = append(c.want, line+" #! "+lock)
			}
		}
	}
	c.rules = rules.String()
	slices.Sort(c.want)
	return c
}

// asLine writes a lock as the line that earns it.
func (l Lock) asLine() string {
	line := "-A " + l.Chain + " " + l.Rule
	if l.Rule == "" {
		line = ":" + l.Chain + " DROP [0:0]"
	}
	return line + " #! " + l.Hook.String() + " " + l.Kind.String()
}

// usualWays are the routes of an instance.
var usualWays = map[netip.AddrPort]way{
	netip.MustParseAddrPort("169.254.169.254:80"): {netip.MustParseAddr("172.31.0.10"), "eth0"},
	netip.MustParseAddrPort("[fd00:ec2::254]:80"): {netip.MustParseAddr("fd00:ec2:1::10"), "eth0"},
}

func (c lockCase) config(uid uint32) Config {
	config := Config{UID: uid}.WithDefaults()
	config.Endpoints = append(config.Endpoints, c.listed...)
	return config
}

func (c lockCase) check(t *testing.T, locks []Lock, admit bool, unclear int) {
	t.Helper()
	var got []string
	for _, l := range locks {
		if l.Family == c.family {
			got = append(got, l.asLine())
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff(c.want, got); diff != "" {
		t.Errorf("locks, - expected, + found:\n%s", diff)
	}
	if admit != c.admit {
		t.Errorf("admit redirected packets: %v, want %v", admit, c.admit)
	}
	if unclear != c.unclear {
		t.Errorf("%d rules unclear, want %d", unclear, c.unclear)
	}
}

func TestLocks(t *testing.T) {
	files, err := filepath.Glob("testdata/locks/*.rules")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".rules"), func(t *testing.T) {
			c := readLockCase(t, file)
			saved, err := parseSave(c.rules)
			if err != nil {
				t.Fatal(err)
			}
			const store = "iptables-nft"
			found, err := rules{c.family: saved.judged(store)}.locks(c.config(990), c.family, store, usualWays)
			if err != nil {
				t.Fatal(err)
			}
			c.check(t, found.locks, found.admit, len(found.unclear))
		})
	}
}

// With an override, rules that refuse are ignored, and redirected packets let past those of our own store. Past others
// they cannot be.
func TestLocksOverridden(t *testing.T) {
	saved, err := parseSave(readLockCase(t, "testdata/locks/egress-root-only.rules").rules)
	if err != nil {
		t.Fatal(err)
	}
	for mine, want := range map[string]string{
		"iptables-nft":    "admit true, [refuses]",
		"iptables-legacy": "admit false, [refuses drops-redirected]",
	} {
		c := Config{UID: 990, OverrideForeign: true}.WithDefaults()
		found, err := rules{IPv4: saved.judged("iptables-nft")}.locks(c, IPv4, mine, usualWays)
		if err != nil {
			t.Fatal(err)
		}
		var kinds []LockKind
		for _, l := range found.locks {
			kinds = append(kinds, l.Kind)
		}
		if got := fmt.Sprintf("admit %v, %v", found.admit, kinds); got != want {
			t.Errorf("%s: %s, want %s", mine, got, want)
		}
	}
}

// The rules that deny everything to everybody in another store than ours cannot be admitted by us.
func TestLocksInAnotherStore(t *testing.T) {
	saved, err := parseSave(readLockCase(t, "testdata/locks/egress-allow-list.rules").rules)
	if err != nil {
		t.Fatal(err)
	}
	found, err := rules{IPv4: saved.judged("iptables-legacy")}.locks(Config{UID: 990}.WithDefaults(), IPv4, "iptables-nft", usualWays)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range found.locks {
		got = append(got, l.asLine())
	}
	want := []string{
		"-A OUTPUT -j REJECT --reject-with icmp-port-unreachable #! host drops-redirected",
		":INPUT DROP [0:0] #! forwarded drops-redirected",
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" || found.admit {
		t.Errorf("admit %v, locks, - expected, + found:\n%s", found.admit, diff)
	}
}

func TestLockString(t *testing.T) {
	l := Lock{IPv4, ForwardedHook, Refuses, "iptables-nft", "filter", "DOCKER-USER", "-d 169.254.169.254/32 -j DROP"}
	const want = `iptables-nft, table filter, chain DOCKER-USER, rule "-d 169.254.169.254/32 -j DROP" keeps packets from ` +
		`the metadata service, and redirected packets would not meet it (IPv4, forwarded hook): remove it, or set redirect.override_foreign: ` +
		`true so that policy decides instead`
	if got := l.String(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// Each kind has a fix of its own.
func TestLockFix(t *testing.T) {
	kinds := map[string]LockKind{}
	for kind := range lockKindNames {
		l := Lock{Kind: LockKind(kind)}
		if other, known := kinds[l.Fix()]; known || l.Fix() == "" {
			t.Errorf("%v is to be dealt with like %v: %q", l.Kind, other, l.Fix())
		}
		kinds[l.Fix()] = l.Kind
	}
}

func TestRefusal(t *testing.T) {
	for _, c := range []struct {
		name     string
		packet   packet
		override bool
		rules    string
		want     string
	}{
		{name: "policy", want: "FORWARD", rules: `
*filter
:FORWARD DROP [0:0]
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
COMMIT`, packet: packet{in: "pod0", out: "eth0"}},
		{name: "policy, after chains that give all back", want: "FORWARD", rules: `
*filter
:FORWARD DROP [0:0]
:MARKED - [0:0]
:EMPTY - [0:0]
-A FORWARD -m mark --mark 0x1 -j MARKED
-A FORWARD -m mark --mark 0x2 -g EMPTY
-A FORWARD -m mark --mark 0x3 -j RETURN
-A MARKED -m mark --mark 0x4 -j RETURN
-A MARKED -p udp -j ACCEPT
COMMIT`, packet: packet{in: "pod0", out: "eth0"}},
		{name: "policy, after a chain that may have accepted", rules: `
*filter
:FORWARD DROP [0:0]
:MARKED - [0:0]
-A FORWARD -m mark --mark 0x1 -j MARKED
-A MARKED -j ACCEPT
COMMIT`, packet: packet{in: "pod0", out: "eth0"}},
		{name: "another interface is accepted", rules: `
*filter
:FORWARD DROP [0:0]
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
COMMIT`, packet: packet{in: "docker0", out: "eth0"}},
		{name: "source", want: "FORWARD", rules: `
*filter
:FORWARD ACCEPT [0:0]
-A FORWARD -s 172.17.0.0/24 -j DROP
COMMIT`, packet: packet{in: "docker0", out: "eth0"}},
		{name: "another source", rules: `
*filter
:FORWARD ACCEPT [0:0]
-A FORWARD ! -s 172.17.0.0/24 -j DROP
COMMIT`, packet: packet{in: "docker0", out: "eth0"}},
		{name: "perhaps", rules: `
*filter
:FORWARD ACCEPT [0:0]
-A FORWARD -m mark --mark 0x1 -j DROP
COMMIT`, packet: packet{in: "docker0", out: "eth0"}},
		{name: "by name", want: "PREROUTING", rules: `
*raw
:PREROUTING ACCEPT [0:0]
-A PREROUTING -d 169.254.169.254/32 -j DROP
COMMIT`, packet: packet{in: "docker0", out: "eth0"}},
		{name: "by name, overridden", override: true, rules: `
*raw
:PREROUTING ACCEPT [0:0]
-A PREROUTING -d 169.254.169.254/32 -j DROP
COMMIT`, packet: packet{in: "docker0", out: "eth0"}},
		{name: "ours do not count", rules: `
*filter
:FORWARD ACCEPT [0:0]
:IMDSGATE-FORWARD - [0:0]
-A FORWARD -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j IMDSGATE-FORWARD
-A IMDSGATE-FORWARD -p tcp -j REJECT --reject-with tcp-reset
COMMIT`, packet: packet{in: "docker0", out: "eth0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			saved, err := parseSave(strings.TrimPrefix(c.rules, "\n"))
			if err != nil {
				t.Fatal(err)
			}
			c.packet.src = netip.MustParseAddrPort("172.17.0.2:40000")
			c.packet.dst = netip.MustParseAddrPort("169.254.169.254:80")
			s, refused := rules{IPv4: saved.judged("iptables-nft")}.refusal(IPv4, c.packet, c.override)
			if refused != (c.want != "") || s.chain != c.want {
				t.Errorf("refused %v in chain %q, want %q", refused, s.chain, c.want)
			}
		})
	}
}

// A text need not be a rule set that the kernel would take.
func TestRulesWithoutEnd(t *testing.T) {
	loop := "*filter\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n-A OUTPUT -j A\n-A A -j B\n-A B -j A\n-A B -j A\nCOMMIT\n"
	var wide strings.Builder
	wide.WriteString("*filter\n:OUTPUT ACCEPT [0:0]\n")
	for c := 'a'; c < 'z'; c++ {
		wide.WriteString(":" + string(c) + " - [0:0]\n")
	}
	wide.WriteString("-A OUTPUT -j a\n")
	for c := 'a'; c < 'y'; c++ {
		for range 4 {
			wide.WriteString("-A " + string(c) + " -m limit --limit 5/sec -j " + string(c+1) + "\n")
		}
	}
	wide.WriteString("COMMIT\n")
	for name, text := range map[string]string{"loop": loop, "wide": wide.String()} {
		saved, err := parseSave(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (rules{IPv4: saved.judged("x")}).locks(Config{}.WithDefaults(), IPv4, "x", nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
