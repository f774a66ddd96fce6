package iptables

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// others are rules that a host has before us: those of Docker, kube-proxy, firewalld and a hardening guide.
const others = `
iptables-%[1]s -N DOCKER-USER; iptables-%[1]s -A DOCKER-USER -j RETURN; iptables-%[1]s -I FORWARD -j DOCKER-USER
iptables-%[1]s -t nat -N DOCKER; iptables-%[1]s -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
iptables-%[1]s -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
iptables-%[1]s -t nat -N KUBE-SERVICES; iptables-%[1]s -t nat -I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
iptables-%[1]s -A INPUT -i lo -j ACCEPT; iptables-%[1]s -A INPUT -p tcp --dport 22 -j ACCEPT
ip6tables-%[1]s -A INPUT -i lo -j ACCEPT
nft -f testdata/native/firewalld.nft
ip rule add pref 5000 to 10.9.0.0/16 lookup 99; ip route add 10.9.0.0/16 dev lo table 99
`

// others prints everything that is not ours.
func (s *site) others(b Backend) string {
	s.Helper()
	text := s.sh(fmt.Sprintf("iptables-%s-save; ip6tables-%[1]s-save", b))
	var all strings.Builder
	for table := range strings.SplitSeq(text, "COMMIT\n") {
		_, table, _ = strings.Cut(table, "*")
		var kept []string
		for line := range strings.Lines(table) {
			if !strings.Contains(line, own) && line[0] != '#' {
				kept = append(kept, counters.ReplaceAllString(line, "[0:0]"))
			}
		}
		table = strings.Join(kept, "")
		if strings.Contains(table, "\n-A ") || strings.Contains(table, " - [") || strings.Contains(table, "DROP [") {
			all.WriteString("*" + table)
		}
	}
	all.WriteString(s.sh("nft list tables | grep -v ' ip6* \\(filter\\|nat\\|raw\\|mangle\\)$' || true; nft list table inet firewalld 2>&1 || true; " +
		"ip rule; ip -6 rule; ip route show table all | grep -v " + LinkName + "; ip -6 route show table all | grep -v " + LinkName))
	return volatile.ReplaceAllString(all.String(), "")
}

// volatile is what differs between two hosts although nobody has changed it: their own addresses.
var volatile = regexp.MustCompile(`(?m)^.*(fe80::|ff00::|fd00:|multicast|anycast).*\n`)

// TestRepaired changes what is ours, as an attacker would and as other programs do when they start again. Each is
// repaired, told with who did it, and leaves what belongs to others exactly as it is on a host without us.
func TestRepaired(t *testing.T) {
	for _, b := range backends {
		t.Run(b.String(), func(t *testing.T) {
			t.Parallel()
			s, without := newHost(t), newHost(t)
			s.sh(fmt.Sprintf(others, b))
			without.sh(fmt.Sprintf(others, b))
			for _, c := range []struct {
				name, do, found string
				by              string // "" where the kernel does not tell
				nftOnly         bool
			}{
				{name: "chain flushed", do: "$I -t nat -F IMDSGATE-OUTPUT", found: "nat IMDSGATE-OUTPUT: rule 1 missing", by: "$I"},
				{name: "chain deleted", do: `printf '*filter\n-F INPUT\n-F IMDSGATE-INPUT\n-X IMDSGATE-INPUT\n-A INPUT -i lo -j ACCEPT\nCOMMIT\n' | $I-restore --noflush || printf '*filter\n-F INPUT\n-A INPUT -i lo -j ACCEPT\nCOMMIT\n' | $I-restore --noflush`,
					found: "filter IMDSGATE-INPUT: chain missing", by: "$I-restor"},
				{name: "jump deleted", do: "$I -t nat -D OUTPUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j IMDSGATE-OUTPUT", found: "nat OUTPUT: jump missing", by: "$I"},
				{name: "hidden behind another", do: "$I -t nat -I OUTPUT -d 169.254.169.254 -j ACCEPT", found: "nat OUTPUT: jump at place 2 instead of 1", by: "$I"},
				{name: "hidden in ours", do: "$I -t nat -I IMDSGATE-OUTPUT -j RETURN", found: "nat IMDSGATE-OUTPUT: rule 1 altered", by: "$I"},
				{name: "altered", do: "$I -t nat -R IMDSGATE-OUTPUT 2 -p tcp -m tcp --syn -j REDIRECT --to-ports 8080", found: "nat IMDSGATE-OUTPUT: rule 2 altered", by: "$I"},
				{name: "zone rules flushed", do: "$I -t raw -F", found: "raw", by: "$I"},
				{name: "IPv6 flushed", do: "ip6${I#ip} -t nat -F; ip6${I#ip} -F", found: "IPv6 nat", by: "ip6"},
				{name: "link deleted", do: "ip link del " + LinkName, found: "link imdsgate0 missing"},
				{name: "link down", do: "ip link set down " + LinkName, found: "link imdsgate0 down"},
				{name: "address deleted", do: "ip addr del 169.254.213.80/32 dev " + LinkName, found: "address 169.254.213.80"},
				{name: "Docker starts again", do: `$I -t nat -F DOCKER; $I -t nat -D OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
					$I -t nat -I OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER; $I -D FORWARD -j DOCKER-USER; $I -I FORWARD -j DOCKER-USER`,
					found: "jump at place 2 instead of 1", by: "$I"},
				{name: "kube-proxy writes its rules", do: `printf '*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-X\n-A KUBE-SVC-X -j RETURN\n-I OUTPUT 1 -m comment --comment "kubernetes again" -j KUBE-SERVICES\nCOMMIT\n' | $I-restore --noflush`,
					found: "nat OUTPUT: jump at place 2 instead of 1", by: "$I-restor"},
				{name: "iptables-restore", do: `printf '*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -d 10.1.1.1/32 -j ACCEPT\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i lo -j ACCEPT\nCOMMIT\n' | $I-restore`,
					found: "nat OUTPUT: jump missing", by: "$I-restor"},
				{name: "a hardening guide", do: `$I -F; $I -P INPUT DROP; $I -P FORWARD DROP; $I -A INPUT -i lo -j ACCEPT; $I -A OUTPUT -o lo -j ACCEPT; $I -A INPUT -s 127.0.0.0/8 -j DROP
					$I -A OUTPUT -p tcp -m state --state NEW,ESTABLISHED -j ACCEPT; $I -A INPUT -p tcp -m state --state ESTABLISHED -j ACCEPT; $I -A INPUT -p tcp --dport 22 -m state --state NEW -j ACCEPT`,
					found: "filter INPUT: jump missing", by: "$I"},
				{name: "nft flush ruleset", do: "nft flush ruleset", found: "nat OUTPUT: jump missing", by: "nft", nftOnly: true},
				{name: "nft -f of Debian", do: `printf 'flush ruleset\ntable inet filter {\n chain input { type filter hook input priority 0; }\n chain output { type filter hook output priority 0; }\n}\n' | nft -f -`,
					found: "nat OUTPUT: jump missing", by: "nft", nftOnly: true},
			} {
				if c.nftOnly && b == BackendLegacy {
					continue // they do not touch such rules
				}
				tool := "iptables-" + b.String()
				do := "I=" + tool + "\n" + c.do
				r := s.open(Config{UID: uid, Backend: b, Enforce: true})
				s.install(r)
				interval := time.Hour
				if b == BackendLegacy {
					interval = 5 * time.Second // for the one that leaves as many rules of the same size
				}
				drifts, stop := s.startWatch(r, interval)
				began := time.Now()
				s.sh(do)
				changed := time.Now()
				// What takes several steps may be seen, and repaired, in the middle.
				words, by, ended := "", "", time.After(30*time.Second)
				for !strings.Contains(words, c.found) && ended != nil {
					select {
					case d := <-drifts:
						words += inWords(d.Found) + "\n"
						if by == "" && len(d.By) > 0 {
							by = d.By[0].Name
						}
						if strings.Contains(words, c.found) {
							s.Logf("%-28s repaired %4d ms after it was done, %4d ms after it was begun; by %v",
								c.name, time.Since(changed).Milliseconds(), time.Since(began).Milliseconds(), d.By)
						}
						if d.Repaired != 1 || d.Err != nil {
							s.Errorf("%s: repaired %d, %v", c.name, d.Repaired, d.Err)
						}
					case <-ended:
						ended = nil
						s.Errorf("%s: not noticed, but\n%s", c.name, words)
					}
				}
				want := strings.ReplaceAll(c.by, "$I", tool)
				if b == BackendLegacy {
					want = ""
				}
				if want = want[:min(len(want), 15)]; !strings.HasPrefix(by, want) || (by == "") != (want == "") {
					s.Errorf("%s: changed by %q, want %q", c.name, by, want)
				}
				s.eventually("the differences of "+c.name, func() bool { return inWords(s.verify(r)) == "" })
				stop()
				without.sh("set +e\nexec 2>/dev/null\n" + do + "\ntrue")
				if have, want := s.others(b), without.others(b); have != want {
					s.Fatalf("what belongs to others after %s:\n%s\nwithout us it is\n%s", c.name, have, want)
				}
			}
		})
	}
}
