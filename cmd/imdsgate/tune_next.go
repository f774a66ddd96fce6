package main

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy/tune"
)

// dropIns is where a host has those of its operator.
var dropIns = filepath.Join(filepath.Dir(config.DefaultPath), "config.d")

// next says what to type after a report. written is that a drop-in was.
func (o *tuneOptions) next(w io.Writer, r *tune.Report, args []string, written bool) error {
	p := &printer{w: w}
	first := true
	say := func(format string, args ...any) {
		if first {
			p.line("\nNEXT")
			first = false
		}
		p.text("   "+format, args...)
	}
	left := 0
	for _, one := range r.Proposals {
		if !one.Taken {
			left++
		}
	}
	what := strings.Join(args, " ")
	switch {
	case left > 0 && !o.interactive && !o.batch:
		say("imdsgate tune --interactive -o %s%s %s", filepath.Join(dropIns, "50-tune.yaml"), o.again(), what)
		say("    asks about each proposal, and writes a drop-in with those that you take")
	case left > 0 && o.batch:
		say("imdsgate tune --interactive -o FILE%s %s", o.again(), what)
		say("    asks about what --batch does not take (%d), once the drop-in is in the configuration", left)
	}
	if len(r.Unexplained) > 0 && len(r.Unexplained[0].IDs) > 0 {
		say("imdsgate explain --event %s %s", r.Unexplained[0].IDs[0], what)
		say("    shows who it was that is unexplained, and what refuses it")
	}
	switch {
	case written:
		if at, _ := filepath.Abs(o.output); filepath.Dir(at) != dropIns {
			say("put %s into %s of each host, and there:", o.output, dropIns)
			what = filepath.Dir(config.DefaultEvents)
		}
		say("imdsgate check && imdsgate replay --actual %s", what)
		say("    shows what enforce mode would still refuse")
		say("imdsgate reload")
		say("    puts the drop-in in force")
	case r.Readiness.Left == 0 && slices.ContainsFunc(r.Readiness.Classes, func(c tune.Class) bool { return !c.Safe }):
		say("imdsgate tune %s", what)
		say("    again when a week was seen")
	case r.Readiness.Left == 0:
		say("imdsgate mode set enforce --reason TEXT")
		say("    refuses nothing of what was recorded, other than by a deny")
	}
	return p.err
}

// again are the flags by which the same events make the same proposals.
func (o *tuneOptions) again() string {
	text := ""
	for _, f := range []struct{ name, value, usual string }{
		{"min-count", fmt.Sprint(o.minCount), fmt.Sprint(usualMin)}, {"min-days", fmt.Sprint(o.minDays), fmt.Sprint(usualMin)},
		{"since", o.since, ""}, {"until", o.until, ""},
	} {
		if f.value != f.usual {
			text += fmt.Sprintf(" --%s %s", f.name, f.value)
		}
	}
	return text
}
