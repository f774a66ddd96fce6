package tune

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// key is everything at which grants look, and what speaks against it: so that a grant
// covers all of a group or nothing, and one of its requests can stand for all.
type key struct {
	executable, unit, container, pod string
	user, userID                     string
	parent, by                       string // by: see descent
	class, paths                     string
	facts                            facts
	why                              string // suspicion
	rule                             string // that would refuse; "" for the posture
}

// facts are those about files and descent.
type facts uint32

const (
	known facts = 1 << iota
	deleted
	hostVerified
	rootOwned
	oneUser // real, effective and saved
	bornHere
	parentVerified
	parentOwned
	parentUnproven
	parentLoader
	overV1
	foreign
	otherTasks // at an endpoint for tasks and pods
	evasive
	sufficient // evidence
	loader
	earlier
	swapped
	ended
)

func keyOf(p *event.Process, ev *event.Event, why string) key {
	q := &ev.Request
	k := key{class: q.Class, paths: pattern(q), why: why}
	if ev.Decision.Rule != nil {
		k.rule = ev.Decision.Rule.ID
	}
	k.set(!q.Token && q.Class != "token" && !q.Container, overV1)
	k.set(q.Container, otherTasks)
	k.set(q.Evasive, evasive)
	k.set(ev.Attribution.Sufficient(), sufficient)
	if p == nil {
		return k
	}
	k.executable, k.unit, k.container, k.pod = p.Executable, p.Unit, p.Container, p.Pod
	k.user, k.userID = cmp.Or(p.UserName, p.UserID), p.UserID
	if strings.Trim(k.user, "0123456789") == "" { // a name that a grant would take for a number
		k.user = p.UserID
	}
	k.set(p.Known, known)
	k.set(p.Deleted, deleted)
	k.set(p.HostVerified, hostVerified)
	k.set(p.RootOwned, rootOwned)
	k.set(p.UserID != "" && p.UserID == p.RealUserID && p.UserID == p.SavedUserID, oneUser)
	k.set(ev.Token.Foreign(p), foreign)
	k.set(p.Loader, loader)
	k.set(p.Earlier, earlier)
	k.set(p.Swapped, swapped)
	k.set(p.Ended, ended)
	if parent := p.Parent; parent != nil {
		k.parent = parent.Executable
		k.set(p.Ancestry == "birth", bornHere)
		k.set(parent.HostVerified, parentVerified)
		k.set(parent.RootOwned, parentOwned)
		k.set(parent.Unproven, parentUnproven)
		k.set(parent.Loader, parentLoader)
	}
	return k
}

func (k *key) set(is bool, f facts) {
	if is {
		k.facts |= f
	}
}

func (k *key) is(f facts) bool { return k.facts&f == f }

// below are the trees of the catalogue that have such names.
var below = []string{"/latest/meta-data/iam/**", "/latest/meta-data/identity-credentials/**", "/latest/dynamic/instance-identity/**"}

// pattern is a path as a grant would have it. Names that differ from host to host, or
// from task to task, are left open.
func pattern(q *event.Request) string {
	path := policy.Unversioned(q)
	for _, glob := range below {
		if rest, ok := strings.CutPrefix(path, strings.TrimSuffix(glob, "/**")); ok && (rest == "" || rest[0] == '/') {
			return glob
		}
	}
	if q.Container {
		if i := strings.LastIndexByte(path, '/'); i > 0 {
			return path[:i] + "/*"
		}
	}
	return path
}

const (
	maxExamples = 3
	maxShapes   = 3   // command lines that are kept of a group
	maxShape    = 512 // bytes of one
	maxDays     = 400
)

// group is requests that are alike.
type group struct {
	key
	id      int
	subject *event.Process // of the first, for whom it stands; nil if nobody is known
	asked   event.Event    // the first
	count   uint64
	alone   uint64 // requests in which nobody else lacks a grant
	first   time.Time
	last    time.Time
	oldest  time.Duration // age of a process when it asked
	days    map[int32]struct{}
	hosts   map[*host]struct{}
	shapes  map[string]struct{}
	ids     []string
}

func newGroup(id int, k key, p *event.Process, ev *event.Event) *group {
	g := &group{key: k, id: id, subject: p, asked: *ev, first: ev.Start(), last: ev.Time,
		days: map[int32]struct{}{}, hosts: map[*host]struct{}{}, shapes: map[string]struct{}{}}
	g.asked.Subjects, g.asked.Roles = slices.Clone(ev.Subjects), slices.Clone(ev.Roles)
	return g
}

func (g *group) add(r *event.Record, p *event.Process, h *host) {
	ev := &r.Event
	g.count += ev.Requests()
	if start := ev.Start(); start.Before(g.first) {
		g.first = start
	}
	if ev.Time.After(g.last) {
		g.last = ev.Time
	}
	if day := dayOf(ev.Time); len(g.days) < maxDays {
		g.days[day] = struct{}{}
	}
	g.hosts[h] = struct{}{}
	if p != nil {
		if !p.Start.IsZero() {
			g.oldest = max(g.oldest, ev.Time.Sub(p.Start))
		}
		if len(g.shapes) < maxShapes {
			g.shapes[strings.ToValidUTF8(p.CommandLine[:min(len(p.CommandLine), maxShape)], "")] = struct{}{}
		}
	}
	if len(g.ids) < maxExamples && r.ID != "" {
		g.ids = append(g.ids, r.ID)
	}
}

func dayOf(t time.Time) int32 { return int32(t.Unix() / (24 * 60 * 60)) }

// Evidence is what a proposal, or a refusal, rests on.
type Evidence struct {
	Count     uint64    `json:"count"`
	Hosts     int       `json:"hosts"`
	HostNames []string  `json:"host_names"` // some
	Days      int       `json:"days"`
	First     time.Time `json:"first"`
	Last      time.Time `json:"last"`
	Users     []string  `json:"users,omitempty"`
	Parents   []string  `json:"parents,omitempty"`
	Units     []string  `json:"units,omitempty"`
	// Containers are some of those that there were.
	Containers []string          `json:"containers,omitempty"`
	Classes    map[string]uint64 `json:"classes"`
	Paths      []string          `json:"paths,omitempty"`
	// CommandLines are some of those that there were, as they were recorded: redacted.
	CommandLines []string `json:"command_lines,omitempty"`
	Rules        []string `json:"rules,omitempty"`
	IDs          []string `json:"event_ids"`
	// Packages are those that own the executables, by path, where that could be looked up.
	Packages map[string]string `json:"packages,omitempty"`
	// Hashes are the SHA-256 of the executables as they are now, by path, where they could
	// be read.
	Hashes map[string]string `json:"sha256,omitempty"`
}

const maxListed = 5

// evidence adds up groups.
func evidence(groups []*group) Evidence {
	e := Evidence{Classes: map[string]uint64{}}
	hosts, days, lists := map[*host]struct{}{}, map[int32]struct{}{}, [7]map[string]struct{}{}
	for i := range lists {
		lists[i] = map[string]struct{}{}
	}
	for _, g := range groups {
		e.Count += g.count
		e.Classes[g.class] += g.count
		if e.First.IsZero() || g.first.Before(e.First) {
			e.First = g.first
		}
		if g.last.After(e.Last) {
			e.Last = g.last
		}
		maps.Copy(hosts, g.hosts)
		maps.Copy(days, g.days)
		for i, text := range [...]string{g.user, g.parent, g.unit, cmp.Or(g.container, g.pod), g.paths, ruleName(g)} {
			if text != "" {
				lists[i][text] = struct{}{}
			}
		}
		maps.Copy(lists[6], g.shapes)
		e.IDs = append(e.IDs, g.ids[:min(len(g.ids), maxListed-min(len(e.IDs), maxListed))]...)
	}
	for i, to := range [...]*[]string{&e.Users, &e.Parents, &e.Units, &e.Containers, &e.Paths, &e.Rules, &e.CommandLines} {
		*to = slices.Sorted(maps.Keys(lists[i]))
		*to = (*to)[:min(len(*to), maxListed)]
	}
	e.Hosts, e.Days = len(hosts), len(days)
	var names []string
	for h := range hosts {
		names = append(names, h.name)
	}
	slices.Sort(names)
	e.HostNames = names[:min(len(names), maxListed)]
	return e
}

func ruleName(g *group) string {
	if r := g.asked.Decision.Rule; r != nil {
		return r.Name
	}
	return ""
}
