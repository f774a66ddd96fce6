package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/pelletier/go-toml/v2"
)

// Rule is a detection, as it was loaded. What follows from a match of it is not
// its own business but the policy's.
type Rule struct {
	event.Rule
	File   string
	Query  *eql.Query // its warnings have lines of the file
	Action *Action    // that the file proposes, in a table of ours; nil if it does not

	// Bound is the query without the clauses that the caller could use to
	// excuse himself, which Excluded lists.
	Bound    *eql.Query
	Excluded []eql.Exclusion
}

// file is a rule file in the form in which Elastic publishes its detection
// rules. Tables and keys that are not here are none of our business.
type file struct {
	Metadata struct {
		UpdatedDate string `toml:"updated_date"`
		Ruleset     string `toml:"ruleset"`
	} `toml:"metadata"`
	Imdsgate struct {
		Action *Action `toml:"action"`
	} `toml:"imdsgate"`
	Rule struct {
		ID         string   `toml:"rule_id"`
		Name       string   `toml:"name"`
		Type       string   `toml:"type"`
		Language   string   `toml:"language"`
		Query      string   `toml:"query"`
		Severity   string   `toml:"severity"`
		RiskScore  int64    `toml:"risk_score"`
		References []string `toml:"references"`
		Threat     []struct {
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
		} `toml:"threat"`
	} `toml:"rule"`
}

// ParseRule reads one rule file. name is for errors, which have the line of the
// file with a caret.
func ParseRule(name string, src []byte) (*Rule, error) {
	var f file
	if err := toml.Unmarshal(src, &f); err != nil {
		if decode := (*toml.DecodeError)(nil); errors.As(err, &decode) {
			line, column := decode.Position()
			return nil, fmt.Errorf("%s:%d:%d: %w\n%s", name, line, column, decode, decode.String())
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r := &Rule{File: name, Action: f.Imdsgate.Action}
	switch {
	case f.Rule.Name == "" || f.Rule.ID == "":
		return nil, fmt.Errorf("%s: no [rule] with a name and a rule_id; is this a rule file?", name)
	case f.Rule.Type != "eql" || f.Rule.Language != "eql":
		return nil, fmt.Errorf("%s: a rule of type %q in the language %q: %w; rules of type eql are run", name, f.Rule.Type, f.Rule.Language, errors.ErrUnsupported)
	case f.Rule.Query == "":
		return nil, fmt.Errorf("%s: the rule has no query", name)
	}
	if _, err := event.SeverityNumber(f.Rule.Severity); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	tree, err := syntax.Parse(name, f.Rule.Query)
	if err == nil {
		r.Query, err = eql.Compile(tree, schema{})
	}
	if err == nil && r.Query.Late() {
		err = late(tree)
	}
	if err != nil {
		return nil, inFile(err, src, f.Rule.Query)
	}
	inFile(syntax.ErrorList(r.Query.Warnings()), src, f.Rule.Query)
	r.Bound, r.Excluded = r.Query.WithoutExclusions(callerChosen)

	r.Rule = event.Rule{
		ID: f.Rule.ID, Name: f.Rule.Name, Ruleset: f.Metadata.Ruleset, Version: f.Metadata.UpdatedDate,
		Severity: f.Rule.Severity, RiskScore: f.Rule.RiskScore,
	}
	if len(f.Rule.References) > 0 {
		r.Reference = f.Rule.References[0]
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
	return r, nil
}

// late refuses a sequence that ends in a missing event. An alert belongs to the
// request that raised it, and when the span is over that was answered long ago.
func late(tree *syntax.Query) error {
	items := tree.Body.(*syntax.Sequence).Items
	e := tree.Errorf(items[len(items)-1].Pos, "a sequence that ends in a missing event is decided when its maxspan is over, after the request that it is about")
	e.Hint, e.Err = "ask recorded events with imdsgate eql", errors.ErrUnsupported
	return syntax.ErrorList{e}
}

// inFile moves the lines of a query's errors to where the query stands in its
// file. A query that is written with escapes keeps its own lines.
func inFile(err error, src []byte, query string) error {
	at := bytes.Index(bytes.ReplaceAll(src, []byte("\r\n"), []byte("\n")), []byte(strings.ReplaceAll(query, "\r\n", "\n")))
	if at < 0 {
		return err
	}
	above := bytes.Count(src[:at], []byte("\n"))
	list := syntax.ErrorList(nil)
	if errors.As(err, &list) {
		for _, e := range list {
			e.Line += above
		}
	}
	return err
}

// ParseRules reads the rule files at the given paths: a file, or a directory
// with all its files named *.toml. All errors of all files come together.
func ParseRules(fsys fs.FS, paths ...string) ([]*Rule, error) {
	var rules []*Rule
	var errs []error
	ids := map[string]string{}
	for _, path := range paths {
		err := fs.WalkDir(fsys, path, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || name != path && filepath.Ext(name) != ".toml" {
				return err
			}
			src, err := fs.ReadFile(fsys, name)
			if err != nil {
				return err
			}
			r, err := ParseRule(name, src)
			if err != nil {
				errs = append(errs, err)
				return nil
			}
			if first, ok := ids[r.ID]; ok {
				errs = append(errs, fmt.Errorf("%s: rule_id %s is also in %s; rules that are loaded together need different ones", name, r.ID, first))
				return nil
			}
			ids[r.ID] = name
			rules = append(rules, r)
			return nil
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("read rules: %w", err))
		}
	}
	return rules, errors.Join(errs...)
}

// host is the file system with the names that people use.
type host struct{}

func (host) Open(name string) (fs.File, error) { return os.Open(name) }
