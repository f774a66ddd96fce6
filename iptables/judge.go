package iptables

import (
	"errors"
	"net/netip"
	"strings"
)

// What would a host's rules do to a packet? The answer has degrees, because a rule may depend on what a packet's
// destination does not tell (its process, the interface it comes in by), or on something that is not understood here.
// A rule applies to the packets that reach it and meet all its conditions: to the least degree among them. What
// remains for the next rule is what a terminal rule did not take.

type degree uint8

const (
	no    degree = iota // no such packet
	maybe               // could not tell
	some                // certainly some, depending on its process or interface
	all                 // every such packet
)

func known(b bool) degree {
	if b {
		return all
	}
	return no
}

// not is the degree to which packets do not meet a condition.
func (d degree) not() degree {
	switch d {
	case no:
		return all
	case all:
		return no
	default:
		return d
	}
}

// without is what remains of packets after a rule that applies to the degree d has taken its own.
func (reach degree) without(d degree) degree {
	if d == no {
		return reach
	}
	return min(reach, d.not())
}

type hook uint8

const (
	hookPrerouting hook = iota
	hookInput
	hookForward
	hookOutput
	hookElse // not walked
)

// A packet is the first packet of a TCP connection, or all of those that agree in the fields that are set.
type packet struct {
	hook     hook
	local    bool    // made by a process of this host
	uid      *uint32 // of that process, nil if it may be any
	src, dst netip.AddrPort
	in, out  string // "" if not known
	dnat     bool   // its destination has been changed
}

type verdict uint8

const (
	goOn verdict = iota
	accept
	drop
	divert // its destination is changed, or it goes to a proxy
	giveBack
	untrack // the connection tracker does not learn of it; it goes on
	jump
	goTo
)

// A condition is one match of a rule.
type condition struct {
	holds func(*packet) degree
	dst   bool // about the destination address, and not met by all addresses
}

// A judgedRule does one thing to the packets that meet all its conditions. A verdict map becomes several.
type judgedRule struct {
	text       string
	conditions []condition
	verdict    verdict
	target     *judgedChain // of jump and goTo
	port       uint16       // of this host, that a divert leads to; 0 if it is none or not known
}

type judgedChain struct {
	name  string
	rules []judgedRule
}

// A base is a chain that the kernel itself calls.
type base struct {
	judgedChain
	store    string // "iptables-nft", "iptables-legacy", "nft"
	table    string
	hook     hook
	priority int
	drops    bool // its policy
}

// dstnat is the priority at which destinations are changed (NF_IP_PRI_NAT_DST, include/uapi/linux/netfilter_ipv4.h).
const dstnat = -100

// conntrack is the priority at which the tracker learns of packets (NF_IP_PRI_CONNTRACK, likewise).
const conntrack = -200

// A stop is a place where packets are dropped, diverted or kept from the connection tracker.
type stop struct {
	base        *base
	chain, rule string // rule "" for the base's policy
	verdict     verdict
	port        uint16 // of this host, that packets are diverted to; 0 if it is none or not known
	degree      degree
	named       degree // to which the rule, or one that leads to it, is about the destination address
}

// errTooLarge ends a walk through rules that branch so often that following them would take for ever.
var errTooLarge = errors.New("too many ways through the rules")

// maxSteps is far above a walk through any real rule set (10 000 rules of kube-proxy, each seen a few times), and takes
// a few hundredths of a second.
const maxSteps = 1 << 18

// stops returns where packets p can end in b.
func (b *base) stops(p *packet) ([]stop, error) {
	w := walk{base: b, packet: p}
	rest := w.chain(&b.judgedChain, all, no, 0)
	if b.drops && rest > no {
		w.stop(b.name, &judgedRule{verdict: drop}, rest, no)
	}
	if w.steps > maxSteps {
		return nil, errTooLarge
	}
	return w.found, nil
}

type walk struct {
	base   *base
	packet *packet
	found  []stop
	ended  int // how many rules let packets end: accepted, dropped, diverted
	steps  int
}

// chain returns the degree to which packets come out at the end. Where none ended on the way, that is all that came.
func (w *walk) chain(c *judgedChain, reach, named degree, depth int) degree {
	came, ended, back := reach, w.ended, no
	// The kernel refuses loops, a text need not.
	if depth > 64 {
		w.steps = maxSteps + 1
	}
	for i := range c.rules {
		r := &c.rules[i]
		if w.steps++; w.steps > maxSteps || reach == no {
			break
		}
		if r.verdict == goOn {
			continue
		}
		meets, named := all, named
		for _, condition := range r.conditions {
			d := condition.holds(w.packet)
			meets = min(meets, d)
			if condition.dst {
				named = max(named, d)
			}
		}
		takes := min(reach, meets)
		if takes == no {
			continue
		}
		rest := reach.without(meets)
		switch r.verdict {
		case accept:
			w.ended++
		case untrack:
			w.found = append(w.found, stop{w.base, c.name, r.text, r.verdict, 0, takes, named})
			rest = reach
		case drop, divert:
			w.stop(c.name, r, takes, named)
		case giveBack:
			back = max(back, takes)
		case jump:
			before := w.ended
			returned := w.chain(r.target, takes, named, depth+1)
			if rest = max(rest, returned); w.ended == before {
				rest = reach
			}
		case goTo:
			back = max(back, w.chain(r.target, takes, named, depth+1))
		}
		reach = rest
	}
	if w.ended == ended {
		return came
	}
	return max(back, reach)
}

func (w *walk) stop(chain string, r *judgedRule, d, named degree) {
	w.ended++
	w.found = append(w.found, stop{w.base, chain, r.text, r.verdict, r.port, d, named})
}

func unknown(*packet) degree { return maybe }

// byProcess is a condition on the process that sends: some do.
func byProcess(p *packet) degree {
	if p.local {
		return some
	}
	return no
}

func byUser(low, high uint32) func(*packet) degree {
	return func(p *packet) degree {
		if p.uid == nil {
			return byProcess(p)
		}
		return known(*p.uid >= low && *p.uid <= high)
	}
}

func negate(c condition) condition {
	holds := c.holds
	c.holds = func(p *packet) degree { return holds(p).not() }
	return c
}

// destination judges a condition on the destination address; in is nil if it could not be read.
func destination(in func(netip.Addr) bool) func(*packet) degree {
	if in == nil {
		return unknown
	}
	return func(p *packet) degree { return known(in(p.dst.Addr())) }
}

// source judges a condition on the source address, likewise. The usual source of a local packet is the one that the
// route gives it, but a process may bind another.
func source(in func(netip.Addr) bool) func(*packet) degree {
	return func(p *packet) degree {
		switch a := p.src.Addr(); {
		case in == nil || !a.IsValid():
			return maybe
		case p.local && !in(a):
			return maybe
		default:
			return known(in(a))
		}
	}
}

// comesIn and goesOut judge a condition on an interface name; the pattern may end in the wildcard character.
func comesIn(pattern string, wildcard byte) func(*packet) degree {
	return func(p *packet) degree {
		return interfaceIs(p.in, p.hook == hookOutput, pattern, wildcard)
	}
}

func goesOut(pattern string, wildcard byte) func(*packet) degree {
	return func(p *packet) degree {
		return interfaceIs(p.out, p.hook == hookPrerouting || p.hook == hookInput, pattern, wildcard)
	}
}

func interfaceIs(name string, absent bool, pattern string, wildcard byte) degree {
	prefix, isPrefix := strings.CutSuffix(pattern, string(rune(wildcard)))
	switch {
	case absent:
		return no
	case isPrefix && prefix == "":
		return all
	case name == "" && pattern == "lo": // the loopback interface is always stated
		return no
	case name == "":
		return some
	case isPrefix:
		return known(strings.HasPrefix(name, prefix))
	default:
		return known(name == pattern)
	}
}
