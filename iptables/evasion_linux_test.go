package iptables

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestEvasions has somebody with CAP_NET_ADMIN on the host try to get past the redirect, or to lead the daemon
// elsewhere, in every way that the kernel offers, and prints what became of a client, and what was told.
func TestEvasions(t *testing.T) {
	const nft = "I=iptables-nft\n"
	for _, c := range []struct {
		name, do string
		// What a client of this host gets, in audit and in enforce: "host" is the daemon, "metadata" the service past it.
		audit, enforce string
		told           string // "" where nothing is
	}{
		{"accept before ours, in nat", "$I -t nat -I OUTPUT -d 169.254.169.254 -j ACCEPT", "host", "host", "nat OUTPUT: jump at place 2 instead of 1"},
		{"redirect to another port, before ours", "$I -t nat -I OUTPUT -d 169.254.169.254 -p tcp -j REDIRECT --to-ports 8080", "ECONNREFUSED", "ECONNREFUSED", "lock: redirects"},
		{"NOTRACK in raw", "$I -t raw -I OUTPUT -d 169.254.169.254 -j NOTRACK", "metadata", "ECONNREFUSED", "evasion: iptables-nft, table raw"},
		{"NOTRACK for everything", "$I -t raw -I OUTPUT -j NOTRACK", "metadata", "ECONNREFUSED", "evasion: iptables-nft, table raw"},
		{"NOTRACK for a user", "$I -t raw -I OUTPUT -m owner --uid-owner 0 -j NOTRACK", "metadata", "ECONNREFUSED", "evasion: iptables-nft, table raw"},
		{"notrack in a table of nft", "nft 'table inet t { chain o { type filter hook output priority -300; ip daddr 169.254.169.254 notrack; }; }'", "metadata", "ECONNREFUSED", "evasion: nft, table inet t"},
		{"NOTRACK on lo", "$I -t raw -I OUTPUT -o lo -j NOTRACK", "metadata", "metadata", "lock: untracks-answers"},
		{"accept in a nat chain of nft, earlier", "nft 'table ip t { chain o { type nat hook output priority -150; ip daddr 169.254.169.254 accept; }; }'", "host", "host", ""},
		{"dnat in a nat chain of nft, earlier", "nft 'table ip t { chain o { type nat hook output priority -150; ip daddr 169.254.169.254 tcp dport 80 dnat to 169.254.169.254:80; }; }'", "metadata", "metadata", "lock: redirects"},
		{"drop in a table of nft", "nft 'table inet t { chain o { type filter hook output priority -150; ip daddr 169.254.169.254 drop; }; }'", "timeout", "timeout", "lock: refuses"},
		{"the daemon's mark, in mangle", "$I -t mangle -I OUTPUT -d 169.254.169.254 -j MARK --set-mark 0x7fff0815", "host", "host", ""},
		{"another zone", "$I -t raw -I OUTPUT -d 169.254.169.254 -j CT --zone 7", "timeout", "timeout", "raw OUTPUT: jump at place 2 instead of 1"},
		{"a rule of routing to another table", "ip route add default dev eth0 table 99; ip rule add to 169.254.169.254 lookup 99", "host", "host", ""},
		{"a rule of routing to another interface", "ip link add evil type bridge; ip link set evil up; ip route add default dev evil table 99; ip rule add to 169.254.169.254 lookup 99", "host", "host", "way: clients to 169.254.169.254: by evil"},
		{"a rule of routing for the daemon's mark", "ip link add evil type bridge; ip link set evil up; ip route add default dev evil table 99; ip rule add fwmark 0x7fff0815 lookup 99", "host", "host", "way: the daemon to 169.254.169.254: by evil"},
		{"a route that prohibits", "ip route replace prohibit 169.254.169.254", "EACCES", "EACCES", "way: clients to 169.254.169.254: prohibited by a route"},
		{"a blackhole", "ip route replace blackhole 169.254.169.254", "EINVAL", "EINVAL", "way: clients to 169.254.169.254: dropped by a route"},
		{"the service's address on this host", "ip addr add 169.254.169.254/32 dev lo", "host", "host", "which is this host itself"},
		{"egress of a device, by nft", "nft 'table netdev t { chain e { type filter hook egress device eth0 priority 0; ip daddr 169.254.169.254 drop; }; }'", "host", "host", "way: through eth0: nft egress chain t e"},
		{"BPF of traffic control", "tc qdisc add dev eth0 clsact; tc filter add dev eth0 egress bpf da bytecode '1,6 0 0 4294967295,'", "host", "host", "way: through eth0: tc egress filter bpf"},
		{"our port taken from the guard", "$I -I INPUT -p tcp --dport 254 -j ACCEPT", "host", "host", "filter INPUT: jump at place 2 instead of 1"},
	} {
		for _, enforce := range []bool{false, true} {
			mode, want := "audit", c.audit
			if enforce {
				mode, want = "enforce", c.enforce
			}
			t.Run(strings.ReplaceAll(c.name, " ", "-")+"/"+mode, func(t *testing.T) {
				s := newSite(t)
				r := s.open(Config{UID: uid, Backend: BackendNFT, Enforce: enforce})
				s.daemon(r)
				s.install(r)
				drifts := s.watch(r, time.Hour)
				before := s.ask(s.lab.Instance, client{}, endpoint[IPv4])
				if !strings.HasPrefix(before, "host") {
					t.Fatalf("at first: %s", before)
				}
				began := time.Now()
				s.sh(nft + c.do)
				var told []string
				for wait := time.After(within(c.told)); wait != nil; {
					select {
					case d := <-drifts:
						told = append(told, inAll(d)...)
						if c.told != "" && strings.Contains(strings.Join(told, "\n"), c.told) {
							wait = nil
						}
					case <-wait:
						wait = nil
					}
				}
				took := time.Since(began)
				all := strings.Join(told, "\n")
				if !strings.Contains(all, c.told) || c.told == "" && all != "" {
					t.Errorf("told %q, want %q", all, c.told)
				}
				got := s.ask(s.lab.Instance, client{}, endpoint[IPv4])
				if !strings.HasPrefix(got, want) {
					t.Errorf("a client gets %q, want %s", got, want)
				}
				when := "not told"
				if c.told != "" {
					when = fmt.Sprintf("told after %d ms", took.Milliseconds())
				}
				t.Logf("| %s | %s | %s | %s: %s |", c.name, mode, got, when, c.told)
			})
		}
	}
}

// within is how long to wait: for nothing, as long as what is told takes.
func within(told string) time.Duration {
	if told == "" {
		return 2 * time.Second
	}
	return 30 * time.Second
}

// inAll is everything that a drift tells.
func inAll(d Drift) (told []string) {
	for _, f := range d.Found {
		told = append(told, f.String())
	}
	for _, l := range d.Report.Locks {
		told = append(told, "lock: "+l.Kind.String()+" "+l.String())
	}
	for _, e := range d.Evasions {
		told = append(told, "evasion: "+e.String())
	}
	for _, w := range d.After {
		told = append(told, "way: "+w.String())
	}
	if d.Err != nil {
		told = append(told, d.Err.Error())
	}
	return told
}
