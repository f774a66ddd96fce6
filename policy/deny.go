package policy

import (
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/event"
)

// Deny refuses what a grant, a decision or the posture would allow. It only takes
// away, so it may also rest on what a caller can choose; one who chooses otherwise is
// where he would be without it. Everything that is known of a process and resembles
// what is named counts, and so does a request that is spelled so that it could be
// meant for one of the paths.
type Deny struct {
	Name    string `yaml:"name"`
	Who     `yaml:",inline"`
	What    `yaml:",inline"`
	Owner   string `yaml:"owner"`
	Reason  string `yaml:"reason"`
	Expires Date   `yaml:"expires"`
}

// check says what is wrong with a deny; classes are those that there are.
func (d *Deny) check(c *complaints, classes []string) {
	if d.Name == "" {
		c.say("name", "a deny needs a name")
	}
	if d.anyone() && len(d.Classes) == 0 && len(d.Paths) == 0 && d.API == AnyAPI {
		c.say("", "a deny that names nobody and nothing refuses everything: say whom or what it is about")
	}
	if d.Container != "" {
		if err := checkContainer(d.Container); err != nil {
			c.say("container", "%w", err)
		}
	}
	if d.Pod != "" {
		if err := checkPod(d.Pod); err != nil {
			c.say("pod", "%w", err)
		}
	}
	d.What.check(c, classes)
	if d.Reason == "" {
		c.say("reason", "a deny needs a reason: who is refused will ask")
	}
}

// covers reports whether the deny is about what this process asks for. A process that
// is not known is nobody in particular.
func (d *Deny) covers(p *event.Process, ev *event.Event) bool {
	q := &ev.Request
	return !d.Expires.over(ev.Time) &&
		(len(d.Classes) == 0 || slices.Contains(d.Classes, q.Class)) &&
		(len(d.Paths) == 0 || d.path(q)) &&
		(d.API == AnyAPI || d.API == d.API.of(q)) &&
		(d.anyone() || p != nil && d.who(p))
}

func (d *Deny) who(p *event.Process) bool {
	return (len(d.Executable) == 0 || d.Names(p.Executable)) &&
		(d.Unit == "" || d.unit(p.Unit) || d.unit(p.UserUnit)) &&
		(d.User == "" || slices.Contains([]string{p.UserID, p.RealUserID, p.SavedUserID, p.UserName}, d.User)) &&
		(d.Group == "" || slices.Contains([]string{p.GroupID, p.RealGroupID, p.SavedGroupID, p.GroupName}, d.Group) || slices.Contains(p.SupplementalGroups, d.Group)) &&
		(d.Container == "" || strings.HasPrefix(p.Container, d.Container)) &&
		(d.Pod == "" || d.Pod == p.Pod) &&
		(d.Parent == "" || p.Parent != nil && isProgram(d.Parent, p.Parent.Executable) || p.ParentNow != nil && isProgram(d.Parent, p.ParentNow.Executable))
}

// path reports whether a request may be for one of the paths: in any case, with a slash
// at the end or not, and whatever is before it in place of a version. One that is
// spelled as no client spells it may be for any.
func (d *Deny) path(q *event.Request) bool {
	if q.Evasive {
		return true
	}
	path := withoutVersions(strings.ToLower(q.Path))
	_, behind, _ := cutSegment(path)
	behind = withoutVersions(behind)
	return slices.ContainsFunc(d.Paths, func(pattern string) bool {
		pattern = withoutVersions(strings.ToLower(pattern))
		return slices.ContainsFunc([]string{path, behind, strings.TrimSuffix(path, "/"), strings.TrimSuffix(behind, "/"), path + "/", behind + "/"}, func(path string) bool {
			return glob(pattern, path)
		})
	})
}

// withoutVersions is a path without the versions that it begins with.
func withoutVersions(path string) string {
	for {
		segment, rest, ok := cutSegment(path)
		if !ok || segment != "/latest" && !dated(segment[1:]) {
			return path
		}
		path = rest
	}
}
