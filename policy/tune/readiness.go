package tune

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// Report is what was found.
type Report struct {
	Policy      string      `json:"policy"` // digest of that by which was judged
	Sum         Sum         `json:"sum"`
	Proposals   []*Proposal `json:"proposals"`
	Refused     []Finding   `json:"refused"`     // legitimate, as it looks, and for no grant
	Unexplained []Finding   `json:"unexplained"` // with a sign of theft, or not known for certain
	Readiness   Readiness   `json:"readiness"`

	tuner *Tuner
}

// Readiness says what enforce mode would do now.
type Readiness struct {
	Days    int       `json:"days"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
	Hosts   int       `json:"hosts"`
	Blocked uint64    `json:"would_be_blocked"`
	Denied  uint64    `json:"denied_by_policy"`
	Covered uint64    `json:"covered"` // by the proposals that were taken
	Left    uint64    `json:"left"`    // that would still be blocked, other than by a deny
	Classes []Class   `json:"classes"`
	Gaps    []HostGap `json:"gaps"`
}

// Class says whether a class of requests can be enforced.
type Class struct {
	Class    string   `json:"class"`
	Requests uint64   `json:"requests"`
	Blocked  uint64   `json:"would_be_blocked"`
	Covered  uint64   `json:"covered"`
	Left     uint64   `json:"left"`
	Safe     bool     `json:"safe"`
	Keeps    []string `json:"keeps,omitempty"` // from it
}

// classCount counts the requests of a class.
type classCount struct{ requests, blocked, denied, beyond uint64 }

// week is how long must have been watched: jobs run weekly, too.
const week = 7

// Take works out the readiness with some of the proposals taken.
func (r *Report) Take(taken []*Proposal) {
	t := r.tuner
	for _, p := range r.Proposals {
		p.Taken = slices.Contains(taken, p)
	}
	days := map[int32]struct{}{}
	for _, h := range t.hosts {
		maps.Copy(days, h.days)
	}
	out := Readiness{Days: len(days), First: t.sum.First, Last: t.sum.Last, Hosts: len(t.hosts), Blocked: t.sum.Blocked, Denied: t.sum.Denied, Classes: []Class{}, Gaps: t.gaps()}
	if out.Gaps == nil {
		out.Gaps = []HostGap{}
	}
	covered := map[*group]bool{}
	for _, g := range t.groups {
		covered[g] = slices.ContainsFunc(taken, func(p *Proposal) bool { return p.covers(g) })
	}
	type left struct{ passes, proposed, refused, unexplained uint64 }
	proposed := map[*group]bool{}
	for _, p := range r.Proposals {
		for _, g := range p.groups {
			proposed[g] = true
		}
	}
	byClass := map[string]*left{}
	add := func(count uint64, groups ...*group) {
		l := byClass[groups[0].class]
		if l == nil {
			l = &left{}
			byClass[groups[0].class] = l
		}
		is := func(f func(*group) bool) bool {
			return !slices.ContainsFunc(groups, func(g *group) bool { return !f(g) })
		}
		switch {
		case is(func(g *group) bool { return covered[g] }):
			l.passes += count
		case is(func(g *group) bool { return covered[g] || proposed[g] }):
			l.proposed += count
		case is(func(g *group) bool { return g.why == "" }):
			l.refused += count
		default:
			l.unexplained += count
		}
	}
	for _, g := range t.groups {
		add(g.alone, g)
	}
	for _, j := range t.joint {
		add(j.count, j.groups...)
	}
	for _, name := range t.classNames() {
		n, l := t.classes[name], byClass[name]
		if l == nil {
			l = &left{}
		}
		c := Class{Class: name, Requests: n.requests, Blocked: n.blocked, Covered: l.passes, Left: n.blocked - n.denied - l.passes}
		keep := func(count uint64, format string) {
			if count > 0 {
				c.Keeps = append(c.Keeps, fmt.Sprintf(format, number(count)))
			}
		}
		keep(l.unexplained, "%s with a sign of theft, or of which is not known who it was: find out")
		keep(l.refused, "%s for which there is no grant that is worth it: see what to do instead")
		keep(l.proposed, "%s for which a proposal was not taken")
		keep(n.beyond, "%s in more groups than are kept")
		switch {
		case out.Days == 1:
			c.Keeps = append(c.Keeps, "seen for 1 day: what runs once a week may not have run")
		case out.Days < week:
			c.Keeps = append(c.Keeps, fmt.Sprintf("seen for %d days: what runs once a week may not have run", out.Days))
		}
		c.Safe = len(c.Keeps) == 0 && c.Left == 0
		out.Covered, out.Left = out.Covered+c.Covered, out.Left+c.Left
		out.Classes = append(out.Classes, c)
	}
	r.Readiness = out
}

func number(n uint64) string {
	if n == 1 {
		return "1 request"
	}
	return fmt.Sprintf("%d requests", n)
}

// classNames are those that were seen, in the order of the options.
func (t *Tuner) classNames() []string {
	names := slices.Sorted(maps.Keys(t.classes))
	slices.SortStableFunc(names, func(a, b string) int {
		return slices.Index(t.options.Classes, b) - slices.Index(t.options.Classes, a) // the most guarded first
	})
	return names
}
