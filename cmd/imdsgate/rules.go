package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/spf13/cobra"
)

func newRules(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rules",
		Short: "Detection rules, as files",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("what about them? There is imdsgate rules check PATH")
		},
	}
	cmd.AddCommand(newRulesCheck(o))
	return cmd
}

func newRulesCheck(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "check PATH...",
		Short: "Show which rule files the daemon would load, and why not the others",
		Long: `Show which rule files the daemon would load, and why not the others. A PATH is a
file, or a directory with all its files named *.toml, in the form in which Elastic
publishes its detection rules or those of its endpoint agent. No daemon is needed.

For each file there is its rule's id and type, whether it loads, and which of the
fields that it reads no event of this host has: a condition on one of these never
holds. Then come the errors with their lines; warnings; what else is not as in
Elastic; and the exceptions of a rule that keep it from alerting, but not from
blocking, because a process can bring them about itself.

Exit status: 0 all load, 1 some are refused, 2 a path could not be read.`,
		Example: "  imdsgate rules check /etc/imdsgate/elastic\n  imdsgate rules check --json rule.toml | jq '.rules[] | select(.error)'",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("which rules? Name files or directories, as in imdsgate rules check /etc/imdsgate/elastic")
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"toml"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			checked, unread := policy.CheckRules(policy.Host{}, args...)
			report := checkReport(checked)
			var err error
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(report)
			} else {
				err = printRules(cmd.OutOrStdout(), report)
			}
			switch {
			case err != nil:
				return err
			case unread != nil:
				return unread
			case report.Refused > 0:
				return exit(exitNo)
			}
			return nil
		},
	}
}

// rulesReport is what a check has found.
type rulesReport struct {
	Loaded  int           `json:"loaded"`
	Refused int           `json:"refused"`
	Rules   []checkedRule `json:"rules"`
}

type checkedRule struct {
	File           string   `json:"file"`
	ID             string   `json:"rule_id,omitempty"`
	Name           string   `json:"name,omitempty"`
	Type           string   `json:"type,omitempty"`
	OK             bool     `json:"ok"`
	Reason         string   `json:"reason,omitempty"`      // the first line of Error
	Unsupported    bool     `json:"unsupported,omitempty"` // rather than wrong
	Error          string   `json:"error,omitempty"`
	Missing        []string `json:"missing_fields,omitempty"`
	Warnings       []string `json:"warnings,omitempty"`
	Notes          []string `json:"notes,omitempty"`
	Exclusions     []string `json:"exclusions_that_do_not_excuse,omitempty"`
	FirstSeen      string   `json:"first_seen,omitempty"`
	Action         string   `json:"action,omitempty"`
	Severity       string   `json:"severity,omitempty"`
	RiskScore      int64    `json:"risk_score"`
	Version        string   `json:"version,omitempty"`
	Tags           []string `json:"tags,omitempty"`
	References     []string `json:"references,omitempty"`
	FalsePositives []string `json:"false_positives,omitempty"`
	Threat         []threat `json:"threat,omitempty"`
}

type threat struct {
	Framework     string   `json:"framework"`
	Tactic        string   `json:"tactic"`
	Techniques    []string `json:"techniques,omitempty"`
	Subtechniques []string `json:"subtechniques,omitempty"`
}

func checkReport(checked []policy.Checked) rulesReport {
	r := rulesReport{Rules: []checkedRule{}}
	for _, c := range checked {
		row := checkedRule{
			File: c.File, ID: c.ID, Name: c.Name, Type: c.Type, OK: c.Err == nil, Missing: c.Missing, Notes: c.Notes,
			Severity: c.Severity, RiskScore: c.RiskScore, Version: c.Version,
			Tags: c.Tags, References: c.References, FalsePositives: c.FalsePositives,
		}
		for _, t := range c.Threat {
			row.Threat = append(row.Threat, threat{t.Framework, t.TacticID, t.TechniqueIDs, t.SubtechniqueIDs})
		}
		if c.Err != nil {
			r.Refused++
			row.Error, row.Reason, row.Unsupported = c.Err.Error(), reason(c.File, c.Err), errors.Is(c.Err, errors.ErrUnsupported)
			r.Rules = append(r.Rules, row)
			continue
		}
		r.Loaded++
		for _, w := range c.Warnings {
			row.Warnings = append(row.Warnings, w.Error())
		}
		for _, x := range c.Excluded {
			row.Exclusions = append(row.Exclusions, fmt.Sprintf("line %d: %s", x.Line, x.Text))
		}
		if c.NewTerms != nil {
			row.FirstSeen = c.NewTerms.String()
		}
		row.Action = policy.Block.String()
		if c.Action != nil {
			row.Action = c.Action.String()
		}
		r.Rules = append(r.Rules, row)
	}
	return r
}

// reason is an error in one line of a table that has the file already.
func reason(file string, err error) string {
	list := syntax.ErrorList(nil)
	first, fault := "", (*syntax.Error)(nil)
	switch {
	case errors.As(err, &list):
		fault = list[0]
	case errors.As(err, &fault):
	}
	if fault != nil {
		first = fmt.Sprintf("line %d: %s", fault.Line, fault.Msg)
		if fault.File != file {
			first = "query, " + first
		}
	} else {
		first, _, _ = strings.Cut(strings.TrimPrefix(err.Error(), file+": "), "\n")
	}
	if len(list) > 1 {
		first += fmt.Sprintf(" (and %d more)", len(list)-1)
	}
	return first
}

func printRules(w io.Writer, r rulesReport) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if len(r.Rules) > 0 {
		fmt.Fprintln(t, "FILE\tRULE\tTYPE\tRESULT\tFIELDS THAT NO EVENT HERE HAS")
	}
	for _, rule := range r.Rules {
		result := "ok"
		if !rule.OK {
			result = "refused: " + beginning(rule.Reason)
		}
		cells := []string{rule.File, cmp.Or(rule.ID, "-"), cmp.Or(rule.Type, "-"), result, cmp.Or(strings.Join(rule.Missing, " "), "-")}
		for i, cell := range cells {
			cells[i] = shown(strings.ReplaceAll(cell, "\n", " "))
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	p := &printer{w: w}
	for _, part := range []struct {
		title string
		lines func(checkedRule) []string
	}{
		{"refused", func(r checkedRule) []string {
			if r.OK {
				return nil
			}
			return []string{r.Error}
		}},
		{"warnings", func(r checkedRule) []string { return r.Warnings }},
		{"not as in Elastic", func(r checkedRule) []string { return named(r, r.Notes) }},
		{"exceptions that do not excuse from a block; only a grant does, or honour_exclusions", func(r checkedRule) []string { return named(r, r.Exclusions) }},
	} {
		title := part.title
		for _, rule := range r.Rules {
			for _, line := range part.lines(rule) {
				if title != "" {
					p.line("\n%s", title)
					title = ""
				}
				p.line("  %s", strings.ReplaceAll(shown(line), "\n", "\n  "))
			}
		}
	}
	if len(r.Rules) == 0 {
		p.line("no files named *.toml there")
	} else {
		p.line("\n%d load, %d refused", r.Loaded, r.Refused)
	}
	return p.err
}

// beginning is what of a reason a table has room for. All of it is below.
func beginning(reason string) string {
	const room = 60
	if r := []rune(reason); len(r) > room {
		return string(r[:room-1]) + "…"
	}
	return reason
}

// named puts the file before lines that do not have it.
func named(r checkedRule, lines []string) []string {
	all := make([]string, len(lines))
	for i, line := range lines {
		all[i] = r.File + ": " + line
	}
	return all
}

// shown is text from a file, without what would do more to a terminal than to show
// itself.
func shown(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\n' || r == '\t' {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
