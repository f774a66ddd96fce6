package iptables

import (
	"fmt"
	"slices"
	"strings"
)

// A Difference is one way in which a host is not as planned.
type Difference struct {
	Family       Family
	Table, Chain string // "" when it is about the link
	Problem      string
	Have, Want   string // texts of rules, "" where there is none
}

func (d Difference) String() string {
	var b strings.Builder
	if d.Table != "" {
		fmt.Fprintf(&b, "%s %s %s: ", d.Family, d.Table, d.Chain)
	}
	b.WriteString(d.Problem)
	if d.Have != "" {
		fmt.Fprintf(&b, "; have %q", d.Have)
	}
	if d.Want != "" {
		fmt.Fprintf(&b, "; want %q", d.Want)
	}
	return b.String()
}

// A change is what separates a rule set from a plan, in words and as commands for iptables-restore. Both come from
// one comparison, so that what is reported is what is repaired.
type change struct {
	family      Family
	differences []Difference
	sections    []*section
	backwards   bool
}

type section struct {
	stage    stage
	table    string
	commands []string
	stale    []string // chains to delete once nothing leads to them
}

// A stage is a place in the order of commits: iptables-restore commits table by table. The door of the listeners
// comes before the redirect to them, and the redirect before the guard that refuses what is not redirected, so that
// there is no moment in which a client is harmed. A removal goes the other way.
type stage uint8

const (
	stageRaw   stage = iota
	stageInput       // filter INPUT
	stageNAT
	stageGuard // filter OUTPUT and FORWARD
	stageOther // tables in which only another version of us could have rules
)

func stageOf(table, chain string) stage {
	switch {
	case table == "raw":
		return stageRaw
	case table == "nat":
		return stageNAT
	case table != "filter":
		return stageOther
	case chain == "INPUT" || chain == inputs:
		return stageInput
	default:
		return stageGuard
	}
}

// compare returns what has to be done to have, so that our part of it is want. What is right already keeps its
// place and its counters.
func compare(have *ruleset, want FamilyPlan) change {
	is := have.installed(want.Family)
	c := change{family: want.Family, backwards: want.empty()}

	for _, w := range want.Chains {
		i := slices.IndexFunc(is.Chains, w.same)
		if i < 0 {
			c.differ(w.Table, w.Name, "chain missing", "", "")
		} else if !slices.EqualFunc(is.Chains[i].Rules, w.Rules, sameRule) {
			c.differRules(is.Chains[i], w)
		} else {
			continue
		}
		s := c.section(w.Table, w.Name)
		s.commands = append(s.commands, ":"+w.Name+" - [0:0]") // creates the chain, or empties it
		for _, rule := range w.Rules {
			s.commands = append(s.commands, "-A "+w.Name+" "+rule)
		}
	}

	type place struct{ table, chain string }
	var places []place
	for _, j := range slices.Concat(want.Jumps, is.Jumps) {
		if p := (place{j.Table, j.Chain}); !slices.Contains(places, p) {
			places = append(places, p)
		}
	}
	for _, p := range places {
		elsewhere := func(j Jump) bool { return j.Table != p.table || j.Chain != p.chain }
		is := slices.DeleteFunc(slices.Clone(is.Jumps), elsewhere)
		want := slices.DeleteFunc(slices.Clone(want.Jumps), elsewhere)
		if slices.EqualFunc(is, want, func(h, w Jump) bool { return h.At == w.At && sameRule(h.Rule, w.Rule) }) {
			continue
		}
		c.differJumps(is, want)
		s := c.section(p.table, p.chain)
		// By text and not by number: if somebody changes the chain meanwhile, this fails instead of deleting theirs.
		for _, j := range is {
			s.commands = append(s.commands, "-D "+j.Chain+" "+j.Rule)
		}
		for _, j := range want {
			s.commands = append(s.commands, fmt.Sprintf("-I %s %d %s", j.Chain, j.At, j.Rule))
		}
	}

	for _, h := range is.Chains {
		if !slices.ContainsFunc(want.Chains, h.same) {
			c.differ(h.Table, h.Name, "chain not in the plan", "", "")
			s := c.section(h.Table, h.Name)
			s.stale = append(s.stale, h.Name)
		}
	}
	return c
}

// sameRule compares texts of rules; which words iptables puts in quotes depends on their characters.
func sameRule(a, b string) bool { return a == b || slices.Equal(words(a), words(b)) }

func (c Chain) same(other Chain) bool { return c.Table == other.Table && c.Name == other.Name }

func (c *change) section(table, chain string) *section {
	at := stageOf(table, chain)
	for _, s := range c.sections {
		if s.stage == at && s.table == table {
			return s
		}
	}
	s := &section{stage: at, table: table}
	c.sections = append(c.sections, s)
	return s
}

func (c *change) differ(table, chain, problem, have, want string) {
	c.differences = append(c.differences, Difference{c.family, table, chain, problem, have, want})
}

func (c *change) differRules(have, want Chain) {
	for i := range max(len(have.Rules), len(want.Rules)) {
		switch {
		case i >= len(have.Rules):
			c.differ(want.Table, want.Name, fmt.Sprintf("rule %d missing", i+1), "", want.Rules[i])
		case i >= len(want.Rules):
			c.differ(want.Table, want.Name, fmt.Sprintf("rule %d not in the plan", i+1), have.Rules[i], "")
		case !sameRule(have.Rules[i], want.Rules[i]):
			c.differ(want.Table, want.Name, fmt.Sprintf("rule %d altered", i+1), have.Rules[i], want.Rules[i])
		}
	}
}

func (c *change) differJumps(have, want []Jump) {
	for _, w := range want {
		i := slices.IndexFunc(have, func(h Jump) bool { return sameRule(h.Rule, w.Rule) })
		if i < 0 {
			c.differ(w.Table, w.Chain, "jump missing", "", w.Rule)
			continue
		}
		if have[i].At != w.At {
			c.differ(w.Table, w.Chain, fmt.Sprintf("jump at place %d instead of %d", have[i].At, w.At), have[i].Rule, "")
		}
		have = slices.Delete(slices.Clone(have), i, i+1)
	}
	for _, h := range have {
		c.differ(h.Table, h.Chain, "jump not in the plan", h.Rule, "")
	}
}

// script is the input for iptables-restore --noflush that makes the change, "" if there is none to make.
func (c change) script() string {
	order := slices.Clone(c.sections)
	slices.SortStableFunc(order, func(a, b *section) int {
		if c.backwards {
			a, b = b, a
		}
		return int(a.stage) - int(b.stage)
	})
	var b strings.Builder
	for i, s := range order {
		fmt.Fprintf(&b, "*%s\n", s.table)
		for _, command := range s.commands {
			fmt.Fprintln(&b, command)
		}
		// A chain can go when the last section of its table has removed the last jump to it. All are emptied first,
		// for they may lead to each other.
		if !slices.ContainsFunc(order[i+1:], func(later *section) bool { return later.table == s.table }) {
			var stale []string
			for _, of := range order[:i+1] {
				if of.table == s.table {
					stale = append(stale, of.stale...)
				}
			}
			for _, name := range stale {
				fmt.Fprintf(&b, ":%s - [0:0]\n", name)
			}
			for _, name := range stale {
				fmt.Fprintf(&b, "-X %s\n", name)
			}
		}
		fmt.Fprintln(&b, "COMMIT")
	}
	return b.String()
}
