package tune

import (
	"fmt"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/policy"
)

// Risk is what a grant puts at risk.
type Risk uint8

const (
	// Low is a program that does one thing, in a unit of its own.
	Low Risk = iota
	// Medium is one that also does what somebody tells it who has got hold of the unit,
	// the user or the container.
	Medium
	// High is one by which many can have the credentials, or with which the history has
	// a sign of theft. It is never taken in batch.
	High
)

var riskNames = []string{Low: "low", Medium: "medium", High: "high"}

func (r Risk) String() string               { return riskNames[r] }
func (r Risk) MarshalText() ([]byte, error) { return []byte(r.String()), nil }
func (r *Risk) UnmarshalText(text []byte) error {
	i := slices.Index(riskNames, string(text))
	if i < 0 {
		return fmt.Errorf("unknown risk %q; there are %s", text, strings.Join(riskNames, ", "))
	}
	*r = Risk(i)
	return nil
}

// languages are the tools in which applications are written. The others are for the hand.
var languages = []string{"beam.smp", "bun", "deno", "dotnet", "erl", "groovy", "guile", "java", "julia", "lua", "luajit", "mono", "node", "nodejs",
	"perl", "php", "php-cgi", "php-fpm", "pypy", "python", "r", "rscript", "ruby", "jruby", "tclsh"}

// manyJobs says whose jobs a unit runs that runs many people's.
func manyJobs(unit string) (whose string, ok bool) {
	name, _, _ := strings.Cut(strings.TrimSuffix(unit, ".service"), "@")
	switch {
	case slices.Contains([]string{"cron", "crond", "cronie", "anacron", "fcron"}, name):
		return "all jobs of this user's crontab run there", true
	case slices.Contains([]string{"atd"}, name):
		return "whoever may use at(1) runs jobs there", true
	case name == "amazon-ssm-agent" || name == "snap.amazon-ssm-agent.amazon-ssm-agent":
		return "whoever may send commands by Systems Manager runs them there", true
	case builds(unit):
		return "whoever may start a build runs what he likes there", true
	case slices.Contains([]string{"ssh", "sshd", "docker", "containerd", "crio"}, name):
		return "it starts what others ask it to", true
	}
	return "", false
}

// builds reports whether a unit runs builds, whose programs are what somebody has just
// written.
func builds(unit string) bool {
	name, _, _ := strings.Cut(strings.TrimSuffix(unit, ".service"), "@")
	return strings.HasPrefix(name, "actions.runner.") || slices.Contains([]string{"gitlab-runner", "jenkins", "buildkite-agent", "teamcity-agent"}, name)
}

// grade says how much a proposal puts at risk, and why.
func (p *Proposal) grade() {
	g := &p.Grant
	var reasons [3][]string
	because := func(r Risk, format string, args ...any) {
		reasons[r] = append(reasons[r], fmt.Sprintf(format, args...))
	}
	name, tool := policy.Tool(g.Executable[0])
	whose, many := manyJobs(g.Unit)
	root := g.User == "root" || g.User == "0"
	where := g.Unit
	switch {
	case g.Pod != "":
		where = "the pod"
	case g.Container != "":
		where = "the container"
	case where == "":
		where = "sessions of " + g.User
	}
	switch {
	case tool && !slices.Contains(languages, name):
		because(High, "%s fetches or runs whatever it is told: whoever can make %s run it has the grant", name, where)
	case tool && many && !root:
		because(High, "%s in %s: %s", name, where, whose)
	case tool && many:
		because(Medium, "%s in %s: %s, and root's alone have the grant", name, where, whose)
	case tool:
		because(Medium, "%s runs any script: whoever gets hold of %s, or can write what it runs, has the grant", name, where)
	case many && !root:
		because(Medium, "%s in %s: %s", name, where, whose)
	}
	p.Means = fmt.Sprintf("everything that %s does in %s", strings.Join(g.Executable, " or "), where)
	if tool {
		p.Means = fmt.Sprintf("any program that %s is given in %s", strings.Join(g.Executable, " or "), where)
	}
	if g.User != "" && g.Unit+g.Pod+g.Container != "" {
		p.Means += " as " + g.User
	}
	if g.Parent != "" {
		p.Means += ", as long as " + g.Parent + " starts it"
	}
	var by string
	for _, of := range p.groups {
		if of.by != "" && !of.contained() {
			by = of.by
		}
	}
	switch {
	case by != "" && tool:
		because(High, "%s starts it: whoever gets hold of that can have %s run what he likes", by, name)
	case by != "" && !root:
		because(Medium, "%s starts it: whoever gets hold of that can start it, too, with a library of his own in it (LD_PRELOAD)", by)
	}
	switch {
	case g.Unit == "" && g.Pod == "" && g.Container == "" && slices.ContainsFunc(p.groups, (*group).ofLogin):
		because(High, "it runs in a login or a unit of a user's own: whoever is logged in as %s can run it by hand, with a library of his own in it (LD_PRELOAD)", g.User)
	case g.Unit == "" && g.Pod == "" && g.Container == "":
		because(Medium, "it runs in no unit: whoever is %s can run it by hand, with a library of his own in it (LD_PRELOAD)", g.User)
	case g.Unit == "":
		because(Medium, "whoever can write in %s can put another program at the same path", where)
	}
	if slices.ContainsFunc(p.groups, func(g *group) bool { return g.is(overV1) }) {
		because(Medium, "it asks over IMDSv1, which a forged request of a server reaches; have it use session tokens")
	}
	if !g.OwnToken {
		because(Low, "it uses session tokens that others were given (root's own), and so can whoever brings one")
	}
	for _, f := range p.Also {
		if f.Suspect {
			because(High, "the history has what looks like a theft, which the grant would let through: %s", f.Who)
		}
	}
	switch {
	case len(g.Executable) > 1:
		p.note("it was at %d paths; at another, such as after a deployment, it is refused", len(g.Executable))
	case strings.Contains(g.Executable[0], "*"):
		p.note("* stands for the version, so that the next deployment has the grant, too")
	}
	if g.Pod != "" || g.Container != "" {
		p.note("the ID is another after the next start of the container or pod, except of static pods: then the grant is void")
	}
	switch {
	case reasons[High] != nil:
		p.Risk = High
	case reasons[Medium] != nil:
		p.Risk = Medium
	default:
		because(Low, "a program that only root can change and that does one thing, in %s", where)
	}
	p.Because = slices.Concat(reasons[High], reasons[Medium], reasons[Low])
}

func (p *Proposal) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}
