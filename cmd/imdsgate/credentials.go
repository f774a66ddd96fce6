package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/spf13/cobra"
)

func newCredentials(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "credentials [ACCESS-KEY-ID]",
		Short: "Show which process got which credentials",
		Long: `Show which process got which credentials of the instance's role: all that were
handed out, the latest first, or those of one access key id, as CloudTrail has it
in userIdentity.accessKeyId. The secret is nowhere in it.

The daemon remembers this since it was started, for some thousand programs; its
events have imdsgate.credential.access_key_id for as long as they are kept.

Exit status: 0 somebody got them, 1 nobody is known to.`,
		Args:    cobra.MaximumNArgs(1),
		Example: "  imdsgate credentials\n  imdsgate credentials ASIAEXAMPLEFAKE00001",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var c report.Credentials
			if err := client.Get(cmd.Context(), "credentials", url.Values{"key": args}, &c); err != nil {
				return err
			}
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(c)
			} else {
				err = printCredentials(cmd.OutOrStdout(), c)
			}
			if err == nil && len(c.Issued) == 0 {
				return exit(exitNo)
			}
			return err
		},
	}
}

func printCredentials(w io.Writer, c report.Credentials) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if len(c.Issued) > 0 {
		fmt.Fprintln(t, "LAST\tTIMES\tACCESS KEY ID\tEXPIRES\tPROCESS\tUSER\tUNIT\tVERDICT")
	}
	for _, i := range c.Issued {
		key, expires := i.AccessKeyID, "?"
		if key == "" {
			key = "? (a part)"
		}
		if i.Expiration != nil {
			expires = second(*i.Expiration)
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t", second(i.Last), i.Count, key, expires)
		if len(i.To) == 0 {
			fmt.Fprintf(t, "not known, from %s\t\t\t%s\n", i.Source, verdict(i))
		}
		for n, p := range i.To {
			// Others that had a part in the same connection are judged together.
			if n > 0 {
				fmt.Fprintf(t, "\t\t\t\t%s ", p.Role)
			}
			fmt.Fprintf(t, "%s (pid %d)\t%s\t%s\t", printable(p.Executable), p.PID, p.User, printable(p.Unit))
			if n == 0 {
				fmt.Fprint(t, verdict(i))
			}
			fmt.Fprintln(t)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	p := &printer{w: w}
	if len(c.Issued) == 0 {
		p.line("nobody is known to have got them")
	}
	p.line("since %s; the event file has what was before", second(c.Since))
	if c.Forgotten > 0 {
		p.line("%d lines were forgotten for want of room: the event file has them", c.Forgotten)
	}
	return p.err
}

func second(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// printable quotes what would do more to a terminal than to show itself, or to the
// table.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// verdict says what was decided, and in audit mode what would have been, and by
// what.
func verdict(i report.Issuance) string {
	said := []string{i.Verdict}
	if i.WouldBe != i.Verdict {
		said = append(said, "would "+i.WouldBe)
	}
	switch {
	case i.Grant != "":
		said = append(said, "grant "+i.Grant)
	case i.Rule != "":
		said = append(said, "rule "+i.Rule)
	case i.Reason != "":
		said = append(said, i.Reason)
	}
	return printable(strings.Join(said, ", "))
}
