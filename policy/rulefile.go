package policy

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/imdsgate/imdsgate/policy/kql"
)

// Rule is a detection, as it was loaded. What follows from a match of it is not
// its own business but the policy's.
type Rule struct {
	event.Rule
	File     string
	Type     string // eql, query, new_terms, and others that are refused
	Query    *eql.Query
	NewTerms *NewTerms // of the type new_terms, else nil
	Action   *Action   // that the file proposes, or its type; nil if neither does

	Tags           []string
	References     []string
	FalsePositives []string

	// Bound is the query without the clauses that the caller could use to
	// excuse himself, which Excluded lists.
	Bound    *eql.Query
	Excluded []eql.Exclusion

	// Missing are the fields that the query reads and no event here has.
	Missing []string
	// Warnings are what the author of the query should know although it works.
	Warnings []*syntax.Error
	// Notes are what else is not as whoever has published the rule may expect.
	Notes []string

	text [sha256.Size]byte // digest of the file
}

// file is a rule file in the form in which Elastic publishes its detection
// rules, or those of its endpoint agent. Tables and keys that are not here are
// none of our business.
type file struct {
	Metadata struct {
		UpdatedDate     string `toml:"updated_date"`
		DeprecationDate string `toml:"deprecation_date"`
		Maturity        string `toml:"maturity"`
		Ruleset         string `toml:"ruleset"`
	} `toml:"metadata"`
	Imdsgate struct {
		Action *Action `toml:"action"`
	} `toml:"imdsgate"`
	Rule struct {
		ID             string   `toml:"rule_id"`
		Name           string   `toml:"name"`
		Type           string   `toml:"type"`
		Language       string   `toml:"language"`
		Query          string   `toml:"query"`
		Severity       string   `toml:"severity"`
		RiskScore      int64    `toml:"risk_score"`
		Tags           []string `toml:"tags"`
		References     []string `toml:"references"`
		FalsePositives []string `toml:"false_positives"`
		Threat         []threat `toml:"threat"`

		NewTerms *newTerms `toml:"new_terms"`

		TimestampOverride string           `toml:"timestamp_override"`
		TimestampField    string           `toml:"timestamp_field"`
		CategoryOverride  string           `toml:"event_category_override"`
		TiebreakerField   string           `toml:"tiebreaker_field"`
		BuildingBlock     string           `toml:"building_block_type"`
		Suppression       map[string]any   `toml:"alert_suppression"`
		Filters           []map[string]any `toml:"filters"`

		// Of a rule of the endpoint agent.
		EndpointID string   `toml:"id"`
		OSList     []string `toml:"os_list"`
	} `toml:"rule"`
	Actions []map[string]any `toml:"actions"` // as Threat, of a rule of the endpoint agent
	Threat  []threat         `toml:"threat"`
}

type threat struct {
	Framework string `toml:"framework"`
	Tactic    struct {
		ID   string `toml:"id"`
		Name string `toml:"name"`
	} `toml:"tactic"`
	Technique []struct {
		ID           string `toml:"id"`
		Name         string `toml:"name"`
		Subtechnique []struct {
			ID   string `toml:"id"`
			Name string `toml:"name"`
		} `toml:"subtechnique"`
	} `toml:"technique"`
}

// ParseRule reads one rule file. name is for errors, which have the line of the
// file with a caret. What a file may ask for but is not done here is an error that is
// errors.ErrUnsupported.
func ParseRule(name string, src []byte) (*Rule, error) {
	r := &Rule{File: name}
	if err := r.read(source{name, src}); err != nil {
		return nil, err
	}
	return r, nil
}

// read fills the rule from its file, as far as it goes.
func (r *Rule) read(s source) error {
	r.text = sha256.Sum256(s.text)
	var f file
	if err := s.decode(&f); err != nil {
		return err
	}
	f.endpoint(r)
	r.describe(&f)
	if r.ID == "" || r.Name == "" {
		return fmt.Errorf("%s: no [rule] with a name and a rule_id; is this a rule file?", s.name)
	}
	if err := f.supported(s); err != nil {
		return err
	}
	if _, err := event.SeverityNumber(r.Severity); err != nil {
		return s.at("rule", "severity", "", "%v", err)
	}
	if f.Rule.Type == newTermsType {
		var err error
		if r.NewTerms, err = f.Rule.NewTerms.parse(s); err != nil {
			return err
		}
	}
	if err := r.compile(&f, s); err != nil {
		return err
	}
	if r.NewTerms != nil && r.Query.IsSequence() {
		return s.refuse("rule", "query", "", "first-seen values are those of single events, and this is a sequence")
	}
	r.Bound, r.Excluded = r.Query.WithoutExclusions(callerChosen)
	return nil
}

// endpoint gives a rule of the endpoint agent what it leaves to the agent.
func (f *file) endpoint(r *Rule) {
	if f.Rule.ID != "" || f.Rule.EndpointID == "" {
		return
	}
	f.Rule.ID, f.Rule.Type, f.Rule.Language = f.Rule.EndpointID, "eql", "eql"
	f.Rule.Threat = f.Threat
	if f.Rule.Severity == "" {
		f.Rule.Severity, f.Rule.RiskScore = "medium", 47
	}
	r.Notes = append(r.Notes, "a rule of the endpoint agent, which says no severity: medium")
	if len(f.Actions) > 0 {
		r.Notes = append(r.Notes, "its actions are the agent's, and are not carried out")
	}
}

// describe carries over what events and people are told of the rule.
func (r *Rule) describe(f *file) {
	r.Rule = event.Rule{
		ID: f.Rule.ID, Name: f.Rule.Name, Ruleset: f.Metadata.Ruleset, Version: f.Metadata.UpdatedDate,
		Severity: f.Rule.Severity, RiskScore: f.Rule.RiskScore,
	}
	r.Type, r.Action = f.Rule.Type, f.Imdsgate.Action
	r.Tags, r.References, r.FalsePositives = f.Rule.Tags, f.Rule.References, f.Rule.FalsePositives
	if len(r.References) > 0 {
		r.Reference = r.References[0]
	}
	for _, t := range f.Rule.Threat {
		threat := event.Threat{Framework: t.Framework, TacticID: t.Tactic.ID, TacticName: t.Tactic.Name}
		for _, technique := range t.Technique {
			threat.TechniqueIDs = append(threat.TechniqueIDs, technique.ID)
			threat.TechniqueNames = append(threat.TechniqueNames, technique.Name)
			for _, sub := range technique.Subtechnique {
				threat.SubtechniqueIDs = append(threat.SubtechniqueIDs, sub.ID)
				threat.SubtechniqueNames = append(threat.SubtechniqueNames, sub.Name)
			}
		}
		r.Threat = append(r.Threat, threat)
	}
	switch f.Metadata.Maturity {
	case "deprecated":
		r.Notes = append(r.Notes, strings.TrimSpace("deprecated by whoever has published it "+f.Metadata.DeprecationDate))
	case "development":
		r.Notes = append(r.Notes, "in development: not yet published as a rule to run")
	}
	if len(f.Rule.Suppression) > 0 {
		r.Notes = append(r.Notes, "alert_suppression is not done here: each match raises an alert")
	}
	if r.Action != nil {
		return
	}
	switch {
	case f.Rule.BuildingBlock != "":
		r.Notes = append(r.Notes, "a building block, whose alerts are for other rules: its action is log unless the configuration says another")
		r.Action = new(Action)
	case r.Type == newTermsType:
		action := Alert
		r.Action = &action
	}
}

// late refuses a sequence that ends in a missing event. An alert belongs to the
// request that raised it, and when the span is over that was answered long ago.
func late(tree *syntax.Query) error {
	items := tree.Body.(*syntax.Sequence).Items
	e := tree.Errorf(items[len(items)-1].Pos, "a sequence that ends in a missing event is decided when its maxspan is over, after the request that it is about")
	e.Hint, e.Err = "ask recorded events with imdsgate eql", errors.ErrUnsupported
	return syntax.ErrorList{e}
}

// doneElsewhere is why types of rules are refused.
var doneElsewhere = map[string]string{
	"threshold":        "counts the hits of a search, which is done where events are collected",
	"esql":             "is a search in ES|QL over collected events",
	"machine_learning": "needs a model that is trained where events are collected",
	"threat_match":     "joins collected events with a list of indicators",
	"saved_query":      "names a query that is kept in Kibana",
}

// supported refuses what the rule asks for and is not done here.
func (f *file) supported(s source) error {
	r := &f.Rule
	runs := "rules of the types eql, query and new_terms are run"
	if why, ok := doneElsewhere[r.Type]; ok {
		return s.refuse("rule", "type", runs, "a rule of the type %s %s", r.Type, why)
	}
	languages := map[string][]string{"eql": {"eql"}, "query": {"kuery"}, newTermsType: {"kuery", "eql"}}[r.Type]
	switch {
	case languages == nil:
		return s.refuse("rule", "type", runs, "a rule of the type %q is not known here", r.Type)
	case !slices.Contains(languages, r.Language):
		return s.refuse("rule", "language", "", "a rule of the type %s in the language %q is not run here; %s is", r.Type, r.Language, strings.Join(languages, " or "))
	case r.EndpointID != "" && !slices.Contains(r.OSList, "linux") && len(r.OSList) > 0:
		return s.refuse("rule", "os_list", "", "this rule is for %s, and not for linux", strings.Join(r.OSList, " and "))
	case len(r.Filters) > 0:
		return f.refuseFilters(s)
	case r.Query == "":
		return s.at("rule", "query", "", "the rule has no query")
	}
	for _, o := range []struct{ key, value, why string }{
		{"timestamp_override", r.TimestampOverride, "events are judged as they happen, once"},
		{"timestamp_field", r.TimestampField, "events are in the order of @timestamp"},
	} {
		if !slices.Contains([]string{"", "@timestamp", "event.ingested", "event.created"}, o.value) {
			return s.refuse("rule", o.key, "", "%s: %s", o.value, o.why)
		}
	}
	if t := r.TiebreakerField; t != "" && t != "event.sequence" {
		return s.refuse("rule", "tiebreaker_field", "", "%s: events of the same time are in the order in which they were seen, which event.sequence has", t)
	}
	if c := r.CategoryOverride; c != "" {
		if f, ok := (schema{}).Field(c); !ok || f.Type != eql.Keyword {
			return s.refuse("rule", "event_category_override", "", "no event here has a category in the field %s", c)
		}
	}
	return nil
}

func (f *file) refuseFilters(s source) error {
	return s.refuse("rule", "filters", "put them into the query", "filters narrow the search beside the query, and are not applied here")
}

// compile turns the query into one that is run, whatever language it is written in.
func (r *Rule) compile(f *file, s source) error {
	tree, err := r.parse(f, s)
	if err != nil {
		return err
	}
	r.missing(tree)
	if r.Query, err = eql.Compile(tree, schema{}); err != nil {
		return err
	}
	if r.Query.Late() {
		return late(tree)
	}
	r.Warnings = append(r.Warnings, r.Query.Warnings()...)
	return observable(tree)
}

func (r *Rule) parse(f *file, s source) (*syntax.Query, error) {
	if f.Rule.Language != "kuery" {
		tree, err := f.eql(s)
		if err == nil && f.Rule.CategoryOverride != "" {
			override(tree, f.Rule.CategoryOverride)
		}
		return tree, err
	}
	name, query, lines := s.embedded(f.Rule.Query)
	q, err := kql.Parse(name, query)
	if err != nil {
		return nil, quoting(lines, err)
	}
	r.Warnings, q.Source = q.Warnings, lines
	quoting(lines, syntax.ErrorList(q.Warnings))
	return kql.Translate(q, schema{})
}

// eql parses a query in EQL.
func (f *file) eql(s source) (*syntax.Query, error) {
	name, query, lines := s.embedded(f.Rule.Query)
	tree, err := syntax.Parse(name, query)
	if err != nil {
		return nil, quoting(lines, err)
	}
	tree.Source = lines
	return tree, nil
}

// override makes another field the one that "process where" tests.
func override(tree *syntax.Query, field string) {
	syntax.Walk(tree, func(n syntax.Node) bool {
		e, ok := n.(*syntax.Event)
		if !ok || e.Any {
			return true
		}
		is := &syntax.Binary{Pos: e.Pos, Op: syntax.Eq, OpPos: e.Pos,
			X: &syntax.Field{Pos: e.Pos, Name: field}, Y: &syntax.Literal{Pos: e.Pos, Value: e.Category}}
		e.Any, e.Category = true, ""
		e.Where = &syntax.Logic{Pos: e.Pos, Op: syntax.And, X: []syntax.Expr{is, e.Where}}
		return true
	})
}

// missing lists the fields of a query that no event here has.
func (r *Rule) missing(tree *syntax.Query) {
	missing := map[string]bool{}
	syntax.Walk(tree, func(n syntax.Node) bool {
		if f, ok := n.(*syntax.Field); ok {
			if _, known := (schema{}).Field(f.Name); !known {
				missing[f.Name] = true
			}
		}
		return true
	})
	r.Missing = slices.Sorted(maps.Keys(missing))
}

// categories of the documents that rules are asked about; see stages.
var categories = []string{"process", "network"}

// observable refuses a query with an event that never happens here, which as a whole
// could not match, or would match without what was to end it.
func observable(tree *syntax.Query) error {
	var errs syntax.ErrorList
	syntax.Walk(tree, func(n syntax.Node) bool {
		if e, ok := n.(*syntax.Event); ok && !e.Any && !slices.Contains(categories, e.Category) {
			err := tree.Errorf(e.Pos, "events of the category %s are not observed here", e.Category)
			err.Hint, err.Err = "there are "+strings.Join(categories, " and "), errors.ErrUnsupported
			errs = append(errs, err)
		}
		return true
	})
	if len(errs) > 0 {
		return errs
	}
	return nil
}

// Checked is a rule file with what was found out about it.
type Checked struct {
	*Rule       // as far as it could be read
	Err   error // why it is refused; nil if it is not
}

// CheckRules reads the rule files at the given paths: a file, or a directory with
// all its files named *.toml. Its error is about the paths; those about the rules are
// with them.
func CheckRules(fsys fs.FS, paths ...string) ([]Checked, error) {
	var all []Checked
	var errs []error
	ids := map[string]string{}
	for _, path := range paths {
		err := fs.WalkDir(fsys, path, func(name string, d fs.DirEntry, err error) error {
			if err != nil || !isRuleFile(path, name, d) {
				return err
			}
			src, err := fs.ReadFile(fsys, name)
			if err != nil {
				return err
			}
			c := Checked{Rule: &Rule{File: name}}
			c.Err = c.read(source{name, src})
			if first, ok := ids[c.ID]; ok && c.Err == nil {
				c.Err = fmt.Errorf("%s: rule_id %s is also in %s; rules that are loaded together need different ones", name, c.ID, first)
			} else if c.Err == nil {
				ids[c.ID] = name
			}
			all = append(all, c)
			return nil
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("read rules: %w", err))
		}
	}
	return all, errors.Join(errs...)
}

// isRuleFile reports whether what was found below a path is read.
func isRuleFile(path, name string, d fs.DirEntry) bool {
	return !d.IsDir() && (name == path || filepath.Ext(name) == ".toml")
}

// ParseRules is CheckRules for those who want all rules or none. All errors of all
// files come together.
func ParseRules(fsys fs.FS, paths ...string) ([]*Rule, error) {
	rules, refused, _, err := readRules(fsys, paths...)
	return rules, errors.Join(append(refused, err)...)
}

func readRules(fsys fs.FS, paths ...string) (rules []*Rule, refused []error, files []File, err error) {
	checked, err := CheckRules(fsys, paths...)
	for _, c := range checked {
		files = append(files, File{c.Rule.File, c.text})
		if c.Err != nil {
			refused = append(refused, c.Err)
		} else {
			rules = append(rules, c.Rule)
		}
	}
	return rules, refused, files, err
}

// Host is the file system with the names that people use.
type Host struct{}

func (Host) Open(name string) (fs.File, error) { return os.Open(name) }
