package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/imdsgate/imdsgate/policy/tune"
)

// maxFindings is how many of a list are printed; --json has all.
const maxFindings = 20

// printTuning prints a report, with what became of the proposals if they were taken in
// batch or asked about. Who was asked has read them, and is told no more than that.
func printTuning(w io.Writer, r *tune.Report, batch, asked bool) error {
	p := &printer{w: w}
	if len(r.Proposals) > 0 {
		p.line("PROPOSALS")
	}
	for i, one := range r.Proposals {
		state := ""
		switch {
		case one.Taken:
			state = ", taken"
		case batch || asked:
			state = ", not taken"
		}
		if !asked || i == 0 {
			p.line("")
		}
		p.text("%d. %s  [risk %s%s]", i+1, one.Grant.Name, one.Risk, state)
		if !asked {
			p.proposal(one)
		}
	}
	p.findings("REFUSED: no grant for it would be worth much; where it is legitimate, see what to do instead", r.Refused)
	p.findings("UNEXPLAINED: never proposed; find out what it was", r.Unexplained)
	if p.err != nil {
		return p.err
	}
	if len(r.Proposals)+len(r.Refused)+len(r.Unexplained) > 0 {
		p.line("")
	}
	if p.err != nil {
		return p.err
	}
	return printReadiness(w, r)
}

// proposal prints one as somebody reads it who is to decide.
func (p *printer) proposal(one *tune.Proposal) {
	g := &one.Grant
	row := func(name, format string, args ...any) { p.text("   %-9s %s", name, fmt.Sprintf(format, args...)) }
	who := strings.Join(g.Executable, " or ")
	for _, part := range []struct{ before, value string }{{" in ", g.Unit}, {" in container ", g.Container}, {" in pod ", g.Pod}, {" as ", g.User}, {", started by ", g.Parent}} {
		if part.value != "" {
			who += part.before + part.value
		}
	}
	row("who", "%s", who)
	if len(one.Packages) > 0 {
		var of []string
		for _, file := range slices.Sorted(maps.Keys(one.Packages)) {
			of = append(of, fmt.Sprintf("%s of %s", file, cmp.Or(one.Packages[file], "no package")))
		}
		row("package", "%s", strings.Join(of, ", "))
	}
	for _, file := range slices.Sorted(maps.Keys(one.Hashes)) {
		row("sha256", "%s of %s, as it is now", one.Hashes[file], file)
	}
	what := strings.Join(g.Classes, ", ")
	if len(g.Paths) > 0 {
		what += " at " + strings.Join(g.Paths, ", ")
	}
	if !slices.Contains([]string{"any"}, g.API.String()) {
		what += ", with a session token"
		if g.OwnToken {
			what += " of its own"
		}
	}
	row("for", "%s", what)
	row("seen", "%s", seen(&one.Evidence))
	for i, line := range one.CommandLines {
		name := "ran"
		if i > 0 {
			name = ""
		}
		row(name, "%.160s", line)
	}
	if g.Parent == "" && len(one.Parents) > 0 {
		row("parents", "%s", strings.Join(one.Parents, ", "))
	}
	if len(one.Rules) > 0 {
		row("refused", "by %s", strings.Join(one.Rules, "; "))
	}
	row("risk", "%s: %s", one.Risk, strings.Join(one.Because, "; "))
	row("trusts", "%s", one.Means)
	switch {
	case len(one.Also) == 0:
		row("also", "nothing else that was recorded")
	default:
		for _, f := range one.Also {
			row("also", "%s (%d): %s", f.Who, f.Count, f.Why)
		}
	}
	for _, note := range one.Notes {
		row("note", "%s", note)
	}
	row("until", "%s", g.Expires.Format(time.DateOnly))
	row("events", "%s", strings.Join(one.IDs, ", "))
}

// text prints a line of what processes and clients have chosen: one line, and nothing
// that does more to a terminal than to show itself.
func (p *printer) text(format string, args ...any) {
	p.line("%s", strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, fmt.Sprintf(format, args...)))
}

// details prints what a proposal rests on beyond that.
func (p *printer) details(one *tune.Proposal) {
	row := func(name string, list []string) {
		for i, text := range list {
			if i > 0 {
				name = ""
			}
			p.text("   %-13s %s", name, text)
		}
	}
	row("command lines", one.CommandLines) // as a whole
	row("parents", one.Parents)
	row("users", one.Users)
	row("paths", one.Paths)
	row("hosts", one.HostNames)
	row("reason", []string{one.Grant.Reason})
}

func seen(e *tune.Evidence) string {
	hosts := fmt.Sprintf("%d hosts (%s)", e.Hosts, some(e.HostNames, e.Hosts))
	if e.Hosts == 1 {
		hosts = e.HostNames[0]
	}
	first, last := e.First.UTC().Format("2006-01-02 15:04"), e.Last.UTC().Format("2006-01-02 15:04")
	if e.Count == 1 {
		return fmt.Sprintf("once on %s, %s UTC", hosts, first)
	}
	return fmt.Sprintf("%d times on %s, on %s between %s and %s UTC", e.Count, hosts, days(e.Days), first, last)
}

func days(n int) string {
	if n == 1 {
		return "1 day"
	}
	return fmt.Sprintf("%d days", n)
}

// some are the first of a list of so many.
func some(names []string, of int) string {
	text := strings.Join(names[:min(len(names), 3)], ", ")
	if of > 3 {
		text += ", ..."
	}
	return text
}

func (p *printer) findings(title string, all []tune.Finding) {
	if len(all) == 0 {
		return
	}
	p.line("\n%s", title)
	for i, f := range all {
		if i == maxFindings {
			p.line("\n   and %d more: --json has them", len(all)-i)
			break
		}
		p.line("")
		p.text("-  %s", f.Who)
		p.text("   %-9s %s", "seen", seen(&f.Evidence))
		p.text("   %-9s %s", "for", className(strings.Join(slices.Sorted(maps.Keys(f.Classes)), ", ")))
		p.text("   %-9s %s", "why", f.Why)
		if f.Instead != "" {
			p.text("   %-9s %s", "instead", f.Instead)
		}
		p.text("   %-9s %s", "events", strings.Join(f.IDs, ", "))
	}
}

// className is the class of a request, which one that cannot be read has not.
func className(class string) string { return cmp.Or(class, "(malformed)") }

func printReadiness(w io.Writer, r *tune.Report) error {
	p, a := &printer{w: w}, r.Readiness
	p.line("READINESS")
	if r.Sum.Requests == 0 {
		p.line("   no request was recorded: nothing can be said")
		return p.err
	}
	p.line("   %s seen, %s to %s, %d requests of %s", days(a.Days), a.First.UTC().Format(time.DateOnly), a.Last.UTC().Format(time.DateOnly), r.Sum.Requests, hostCount(a.Hosts))
	p.line("   %d would be refused in enforce mode: %d let through by what was taken, %d left", a.Blocked, a.Covered, a.Left)
	if a.Denied > 0 {
		p.line("   %d of them by a deny of the policy, as it is meant", a.Denied)
	}
	if r.Sum.Unsure > 0 {
		p.line("   %d could not be judged again, and are taken as they were judged then", r.Sum.Unsure)
	}
	p.line("")
	for _, c := range a.Classes {
		verdict := "safe to enforce"
		if !c.Safe {
			verdict = "NOT YET"
		}
		p.text("   %-15s %s (%d requests, %d left that would be refused)", className(c.Class), verdict, c.Requests, c.Left)
		for _, why := range c.Keeps {
			p.line("   %-15s - %s", "", why)
		}
	}
	for _, g := range a.Gaps {
		p.text("   ! %s: %s", g.Host, g.Why)
	}
	return p.err
}

func hostCount(n int) string {
	if n == 1 {
		return "1 host"
	}
	return fmt.Sprintf("%d hosts", n)
}
