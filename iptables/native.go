package iptables

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// parseNative reads the output of "nft -j list ruleset" (libnftables-json(5)) and returns, by family, the chains that
// the kernel calls, without those that iptables-save prints too. Statements and expressions that are not known make a
// condition that could be met or not.
func parseNative(text []byte) (native, error) {
	var list struct {
		Nftables []struct {
			Chain *nativeChain
			Rule  *nativeRule
			Set   *nativeSet
			Map   *nativeSet
		}
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return native{}, fmt.Errorf("native rules: %w", err)
	}
	n := native{bases: make(map[Family][]*base), sets: make(map[object]nativeSet), chains: make(map[object]*judgedChain), devices: make(map[string][]string)}
	for _, o := range list.Nftables {
		switch {
		case o.Set != nil:
			n.sets[object{o.Set.Family, o.Set.Table, o.Set.Name}] = *o.Set
		case o.Map != nil:
			n.sets[object{o.Map.Family, o.Map.Table, o.Map.Name}] = *o.Map
		case o.Chain != nil:
			c := o.Chain
			b := c.base()
			n.chains[object{c.Family, c.Table, c.Name}] = &b.judgedChain
			if _, _, isIptables := builtIn(c.Table, c.Name); c.Hook == "" || isIptables && c.Family != "inet" {
				continue
			}
			for _, device := range c.devices() {
				n.devices[device] = append(n.devices[device], fmt.Sprintf("nft %s chain %s %s", c.Hook, c.Table, c.Name))
			}
			if c.Family == "ip" || c.Family == "inet" {
				n.bases[IPv4] = append(n.bases[IPv4], b)
			}
			if c.Family == "ip6" || c.Family == "inet" {
				n.bases[IPv6] = append(n.bases[IPv6], b)
			}
		}
	}
	for _, o := range list.Nftables {
		if o.Rule != nil {
			if c := n.chains[object{o.Rule.Family, o.Rule.Table, o.Rule.Chain}]; c != nil {
				c.rules = append(c.rules, n.rules(o.Rule)...)
			}
		}
	}
	return n, nil
}

type object struct{ family, table, name string }

type nativeChain struct {
	Family, Table, Name, Hook, Policy string
	Prio                              int
	Dev                               any // of a chain of a network device: its name, or several
}

// devices is "" alone for those that nft does not tell: 1.0.6 does not.
func (c *nativeChain) devices() (names []string) {
	if c.Family != "netdev" || c.Hook == "" {
		return nil
	}
	if _, several := c.Dev.([]any); !several {
		return []string{text(c.Dev)}
	}
	for _, name := range list(c.Dev) {
		names = append(names, text(name))
	}
	return names
}

type nativeRule struct {
	Family, Table, Chain, Comment string
	Handle                        int
	Expr                          []any
}

type nativeSet struct {
	Family, Table, Name string
	Elem                []any
}

// native are the rules of the nft command.
type native struct {
	bases  map[Family][]*base
	tracks bool // one of them needs the connection tracker
	sets   map[object]nativeSet
	chains map[object]*judgedChain
	// devices has, by name, the chains that see its packets before or after all others; under "" those of which it is
	// not known at which device they are. Their rules are not judged.
	devices map[string][]string
}

var nativeHooks = map[string]hook{
	"prerouting": hookPrerouting, "input": hookInput, "forward": hookForward, "output": hookOutput,
}

func (c *nativeChain) base() *base {
	h, known := nativeHooks[c.Hook]
	if !known {
		h = hookElse
	}
	return &base{
		judgedChain: judgedChain{name: c.Name},
		store:       "nft", table: c.Family + " " + c.Table, hook: h, priority: c.Prio, drops: c.Policy == "drop",
	}
}

func (n *native) rules(from *nativeRule) []judgedRule {
	r := judgedRule{text: fmt.Sprintf("handle %d", from.Handle)}
	if from.Comment != "" {
		r.text += fmt.Sprintf(" comment %q", from.Comment)
	}
	var all []judgedRule
	for _, statement := range from.Expr {
		one, _ := statement.(map[string]any)
		for kind, body := range one {
			n.tracks = n.tracks || !from.isIptables() && needsTracking(kind, body)
			switch kind {
			case "match":
				r.conditions = append(r.conditions, implied(at(body, "left")), n.match(from, body))
			case "vmap":
				return append(all, n.branches(from, r, body)...)
			case "notrack": // and what follows is done, too
				untracks := r
				untracks.conditions, untracks.verdict = slices.Clip(r.conditions), untrack
				all = append(all, untracks)
			case "limit", "quota", "ct count":
				r.conditions = append(r.conditions, condition{holds: unknown})
			case "xt":
				if at(body, "type") == "match" {
					r.conditions = append(r.conditions, condition{holds: unknown})
				}
			default:
				if n.aim(from, &r, kind, body); r.verdict != goOn {
					return append(all, r)
				}
			}
		}
	}
	return all
}

// isIptables reports whether iptables-save prints the rule too.
func (r *nativeRule) isIptables() bool {
	_, _, isBase := builtIn(r.Table, r.Chain)
	return r.Family != "inet" && (isBase || ours(r.Chain))
}

func needsTracking(kind string, body any) bool {
	switch kind {
	case "dnat", "snat", "masquerade", "redirect":
		return true
	case "match":
		return at(at(body, "left"), "ct") != nil
	case "vmap":
		return at(at(body, "key"), "ct") != nil
	}
	return false
}

func (n *native) aim(from *nativeRule, r *judgedRule, kind string, body any) {
	switch kind {
	case "accept", "queue":
		r.verdict = accept
	case "drop", "reject":
		r.verdict = drop
	case "return":
		r.verdict = giveBack
	case "dnat", "redirect", "tproxy":
		r.verdict = divert
	case "jump", "goto":
		name, _ := at(body, "target").(string)
		if r.target = n.chains[object{from.Family, from.Table, name}]; r.target == nil {
			return
		}
		r.verdict = jump
		if kind == "goto" {
			r.verdict = goTo
		}
	}
}

// branches makes one rule of each element of a verdict map, that of the other packets ("*") last.
func (n *native) branches(from *nativeRule, r judgedRule, body any) []judgedRule {
	var rules, last []judgedRule
	for _, element := range n.elements(from, at(body, "data")) {
		key, value := pair(element)
		b := r
		b.conditions = append(slices.Clip(r.conditions), implied(at(body, "key")), n.compare(from, at(body, "key"), []any{key}))
		verdict, _ := value.(map[string]any)
		for kind, body := range verdict {
			n.aim(from, &b, kind, body)
		}
		if bare(key) == "*" {
			last = append(last, b)
		} else {
			rules = append(rules, b)
		}
	}
	return append(rules, last...)
}

func (n *native) match(from *nativeRule, body any) condition {
	c := n.compare(from, at(body, "left"), n.elements(from, at(body, "right")))
	switch at(body, "op") {
	case "==", "in":
		return c
	case "!=":
		return negate(c)
	default:
		c.holds = unknown
		return c
	}
}

// implied is the condition that nft puts before a look into a packet: that it is of the protocol. It holds for "!=" too.
func implied(left any) condition {
	parts := list(at(left, "concat"))
	if parts == nil {
		parts = []any{left}
	}
	return condition{holds: func(p *packet) degree {
		for _, part := range parts {
			switch at(at(part, "payload"), "protocol") {
			case "ip":
				if !p.dst.Addr().Is4() {
					return no
				}
			case "ip6":
				if p.dst.Addr().Is4() {
					return no
				}
			case "udp", "icmp", "icmpv6", "sctp", "dccp", "arp":
				return no
			}
		}
		return all
	}}
}

// elements returns the values that the right side of a match stands for: a set's, a list's, or itself.
func (n *native) elements(from *nativeRule, right any) []any {
	switch right := right.(type) {
	case string:
		if name, isSet := strings.CutPrefix(right, "@"); isSet {
			return n.sets[object{from.Family, from.Table, name}].Elem
		}
	case []any:
		return right
	case map[string]any:
		if set, isSet := right["set"].([]any); isSet {
			return set
		}
	}
	return []any{right}
}

// compare returns the condition that what left stands for is among the values.
func (n *native) compare(from *nativeRule, left any, values []any) condition {
	parts := list(at(left, "concat"))
	if parts == nil {
		return fieldOf(left).among(values)
	}
	var fields []field
	var c condition
	for _, part := range parts {
		f := fieldOf(part)
		fields = append(fields, f)
		c.dst = c.dst || f.dst
	}
	var rows [][]condition
	for _, v := range values {
		columns := list(at(bare(v), "concat"))
		var row []condition
		for i, f := range fields {
			if i < len(columns) {
				row = append(row, f.among(columns[i:i+1]))
			}
		}
		rows = append(rows, row)
	}
	c.holds = func(p *packet) degree {
		best := no
		for _, row := range rows {
			d := all
			for _, column := range row {
				d = min(d, column.holds(p))
			}
			best = max(best, d)
		}
		return best
	}
	return c
}

// A field is a property of packets that a match can look at.
type field struct {
	among func(values []any) condition
	dst   bool
}

func fieldOf(left any) field {
	key := func(kind string) string { s, _ := at(at(left, kind), "key").(string); return s }
	protocol, _ := at(at(left, "payload"), "protocol").(string)
	name, _ := at(at(left, "payload"), "field").(string)

	switch {
	case (protocol == "ip" || protocol == "ip6") && name == "daddr":
		return field{dst: true, among: func(values []any) condition {
			in, every := addresses(values)
			return condition{dst: !every, holds: destination(in)}
		}}
	case (protocol == "ip" || protocol == "ip6") && name == "saddr":
		return byValues(func(values []any) func(*packet) degree {
			in, _ := addresses(values)
			return source(in)
		})
	case (protocol == "tcp" || protocol == "th") && (name == "dport" || name == "sport"):
		return byValues(func(values []any) func(*packet) degree {
			list := ports(values)
			if list == "" {
				return func(*packet) degree { return no }
			}
			if name == "sport" {
				return func(p *packet) degree { return sourcePort(list, p) }
			}
			return func(p *packet) degree { return inPorts(list, p.dst.Port()) }
		})
	case protocol == "ip" && name == "protocol", protocol == "ip6" && name == "nexthdr", key("meta") == "l4proto":
		return constant("tcp", "6")
	case protocol == "tcp" && name == "flags":
		return constant("syn")
	case key("meta") == "nfproto":
		return byWords(func(p *packet, w string) degree {
			return known(w == map[bool]string{true: "ipv4", false: "ipv6"}[p.dst.Addr().Is4()])
		})
	case key("meta") == "protocol":
		return byWords(func(p *packet, w string) degree {
			return known(w == map[bool]string{true: "ip", false: "ip6"}[p.dst.Addr().Is4()])
		})
	case key("meta") == "iifname", key("meta") == "iif":
		return byWords(func(p *packet, w string) degree { return comesIn(w, '*')(p) })
	case key("meta") == "oifname", key("meta") == "oif":
		return byWords(func(p *packet, w string) degree { return goesOut(w, '*')(p) })
	case key("meta") == "skuid":
		return byWords(func(p *packet, w string) degree {
			uid, err := strconv.ParseUint(w, 10, 32)
			if err != nil {
				return byProcess(p)
			}
			return byUser(uint32(uid), uint32(uid))(p)
		})
	case key("meta") == "skgid", key("meta") == "cgroup", at(left, "socket") != nil:
		return byWords(func(p *packet, _ string) degree { return byProcess(p) })
	case key("ct") == "state":
		return byWords(func(p *packet, w string) degree { return known(w == "new") })
	case key("ct") == "status":
		return byWords(func(p *packet, w string) degree {
			if w == "dnat" {
				return known(p.dnat)
			}
			return maybe
		})
	case key("ct") == "direction":
		return constant("original")
	}
	if flags, mask := pair(at(left, "&")); at(at(flags, "payload"), "field") == "flags" {
		masked := text(mask) == "syn"
		if list, isList := mask.([]any); isList {
			masked = slices.ContainsFunc(list, func(v any) bool { return text(v) == "syn" })
		}
		return byValues(func(values []any) func(*packet) degree {
			return func(*packet) degree { return known(masked && len(values) == 1 && text(values[0]) == "syn") }
		})
	}
	if fib := at(left, "fib"); at(fib, "result") == "type" && slices.ContainsFunc(list(at(fib, "flags")), func(v any) bool { return v == "daddr" }) {
		return byWords(func(p *packet, w string) degree { return addressType(strings.ToUpper(w), known(p.dnat)) })
	}
	return field{among: func([]any) condition { return condition{holds: unknown} }}
}

func byValues(holds func(values []any) func(*packet) degree) field {
	return field{among: func(values []any) condition { return condition{holds: holds(values)} }}
}

// byWords is a field of which each value is judged by itself.
func byWords(is func(*packet, string) degree) field {
	return byValues(func(values []any) func(*packet) degree {
		var words []string
		for _, v := range values {
			words = append(words, text(bare(v)))
		}
		return func(p *packet) degree {
			best := no
			for _, w := range words {
				if w == "*" {
					return all
				}
				best = max(best, is(p, w))
			}
			return best
		}
	})
}

// constant is a field that has the same value, under all these names, in every packet that is judged here.
func constant(names ...string) field {
	return byWords(func(_ *packet, w string) degree { return known(slices.Contains(names, w)) })
}

// addresses returns whether an address is among the values; every is true if all are.
func addresses(values []any) (in func(netip.Addr) bool, every bool) {
	type span struct{ first, last netip.Addr }
	var spans []span
	for _, v := range values {
		v = bare(v)
		first, last := text(v), text(v)
		if prefix := at(v, "prefix"); prefix != nil {
			p, err := netip.ParsePrefix(fmt.Sprintf("%s/%s", text(at(prefix, "addr")), text(at(prefix, "len"))))
			if err != nil {
				continue
			}
			every = every || p.Bits() == 0
			spans = append(spans, span{p.Masked().Addr(), lastOf(p)})
			continue
		}
		if from, to := pair(at(v, "range")); from != nil {
			first, last = text(from), text(to)
		}
		every = every || first == "*"
		from, fromErr := netip.ParseAddr(first)
		to, toErr := netip.ParseAddr(last)
		if fromErr == nil && toErr == nil {
			spans = append(spans, span{from, to})
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return a.first.Compare(b.first) })
	return func(a netip.Addr) bool {
		if every {
			return true
		}
		// The spans of a set do not overlap.
		i, found := slices.BinarySearchFunc(spans, a, func(s span, a netip.Addr) int { return s.first.Compare(a) })
		return found || i > 0 && a.Compare(spans[i-1].last) <= 0
	}, every
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// ports writes values as inPorts reads them.
func ports(values []any) string {
	var list []string
	for _, v := range values {
		v = bare(v)
		if from, to := pair(at(v, "range")); from != nil {
			list = append(list, text(from)+":"+text(to))
		} else if text(v) == "*" {
			list = append(list, ":")
		} else {
			list = append(list, text(v))
		}
	}
	return strings.Join(list, ",")
}

// bare takes an element of a set out of what it carries: timeout, comment, counter.
func bare(v any) any {
	if value := at(at(v, "elem"), "val"); value != nil {
		return value
	}
	return v
}

func at(v any, key string) any {
	m, _ := v.(map[string]any)
	return m[key]
}

func list(v any) []any {
	l, _ := v.([]any)
	return l
}

func pair(v any) (first, second any) {
	if l := list(v); len(l) == 2 {
		return l[0], l[1]
	}
	return nil, nil
}

func text(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case float64:
		return fmt.Sprint(int64(v))
	default:
		return ""
	}
}
