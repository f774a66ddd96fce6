package replay

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// Change is what another policy changes for a request.
type Change uint8

const (
	NewlyBlocked Change = iota
	NewlyAllowed
	Undecidable
	StillBlocked
	StillAllowed

	changes = StillAllowed // how many have groups
)

const (
	// MaxGroups bounds the groups of each change. What comes when there are so many is
	// counted without them. With fewer, the groups of a large fleet do not fit; each takes
	// about a kilobyte.
	MaxGroups = 4096
	// maxHosts bounds the hosts that are told apart in a group, and maxAllHosts in all.
	maxHosts, maxAllHosts = 64, 1 << 16
	maxExamples           = 3
)

// Diff is what would have been different. Its form is what --json prints.
type Diff struct {
	Policy    string    `json:"policy"`          // digest
	Against   string    `json:"against"`         // digest, "recorded" or "actual"
	Requests  uint64    `json:"requests"`        // that were compared
	Passed    uint64    `json:"other_documents"` // alerts, starts of processes, changes of the daemon
	Hosts     int       `json:"hosts"`           // at most 65,536 are counted
	First     time.Time `json:"first"`           // request
	Last      time.Time `json:"last"`
	Allowed   uint64    `json:"unchanged_allowed"` // without groups
	Decided   uint64    `json:"decided"`           // requests that decisions of operators have decided, then
	Late      uint64    `json:"late"`              // events that are older than one before them of the same host by more than a request takes
	New       Section   `json:"newly_blocked"`
	Opened    Section   `json:"newly_allowed"`
	Undecided Section   `json:"undecidable"`
	Still     Section   `json:"unchanged_blocked"`
	Classes   []Class   `json:"classes"`
}

// Section is the requests for which one thing changes.
type Section struct {
	Requests uint64  `json:"requests"`
	Groups   []Group `json:"groups"` // most requests first
	Others   uint64  `json:"others"` // requests in more groups than are kept
}

// Group is requests that are alike: of one program, for one class, decided alike.
type Group struct {
	Executable string       `json:"executable,omitempty"` // "" where nobody is known
	Place      string       `json:"place,omitempty"`      // its unit, container or pod
	User       string       `json:"user,omitempty"`
	Parent     string       `json:"parent,omitempty"` // executable
	Class      string       `json:"class"`
	Before     policy.Basis `json:"before"`
	After      policy.Basis `json:"after"`
	Doubt      string       `json:"doubt,omitempty"` // why it cannot be decided
	Passed     bool         `json:"passed"`          // clients have got what they asked for, as in audit mode

	Requests  uint64               `json:"requests"`
	Hosts     int                  `json:"hosts"` // at most 64 are counted
	HostNames []string             `json:"host_names"`
	First     time.Time            `json:"first"`
	Last      time.Time            `json:"last"`
	Examples  []string             `json:"event_ids"`
	Paths     []string             `json:"paths"`
	Nearest   *policy.GrantFinding `json:"nearest_grant,omitempty"` // that almost covered the first of them
}

// Class is the sums of one class of requests.
type Class struct {
	Class        string `json:"class"`
	NewlyBlocked uint64 `json:"newly_blocked"`
	NewlyAllowed uint64 `json:"newly_allowed"`
	Undecidable  uint64 `json:"undecidable"`
	StillBlocked uint64 `json:"unchanged_blocked"`
	StillAllowed uint64 `json:"unchanged_allowed"`
}

// key is what is alike in a group.
type key struct {
	executable, place, user, parent, class string
	before, after                          policy.Basis
	doubt                                  string
	passed                                 bool
}

type group struct {
	Group
	hosts map[string]struct{}
}

// collector counts.
type collector struct {
	requests, passed, allowed, late uint64
	decided                         uint64
	first, last                     time.Time
	hosts                           map[string]*host
	classes                         map[string]*[StillAllowed + 1]uint64
	sections                        [changes]section
}

type section struct {
	Requests, others uint64
	groups           map[key]*group
}

// host is what is remembered of one: the time of its last event.
type host struct{ last time.Time }

// disorder is how much older than the one before it an event may be: they are written when
// they are answered, and told by when they were asked.
const disorder = 2 * time.Minute

func newCollector() *collector {
	c := &collector{hosts: map[string]*host{}, classes: map[string]*[StillAllowed + 1]uint64{}}
	for i := range c.sections {
		c.sections[i].groups = map[key]*group{}
	}
	return c
}

func (c *collector) add(p *policy.Policy, r *event.Record, before, after outcome, doubt policy.Doubt) {
	ev := &r.Event
	n := ev.Requests()
	c.requests += n
	if r.Decision.Operator != "" {
		c.decided += n
	}
	if start := ev.Start(); c.first.IsZero() || start.Before(c.first) {
		c.first = start
	}
	if ev.Time.After(c.last) {
		c.last = ev.Time
	}
	h := c.hosts[ev.Host.ID]
	switch {
	case h != nil:
		// Repeats are written when the window in which they were counted is over.
		if ev.Repeats.Requests == 0 && ev.Time.Before(h.last.Add(-disorder)) {
			c.late++
		}
		h.last = ev.Time
	case len(c.hosts) < maxAllHosts:
		c.hosts[ev.Host.ID] = &host{ev.Time}
	}
	change := changeOf(before, after, doubt)
	name := ev.Request.Class
	class := c.classes[name]
	if class == nil {
		if len(c.classes) >= maxClasses {
			name = "others"
		}
		if class = c.classes[name]; class == nil {
			class = new([StillAllowed + 1]uint64)
			c.classes[name] = class
		}
	}
	class[change] += n
	if change == StillAllowed {
		c.allowed += n
		return
	}
	c.sections[change].add(p, r, before, after, doubt)
}

// maxClasses bounds those of a file that somebody made: there are eight.
const maxClasses = 64

func changeOf(before, after outcome, doubt policy.Doubt) Change {
	switch {
	case doubt.About == policy.TheVerdict:
		return Undecidable
	case before.verdict == after.verdict && after.verdict == event.Allow:
		return StillAllowed
	case before.verdict == after.verdict:
		return StillBlocked
	case after.verdict == event.Deny:
		return NewlyBlocked
	}
	return NewlyAllowed
}

func (s *section) add(p *policy.Policy, r *event.Record, before, after outcome, doubt policy.Doubt) {
	ev := &r.Event
	s.Requests += ev.Requests()
	k := key{class: ev.Request.Class, before: before.basis, after: after.basis, passed: r.Decision.Verdict == event.Allow}
	if doubt.About == policy.TheVerdict {
		k.doubt, k.after = doubt.Why, policy.Basis{}
	}
	if len(ev.Subjects) > 0 {
		first := ev.Subjects[0]
		k.executable, k.place, k.user = short(first.Executable), short(place(first)), short(user(first))
		if first.Parent != nil {
			k.parent = short(first.Parent.Executable)
		}
	}
	g := s.groups[k]
	if g == nil {
		if len(s.groups) >= MaxGroups {
			s.others += ev.Requests()
			return
		}
		g = &group{Group{Executable: k.executable, Place: k.place, User: k.user, Parent: k.parent, Class: k.class, Before: k.before, After: k.after,
			Doubt: k.doubt, Passed: k.passed, First: ev.Start(), Last: ev.Time}, map[string]struct{}{}}
		if after.verdict == event.Deny {
			g.Nearest = p.NearestGrant(ev)
		}
		s.groups[k] = g
	}
	g.add(r)
}

func (g *group) add(r *event.Record) {
	ev := &r.Event
	g.Requests += ev.Requests()
	if start := ev.Start(); start.Before(g.First) {
		g.First = start
	}
	if ev.Time.After(g.Last) {
		g.Last = ev.Time
	}
	if _, ok := g.hosts[ev.Host.ID]; !ok && len(g.hosts) < maxHosts {
		g.hosts[ev.Host.ID] = struct{}{}
		if len(g.HostNames) < maxExamples {
			g.HostNames = append(g.HostNames, cmp.Or(ev.Host.Name, ev.Host.ID))
		}
	}
	if len(g.Examples) < maxExamples && r.ID != "" {
		g.Examples = append(g.Examples, r.ID)
	}
	if path := short(ev.Request.Path); len(g.Paths) < maxExamples && !slices.Contains(g.Paths, path) {
		g.Paths = append(g.Paths, path)
	}
}

// short is as much of a text as a group keeps, which whoever asks may make long.
func short(s string) string {
	const keeps = 256
	if len(s) <= keeps {
		return s
	}
	return strings.ToValidUTF8(s[:keeps], "") + "…"
}

// Diff is what was found so far.
func (r *Replay) Diff() *Diff {
	c := r.diff
	d := &Diff{
		Policy: r.options.Policy.Digest, Against: "recorded", Requests: c.requests, Passed: c.passed, Hosts: len(c.hosts), First: c.first, Last: c.last,
		Allowed: c.allowed, Decided: c.decided, Late: c.late,
		New: c.sections[NewlyBlocked].sorted(), Opened: c.sections[NewlyAllowed].sorted(),
		Undecided: c.sections[Undecidable].sorted(), Still: c.sections[StillBlocked].sorted(), Classes: []Class{},
	}
	switch {
	case r.options.Actual:
		d.Against = "actual"
	case r.options.Against != nil:
		d.Against = r.options.Against.Digest
	}
	for _, name := range slices.Sorted(maps.Keys(c.classes)) {
		n := c.classes[name]
		d.Classes = append(d.Classes, Class{name, n[NewlyBlocked], n[NewlyAllowed], n[Undecidable], n[StillBlocked], n[StillAllowed]})
	}
	return d
}

func (s *section) sorted() Section {
	out := Section{Requests: s.Requests, Others: s.others, Groups: []Group{}}
	for _, g := range s.groups {
		g.Hosts = len(g.hosts)
		out.Groups = append(out.Groups, g.Group)
	}
	slices.SortFunc(out.Groups, func(a, b Group) int {
		return cmp.Or(cmp.Compare(b.Requests, a.Requests), a.First.Compare(b.First), cmp.Compare(a.Executable, b.Executable),
			cmp.Compare(a.Class, b.Class), cmp.Compare(a.Place, b.Place), cmp.Compare(a.User, b.User), cmp.Compare(a.Parent, b.Parent),
			cmp.Compare(a.After.Name, b.After.Name), cmp.Compare(a.Before.Name, b.Before.Name))
	})
	return out
}
