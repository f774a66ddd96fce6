// Package policy says what should become of a request, given who asks and what
// for.
//
// It holds two lists that are never mixed. Detections are rules in Elastic's
// form and language: they raise alerts as Elastic would have raised them, and
// they block. Grants are what lets a program have credentials all the same: they
// rest on what the caller cannot choose. What excuses an alert does not open a
// door. Denies take away, and go before both.
//
// A Policy is compiled once and does not change; an Engine applies the present
// one. Judging reads no file and waits for nobody.
package policy

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"unicode"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
)

// Config is the policy as an operator writes it. The zero value is the policy
// of an installation that nobody has configured.
type Config struct {
	// Name and Revision are what operators call the policy, such as a group of hosts and
	// the commit that it was made from: to see which host has which. They decide nothing.
	Name     string `yaml:"name"`
	Revision string `yaml:"revision"`

	Mode    Mode         `yaml:"mode"`
	Posture Posture      `yaml:"posture"`
	Rules   RulesConfig  `yaml:"rules"`
	Tokens  TokensConfig `yaml:"tokens"`
	Grants  []Grant      `yaml:"grants"`
	// Profiles are names of files with grants for programs that come with a platform.
	Profiles []string `yaml:"profiles"`
	// ProfilePaths are the directories in which they are looked for; the package's
	// ProfilePaths if there are none.
	ProfilePaths []string `yaml:"profile_paths"`
	Denies       []Deny   `yaml:"denies"`
	// Classes are postures of single classes of requests, which go before Posture.
	// Strict also keeps a class that is not guarded to those with a grant.
	Classes map[string]Posture `yaml:"classes"`
}

// RulesConfig says which rules there are and what follows from them.
type RulesConfig struct {
	// Paths are rule files in Elastic's TOML form, or directories of them.
	Paths []string `yaml:"paths"`
	// WithoutShipped leaves out the rules that are built in.
	WithoutShipped bool `yaml:"without_shipped"`
	// SkipRefused leaves out the files that are refused, as some of a directory of
	// Elastic's are. Without it one of them keeps the whole configuration out.
	SkipRefused bool `yaml:"skip_refused"`
	// Actions are by rule_id. A rule that is not named blocks guarded requests
	// and alerts on others.
	Actions map[string]RuleAction `yaml:"actions"`
}

// RuleAction is what follows from a match of one rule.
type RuleAction struct {
	// Action is for requests of classes that Classes does not name. Block
	// refuses guarded requests (credentials, user data, identity proofs, and
	// unknown paths that speak of secrets); on others it is Alert, unless
	// Classes says so.
	Action  *Action           `yaml:"action"`
	Classes map[string]Action `yaml:"classes"`
	// HonourExclusions lets the rule's own exceptions excuse from a block, also
	// those that the caller can bring about.
	HonourExclusions bool    `yaml:"honour_exclusions"`
	AlertOn          AlertOn `yaml:"alert_on"`
}

// Policy is a compiled Config.
type Policy struct {
	Name, Revision string // of Config, and "" where nobody has set them

	Mode    Mode // that the configuration asks for
	Posture Posture
	Digest  string  // of all that was configured, to compare hosts
	Files   []File  // that it was read from, without those of the configuration itself
	Skipped []error // why files were left out

	rules      []*rule
	set        *ruleSet
	classes    map[string]Posture
	decisive   map[string]bool // classes of requests that are not guarded and may be refused all the same
	grants     []Grant
	byProgram  map[program][]*Grant
	denies     []Deny
	denied     *denyTable
	rests      event.Gaps // facts at which grants and denies look
	rulesRest  event.Gaps // and rules that may block
	mayDepend  bool       // one of which blocks what it has not seen before
	tokenScope event.TokenScope
}

// rule is a detection with what follows from it.
type rule struct {
	*Rule
	action   RuleAction
	blocking []*stage // of the query that blocks
	literal  []*stage // of the query as written

	aboutProcess bool       // blocks because of what the process is, not of a request alone, nor of what is new
	rests        event.Gaps // facts that the stages that block look at
	alertsOnly   bool       // of counts and of what did not come before: neither says anything of one process
}

// maxCalled bounds a label of metrics, and a line of status. A commit has 40 bytes, or 64.
const maxCalled = 64

//go:embed rules/*.toml
var shipped embed.FS

// Compile checks a configuration and reads the rules that it names. classes are
// the names of the classes that requests can have. All errors come together, as
// far as they can be found in one go.
func Compile(c Config, classes []string) (*Policy, error) {
	p := &Policy{Name: c.Name, Revision: c.Revision, Mode: c.Mode, Posture: c.Posture, classes: c.Classes, grants: slices.Clone(c.Grants), denies: c.Denies, denied: newDenyTable(c.Denies), tokenScope: c.Tokens.Scope, decisive: map[string]bool{}}
	var errs []error
	for _, of := range []struct{ key, text string }{{"name", c.Name}, {"revision", c.Revision}} {
		if len(of.text) > maxCalled || strings.ContainsFunc(of.text, func(r rune) bool { return !unicode.IsGraphic(r) }) {
			errs = append(errs, &KeyError{Key: of.key, Err: fmt.Errorf("what a policy is called has at most %d bytes, each of which can be seen", maxCalled)})
		}
	}
	var loaded []*Rule
	if !c.Rules.WithoutShipped {
		rules, err := ParseRules(shipped, "rules")
		loaded, errs = append(loaded, rules...), append(errs, err)
	}
	loaded, err := c.Tokens.rules(loaded)
	errs = append(errs, err)
	rules, refused, files, err := readRules(Host{}, c.Rules.Paths...)
	loaded, errs = append(loaded, rules...), append(errs, c.Rules.locate(err)...)
	p.Files = files
	if c.Rules.SkipRefused {
		p.Skipped = refused
	} else {
		errs = append(errs, refused...)
	}

	known := map[string]string{}
	digest := sha256.New()
	for _, r := range loaded {
		if other, ok := known[r.ID]; ok {
			errs = append(errs, fmt.Errorf("%s: rule_id %s is also in %s; set rules.without_shipped, or change the id", r.File, r.ID, other))
		}
		known[r.ID] = r.File
		fmt.Fprintf(digest, "%s %s %x\n", r.ID, r.Version, r.text)
		p.rules = append(p.rules, newRule(r, c.Rules.Actions[r.ID]))
	}
	for _, id := range slices.Sorted(maps.Keys(c.Rules.Actions)) {
		a, action := c.Rules.Actions[id], complaints{key: "rules.actions." + id}
		if _, ok := known[id]; !ok {
			action.say("", "no rule has the rule_id %q; there are %s", id, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		for _, r := range p.rules {
			if r.ID == id && r.alertsOnly && a.blocks() {
				action.say("", "a rule that counts events (with runs) or has missing ones cannot block; use log or alert")
			}
		}
		for class := range a.Classes {
			if !slices.Contains(classes, class) {
				action.say("classes."+class, "unknown class %q; there are %s", class, strings.Join(classes, ", "))
			}
		}
		errs = append(errs, action.errs...)
		fmt.Fprintln(digest, id, a.Action, a.Classes, a.HonourExclusions, a.AlertOn)
	}
	names := map[string]string{}
	entry := func(key, what, name string, check func(*complaints)) {
		c := complaints{key: key}
		check(&c)
		if other, ok := names[what+name]; ok && name != "" {
			c.errs = append(c.errs, &KeyError{Key: key + ".name", Other: other + ".name", Err: fmt.Errorf("%s %q is there twice", what, name)})
		}
		names[what+name] = key
		errs = append(errs, c.errs...)
	}
	for i := range c.Grants {
		g := &c.Grants[i]
		entry(fmt.Sprintf("grants[%d]", i), "grant", g.Name, func(c *complaints) { g.check(c, classes) })
		fmt.Fprintf(digest, "%+v\n", *g)
	}
	profiles, wrong := c.profiles()
	errs = append(errs, wrong...)
	for i, profile := range profiles {
		if profile.File != "" {
			p.Files = append(p.Files, File{profile.File, sha256.Sum256(profile.source.Text)})
		}
		for j := range profile.Grants {
			g := &profile.Grants[j]
			entry(fmt.Sprintf("profiles[%d]", i), "grant", g.Name, func(c *complaints) {
				own := complaints{key: fmt.Sprintf("grants[%d]", j)}
				g.check(&own, classes)
				for _, err := range own.errs {
					wrong := err.(*KeyError)
					c.errs = append(c.errs, profile.source.Locate(yamlfile.Path(wrong.Key), wrong.Err))
				}
			})
			p.grants = append(p.grants, *g)
			fmt.Fprintf(digest, "%+v\n", *g)
		}
	}
	for i := range c.Denies {
		d := &c.Denies[i]
		entry(fmt.Sprintf("denies[%d]", i), "deny", d.Name, func(c *complaints) { d.check(c, classes) })
		fmt.Fprintf(digest, "%+v\n", *d)
	}
	for _, class := range slices.Sorted(maps.Keys(c.Classes)) {
		if !slices.Contains(classes, class) {
			errs = append(errs, &KeyError{Key: "classes." + class, Err: fmt.Errorf("unknown class %q; there are %s", class, strings.Join(classes, ", "))})
		}
		fmt.Fprintln(digest, class, c.Classes[class])
	}
	fmt.Fprintln(digest, c.Posture, c.Tokens.Scope)
	if c.Tokens.Action != nil {
		fmt.Fprintln(digest, *c.Tokens.Action)
	}
	p.set = newRuleSet(p.rules)
	p.byProgram, p.rests = grantsByProgram(p.grants), restsOf(p.grants, p.denies)
	for _, r := range p.rules {
		if r.mayBlock() {
			p.rulesRest |= r.rests
			p.mayDepend = p.mayDepend || r.NewTerms != nil
		}
	}
	p.findDecisive(classes)
	p.Digest = "sha256:" + hex.EncodeToString(digest.Sum(nil))
	return p, errors.Join(errs...)
}

// locate gives errors of reading, which come together, the keys of their paths.
func (c *RulesConfig) locate(err error) (errs []error) {
	all, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	for _, err := range all.Unwrap() {
		read := (*fs.PathError)(nil)
		i := -1
		if errors.As(err, &read) {
			i = slices.IndexFunc(c.Paths, func(path string) bool { return read.Path == path || strings.HasPrefix(read.Path, path+"/") })
		}
		if i >= 0 {
			err = &KeyError{Key: fmt.Sprintf("rules.paths[%d]", i), Err: err}
		}
		errs = append(errs, err)
	}
	return errs
}

// Rules lists the rules in the order in which they are asked.
func (p *Policy) Rules() []*Rule {
	rules := make([]*Rule, len(p.rules))
	for i, r := range p.rules {
		rules[i] = r.Rule
	}
	return rules
}

// Grants lists the grants.
func (p *Policy) Grants() []Grant { return slices.Clone(p.grants) }

// Denies lists the denies.
func (p *Policy) Denies() []Deny { return slices.Clone(p.denies) }

func newRule(r *Rule, a RuleAction) *rule {
	blocking := r.Bound
	if a.HonourExclusions {
		blocking = r.Query
	}
	own := &rule{Rule: r, action: a, blocking: stages(blocking), literal: stages(r.Query)}
	own.alertsOnly = r.Query.Counts() || slices.ContainsFunc(own.literal, func(s *stage) bool { return s.Missing() })
	if own.alertsOnly {
		own.blocking = nil
	}
	for _, s := range own.blocking {
		own.rests |= s.rests
		own.aboutProcess = own.aboutProcess || r.NewTerms == nil && slices.ContainsFunc(s.Fields(), func(f eql.Field) bool {
			return strings.HasPrefix(f.Name, "process.") || strings.HasPrefix(f.Name, "imdsgate.executable.")
		})
	}
	return own
}

// on says what follows from a match on a request.
func (r *rule) on(q *event.Request) Action {
	if a, ok := r.action.Classes[q.Class]; ok {
		return a
	}
	action := Block
	switch {
	case r.action.Action != nil:
		action = *r.action.Action
	case r.Rule.Action != nil:
		action = *r.Rule.Action
	}
	if action == Block && (!q.Guarded || r.alertsOnly) {
		return Alert
	}
	return action
}

// blocks reports whether an operator asked for a block in so many words.
func (a *RuleAction) blocks() bool {
	return a.Action != nil && *a.Action == Block || slices.Contains(slices.Collect(maps.Values(a.Classes)), Block)
}

// findDecisive notes which classes may be refused although they are not guarded.
func (p *Policy) findDecisive(classes []string) {
	for _, r := range p.rules {
		for class, action := range r.action.Classes {
			p.decisive[class] = p.decisive[class] || action == Block
		}
	}
	for class, posture := range p.classes {
		p.decisive[class] = p.decisive[class] || posture == Strict
	}
	for i := range p.denies {
		of := p.denies[i].Classes
		if len(of) == 0 {
			of = classes
		}
		for _, class := range of {
			p.decisive[class] = true
		}
	}
}

// posture is what becomes of a request that neither grant nor rule speaks of.
func (p *Policy) posture(q *event.Request) Posture {
	if own, ok := p.classes[q.Class]; ok {
		return own
	}
	if q.Guarded {
		return p.Posture
	}
	return Default
}

// program is what finds the grants that can be a process's, however many there are of
// others: the path, or where that has a wildcard the name behind the last slash, and the
// unit, of which that may be an instance.
type program struct{ executable, unit string }

func grantsByProgram(grants []Grant) map[program][]*Grant {
	by := make(map[program][]*Grant)
	for i := range grants {
		g := &grants[i]
		for _, file := range slices.Compact(slices.Sorted(slices.Values(g.Executable))) {
			name, _ := programKey(file) // a wildcard in the name is refused
			key := program{name, g.Unit}
			by[key] = append(by[key], g)
		}
	}
	return by
}

// Granted finds the grant that covers what a process asks for: the first of those that
// name its path and its unit, then of those that name less exactly what it is.
func (p *Policy) Granted(subject *event.Process, ev *event.Event) (name string, ok bool) {
	units := [...]string{subject.Unit, Template(subject.Unit), ""}
	for _, file := range [...]string{subject.Executable, path.Base(subject.Executable)} {
		for i, unit := range units {
			if i > 0 && unit == units[i-1] {
				continue
			}
			for _, g := range p.byProgram[program{file, unit}] {
				if ok, _ := g.Allows(subject, ev); ok {
					return g.Name, true
				}
			}
		}
	}
	return "", false
}
