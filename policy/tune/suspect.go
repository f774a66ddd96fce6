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
	why, ok := t.above[p]
	if !ok {
		if len(t.above) >= maxAbove {
			clear(t.above)
		}
		why = t.parents(p)
		t.above[p] = why
	}
	return why
}

// maxAbove bounds the processes of which is remembered what their parents say.
const maxAbove = 4 << 10

// parents is what those say who have started a process.
func (t *Tuner) parents(p *event.Process) string {
	if parent := p.Parent; parent != nil && parent.Executable != p.Executable && t.granted(parent.Executable) {
		if _, tool := policy.Tool(p.Executable); tool {
			return fmt.Sprintf("it was started by %s, which has a grant: this is how somebody works who has got hold of that", parent.Executable)
		}
	}
	if builds(p.Unit) {
		return "" // which run what they like; there is no grant for them in any case
	}
	return chain(p)
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
var starters = []string{"systemd", "init", "cron", "crond", "anacron", "run-parts", "conmon", "runc", "crun", "tini", "docker-init", "dumb-init"}

var shells = []string{"ash", "bash", "csh", "dash", "fish", "ksh", "mksh", "rbash", "sh", "tcsh", "zsh", "busybox"}

// chain looks at who has started a process. A tool that was started by another is how a
// thief works who has broken into the second; only a shell that a starter runs, and
// another process of the same program, are how applications are started.
func chain(p *event.Process) string {
	name, isTool := policy.Tool(p.Executable)
	family := program(p.Executable)
	if isTool && (p.Parent == nil || p.Parent.Executable == "") {
		return "it does whatever it is told, and who has started it is not known"
	}
	for a := p.Parent; a != nil && a.PID != 1; a = a.Parent {
		base := program(a.Executable)
		above := "nobody known"
		started := false
		if a.Parent != nil {
			above = a.Parent.Executable
			started = a.Parent.PID == 1 || slices.Contains(starters, program(above)) || strings.HasPrefix(program(above), "containerd-shim")
		}
		_, tool := policy.Tool(a.Executable)
		switch {
		case base == family:
		case slices.Contains(servers, base) && !slices.Contains(servers, family) && !slices.Contains(workers, family):
			return fmt.Sprintf("it was started below a web server (%s), whose requests come from the network", a.Executable)
		case slices.Contains(shells, base) && (started || above != "" && slices.Contains(shells, program(above))):
			// its own parent is looked at next
		case tool && isTool:
			return fmt.Sprintf("%s was started by %s, and that by %s: this is how somebody works who has got hold of the latter", name, a.Executable, above)
		case slices.Contains(workers, base):
			return fmt.Sprintf("it was started by what runs applications for a web server (%s)", a.Executable)
		}
	}
	return ""
}

// program is what tells programs apart whatever their versions.
func program(file string) string {
	if name, ok := policy.Tool(file); ok {
		return name
	}
	return path.Base(file)
}
