package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/replay"
)

// largest is how many groups of each change are shown without --all.
const largest = 15

// printDiff prints what the one who is to turn a policy on wants to know, first what
// would break.
func printDiff(w io.Writer, d *replay.Diff, o *replayOptions) error {
	p, all := &printer{w: w}, o.all
	if d.Requests == 0 {
		p.line("no requests to compare (%d other events)", d.Passed)
		return p.err
	}
	against := map[string]string{"recorded": "what was recorded", "actual": "what clients got"}[d.Against]
	p.line("%s on %s, %s to %s, compared with %s", countRequests(d.Requests), countHosts(d.Hosts), stamp(d.First), stamp(d.Last), cmp.Or(against, "the other policy"))
	p.section("WOULD NEWLY BE REFUSED", &d.New, all, true)
	p.section("would newly pass", &d.Opened, all, false)
	p.section("cannot be decided from what was recorded", &d.Undecided, all, false)
	p.section("would still be refused", &d.Still, all, true)
	p.line("\n%-15s %10s %10s %10s %10s %10s", "class", "newly", "newly", "cannot be", "still", "still")
	p.line("%-15s %10s %10s %10s %10s %10s", "", "refused", "passes", "decided", "refused", "passes")
	for _, c := range d.Classes {
		p.line("%-15s %10d %10d %10d %10d %10d", printable(className(c.Class)), c.NewlyBlocked, c.NewlyAllowed, c.Undecidable, c.StillBlocked, c.StillAllowed)
	}
	if d.Decided > 0 {
		taken := "and are here, too; --without-decisions judges them by the policy"
		if o.undecided {
			taken = "and are judged by the policy here"
		}
		p.line("\n%s decided by operators for a time, %s", count(d.Decided, "request", ""), taken)
	}
	if d.Late > 0 {
		p.line("\n%d events were out of order: older than others of their host that had been judged. Give all files of a host at once", d.Late)
	}
	return p.err
}

// printNext says what to type after that, where it is the whole of the answer.
func printNext(w io.Writer, d *replay.Diff) error {
	p := &printer{w: w}
	switch {
	case d.Requests == 0, d.Late > 0:
	case d.Against == "actual" && d.New.Requests == 0 && d.Undecided.Requests > 0:
		p.line("\nNEXT\n   imdsgate explain --event ID shows what cannot be decided, which enforce mode may refuse")
	case d.Against == "actual" && d.New.Requests == 0:
		p.line("\nNEXT\n   imdsgate reload, if the daemon does not have this policy yet, and imdsgate mode set enforce --reason TEXT")
		p.line("       refuses nothing that clients got")
	case d.Against == "actual":
		p.line("\nNEXT\n   imdsgate tune proposes grants for what is legitimate of that; what is a theft should be refused. If nothing else is left:")
		p.line("   imdsgate reload, if the daemon does not have this policy yet, and imdsgate mode set enforce --reason TEXT")
	case d.New.Requests > 0:
		p.line("\nNEXT\n   imdsgate tune proposes grants for what is legitimate of that")
	case d.Against == "recorded":
		p.line("\nNEXT\n   imdsgate replay --actual shows what clients got and enforce mode would refuse")
	}
	return p.err
}

func (p *printer) section(title string, s *replay.Section, all, hints bool) {
	if s.Requests == 0 {
		return
	}
	p.line("\n%s: %s", title, countRequests(s.Requests))
	rest, groups := s.Others, uint64(0)
	for i := range s.Groups {
		if i >= largest && !all {
			rest += s.Groups[i].Requests
			groups++
			continue
		}
		p.group(&s.Groups[i], hints)
	}
	switch {
	case groups > 0:
		p.line("%8d  in %d smaller groups (--all)", rest, groups)
	case rest > 0:
		p.line("%8d  in more groups than are kept apart", rest)
	}
}

func (p *printer) group(g *replay.Group, hints bool) {
	who := "nobody known"
	if g.Executable != "" {
		who = printable(g.Executable)
		if g.Place != "" {
			who += ", " + printable(g.Place)
		}
		who += ", user " + printable(g.User)
		if g.Parent != "" {
			who += ", forked by " + printable(g.Parent)
		}
	}
	p.line("%8d  %s: %s", g.Requests, printable(cmp.Or(g.Class, "malformed")), who)
	p.line("          on %s (%s), %s to %s", countHosts(g.Hosts), printable(strings.Join(g.HostNames, ", ")), stamp(g.First), stamp(g.Last))
	if len(g.Examples) > 0 {
		paths := strings.Join(g.Paths, ", ")
		if paths != "" { // a malformed request has none
			paths += ", "
		}
		p.line("          e.g. %sevent %s", printable(paths), printable(strings.Join(g.Examples, ", ")))
	}
	if g.Doubt != "" {
		p.line("          was: %s", printable(g.Before.String()))
		p.line("          now: %s", printable(g.Doubt))
		return
	}
	p.line("          was: %s", printable(g.Before.String()))
	if g.After != g.Before {
		p.line("          now: %s", printable(g.After.String()))
	}
	if g.Passed && g.Before == g.After {
		p.line("          it passed, because of audit mode")
	}
	if hint := hint(g); hints && hint != "" {
		p.line("          -> %s", printable(hint))
	}
}

// hint is what to do if these requests are meant to pass.
func hint(g *replay.Group) string {
	if n := g.Nearest; n != nil && (g.After.Step == policy.StepRule || g.After.Step == policy.StepClass) {
		return fmt.Sprintf("grant %q misses it by: %s", n.Name, strings.Join(n.Missed, "; "))
	}
	switch g.After.Step {
	case policy.StepRule:
		if g.Before.Step == policy.StepGrant {
			return fmt.Sprintf("grant %q let it pass, and no grant of this policy is for the program", g.Before.Name)
		}
		return fmt.Sprintf("no grant is for the program: if it is meant to pass, imdsgate tune says whether there is one worth it; or have the rule alert only (rules.actions.%s)", g.After.ID)
	case policy.StepClass:
		return "no grant is for the program, and under posture strict it takes one"
	case policy.StepDeny:
		return fmt.Sprintf("if it is meant to pass, narrow the deny %q", g.After.Name)
	case policy.StepUnattributed:
		return "no policy lets it pass: see imdsgate status for the level of attribution, and what would raise it"
	case policy.StepMalformed:
		return "no policy lets it pass: the client has to be mended"
	}
	return ""
}

func countRequests(n uint64) string {
	if n == 1 {
		return "1 request"
	}
	return fmt.Sprintf("%d requests", n)
}

func countHosts(n int) string {
	if n == 1 {
		return "1 host"
	}
	return fmt.Sprintf("%d hosts", n)
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }
