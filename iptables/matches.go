package iptables

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// judged returns the chains of a rule set that the kernel calls for packets, without our rules.
func (r *ruleset) judged(store string) []*base {
	var bases []*base
	for _, t := range r.tables {
		chains := make(map[string]*judgedChain)
		for _, c := range t.chains {
			h, priority, isBase := builtIn(t.name, c.name)
			switch {
			case ours(c.name):
			case isBase && c.policy != "-":
				b := &base{store: store, table: t.name, hook: h, priority: priority, drops: c.policy == "DROP"}
				b.name = c.name
				bases = append(bases, b)
				chains[c.name] = &b.judgedChain
			default:
				chains[c.name] = &judgedChain{name: c.name}
			}
		}
		for _, c := range t.chains {
			if j := chains[c.name]; j != nil {
				for _, rule := range c.rules {
					if !leadsToOurs(rule) {
						j.rules = append(j.rules, judgeRule(rule, chains))
					}
				}
			}
		}
	}
	return bases
}

// Priorities of the tables at their hooks (include/uapi/linux/netfilter_ipv4.h, iptables/xtables-nft.c).
var priorities = map[string]int{"raw": -300, "mangle": -150, "nat": dstnat, "filter": 0, "security": 50}

func builtIn(table, chain string) (hook, int, bool) {
	priority, known := priorities[table]
	if !known {
		return hookElse, 0, false
	}
	switch chain {
	case "PREROUTING":
		return hookPrerouting, priority, true
	case "INPUT":
		return hookInput, priority, true
	case "FORWARD":
		return hookForward, priority, true
	case "OUTPUT":
		return hookOutput, priority, true
	case "POSTROUTING":
		return hookElse, priority, true
	}
	return hookElse, 0, false
}

// judgeRule reads one rule. An option that is not known makes a condition that could be met or not.
func judgeRule(text string, chains map[string]*judgedChain) judgedRule {
	r := judgedRule{text: text}
	all := options(text)
	for i, o := range all {
		if o.name == "-j" || o.name == "-g" {
			r.aim(o, chains)
			r.port = localPort(all[i+1:])
			if slices.ContainsFunc(all[i+1:], func(of option) bool { return of.name == "--notrack" }) {
				r.verdict = untrack
			}
			break // what follows are the target's own options
		}
		if c, matters := o.judge(); matters {
			if o.negated {
				c = negate(c)
			}
			r.conditions = append(r.conditions, c)
		}
	}
	return r
}

func (r *judgedRule) aim(o option, chains map[string]*judgedChain) {
	switch target := o.value(); target {
	case "ACCEPT", "QUEUE", "NFQUEUE":
		r.verdict = accept
	case "DROP", "REJECT", "TARPIT", "DELUDE":
		r.verdict = drop
	case "RETURN":
		r.verdict = giveBack
	case "DNAT", "REDIRECT", "TPROXY":
		r.verdict = divert
	case "NOTRACK":
		r.verdict = untrack
	default:
		if r.target = chains[target]; r.target == nil {
			return // LOG, MARK and the like
		}
		r.verdict = jump
		if o.name == "-g" {
			r.verdict = goTo
		}
	}
}

// localPort reads the options of REDIRECT, or of DNAT to loopback.
func localPort(target []option) uint16 {
	for _, o := range target {
		switch o.name {
		case "--to-ports":
			port, _ := strconv.ParseUint(o.value(), 10, 16) // 0 for a range
			return uint16(port)
		case "--to-destination":
			if to, err := netip.ParseAddrPort(o.value()); err == nil && to.Addr().IsLoopback() {
				return to.Port()
			}
		}
	}
	return 0
}

// judge returns the condition that an option states; matters is false if it is none, like "-m tcp".
func (o option) judge() (c condition, matters bool) {
	value := o.value()
	c.holds = unknown
	switch o.name {
	case "-m":
		return c, !slices.Contains(explained, value)
	case "--comment":
		return c, false
	case "-p":
		c.holds = func(*packet) degree { return known(value == "tcp" || value == "6" || value == "all" || value == "0") }
	case "-s":
		in, _ := addressMask(value)
		c.holds = source(in)
	case "--src-range":
		c.holds = source(addressRange(value))
	case "-d":
		in, every := addressMask(value)
		c = condition{holds: destination(in), dst: !every}
	case "--dst-range":
		c = condition{holds: destination(addressRange(value)), dst: true}
	case "--match-set":
		c.dst = len(o.values) > 1 && slices.Contains(strings.Split(o.values[1], ","), "dst")
	case "-i":
		c.holds = comesIn(value, '+')
	case "-o":
		c.holds = goesOut(value, '+')
	case "--dport", "--dports":
		c.holds = func(p *packet) degree { return inPorts(value, p.dst.Port()) }
	case "--sport", "--sports":
		c.holds = func(p *packet) degree { return sourcePort(value, p) }
	case "--ports":
		c.holds = func(p *packet) degree { return max(inPorts(value, p.dst.Port()), sourcePort(value, p)) }
	case "--syn":
		c.holds = func(*packet) degree { return all }
	case "--tcp-flags":
		if len(o.values) == 2 {
			c.holds = func(*packet) degree { return known(isSYN(o.values[0], o.values[1])) }
		}
	case "--ctstate", "--state":
		states := strings.Split(value, ",")
		c.holds = func(p *packet) degree { return inStates(states, p) }
	case "--uid-owner":
		from, to, _ := strings.Cut(value, "-")
		low, lowErr := strconv.ParseUint(from, 10, 32)
		high, highErr := strconv.ParseUint(cmp.Or(to, from), 10, 32)
		if lowErr == nil && highErr == nil {
			c.holds = byUser(uint32(low), uint32(high))
		}
	case "--gid-owner", "--suppl-groups", "--path", "--cgroup", "--pid-owner", "--sid-owner":
		c.holds = byProcess
	case "--socket-exists":
		c.holds = func(p *packet) degree { return known(p.local) }
	case "--dst-type":
		c.holds = func(p *packet) degree { return addressType(value, known(p.dnat)) }
	case "--src-type":
		c.holds = func(p *packet) degree { return addressType(value, known(p.local)) }
	case "-f":
		c.holds = func(*packet) degree { return no }
	}
	return c, true
}

// explained are the matches of which judge knows the options; "-m NAME" by itself states nothing.
var explained = []string{
	"tcp", "comment", "iprange", "set", "multiport", "conntrack", "state", "owner", "cgroup", "addrtype", "mark", "limit",
}

// addressMask reads ADDRESS, ADDRESS/LENGTH and ADDRESS/MASK. in is nil if it is none of these.
func addressMask(text string) (in func(netip.Addr) bool, every bool) {
	address, mask, hasMask := strings.Cut(text, "/")
	a, err := netip.ParseAddr(address)
	if err != nil {
		return nil, false
	}
	if !hasMask {
		mask = strconv.Itoa(a.BitLen())
	}
	if p, err := netip.ParsePrefix(address + "/" + mask); err == nil {
		return p.Contains, p.Bits() == 0
	}
	m, err := netip.ParseAddr(mask)
	if err != nil || m.BitLen() != a.BitLen() {
		return nil, false
	}
	bits := m.AsSlice()
	masked := func(a netip.Addr) []byte {
		b := a.AsSlice()
		for i := range b {
			b[i] &= bits[i]
		}
		return b
	}
	want := masked(a)
	return func(b netip.Addr) bool { return b.BitLen() == a.BitLen() && slices.Equal(masked(b), want) }, m.IsUnspecified()
}

// addressRange reads FIRST-LAST. in is nil if it is not that.
func addressRange(text string) (in func(netip.Addr) bool) {
	from, to, _ := strings.Cut(text, "-")
	first, firstErr := netip.ParseAddr(from)
	last, lastErr := netip.ParseAddr(cmp.Or(to, from))
	if firstErr != nil || lastErr != nil {
		return nil
	}
	return func(a netip.Addr) bool {
		return a.BitLen() == first.BitLen() && first.Compare(a) <= 0 && a.Compare(last) <= 0
	}
}

// inPorts judges a list of ports and of ranges written with a colon.
func inPorts(list string, port uint16) degree {
	for item := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(item, ":")
		if isRange {
			from, to = cmp.Or(from, "0"), cmp.Or(to, "65535")
		} else {
			to = from
		}
		low, lowErr := strconv.ParseUint(from, 10, 16)
		high, highErr := strconv.ParseUint(to, 10, 16)
		if lowErr != nil || highErr != nil {
			return maybe
		}
		if uint64(port) >= low && uint64(port) <= high {
			return all
		}
	}
	return no
}

func sourcePort(list string, p *packet) degree {
	if p.src.Port() == 0 {
		return maybe
	}
	return inPorts(list, p.src.Port())
}

// isSYN reports whether a SYN has, of the flags in mask, exactly those in set.
func isSYN(mask, set string) bool {
	masked := mask == "ALL" || slices.Contains(strings.Split(mask, ","), "SYN")
	if masked {
		return set == "SYN"
	}
	return set == "NONE"
}

func inStates(states []string, p *packet) degree {
	return known(slices.Contains(states, "NEW") || p.dnat && slices.Contains(states, "DNAT"))
}

// addressType judges -m addrtype. An endpoint is another machine's address, and what was redirected is for ours.
func addressType(types string, isLocal degree) degree {
	d := no
	for t := range strings.SplitSeq(types, ",") {
		switch t {
		case "LOCAL":
			d = max(d, isLocal)
		case "UNICAST":
			d = max(d, isLocal.not())
		case "BROADCAST", "MULTICAST", "ANYCAST", "UNSPEC":
		default:
			d = max(d, maybe)
		}
	}
	return d
}
