package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/spf13/cobra"
)

func newDecisions(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "decisions",
		Short: "Allow or deny something for a time, whatever rules and grants say",
		Long: `Allow or deny something for a time, whatever rules and grants say. A decision
that denies comes before one that allows, and both survive a restart of the
daemon. Each is in the events, with who has made it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newAddDecision(o), newListDecisions(o), newDeleteDecisions(o))
	return cmd
}

func newAddDecision(o *options) *cobra.Command {
	var lasts string
	var risk bool
	cmd := &cobra.Command{
		Use:   "add allow|deny --for 4h --reason TEXT [--exe PATH] [--unit NAME] [--user NAME] [--container ID]",
		Short: "Decide for a time",
		Long: `Decide for a time. What is named must hold together; the same again, for
another time, takes the place of what there was.

To allow takes what a grant takes: an executable of the host that only root can
change, with a unit, a user or a container. What lets in more than it says needs
--accept-risk: an executable alone, an interpreter or a downloader for a user
alone, a login for all of its users, a unit, a user or a container as a whole.

Exit status: 0 decided, 2 it was not taken, 3 the daemon is not running, 77 not
permitted.`,
		Example: `  imdsgate decisions add allow --exe /opt/app/bin/app --unit app.service --for 4h --reason INC-123
  imdsgate decisions add deny --user www-data --for 12h --reason "INC-124, shell in the shop"`,
		Args:      oneOf,
		ValidArgs: []string{"allow", "deny"},
		RunE: func(cmd *cobra.Command, what []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			args, err := given(cmd, "exe", "unit", "user", "container", "reason")
			if err != nil {
				return err
			}
			d, err := duration(lasts)
			if err != nil {
				return err
			}
			args.Set("effect", what[0])
			args.Set("for", d.String())
			args.Set("accept-risk", strconv.FormatBool(risk))
			var done report.Decided
			if err := client.Post(cmd.Context(), "decisions/add", args, &done); err != nil {
				if strings.Contains(err.Error(), policy.ErrRisk.Error()) {
					err = fmt.Errorf("%w; or accept that with --accept-risk", err)
				}
				return err
			}
			if o.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(done)
			}
			p := &printer{w: cmd.OutOrStdout()}
			p.line("%s: %s %s, %s", done.Decision.ID, done.Decision.Effect, done.Decision.About(), lasting(done.Decision.Expires))
			if r := done.Replaced; r != nil {
				p.line("in the place of %s, %s", r.ID, lasting(r.Expires))
			}
			p.notes(done.Notes)
			return p.err
		},
	}
	f := cmd.Flags()
	f.String("exe", "", "`path` of an executable")
	f.String("unit", "", "system `unit`, as in app.service")
	f.String("user", "", "`user`, by name or number")
	f.String("container", "", "`id` of a container, with all its 64 digits")
	f.String("reason", "", "why, for those who find it")
	f.StringVar(&lasts, "for", "", "how `long`: 30m, 4h, 2d; at most 30d")
	f.BoolVar(&risk, "accept-risk", false, "allow also what lets in more than it says")
	cmd.MarkFlagRequired("for")
	cmd.MarkFlagRequired("reason")
	return cmd
}

// given are the flags of these names that were given.
func given(cmd *cobra.Command, names ...string) (url.Values, error) {
	args := url.Values{}
	for _, name := range names {
		value, err := cmd.Flags().GetString(name)
		if err != nil {
			return nil, err
		}
		if cmd.Flags().Changed(name) {
			if value == "" {
				return nil, fmt.Errorf("--%s is empty: leave it out, or is a variable not set?", name)
			}
			args.Set(name, value)
		}
	}
	return args, nil
}

func newListDecisions(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the decisions",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var r report.Decisions
			if err := client.Get(cmd.Context(), "decisions", nil, &r); err != nil {
				return err
			}
			if o.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
			}
			return printDecisions(cmd.OutOrStdout(), r)
		},
	}
}

func printDecisions(w io.Writer, r report.Decisions) error {
	p := &printer{w: w}
	if r.Error != "" {
		p.line("! %s", r.Error)
	}
	if len(r.All) == 0 {
		p.line("there are none")
		return p.err
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	p.w = t
	p.line("ID\tDECISION\tENDS\tBY\tREASON")
	for _, d := range r.All {
		p.line("%s\t%s %s\t%s\t%s\t%s", d.ID, d.Effect, d.About(), lasting(d.Expires), printable(d.By.String()), printable(d.Reason))
	}
	return errors.Join(p.err, t.Flush())
}

func newDeleteDecisions(o *options) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "delete ID... | --all",
		Short: "Delete decisions before their time is over",
		Args: func(_ *cobra.Command, ids []string) error {
			if all == (len(ids) > 0) {
				return errors.New("say which decisions, as in imdsgate decisions delete k3f9x2ab, or --all; imdsgate decisions list shows them")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var done report.Decided
			if err := client.Post(cmd.Context(), "decisions/delete", url.Values{"id": ids, "all": {strconv.FormatBool(all)}}, &done); err != nil {
				return err
			}
			if o.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(done)
			}
			p := &printer{w: cmd.OutOrStdout()}
			for _, d := range done.Deleted {
				p.line("deleted %s: %s %s", d.ID, d.Effect, d.About())
			}
			if len(done.Deleted) == 0 {
				p.line("there were none")
			}
			p.notes(done.Notes)
			return p.err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all of them")
	return cmd
}

// duration reads 30m and 4h, as time.ParseDuration does, and whole days.
func duration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n uint64
		n, err = strconv.ParseUint(days, 10, 8)
		d = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("--for %q is not a time, as in 30m, 4h or 2d", s)
	}
	return d, nil
}

// lasting says when something ends, and how long that is from now.
func lasting(end time.Time) string {
	if end.IsZero() {
		return "until it is changed"
	}
	left := time.Until(end).Round(time.Second)
	if left <= 0 {
		return "over"
	}
	return fmt.Sprintf("until %s (%v)", end.Local().Format("2006-01-02 15:04:05 MST"), left)
}

func (p *printer) notes(notes []string) {
	for _, n := range notes {
		p.line("note: %s", n)
	}
}
