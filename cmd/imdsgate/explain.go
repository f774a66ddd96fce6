package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strconv"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/spf13/cobra"
)

func newExplain(o *options) *cobra.Command {
	var pid int
	cmd := &cobra.Command{
		Use:   "explain --pid N",
		Short: "Show what would become of a process's requests, and why",
		Long: `Show how the daemon sees a running process, what each rule and grant says of
it, and what would become of its requests in enforce mode.

A rule's conditions are marked: + holds, - does not, ~ does not, and would not
keep the rule from blocking, because the process can bring it about itself.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("what is %q? A process is given as in imdsgate explain --pid 4711", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var e report.Explanation
			if err := client.Get(cmd.Context(), "explain", url.Values{"pid": {strconv.Itoa(pid)}}, &e); err != nil {
				return err
			}
			if o.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(e)
			}
			return printExplanation(cmd.OutOrStdout(), e)
		},
	}
	cmd.Flags().IntVar(&pid, "pid", 0, "process to explain")
	cmd.MarkFlagRequired("pid")
	return cmd
}

func printExplanation(w io.Writer, e report.Explanation) error {
	p := &printer{w: w}
	p.subject(e.Subject, e.Ancestors)
	for _, was := range e.Past {
		p.line("  was before         %s: %s", image(was), was.CommandLine)
	}
	p.line("  evidence           level %s", e.Level)
	p.line("\nrules")
	for _, r := range e.Rules {
		mark := "does not match"
		if r.Matches {
			mark = "MATCHES"
		}
		p.line("  %s: %s", r.Name, mark)
		for _, c := range r.Clauses {
			sign := "-"
			switch {
			case c.Holds:
				sign = "+"
			case c.Excuse:
				sign = "~"
			}
			p.line("    %s %.160s", sign, c.Text)
		}
	}
	p.line("\ngrants")
	if len(e.Grants) == 0 {
		p.line("  there are none")
	}
	for _, g := range e.Grants {
		if g.Allows {
			p.line("  %s: covers it", g.Name)
		} else {
			p.line("  %s: does not cover it: %s", g.Name, g.Missed)
		}
	}
	p.line("\nin enforce mode (it is %s now), if it is the only holder of the connection", e.Mode)
	for _, v := range e.Verdicts {
		p.line("  %-15s %-5s  %s", v.Class, v.Verdict, v.Reason)
	}
	return p.err
}

// subject prints one process and where it comes from.
func (p *printer) subject(s report.Subject, ancestors []report.Subject) {
	p.line("%s (pid %d), user %s", program(s), s.PID, s.User)
	p.line("  command line       %s", s.CommandLine)
	if !s.Ended {
		p.line("  working directory  %s", s.WorkingDir)
		p.line("  unit               %s", unit(s))
		p.line("  executable         %s", file(s))
	}
	how := map[string]string{"birth": "forked by", "snapshot": "parent at startup", "present": "parent"}[s.Ancestry]
	if how == "" {
		p.line("  forked by          not known: events were lost, or its record had to make room")
		how = "then"
	}
	for _, a := range ancestors {
		p.line("  %-18s %s (pid %d)", how, program(a), a.PID)
		how = "then"
	}
	if s.ParentNow != nil {
		p.line("  %-18s %s (pid %d)", "parent now", program(*s.ParentNow), s.ParentNow.PID)
	}
}

func program(s report.Subject) string {
	if s.Ended {
		return image(s) + ", ended or another program now"
	}
	return image(s)
}

func image(s report.Subject) string {
	if s.Executable == "" {
		return "a program that could not be read"
	}
	return s.Executable
}

func unit(s report.Subject) string {
	switch {
	case s.Unit != "":
		return s.Unit
	case s.UserUnit != "":
		return s.UserUnit + ", a name that its user chose"
	}
	return "none, cgroup " + s.Cgroup
}

func file(s report.Subject) string {
	switch {
	case s.Swapped:
		return "exchanged: /proc/PID/exe names another file than the kernel has executed"
	case s.Loader:
		return "a dynamic loader"
	case s.RootOwned:
		return "the host's own, only root can change it"
	case s.HostVerified:
		return "the host's own, others than root can change it"
	}
	return "not the file that the host has under this path"
}

// printer keeps the first error of many lines.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}
