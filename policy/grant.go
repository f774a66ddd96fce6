package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// Grant lets a program have what rules and posture would refuse. It rests only
// on what the caller cannot choose: the executable, as the host's own file that
// only root can change, together with the system unit, the user or the group it runs
// as. The executable alone says nothing about who tells it what to do
// (LD_PRELOAD=./steal.so /usr/bin/granted), so a grant that names nothing else
// must say executable_only.
//
// In a container the file is not the host's: whoever may write in the container can
// put another at the same path. So a grant for a container or pod rests on that alone,
// as root's cgroups name it, and trusts all that can run in there; the executable only
// narrows it. A grant that names none does not hold in a container, where the host's
// file may be mounted, and loads libraries that are not the host's.
type Grant struct {
	Name string `yaml:"name"`
	Who  `yaml:",inline"`
	// ExecutableOnly accepts that whoever may run the executable has the grant.
	ExecutableOnly bool `yaml:"executable_only"`
	What           `yaml:",inline"`
	// OwnToken leaves out requests with a session token that was issued to somebody
	// else: what the executable is made to ask by one who brings a token of his own.
	OwnToken bool   `yaml:"own_token"`
	Owner    string `yaml:"owner"`
	Reason   string `yaml:"reason"`
	Expires  Date   `yaml:"expires"`
}

// Date is a day, written 2006-01-02. The zero Date is never.
type Date struct{ time.Time }

// UnmarshalText reads a day.
func (d *Date) UnmarshalText(text []byte) error {
	t, err := time.Parse(time.DateOnly, string(text))
	if err != nil {
		return fmt.Errorf("date %q is not written as 2006-01-02", text)
	}
	d.Time = t
	return nil
}

// MarshalText writes a day.
func (d Date) MarshalText() ([]byte, error) {
	if d.IsZero() {
		return nil, nil
	}
	return []byte(d.Format(time.DateOnly)), nil
}

// over reports whether the day has ended.
func (d Date) over(now time.Time) bool {
	return !d.IsZero() && !now.Before(d.AddDate(0, 0, 1))
}

// check says what is wrong with a grant; classes are those that there are.
func (g *Grant) check(c *complaints, classes []string) {
	if g.Name == "" {
		c.say("name", "a grant needs a name")
	}
	if len(g.Executable) == 0 {
		c.say("executable", "a grant needs an executable: who else is in the same unit, container or user is not meant")
	}
	for i, file := range g.Executable {
		key := fmt.Sprintf("executable[%d]", i)
		if err := checkExecutable(file); err != nil {
			c.say(key, "%w", err)
		} else if name, ok := tool(file); ok {
			g.checkTool(c, key, file, name)
		}
	}
	g.checkWho(c)
	switch bound := g.Unit != "" || g.User != "" || g.Group != "" || g.contained(); {
	case !bound && !g.ExecutableOnly:
		alone := "an executable alone"
		if g.Parent != "" {
			alone = "an executable and a parent, which he starts as well,"
		}
		c.say("executable", "%s can be run by an attacker with his own LD_PRELOAD; add unit, user or group, or container or pod, or accept that with executable_only: true", alone)
	case bound && g.ExecutableOnly:
		c.say("executable_only", "executable_only contradicts unit, user, group, container and pod: leave it out")
	}
	g.What.check(c, classes)
	if g.API == V1 {
		c.say("api", "a grant for IMDSv1 alone gives nothing that one without api does not: leave it out, or write v2")
	}
	if g.Owner == "" {
		c.say("owner", "a grant needs an owner: say who is asked when it is in doubt")
	}
	if g.Reason == "" {
		c.say("reason", "a grant needs a reason: say why it is there")
	}
}

// checkTool is for a program that does what it is told. The unit or container says by
// whom it may be, and something else for what: without that everything which runs
// there, and whoever breaks into it, has the grant by a script of his own.
func (g *Grant) checkTool(c *complaints, key, file, name string) {
	switch {
	case g.Unit == "" && !g.contained():
		c.say(key, "%s (%s) does whatever it is told, so that whoever may run it has the grant: name the unit or the container that runs it, or grant a program that does this one thing", file, name)
	case g.User == "" && g.Group == "" && g.Parent == "" && len(g.Classes) == 0 && len(g.Paths) == 0:
		c.say(key, "%s (%s) does whatever it is told, also by somebody who has broken into its unit or container: say for what the grant is (classes, paths), or which of its processes is meant (user, group, parent)", file, name)
	}
}

// checkWho is for what is not the executable.
func (g *Grant) checkWho(c *complaints) {
	for _, k := range []struct {
		key, value string
		check      func(string) error
	}{
		{"unit", g.Unit, checkUnit}, {"container", g.Container, checkContainer}, {"pod", g.Pod, checkPod}, {"parent", g.Parent, checkExecutable},
	} {
		if k.value == "" {
			continue
		}
		if err := k.check(k.value); err != nil {
			c.say(k.key, "%w", err)
		}
	}
	if !g.contained() {
		return
	}
	if g.User != "" && !isNumber(g.User) {
		c.say("user", "%q is a user of the host, and in a container the same number has another name: write the number", g.User)
	}
	if g.Group != "" && !isNumber(g.Group) {
		c.say("group", "%q is a group of the host, and in a container the same number has another name: write the number", g.Group)
	}
}

// check says what is wrong with the requests that are named.
func (w *What) check(c *complaints, classes []string) {
	for i, class := range w.Classes {
		if !slices.Contains(classes, class) {
			c.say(fmt.Sprintf("classes[%d]", i), "unknown class %q; there are %s", class, strings.Join(classes, ", "))
		}
	}
	for i, p := range w.Paths {
		if err := checkPath(p); err != nil {
			c.say(fmt.Sprintf("paths[%d]", i), "%w", err)
		}
	}
}

// allows reports whether the grant covers what this process asks for, and if not what
// keeps it from doing so.
func (g *Grant) allows(p *event.Process, ev *event.Event) (ok bool, missed string) {
	if missed = g.who(p); missed == "" {
		missed = g.what(p, ev)
	}
	return missed == "", missed
}

// who is what keeps a grant from being this process's.
func (g *Grant) who(p *event.Process) (missed string) {
	switch {
	case !g.executable(p.Executable):
		return "executable"
	case p.Loader:
		return "the executable is a dynamic loader"
	case p.Earlier:
		return "the process has executed another program since"
	case p.Ended:
		return "the process has ended, and little is known of it"
	}
	if g.contained() {
		switch {
		case !p.Known || p.Deleted || p.Swapped:
			return "the executable is not a file that can be read"
		case g.Container != "" && !strings.HasPrefix(p.Container, g.Container):
			return "container " + strconv.Quote(p.Container)
		case g.Pod != "" && p.Pod != g.Pod:
			return "pod " + strconv.Quote(p.Pod)
		case p.Container == "":
			return "no container" // of a pod there are others: conmon runs beside them
		}
	} else {
		switch {
		case p.Container != "" || p.Pod != "":
			return "it runs in a container, and the grant names none"
		case !p.HostVerified:
			return "the executable is not the host's own file"
		case !p.RootOwned:
			return "others than root can change the executable"
		}
	}
	switch {
	case g.Unit != "" && !g.unit(p.Unit):
		return "unit " + strconv.Quote(p.Unit)
	case g.User != "" && !userIs(g.User, p):
		return "user " + strconv.Quote(cmp.Or(p.UserName, p.UserID))
	case g.Group != "" && !groupIs(g.Group, p):
		return "group " + strconv.Quote(cmp.Or(p.GroupName, p.GroupID))
	case g.Parent != "":
		return g.parent(p)
	}
	return ""
}

// parent is what keeps the parent from being the one that is named. It counts only
// where the kernel said who forked whom: a process that outlives its parent has the
// one that it is given to, and can bring that about. Of a parent that has ended nobody
// can say any more whether its file was the host's.
func (g *Grant) parent(p *event.Process) (missed string) {
	parent := p.Parent
	switch {
	case p.Ancestry != birth || parent == nil:
		return "who has forked the process is not known for certain"
	case !isProgram(g.Parent, parent.Executable) || parent.Loader:
		return "parent " + strconv.Quote(parent.Executable)
	case !g.contained() && !parent.Unproven && !(parent.HostVerified && parent.RootOwned):
		return "others than root can change the executable of the parent"
	}
	return ""
}

// birth is event.Process.Ancestry where the kernel has said who forked a process.
const birth = "birth"

// what is what keeps a grant from being for this request.
func (g *Grant) what(p *event.Process, ev *event.Event) (missed string) {
	q := &ev.Request
	switch {
	case len(g.Classes) > 0 && !slices.Contains(g.Classes, q.Class):
		return "class " + q.Class
	case len(g.Paths) > 0 && !g.path(q):
		return "path " + strconv.Quote(q.Path)
	case g.API != AnyAPI && g.API != g.API.of(q):
		return "no session token"
	case g.OwnToken && ev.Token.Foreign(p):
		return "the session token of another process"
	case g.Expires.over(ev.Time):
		return "expired on " + g.Expires.Format(time.DateOnly)
	}
	return ""
}

// path reports whether a request is for one of the paths. One that is spelled as no
// client spells it is for none: the service may read it otherwise than we do, and what
// a granted program can be made to ask for is the caller's choice.
func (g *Grant) path(q *event.Request) bool {
	if q.Evasive || q.Malformed != "" {
		return false
	}
	path := unversioned(q)
	return slices.ContainsFunc(g.Paths, func(pattern string) bool {
		return strings.HasPrefix(pattern, "/latest/") != q.Container && glob(pattern, path)
	})
}
