package policy

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
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

// CheckGrant says what is wrong with a grant, without the rest of its policy. classes are
// those that there are; if there are none, they are not looked at. Its reason may be
// missing.
func CheckGrant(g Grant, classes []string) error {
	g.Reason = cmp.Or(g.Reason, "to be written")
	if classes == nil {
		g.Classes = nil
	}
	var c complaints
	g.check(&c, classes)
	return errors.Join(c.errs...)
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
		if err := CheckExecutable(file); err != nil {
			c.say(key, "%w", err)
		} else if name, ok := Tool(file); ok {
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
		{"unit", g.Unit, CheckUnit}, {"container", g.Container, checkContainer}, {"pod", g.Pod, checkPod}, {"parent", g.Parent, CheckExecutable},
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

// Allows reports whether the grant covers what this process asks for, and if not what
// keeps it from doing so first.
func (g *Grant) Allows(p *event.Process, ev *event.Event) (ok bool, missed string) {
	for missed := range g.misses(p, ev) {
		return false, missed
	}
	return true, ""
}

// misses is all that keeps the grant from covering what this process asks for.
func (g *Grant) misses(p *event.Process, ev *event.Event) iter.Seq[string] {
	return func(yield func(string) bool) {
		_ = g.who(p, yield) && g.what(p, ev, yield)
	}
}

// who yields what keeps a grant from being this process's. It is false when yield was.
func (g *Grant) who(p *event.Process, yield func(string) bool) bool {
	return (g.Names(p.Executable) || yield("executable "+strconv.Quote(p.Executable))) &&
		(!p.Loader || yield("the executable is a dynamic loader")) &&
		(!p.Earlier || yield("the process has executed another program since")) &&
		(!p.Ended || yield("the process has ended, and little is known of it")) &&
		g.file(p, yield) &&
		(g.Unit == "" || g.unit(p.Unit) || yield("unit "+strconv.Quote(p.Unit))) &&
		(g.User == "" || userIs(g.User, p) || yield("user "+strconv.Quote(cmp.Or(p.UserName, p.UserID)))) &&
		(g.Group == "" || groupIs(g.Group, p) || yield("group "+strconv.Quote(cmp.Or(p.GroupName, p.GroupID)))) &&
		(g.Parent == "" || g.parent(p, yield))
}

// file yields what is wrong with the executable as a file, and with the container.
func (g *Grant) file(p *event.Process, yield func(string) bool) bool {
	if !g.contained() {
		return (p.Container == "" && p.Pod == "" || yield("it runs in a container, and the grant names none")) &&
			(p.HostVerified || yield("the executable is not the host's own file")) &&
			(!p.HostVerified || p.RootOwned || yield("others than root can change the executable"))
	}
	return (p.Known && !p.Deleted && !p.Swapped || yield("the executable is not a file that can be read")) &&
		(g.Container == "" || strings.HasPrefix(p.Container, g.Container) || yield("container "+strconv.Quote(p.Container))) &&
		(g.Pod == "" || p.Pod == g.Pod || yield("pod "+strconv.Quote(p.Pod))) &&
		(g.Pod == "" || p.Container != "" || yield("no container")) // of a pod there are others: conmon runs beside them
}

// parent yields what keeps the parent from being the one that is named. It counts only
// where the kernel said who forked whom: a process that outlives its parent has the
// one that it is given to, and can bring that about. Of a parent that has ended nobody
// can say any more whether its file was the host's.
func (g *Grant) parent(p *event.Process, yield func(string) bool) bool {
	parent := p.Parent
	switch {
	case p.Ancestry != birth || parent == nil:
		return yield("who has forked the process is not known for certain")
	case !isProgram(g.Parent, parent.Executable) || parent.Loader:
		return yield("parent " + strconv.Quote(parent.Executable))
	case !g.contained() && !parent.Unproven && !(parent.HostVerified && parent.RootOwned):
		return yield("others than root can change the executable of the parent")
	}
	return true
}

// birth is event.Process.Ancestry where the kernel has said who forked a process.
const birth = "birth"

// what yields what keeps a grant from being for this request.
func (g *Grant) what(p *event.Process, ev *event.Event, yield func(string) bool) bool {
	q := &ev.Request
	return (len(g.Classes) == 0 || slices.Contains(g.Classes, q.Class) || yield("class "+q.Class)) &&
		(len(g.Paths) == 0 || g.path(q) || yield("path "+strconv.Quote(q.Path))) &&
		(g.API == AnyAPI || g.API == g.API.of(q) || yield("no session token")) &&
		(!g.OwnToken || !ev.Token.Foreign(p) || yield("the session token of another process")) &&
		(!g.Expires.over(ev.Time) || yield("expired on "+g.Expires.Format(time.DateOnly)))
}

// path reports whether a request is for one of the paths. One that is spelled as no
// client spells it is for none: the service may read it otherwise than we do, and what
// a granted program can be made to ask for is the caller's choice.
func (g *Grant) path(q *event.Request) bool {
	if q.Evasive || q.Malformed != "" {
		return false
	}
	path := Unversioned(q)
	return slices.ContainsFunc(g.Paths, func(pattern string) bool {
		return strings.HasPrefix(pattern, "/latest/") != q.Container && glob(pattern, path)
	})
}
