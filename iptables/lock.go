package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// A Hook is one of the two ways to the metadata service that a redirect takes.
type Hook uint8

const (
	HostHook      Hook = iota // OUTPUT: clients in this network namespace
	ForwardedHook             // PREROUTING: clients in other namespaces and on other machines
)

func (h Hook) String() string {
	if h == ForwardedHook {
		return "forwarded"
	}
	return "host"
}

// MarshalText returns what String returns.
func (h Hook) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// A LockKind says what somebody's rule does.
type LockKind uint8

const (
	Refuses         LockKind = iota // keeps packets from an endpoint; redirected ones would not meet it
	Redirects                       // sends packets for an endpoint elsewhere, as kube2iam does; the redirect would come first
	DropsRedirected                 // lets packets to an endpoint pass, and not when they are redirected
	DropsDaemon                     // lets somebody's packets to an endpoint pass, and not the daemon's
	UntracksAnswers                 // keeps the tracker from the listener's answers, whose source would not be changed back
)

var lockKindNames = [...]string{
	Refuses: "refuses", Redirects: "redirects", DropsRedirected: "drops-redirected", DropsDaemon: "drops-daemon",
	UntracksAnswers: "untracks-answers",
}

func (k LockKind) String() string {
	if int(k) < len(lockKindNames) {
		return lockKindNames[k]
	}
	return fmt.Sprintf("lock kind %d", uint8(k))
}

// MarshalText returns what String returns.
func (k LockKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// overridable reports whether taking the hook in spite of the lock does what the operator wants. Where a rule that we
// cannot get past drops packets, it would cut off the clients.
func (k LockKind) overridable() bool { return k == Refuses || k == Redirects }

// A Lock is a rule of somebody else that decides about packets to an endpoint and that a redirect would change the
// effect of. Its hook is not taken. Config.OverrideForeign overrides those that refuse and those that redirect.
type Lock struct {
	Family Family
	Hook   Hook
	Kind   LockKind

	Store        string // "iptables-nft", "iptables-legacy" or "nft"
	Table, Chain string
	Rule         string // as its store prints it; "" is the chain's policy
}

// String names the rule, what it does and what to do about it.
func (l Lock) String() string { return l.Message() + ": " + l.Fix() }

// Message names the rule and what it does.
func (l Lock) Message() string {
	rule := fmt.Sprintf("rule %q", l.Rule)
	if l.Rule == "" {
		rule = "its policy"
	}
	var does string
	switch l.Kind {
	case Refuses:
		does = "keeps packets from the metadata service, and redirected packets would not meet it"
	case Redirects:
		does = "sends metadata traffic elsewhere, and redirected packets would not meet it"
	case DropsRedirected:
		does = "would drop redirected packets"
	case DropsDaemon:
		does = "would drop the daemon's packets to the metadata service"
	case UntracksAnswers:
		does = "would keep the connection tracker from the answers to redirected clients, which would not reach them"
	}
	return fmt.Sprintf("%s, table %s, chain %s, %s %s (%s, %s hook)", l.Store, l.Table, l.Chain, rule, does, l.Family, l.Hook)
}

// Fix says what to do about it.
func (l Lock) Fix() string {
	switch l.Kind {
	case Refuses:
		return "remove it, or set redirect.override_foreign: true so that policy decides instead"
	case Redirects:
		return "remove it, or set redirect.override_foreign: true"
	case DropsRedirected:
		return "accept them there (iptables: -m conntrack --ctstate DNAT; nft: ct status dnat)"
	case DropsDaemon:
		return "accept those of its user there"
	default: // UntracksAnswers
		return "leave out packets from the listener's port"
	}
}

// rules are everybody's rules but ours, in all stores, ready to be asked. They are not changed once made.
type rules map[Family][]*base

// A way is how the kernel would send this host's own packets to an endpoint.
type way struct {
	source netip.Addr
	out    string
}

// findings are the answer for one family: what keeps its hooks from being taken, whether the host hook needs Hooks.Admit, and rules of
// which could not be told whether they are locks.
type findings struct {
	locks   []Lock
	admit   bool
	unclear []string
	// evasions are rules by which packets to an endpoint go past the redirect although its hook is taken.
	evasions []Evasion
}

// locks asks the rules about the endpoints of a family. mine is the store that we write to.
func (r rules) locks(c Config, f Family, mine string, ways map[netip.AddrPort]way) (findings, error) {
	var found findings
	var errs error
	for _, e := range c.endpoints(f) {
		host := packet{hook: hookOutput, local: true, src: netip.AddrPortFrom(ways[e].source, 0), dst: e, out: ways[e].out}
		redirected := host
		redirected.dst, redirected.dnat = netip.AddrPortFrom(f.localhost(), c.HostPort), true
		daemon := host
		daemon.uid = &c.UID
		answer := packet{hook: hookOutput, local: true, uid: &c.UID, src: redirected.dst, dst: host.src, out: "lo"}
		hostIn := packet{hook: hookInput, in: "lo", src: host.src, dst: redirected.dst, dnat: true}
		forwardedIn := packet{hook: hookInput, dst: netip.AddrPortFrom(c.forwarded(f)[0], c.ForwardedPort), dnat: true}

		agent, err := r.agent(f, daemon)
		errs = errors.Join(errs, err)

		for _, b := range r[f] {
			ownFilter := b.store == mine && b.table == "filter"
			judge := judge{findings: &found, family: f, hook: HostHook, override: c.OverrideForeign, agent: agent}
			switch b.hook {
			case hookOutput:
				errs = errors.Join(errs, judge.output(b, host, redirected, daemon, ownFilter), judge.answers(b, host, answer))
			case hookForward, hookPrerouting:
				judge.hook = ForwardedHook
				errs = errors.Join(errs, judge.forward(b, packet{hook: b.hook, dst: e, out: ways[e].out}))
			case hookInput:
				if ownFilter {
					continue // our own jump comes first there and accepts
				}
				errs = errors.Join(errs, judge.input(b, hostIn))
				judge.hook = ForwardedHook
				errs = errors.Join(errs, judge.input(b, forwardedIn))
			}
		}
	}
	return found, errs
}

// agent returns the port of this host to which rules lead the daemon's own packets to an endpoint, 0 if there is none.
// The agent of ECS has such rules for 169.254.170.2 (ECS Developer Guide, "Installing the Amazon ECS container agent"):
// what they lead to is the service itself, and it is reached through the daemon, too. What stands in the way to the
// instance's own metadata service is somebody else's proxy, who may have to know whose packets they are.
func (r rules) agent(f Family, daemon packet) (uint16, error) {
	if slices.Contains(Config{}.WithDefaults().Endpoints, daemon.dst) {
		return 0, nil
	}
	for _, b := range r[f] {
		if b.hook != hookOutput {
			continue
		}
		stops, err := b.stops(&daemon)
		if err != nil {
			return 0, err
		}
		for _, s := range stops {
			if s.verdict == divert && s.degree == all {
				return s.port, nil
			}
		}
	}
	return 0, nil
}

type judge struct {
	*findings
	family   Family
	hook     Hook
	override bool
	agent    uint16 // see rules.agent
}

// toAgent reports whether packets are led to where the daemon's are.
func (j *judge) toAgent(s stop) bool { return j.agent != 0 && s.port == j.agent }

// lock reports a rule once for each hook, for the first reason that keeps the hook from being taken.
func (j *judge) lock(kind LockKind, s stop) {
	l := Lock{j.family, j.hook, kind, s.base.store, s.base.table, s.chain, s.rule}
	known := func(other Lock) bool {
		if !j.override || !other.Kind.overridable() {
			other.Kind = kind
		}
		return other == l
	}
	if !slices.ContainsFunc(j.locks, known) {
		j.locks = append(j.locks, l)
	}
}

// about reports whether the stop is about the endpoint by name. Where that could not be told it is noted.
func (j *judge) about(s stop) bool {
	if s.named == maybe && s.verdict == drop {
		note := fmt.Sprintf("%s, table %s, chain %s, rule %q: could not tell whether it is about the metadata service",
			s.base.store, s.base.table, s.chain, s.rule)
		if !slices.Contains(j.unclear, note) {
			j.unclear = append(j.unclear, note)
		}
	}
	return s.named >= some
}

// output judges a chain at the output hook. Before the priority at which destinations are changed, a redirected
// packet looks like any other.
func (j *judge) output(b *base, host, redirected, daemon packet, ownFilter bool) error {
	before, err := b.stops(&host)
	if err != nil {
		return err
	}
	after := before
	if b.priority > dstnat {
		if after, err = b.stops(&redirected); err != nil {
			return err
		}
	}
	daemons, err := b.stops(&daemon)
	if err != nil {
		return err
	}

	limited := false // somebody does not reach the endpoint
	for _, s := range before {
		about := j.about(s)
		switch {
		case s.verdict == untrack:
			j.evades(s)
		case s.verdict == divert && about && !j.toAgent(s):
			j.lock(Redirects, s)
		case s.verdict == divert:
		case about || s.degree == all || s.degree == some && degreeOf(after, s) != some:
			j.lock(Refuses, s)
			limited = true
		case s.degree == some:
			limited = true
		}
	}
	for _, s := range after {
		if s.verdict != drop || s.degree < some || s.degree <= degreeOf(before, s) {
			continue
		}
		// To accept what is redirected from everybody is right where everybody reached the endpoint, or shall.
		if ownFilter && (!limited || j.override) {
			j.admit = true
		} else {
			j.lock(DropsRedirected, s)
		}
	}
	for _, s := range daemons {
		if s.verdict == drop && s.degree == all && degreeOf(before, s) != all && !(ownFilter && j.override) {
			j.lock(DropsDaemon, s)
		}
	}
	return nil
}

// forward judges a chain that forwarded packets pass with us or without. What drops them for another reason than
// their destination is no lock: Redirect.Forwardable asks about each client.
func (j *judge) forward(b *base, p packet) error {
	stops, err := b.stops(&p)
	for _, s := range stops {
		if s.verdict == untrack {
			j.evades(s)
			continue
		}
		if !j.about(s) {
			continue
		}
		switch {
		case s.verdict == drop:
			j.lock(Refuses, s)
		case !j.toAgent(s):
			j.lock(Redirects, s)
		}
	}
	return err
}

func (j *judge) input(b *base, p packet) error {
	stops, err := b.stops(&p)
	for _, s := range stops {
		if s.verdict == drop && s.degree == all {
			j.lock(DropsRedirected, s)
		}
	}
	return err
}

func degreeOf(stops []stop, s stop) degree {
	d := no
	for _, other := range stops {
		if other.chain == s.chain && other.rule == s.rule {
			d = max(d, other.degree)
		}
	}
	return d
}

// refusal returns where a forwarded packet would certainly have been dropped without us. With override, rules about
// the endpoint itself do not count.
func (r rules) refusal(f Family, p packet, override bool) (stop, bool) {
	for _, b := range r[f] {
		if b.hook != hookForward && b.hook != hookPrerouting {
			continue
		}
		p.hook = b.hook
		stops, err := b.stops(&p)
		if err != nil {
			continue
		}
		for _, s := range stops {
			if s.verdict == drop && s.degree == all && !(override && s.named >= some) {
				return s, true
			}
		}
	}
	return stop{}, false
}
