package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// queryPlan is how a query is understood.
type queryPlan struct {
	Kind       string      `json:"kind"` // event, sequence, sample
	MaxSpan    string      `json:"maxspan,omitempty"`
	Stages     []stagePlan `json:"stages"`
	Until      *stagePlan  `json:"until,omitempty"`
	Pipes      []string    `json:"pipes,omitempty"`
	Fields     []fieldPlan `json:"fields"`
	Timestamp  string      `json:"timestamp"`
	Form       string      `json:"timestamp_form"`
	Tiebreaker string      `json:"tiebreaker,omitempty"`
}

type stagePlan struct {
	Category string   `json:"category,omitempty"` // none: any
	Missing  bool     `json:"missing,omitempty"`
	Runs     int      `json:"runs,omitempty"`
	Keys     []string `json:"keys,omitempty"`
	// Conditions must all hold. They are asked in this order, until one does not.
	Conditions []string `json:"conditions"`
}

type fieldPlan struct {
	Name string `json:"name"`
	Type string `json:"type"`
	From string `json:"from"` // schema, data, query
}

func planOf(tree *syntax.Query, p *ndjson.Plan, roles ndjson.Roles) queryPlan {
	q := queryPlan{Kind: "event", Timestamp: roles.Timestamp, Form: roles.Form.String(), Tiebreaker: roles.Tiebreaker}
	var by []*syntax.Field
	var items []*syntax.Item
	switch body := tree.Body.(type) {
	case *syntax.Sequence:
		q.Kind, by, items = "sequence", body.By, body.Items
		if body.MaxSpan > 0 {
			q.MaxSpan = body.MaxSpan.String()
		}
		if u := p.Query.Until(); u != nil {
			until := planStage(u, by, body.Until)
			q.Until = &until
		}
	case *syntax.Sample:
		q.Kind, by, items = "sample", body.By, body.Items
	}
	for i, s := range p.Query.Stages() {
		var item *syntax.Item
		if items != nil {
			item = items[i]
		}
		q.Stages = append(q.Stages, planStage(s, by, item))
	}
	for _, pipe := range tree.Pipes {
		q.Pipes = append(q.Pipes, fmt.Sprintf("%s %d", pipe.Name, pipe.Count))
	}
	for _, f := range p.Fields.All() {
		q.Fields = append(q.Fields, fieldPlan{f.Name, f.Type.String(), f.Origin.String()})
	}
	return q
}

func planStage(s *eql.Stage, by []*syntax.Field, item *syntax.Item) stagePlan {
	p := stagePlan{Missing: s.Missing()}
	p.Category, _ = s.Category()
	for _, c := range s.Plan() {
		p.Conditions = append(p.Conditions, c.Text)
	}
	if item == nil {
		return p
	}
	if item.Runs > 1 {
		p.Runs = item.Runs
	}
	for _, k := range slices.Concat(by, item.By) {
		p.Keys = append(p.Keys, syntax.Format(k))
	}
	return p
}

func explainQuery(w io.Writer, asJSON bool, q queryPlan) error {
	if asJSON {
		return json.NewEncoder(w).Encode(q)
	}
	p := &printer{w: w}
	head := q.Kind
	if q.MaxSpan != "" {
		head += " within " + q.MaxSpan
	}
	p.line("%s", head)
	for i, s := range q.Stages {
		p.stage(fmt.Sprintf("%3d  ", i+1), s)
	}
	if q.Until != nil {
		p.stage("  until ", *q.Until)
	}
	for _, pipe := range q.Pipes {
		p.line("  | %s", pipe)
	}
	p.line("")
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "FIELD\tTYPE\tKNOWN FROM")
	for _, f := range q.Fields {
		fmt.Fprintf(t, "%s\t%s\t%s\n", printable(f.Name), f.Type, f.From)
	}
	fmt.Fprintf(t, "%s\ttime (%s)\tthe order\n", printable(q.Timestamp), q.Form)
	if q.Tiebreaker != "" {
		fmt.Fprintf(t, "%s\ttiebreaker\tthe order\n", printable(q.Tiebreaker))
	}
	return cmp.Or(p.err, t.Flush())
}

func (p *printer) stage(mark string, s stagePlan) {
	text := cmp.Or(s.Category, "any")
	if s.Missing {
		text += " missing"
	}
	if len(s.Keys) > 0 {
		text += " by " + strings.Join(s.Keys, ", ")
	}
	if s.Runs > 0 {
		text += fmt.Sprintf(", %d times", s.Runs)
	}
	p.line("%s%s", mark, text)
	for _, c := range s.Conditions {
		p.line("       %s", c)
	}
}
