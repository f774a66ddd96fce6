package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/policy"
)

// nearest is how many grants, and rules that do not match, are shown without --all.
const nearest = 3

func printExplanation(w io.Writer, x report.Explanation, all bool) error {
	p := &printer{w: w}
	if x.Subject == nil {
		p.line("nobody is known")
	} else {
		p.subject(*x.Subject, x.Ancestors)
	}
	for _, was := range x.Past {
		p.line("  was before         %s: %s", image(was), was.CommandLine)
	}
	for _, other := range x.Others {
		p.line("  held it, too       %s (pid %d), user %s: %s", image(other), other.PID, other.User, other.CommandLine)
	}
	if x.Level != "" {
		p.line("  evidence           level %s", x.Level)
	}
	q := x.Request
	p.line("  asks for           %s %s (%s, %s)", printable(q.Method), printable(q.Path), q.Class, q.API)
	if r := x.Recorded; r != nil {
		p.line("\nrecorded at %s on %s in %s mode: %s, in enforce mode %s%s", r.Time, printable(r.Host), r.Mode, r.Verdict, r.WouldBe, because(r.Reason))
		if r.Repeats > 0 {
			p.line("it stands for %d requests from %s on, which were alike", r.Repeats, r.First)
		}
	}
	p.line("\n%s in enforce mode%s%s", strings.ToUpper(x.Verdict), of(x), because(x.Reason))
	if x.Doubt != "" {
		p.line("not certain: %s", x.Doubt)
	}
	p.line("")
	for i, s := range x.Steps {
		p.step(s, i == len(x.Steps)-1, all)
	}
	if len(x.Verdicts) > 0 {
		p.line("\nof other classes")
		for _, v := range x.Verdicts {
			p.line("  %-15s %-5s  %s", v.Class, v.Verdict, printable(v.Reason))
		}
	}
	return p.err
}

// of says by which policy, where that is not clear.
func of(x report.Explanation) string {
	switch {
	case x.Recorded != nil:
		return " by this policy"
	case x.Mode != policy.Enforce.String():
		return ", and it is in " + x.Mode + " mode"
	}
	return ""
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + printable(reason)
}

// step prints one step, and what it has looked at.
func (p *printer) step(s policy.StepFinding, last, all bool) {
	branch, trunk := "├─", "│ "
	if last {
		branch, trunk = "└─", "  "
	}
	name, reached := s.Step.String(), ""
	switch {
	case s.Decides:
		name += " DECIDES"
	case !s.Reached:
		reached = "  (not reached)"
	}
	p.line("%s %-14s %s: %s%s", branch, name, printable(s.Looked), printable(s.Found), reached)
	for _, of := range s.Of {
		if len(s.Of) > 1 {
			p.line("%s   %s", trunk, withPID(printable(of.Executable), of.PID))
		}
		for _, name := range of.Denies {
			p.line("%s   deny %q is about it", trunk, name)
		}
		p.grants(trunk, of.Grants, all)
		p.rules(trunk, of.Rules, all)
	}
}

func (p *printer) grants(trunk string, grants []policy.GrantFinding, all bool) {
	for i, g := range grants {
		if i == nearest && !all {
			p.line("%s   and %d that miss it by more (--all)", trunk, len(grants)-i)
			return
		}
		if g.Allows {
			p.line("%s   %q covers it", trunk, g.Name)
		} else {
			p.line("%s   %q misses it by: %s", trunk, g.Name, printable(strings.Join(g.Missed, "; ")))
		}
	}
}

func (p *printer) rules(trunk string, rules []policy.RuleFinding, all bool) {
	near := 0
	for i, r := range rules {
		says := "matches, action " + r.Action
		switch {
		case r.Latched:
			says = "has blocked the process before, action " + r.Action
		case !r.Matches:
			if says = "does not match"; near == nearest && !all {
				p.line("%s   and %d that do not match (--all)", trunk, len(rules)-i)
				return
			}
			near++
		}
		p.line("%s   %q %s", trunk, r.Name, says)
		for _, c := range r.Clauses {
			sign, unknown := "-", ""
			switch {
			case c.Gaps != "":
				sign, unknown = "?", "  (not recorded whole: "+c.Gaps+")"
			case c.Holds:
				sign = "+"
			case c.Excuse:
				sign = "~"
			}
			p.line("%s     %s %.160s%s", trunk, sign, strings.Join(strings.Fields(c.Text), " "), unknown)
		}
	}
}

// subject prints one process and where it comes from.
func (p *printer) subject(s report.Subject, ancestors []report.Subject) {
	p.line("%s, user %s", withPID(program(s), int64(s.PID)), printable(s.User))
	p.line("  command line       %s", printable(s.CommandLine))
	if !s.Ended {
		p.line("  working directory  %s", printable(s.WorkingDir))
		p.line("  unit               %s", unit(s))
		if s.Container != "" {
			p.line("  container          %s", printable(s.Container))
		}
		p.line("  executable         %s", file(s))
	}
	how := map[string]string{"birth": "forked by", "snapshot": "parent at startup", "present": "parent"}[s.Ancestry]
	switch {
	case how != "":
	case s.PID == 0: // made up
		p.line("  forked by          nobody that is known: --parent names one")
		how = "then"
	default:
		p.line("  forked by          not known: events were lost, or its record had to make room")
		how = "then"
	}
	for _, a := range ancestors {
		p.line("  %-18s %s", how, withPID(program(a), int64(a.PID)))
		how = "then"
	}
	if s.ParentNow != nil {
		p.line("  %-18s %s (pid %d)", "parent now", program(*s.ParentNow), s.ParentNow.PID)
	}
}

// withPID names a process, or a program that was only named (--exe, --parent).
func withPID(program string, pid int64) string {
	if pid == 0 {
		return program
	}
	return fmt.Sprintf("%s (pid %d)", program, pid)
}

func program(s report.Subject) string {
	if s.Ended {
		return image(s) + ", ended or another program now"
	}
	return image(s)
}

func image(s report.Subject) string {
	return printable(cmp.Or(s.Executable, "a program that could not be read"))
}

func unit(s report.Subject) string {
	switch {
	case s.Unit != "":
		return printable(s.Unit)
	case s.UserUnit != "":
		return printable(s.UserUnit) + ", a name that its user chose"
	}
	if s.Cgroup == "" {
		return "none"
	}
	return "none, cgroup " + printable(s.Cgroup)
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
