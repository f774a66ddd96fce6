package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Advice is what is not wrong with a configuration that compiles, and is hardly meant:
// grants and denies that have expired, grants that another makes idle, and those that
// are wider than they look.
func (c Config) Advice(now time.Time) []*KeyError {
	var all complaints
	for i := range c.Grants {
		g := &c.Grants[i]
		key := fmt.Sprintf("grants[%d]", i)
		switch {
		case g.Expires.over(now):
			all.say(key+".expires", "grant %q has expired: nobody has it any more", g.Name)
			continue
		case g.ExecutableOnly:
			all.say(key+".executable_only", "grant %q is everybody's who may run the executable: whoever does can have it do his work (LD_PRELOAD)", g.Name)
		}
		for j := range c.Grants {
			if other := &c.Grants[j]; j != i && !other.Expires.over(now) && other.includes(g) && !(j > i && g.includes(other)) {
				all.say(key+".name", "grant %q gives nothing that grant %q does not", g.Name, other.Name)
				all.errs[len(all.errs)-1].(*KeyError).Other = fmt.Sprintf("grants[%d].name", j)
				break
			}
		}
	}
	for i := range c.Denies {
		if d := &c.Denies[i]; d.Expires.over(now) {
			all.say(fmt.Sprintf("denies[%d].expires", i), "deny %q has expired: nobody is refused by it any more", d.Name)
		}
	}
	if c.Classes["token"] == Strict {
		all.say("classes.token", "SDKs that are refused a session token ask without one: to keep programs from the service, refuse them what they ask for")
	}
	advice := make([]*KeyError, len(all.errs))
	for i, err := range all.errs {
		advice[i] = err.(*KeyError)
	}
	return advice
}

// includes reports whether a grant covers all that another does, as far as that can be
// told from what they name.
func (g *Grant) includes(other *Grant) bool {
	subset := func(part, whole []string) bool {
		return !slices.ContainsFunc(part, func(s string) bool { return !slices.Contains(whole, s) })
	}
	anyOr := func(mine, theirs string) bool { return mine == "" || mine == theirs }
	return subset(other.Executable, g.Executable) && g.contained() == other.contained() &&
		(g.Unit == "" || g.unit(other.Unit)) && anyOr(g.User, other.User) && anyOr(g.Group, other.Group) && anyOr(g.Pod, other.Pod) && anyOr(g.Parent, other.Parent) &&
		strings.HasPrefix(other.Container, g.Container) &&
		(len(g.Classes) == 0 || len(other.Classes) > 0 && subset(other.Classes, g.Classes)) &&
		(len(g.Paths) == 0 || len(other.Paths) > 0 && subset(other.Paths, g.Paths)) &&
		(g.API == AnyAPI || g.API == other.API) && (!g.OwnToken || other.OwnToken) &&
		(g.Expires.IsZero() || !other.Expires.IsZero() && !other.Expires.After(g.Expires.Time))
}
