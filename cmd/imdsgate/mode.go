package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/spf13/cobra"
)

func newMode(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "mode",
		Short: "Show the mode, since when, until when and why",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var m report.Modes
			if err := client.Get(cmd.Context(), "mode", nil, &m); err != nil {
				return err
			}
			return o.printMode(cmd.OutOrStdout(), m)
		},
	}
	cmd.AddCommand(newSetMode(o))
	return cmd
}

func newSetMode(o *options) *cobra.Command {
	var lasts string
	cmd := &cobra.Command{
		Use:   "set audit|enforce|off --reason TEXT [--for 30m]",
		Short: "Change the mode, for a time",
		Long: `Change the mode, for a time: when it is over the daemon goes back to the
configured mode by itself, also if it was restarted meanwhile. What protects
less than what the configuration asks for needs --for; everything else
holds until it is changed, here or in the configuration. Setting the configured
mode goes back at once.

off removes the redirect: clients reach the service itself, and nothing is
attributed, judged or recorded.

Exit status: 0 the mode is the one that was asked for, 2 it was not taken, 3 the
daemon is not running, 77 not permitted.`,
		Example: `  imdsgate mode set audit --for 30m --reason "INC-123, who is refused?"
  imdsgate mode set enforce --reason "INC-123 is solved"`,
		Args:      oneOf,
		ValidArgs: []string{"audit", "enforce", "off"},
		RunE: func(cmd *cobra.Command, mode []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			args, err := given(cmd, "reason")
			if err != nil {
				return err
			}
			args.Set("mode", mode[0])
			if cmd.Flags().Changed("for") {
				d, err := duration(lasts)
				if err != nil {
					return err
				}
				args.Set("for", d.String())
			}
			var m report.Modes
			if err := client.Post(cmd.Context(), "mode/set", args, &m); err != nil {
				return err
			}
			if err := o.printMode(cmd.OutOrStdout(), m); err != nil || o.json || m.Mode != policy.Enforce {
				return err
			}
			back := "audit --for 30m"
			if m.Set != nil {
				back = m.Configured.String()
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "imdsgate events -f shows who is refused, imdsgate explain --event ID why; imdsgate mode set %s --reason TEXT goes back\n", back)
			return err
		},
	}
	cmd.Flags().StringVar(&lasts, "for", "", "how `long`: 30m, 4h; at most 7d")
	cmd.Flags().String("reason", "", "why, for those who find it so")
	cmd.MarkFlagRequired("reason")
	return cmd
}

func (o *options) printMode(w io.Writer, m report.Modes) error {
	if o.json {
		return json.NewEncoder(w).Encode(m)
	}
	p := &printer{w: w}
	p.line("%s, since %s", m.Mode, m.Since.Local().Format("2006-01-02 15:04:05 MST"))
	if s := m.Set; s != nil {
		p.line("set by %s, %s: %s", s.By, lasting(s.Until), printable(s.Reason))
		if !s.Until.IsZero() {
			p.line("then %s, as configured", m.Configured)
		} else {
			p.line("the configuration asks for %s", m.Configured)
		}
	} else {
		p.line("as configured")
	}
	if m.Error != "" {
		p.line("! %s", m.Error)
	}
	return p.err
}
