package main

import (
	"encoding/json"
	"errors"
	"io"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/spf13/cobra"
)

func newReload(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the daemon read the configuration again, and see what changed",
		Long: `Have the daemon read the configuration again. It takes the whole of it or, if anything
is wrong, none: then the old policy stays in force, and what is wrong is printed with
file, line and caret. Rules that are as they were go on with what they remember.

It is about the policy and the mode. What else has changed in the files is named, and
holds from the next start on.

Exit status: 0 it is in force, 1 it is refused, 2 the daemon gave no answer, 3 it does not
run, 77 only root may.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if errors.Is(err, errConfig) { // which the daemon will say
				client, err = o.anyway(err), nil
			}
			if err != nil {
				return err
			}
			var r report.Reload
			if err := client.Post(cmd.Context(), "reload", nil, &r); err != nil {
				return err
			}
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(r)
			} else {
				err = printReload(cmd.OutOrStdout(), &r)
			}
			if err == nil && r.Refused != "" {
				return exit(exitNo)
			}
			return err
		},
	}
}

func printReload(w io.Writer, r *report.Reload) error {
	p := &printer{w: w}
	if r.Refused != "" {
		p.line("refused, the old policy stays in force:\n%s", shown(r.Refused))
		return p.err
	}
	for _, line := range r.Changed {
		p.line("%s", shown(line))
	}
	for _, key := range r.Restart {
		p.line("! %s has changed too, which holds from the next start on", key)
	}
	switch {
	case r.Before.Digest == r.After.Digest && len(r.Changed) > 0: // the mode alone
		p.line("in force: %d rules, %d grants, %d denies, %s", len(r.After.Rules), len(r.After.Grants), len(r.After.Denies), r.After.Digest)
	case r.Before.Digest == r.After.Digest:
		p.line("unchanged: %d rules, %d grants, %d denies, %s", len(r.After.Rules), len(r.After.Grants), len(r.After.Denies), r.After.Digest)
	default:
		p.line("in force: %d rules, %d grants, %d denies, %s, was %s", len(r.After.Rules), len(r.After.Grants), len(r.After.Denies), r.After.Digest, r.Before.Digest)
	}
	return p.err
}
