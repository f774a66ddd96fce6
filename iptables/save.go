package iptables

import (
	"fmt"
	"slices"
	"strings"
)

// A ruleset is one family's rules in one back end, as iptables-save prints them.
type ruleset struct {
	tables []*table
}

type table struct {
	name   string
	chains []*chain
}

type chain struct {
	name   string
	policy string // "-" for chains that are not built in
	rules  []string
}

// parseSave reads the output of iptables-save, with or without counters. Anything it does not know is an error,
// because what is skipped here might be a rule that somebody relies on.
func parseSave(text string) (*ruleset, error) {
	r := new(ruleset)
	var in *table
	chains := make(map[string]*chain)
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSuffix(line, "\n")
		bad := func(why string) (*ruleset, error) {
			return nil, fmt.Errorf("rules, line %d: %s: %q", n, why, line)
		}
		switch {
		case strings.TrimSpace(line) == "" || line[0] == '#':
		case line[0] == '*':
			if in != nil {
				return bad("the table before has no COMMIT")
			}
			in = &table{name: line[1:]}
			clear(chains)
		case in == nil:
			return bad("outside of a table")
		case line == "COMMIT":
			r.tables = append(r.tables, in)
			in = nil
		case line[0] == ':':
			f := strings.Fields(line[1:])
			if len(f) < 2 || chains[f[0]] != nil {
				return bad("not the declaration of a new chain")
			}
			c := &chain{name: f[0], policy: f[1]}
			chains[c.name] = c
			in.chains = append(in.chains, c)
		default:
			rule := line
			if rule[0] == '[' {
				_, rule, _ = strings.Cut(rule, "] ")
			}
			rule, isRule := strings.CutPrefix(rule, "-A ")
			name, rule, _ := strings.Cut(rule, " ")
			c := chains[name]
			if !isRule || c == nil {
				return bad("not a rule of a declared chain")
			}
			c.rules = append(c.rules, rule)
		}
	}
	if in != nil {
		return nil, fmt.Errorf("rules: table %s is cut off after line %d", in.name, n)
	}
	return r, nil
}

// words splits a rule at spaces outside of double quotes, where a backslash takes the next character literally, as
// add_param_to_argv of iptables/xshared.c does.
func words(rule string) []string {
	var all []string
	var word strings.Builder
	inWord, quoted := false, false
	for i := 0; i < len(rule); i++ {
		switch c := rule[i]; {
		case quoted && c == '\\' && i+1 < len(rule):
			i++
			word.WriteByte(rule[i])
		case c == '"':
			quoted, inWord = !quoted, true
		case !quoted && (c == ' ' || c == '\t'):
			if inWord {
				all = append(all, word.String())
				word.Reset()
			}
			inWord = false
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		all = append(all, word.String())
	}
	return all
}

// An option of a rule, with its values.
type option struct {
	name    string
	negated bool
	values  []string
}

func (o option) value() string {
	if len(o.values) == 0 {
		return ""
	}
	return o.values[0]
}

// freeText are options whose value can look like another option.
var freeText = []string{"--comment", "--path", "--string", "--hex-string", "--name", "--helper", "-i", "-o"}

func options(rule string) []option {
	w := words(rule)
	var all []option
	for i := 0; i < len(w); {
		o := option{negated: w[i] == "!"}
		if o.negated {
			if i++; i == len(w) {
				break
			}
		}
		o.name = w[i]
		i++
		from := i
		if i < len(w) && slices.Contains(freeText, o.name) {
			i++
		}
		for i < len(w) && w[i] != "!" && !strings.HasPrefix(w[i], "-") {
			i++
		}
		o.values = w[from:i]
		all = append(all, o)
	}
	return all
}

// leadsTo returns the chain or target that a rule sends its packets to, "" if none.
func leadsTo(rule string) string {
	for _, o := range options(rule) {
		if o.name == "-j" || o.name == "-g" {
			return o.value()
		}
	}
	return ""
}

func ours(chain string) bool { return strings.HasPrefix(chain, own) }

// leadsToOurs spares other people's rules, of which there may be thousands, the reading.
func leadsToOurs(rule string) bool { return strings.Contains(rule, own) && ours(leadsTo(rule)) }

// installed returns our part of a rule set.
func (r *ruleset) installed(f Family) FamilyPlan {
	p := FamilyPlan{Family: f}
	for _, t := range r.tables {
		for _, c := range t.chains {
			if ours(c.name) {
				p.Chains = append(p.Chains, Chain{t.name, c.name, c.rules})
				continue
			}
			for i, rule := range c.rules {
				if leadsToOurs(rule) {
					p.Jumps = append(p.Jumps, Jump{t.name, c.name, i + 1, rule})
				}
			}
		}
	}
	return p
}

// foreign reports whether the rule set holds anything that is not ours: rules, chains or policies.
func (r *ruleset) foreign() bool {
	for _, t := range r.tables {
		for _, c := range t.chains {
			if ours(c.name) {
				continue
			}
			if c.policy == "-" || c.policy == "DROP" || slices.ContainsFunc(c.rules, func(rule string) bool { return !leadsToOurs(rule) }) {
				return true
			}
		}
	}
	return false
}

// tracks reports whether a rule of somebody else needs the connection tracker.
func (r *ruleset) tracks() bool {
	for _, t := range r.tables {
		for _, c := range t.chains {
			if !ours(c.name) && slices.ContainsFunc(c.rules, func(rule string) bool { return tracks(t.name, rule) }) {
				return true
			}
		}
	}
	return false
}

func tracks(table, rule string) bool {
	for _, o := range options(rule) {
		switch {
		case o.name == "-m" && slices.Contains([]string{"conntrack", "state", "connmark", "connbytes", "connlabel", "connlimit", "helper", "cluster"}, o.value()):
			return true
		case o.name == "-j" && (table == "nat" && !ours(o.value()) || o.value() == "CONNMARK" || o.value() == "SYNPROXY"):
			return true
		}
	}
	return false
}
