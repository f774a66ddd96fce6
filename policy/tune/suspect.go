package tune

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// suspicion is why a request that would be refused must not become a reason for a grant,
// in words; "" if nothing speaks against it.
func (t *Tuner) suspicion(ev *event.Event) string {
	q := &ev.Request
	switch {
	case q.Malformed != "":
		return "it cannot be read one way only, and no grant is for such requests"
	case len(ev.Subjects) == 0:
		return "nobody is known to have asked: " + reason(ev)
	case !ev.Attribution.Sufficient():
		return "somebody else may have had a part in the connection: " + reason(ev)
	case ev.Gaps&event.GapSubjects != 0:
		return "the document does not have all who had a part in the connection"
	case q.Evasive:
		return "it is spelled as no client spells it"
	case q.Forwarded:
		return "it came through a proxy (X-Forwarded-For or the like): somebody else has asked"
	case q.HostIsOdd:
		return "it is for a public name, as DNS rebinding makes it"
	}
	for _, p := range ev.Subjects {
		if why := t.suspicious(p, ev); why != "" {
			return why
		}
	}
	return ""
}

func reason(ev *event.Event) string {
	if ev.Attribution.Reason == "" {
		return "no reason is given"
	}
	return ev.Attribution.Reason
}

// suspicious is what speaks against one process.
func (t *Tuner) suspicious(p *event.Process, ev *event.Event) string {
	about := event.View{Event: ev, Document: event.RequestDecision, Subject: p}
	switch gaps := about.Gaps() & (event.GapExecutable | event.GapUser | event.GapPlace); {
	case gaps != 0:
		return fmt.Sprintf("the document does not have the whole of what grants look at: %s", gaps)
	case p.Ended:
		return "the process had ended, and little is known of it"
	case p.Earlier:
		return "the process has executed another program since it connected"
	case p.Swapped:
		return "the process shows another file than the kernel has executed"
	case p.Loader:
		return "a dynamic loader runs whatever file it is given"
	case ev.Token.Foreign(p) && !rootsOwn(&about):
		return "its session token was issued to somebody else"
	}
	return t.descent(p).why
}

// descent is what those say who have started a process.
type descent struct {
	why string // what speaks against it
	by  string // the program that starts it, where that is not what starts services and jobs
}

// maxAbove bounds the processes of which is remembered what their parents say.
const maxAbove = 4 << 10

func (t *Tuner) descent(p *event.Process) descent {
	d, ok := t.above[p]
	if !ok {
		if len(t.above) >= maxAbove {
			clear(t.above)
		}
		d = t.parents(p)
		t.above[p] = d
	}
	return d
}

// parents looks at those who have started a process.
func (t *Tuner) parents(p *event.Process) descent {
	_, isTool := policy.Tool(p.Executable)
	for a := p.Parent; isTool && a != nil && a.PID != 1; a = a.Parent {
		_, tool := policy.Tool(a.Executable)
		if a != p.Parent && tool { // of which chain says more than that it has a grant elsewhere
			continue
		}
		if a.Executable != p.Executable && t.granted(a.Executable) {
			below := "by"
			if a != p.Parent {
				below = "below"
			}
			return descent{why: fmt.Sprintf("it was started %s %s, which has a grant: this is how somebody works who has got hold of that", below, a.Executable)}
		}
	}
	if builds(p.Unit) {
		return descent{} // which run what they like; there is no grant for them in any case
	}
	// The name of a program says what it is on the host alone; and one that has a grant
	// elsewhere is what a thief starts with a library of his own.
	return chain(p, isTool || p.Container != "" || p.Pod != "" || t.granted(p.Executable))
}

// granted reports whether the policy has a grant for a program.
func (t *Tuner) granted(file string) bool {
	return slices.ContainsFunc(t.grants, func(g policy.Grant) bool { return g.Names(file) })
}

var issuerUser = mustLookup("imdsgate.token.issuer.user.id")

func mustLookup(name string) *event.Field {
	i, ok := event.Lookup(name)
	if !ok {
		panic("no field " + name)
	}
	return &event.Fields[i]
}

// rootsOwn reports whether a token has gone from root to root: cloud-init keeps one from
// unit to unit, and root of the host has all tokens anyway.
func rootsOwn(v *event.View) bool {
	return v.Subject.UserID == "0" && v.Subject.Container == "" && issuerUser.Value(v).Text == "0"
}

// servers answer requests of the network. What runs below one of them was started by
// such a request.
var servers = []string{"apache2", "caddy", "httpd", "lighttpd", "litespeed", "lshttpd", "nginx", "openlitespeed"}

// workers run applications for a server, each in processes of its own.
var workers = []string{"php", "php-fpm", "php-cgi", "uwsgi"}

// starters start programs because it is time to, or because the host starts: a shell
// below one of them runs what somebody has installed.
var starters = []string{"systemd", "init", "cron", "crond", "anacron", "run-parts", "conmon", "runc", "crun", "tini", "docker-init", "dumb-init",
	"runsv", "s6-supervise", "supervise"}

// wrappers run one other program, and wait for it: who has started them has started that.
var wrappers = []string{"timeout", "flock", "sudo", "su", "runuser", "setpriv", "chpst", "nice", "ionice", "time"}

var shells = []string{"ash", "bash", "csh", "dash", "fish", "ksh", "mksh", "rbash", "sh", "tcsh", "zsh", "busybox"}

// chain looks at who has started a process. A tool that was started by another is how a
// thief works who has broken into the second; only a shell that a starter runs, and
// another process of the same program, are how applications are started. What may be used
// like a tool is looked at like one.
func chain(p *event.Process, likeTool bool) (d descent) {
	_, isTool := policy.Tool(p.Executable)
	family := program(p.Executable)
	if isTool && (p.Parent == nil || p.Parent.Executable == "") {
		return descent{why: "it does whatever it is told, and who has started it is not known"}
	}
	last := p
	for a := p.Parent; a != nil; last, a = a, a.Parent {
		if a.PID == 1 {
			return d
		}
		base := program(a.Executable)
		above := "nobody known"
		started := false
		if a.Parent != nil {
			above = a.Parent.Executable
			started = a.Parent.PID == 1 || starts(program(above))
		}
		_, tool := policy.Tool(a.Executable)
		switch {
		case base == family:
		case slices.Contains(servers, base) && !slices.Contains(servers, family) && !slices.Contains(workers, family):
			return descent{why: fmt.Sprintf("it was started below a web server (%s), whose requests come from the network", a.Executable)}
		case slices.Contains(shells, base) && (started || above != "" && slices.Contains(shells, program(above))):
			// its own parent is looked at next
		case tool && likeTool:
			return descent{why: fmt.Sprintf("%s was started by %s, and that by %s: this is how somebody works who has got hold of the latter", family, a.Executable, above)}
		case slices.Contains(workers, base):
			return descent{why: fmt.Sprintf("it was started by what runs applications for a web server (%s)", a.Executable)}
		case slices.Contains(shells, base), slices.Contains(wrappers, base), starts(base):
		case d.by == "":
			d.by = a.Executable
		}
	}
	if isTool && !starts(program(last.Executable)) {
		return descent{why: fmt.Sprintf("it does whatever it is told, and who has started %s, below which it runs, is not known", last.Executable)}
	}
	return d
}

// starts reports whether a program is one of the starters.
func starts(program string) bool {
	return slices.Contains(starters, program) || strings.HasPrefix(program, "containerd-shim")
}

// program is what tells programs apart whatever their versions.
func program(file string) string {
	if name, ok := policy.Tool(file); ok {
		return name
	}
	return path.Base(file)
}
