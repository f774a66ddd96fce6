package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/spf13/cobra"
)

func newWhois(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "whois LOCAL:PORT",
		Short: "Show which processes have a connection to the metadata service",
		Long: `Show which processes have a connection to the metadata service, and how that is
known. LOCAL:PORT is the client's end of it, as ss -tn and our events show it.

  connector  called connect(2) for the socket
  holder     has a descriptor of it
  writer     wrote on it, and did not connect it
  ancestor   had it before it forked a holder
  creator    made another subject the child of its own parent (CLONE_PARENT)

Exit status: 0 it is known who has it and that nobody else has, 1 not for
certain; 2 there is no such connection.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return errors.New("whose connection? imdsgate whois LOCAL:PORT takes the client's end of one")
			}
			return nil
		},
		Example: "  imdsgate whois 172.31.0.10:49152\n  imdsgate whois '[fd00:ec2:1::10]:49152'",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var w report.Whois
			if err := client.Get(cmd.Context(), "whois", url.Values{"client": args}, &w); err != nil {
				return err
			}
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(w)
			} else {
				err = printWhois(cmd.OutOrStdout(), w)
			}
			if err == nil && !w.Complete {
				return exit(exitNo)
			}
			return err
		},
	}
}

func printWhois(w io.Writer, found report.Whois) error {
	p := &printer{w: w}
	where := "of this host"
	if found.Forwarded {
		where = "of another network namespace"
	}
	p.line("%s -> %s, a client %s", found.Client, found.Endpoint, where)
	p.line("  socket             inode %d, cookie %d", found.Inode, found.Cookie)
	p.line("  evidence           level %s, confidence %s, by %s, in %v", found.Level, found.Confidence, found.Via, found.Took.Round(time.Microsecond))
	switch {
	case found.Complete && found.Confidence == "high":
		p.line("  complete           nobody else has it")
	case found.Complete:
		p.line("  complete           no other process has a descriptor of it; who prepares for level %s can hide", found.Level)
	default:
		p.line("  not complete       %s: %s", found.Reason, cmp.Or(found.Error, reasons[found.Reason], "see imdsgate status"))
	}
	for i, s := range found.Subjects {
		if slices.ContainsFunc(found.Subjects[:i], func(f report.Holder) bool { return f.EntityID == s.EntityID && f.EntityID != "" }) {
			p.line("  was before         %s, as %s: %s", image(s.Subject), s.Role, s.CommandLine)
			continue
		}
		p.line("")
		fmt.Fprintf(w, "%s: ", s.Role)
		p.subject(s.Subject, s.Ancestors)
	}
	return p.err
}

// reasons are those of package attribution, in words.
var reasons = map[string]string{
	"client_gone":     "the client has closed it",
	"no_holder":       "no process has a descriptor of it: it may be in a message that nobody has received",
	"access_denied":   "a process that may have it cannot be read",
	"churn":           "processes are born or end faster than they can be searched",
	"crowd":           "more processes have it than are read",
	"exec_race":       "who has it went on becoming other programs",
	"remote":          "no process of this host has the client's end",
	"no_witness":      "nobody was seen to connect it",
	"ambiguous_netns": "several network namespaces have a connection with these addresses and ports",
	"evidence_lost":   "events of the kernel that may be about it were lost",
	"partial":         "only likely processes were searched",
	"late":            "the search was not over in time",
}
