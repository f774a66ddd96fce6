package policy

import "github.com/imdsgate/imdsgate/policy/eql/syntax"

// RuleQuery is the query of a rule file by itself, for those who ask recorded events of
// whatever kind. A field that the rule does not name is "".
type RuleQuery struct {
	Tree       *syntax.Query
	Category   string // field that "process where ..." tests
	Timestamp  string // field by which events are in order
	Tiebreaker string // field that orders those of the same time
}

// ParseRuleQuery reads the query of a rule file of the type eql, one of the endpoint
// agent's included. Its errors are like those of ParseRule, but it is not concerned
// with what events of this host have.
func ParseRuleQuery(name string, src []byte) (*RuleQuery, error) {
	s := source{name, src}
	var f file
	if err := s.decode(&f); err != nil {
		return nil, err
	}
	f.endpoint(&Rule{})
	r := &f.Rule
	switch {
	case r.Query == "":
		return nil, s.at("rule", "query", "", "the rule has no query")
	case r.Type != "eql":
		return nil, s.refuse("rule", "type", "only that of a rule of the type eql can", "the query of a rule of the type %q cannot be asked by itself", r.Type)
	case r.Language != "eql":
		return nil, s.refuse("rule", "language", "", "a rule of the type eql in the language %q is none", r.Language)
	case len(r.Filters) > 0:
		return nil, f.refuseFilters(s)
	}
	tree, err := f.eql(s)
	if err != nil {
		return nil, err
	}
	return &RuleQuery{tree, r.CategoryOverride, r.TimestampField, r.TiebreakerField}, nil
}
