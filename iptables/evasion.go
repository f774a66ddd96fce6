package iptables

import (
	"fmt"
	"slices"
)

// An Evasion is a rule of somebody else by which packets to an endpoint go past the redirect although its hook is
// taken: the connection tracker does not learn of them, so that nat rules do not see them. It is not ours to delete.
// In enforce the guard refuses such packets, in audit they reach the service.
type Evasion struct {
	Family Family
	Hook   Hook

	Store, Table, Chain, Rule string // as in Lock
}

// String names the rule, what it does and what to do about it.
func (e Evasion) String() string { return e.Message() + ": " + e.Fix() }

// Message names the rule and what it does.
func (e Evasion) Message() string {
	return fmt.Sprintf("%s, table %s, chain %s, rule %q keeps packets to the metadata service from the connection tracker, so that they "+
		"are not redirected (%s, %s hook)", e.Store, e.Table, e.Chain, e.Rule, e.Family, e.Hook)
}

// Fix says what to do about it.
func (e Evasion) Fix() string { return "delete it, or leave out packets to the metadata service" }

// evades notes a rule that untracks packets to an endpoint: those by name, or all that there are.
func (j *judge) evades(s stop) {
	e := Evasion{j.family, j.hook, s.base.store, s.base.table, s.chain, s.rule}
	if s.base.priority < conntrack && (s.named >= some || s.degree >= some) && !slices.Contains(j.evasions, e) {
		j.evasions = append(j.evasions, e)
	}
}

// answers judges a chain that the listener's answers to redirected clients of this host pass. Where no client is
// redirected, because its packets are not tracked either, there are none.
func (j *judge) answers(b *base, host, answer packet) error {
	if b.priority >= conntrack {
		return nil
	}
	stops, err := b.stops(&host)
	if err != nil || slices.ContainsFunc(stops, func(s stop) bool { return s.verdict == untrack && s.degree == all }) {
		return err
	}
	stops, err = b.stops(&answer)
	for _, s := range stops {
		if s.verdict == untrack && s.degree == all {
			j.lock(UntracksAnswers, s)
		}
	}
	return err
}
