package tune

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/imdsgate/imdsgate/policy"
)

// DropIn is a part of a configuration with the grants of proposals that were taken.
// It is to be compiled together with the rest before it is used.
func DropIn(taken []*Proposal, r *Report) ([]byte, error) {
	grants := make([]yaml.MapSlice, 0, len(taken))
	for _, p := range taken {
		grants = append(grants, fields(&p.Grant))
	}
	text, err := yaml.MarshalWithOptions(yaml.MapSlice{{Key: "grants", Value: grants}}, yaml.IndentSequence(true))
	if err != nil {
		return nil, fmt.Errorf("write the grants: %w", err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# Proposed by imdsgate tune, from %s on %d hosts between %s and %s, and taken.\n# Try it: imdsgate replay. Each grant ends by itself: run tune again before it does.\n",
		number(r.Sum.Requests), r.Readiness.Hosts, day(r.Sum.First), day(r.Sum.Last))
	b.Write(text)
	return []byte(b.String()), nil
}

func day(t time.Time) string { return t.UTC().Format(time.DateOnly) }

// fields are what a grant says, as a configuration has it.
func fields(g *policy.Grant) yaml.MapSlice {
	var m yaml.MapSlice
	add := func(key string, value any, is bool) {
		if is {
			m = append(m, yaml.MapItem{Key: key, Value: value})
		}
	}
	add("name", g.Name, true)
	if len(g.Executable) == 1 {
		add("executable", g.Executable[0], true)
	} else {
		add("executable", []string(g.Executable), true)
	}
	for _, f := range []struct{ key, value string }{
		{"unit", g.Unit}, {"user", g.User}, {"group", g.Group}, {"container", g.Container}, {"pod", g.Pod}, {"parent", g.Parent},
	} {
		add(f.key, f.value, f.value != "")
	}
	add("classes", g.Classes, len(g.Classes) > 0)
	add("paths", g.Paths, len(g.Paths) > 0)
	add("api", g.API.String(), g.API != policy.AnyAPI)
	add("own_token", true, g.OwnToken)
	add("owner", g.Owner, true)
	add("reason", g.Reason, true)
	add("expires", day(g.Expires.Time), !g.Expires.IsZero())
	return m
}

// MarshalJSON writes the grant under the names that a configuration has for it.
func (p *Proposal) MarshalJSON() ([]byte, error) {
	type plain Proposal // without this method
	grant := map[string]any{}
	for _, f := range fields(&p.Grant) {
		grant[f.Key.(string)] = f.Value
	}
	return json.Marshal(struct {
		Grant map[string]any `json:"grant"`
		*plain
	}{grant, (*plain)(p)})
}
