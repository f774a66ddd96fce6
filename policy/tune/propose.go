package tune

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/policy"
)

// Proposal is a grant that would let through what looks legitimate.
type Proposal struct {
	Grant policy.Grant `json:"grant"`
	Evidence
	Risk    Risk     `json:"risk"`
	Because []string `json:"because"` // the risk, in words
	// Means is what the grant trusts, beyond what it names.
	Means string   `json:"means"`
	Notes []string `json:"notes,omitempty"`
	// Also is what else of the history the grant would have let through.
	Also  []Finding `json:"also_lets_through"`
	Taken bool      `json:"taken"`

	groups []*group
}

// Finding is what is refused and gets no grant.
type Finding struct {
	Who string `json:"who"`
	Evidence
	Why     string `json:"why"`
	Instead string `json:"instead,omitempty"` // what the operator can do
	Suspect bool   `json:"suspect"`           // there is a sign of theft in it
}

// candidate is who may get a grant: a program in a place, as a user.
type candidate struct {
	program    string // without its version
	unit       string
	contained  bool
	executable string // in a container: ids differ, and so it is not merged by program
	user       string
	groups     []*group
}

type candidateKey struct {
	program, unit, executable, user string
	contained                       bool
	classes                         string
}

// candidates sorts groups into those that may get a grant, and those that cannot.
func (t *Tuner) candidates() (all []*candidate, refused []*refusal) {
	rails := map[*group]rail{}
	type who struct {
		executable, unit, user string
		contained              bool
	}
	// The classes that a program has asked for, which are merged only with the same: so
	// that none gets more by a grant that it has in common with another.
	classes := map[who]map[string]struct{}{}
	of := func(g *group) who {
		return who{g.executable, g.place(), g.user, g.contained()}
	}
	instances := map[string]map[string]struct{}{}
	for _, g := range t.groups {
		if g.why != "" {
			continue
		}
		if r := g.rail(); r.why != "" {
			rails[g] = r
			continue
		}
		if classes[of(g)] == nil {
			classes[of(g)] = map[string]struct{}{}
		}
		classes[of(g)][g.class] = struct{}{}
		if template := policy.Template(g.place()); template != "" {
			if instances[template] == nil {
				instances[template] = map[string]struct{}{}
			}
			instances[template][g.unit] = struct{}{}
		}
	}
	byKey := map[candidateKey]*candidate{}
	for _, g := range t.sorted() {
		if r, ok := rails[g]; ok {
			refused = append(refused, &refusal{[]*group{g}, r})
			continue
		}
		if g.why != "" {
			continue
		}
		k := candidateKey{program: program(g.executable), unit: g.place(), user: g.user, contained: g.contained(),
			classes: strings.Join(slices.Sorted(maps.Keys(classes[of(g)])), " ")}
		if g.contained() || k.unit == "" {
			k.executable = g.executable
		}
		if !g.is(oneUser) {
			k.user = ""
		}
		if template := policy.Template(k.unit); len(instances[template]) > 1 {
			k.unit = template // root alone makes instances of it
		}
		c := byKey[k]
		if c == nil {
			c = &candidate{program: k.program, unit: k.unit, contained: k.contained, executable: k.executable, user: k.user}
			byKey[k] = c
			all = append(all, c)
		}
		c.groups = append(c.groups, g)
	}
	return mergeUsers(all), refused
}

// sorted are the groups in the order in which they came.
func (t *Tuner) sorted() []*group {
	return slices.SortedFunc(maps.Values(t.groups), func(a, b *group) int { return cmp.Compare(a.id, b.id) })
}

// mergeUsers makes one candidate of those that differ in the user alone, where the
// program and its unit say enough: it does one thing, and nobody else's.
func mergeUsers(all []*candidate) []*candidate {
	type key struct{ program, unit, classes, executables string }
	first := map[key]*candidate{}
	var out []*candidate
	for _, c := range all {
		_, tool := policy.Tool(c.groups[0].executable)
		if _, many := manyJobs(c.unit); tool || many || c.unit == "" || c.contained {
			out = append(out, c)
			continue
		}
		k := key{c.program, c.unit, fmt.Sprint(c.classes()), fmt.Sprint(c.executables())}
		if one := first[k]; one != nil {
			one.groups, one.user = append(one.groups, c.groups...), ""
			continue
		}
		first[k] = c
		out = append(out, c)
	}
	return out
}

func (c *candidate) each(of func(*group) string) []string {
	set := map[string]struct{}{}
	for _, g := range c.groups {
		set[of(g)] = struct{}{}
	}
	return slices.Sorted(maps.Keys(set))
}

func (c *candidate) classes() []string {
	return c.each(func(g *group) string { return g.class })
}

func (c *candidate) executables() []string {
	return c.each(func(g *group) string { return g.executable })
}

func (c *candidate) all(f facts) bool {
	return !slices.ContainsFunc(c.groups, func(g *group) bool { return !g.is(f) })
}

func (c *candidate) any(f facts) bool {
	return slices.ContainsFunc(c.groups, func(g *group) bool { return g.is(f) })
}

// rare takes the classes away that were asked for too seldom: a program that has long
// been asking for one thing, and once for credentials, is granted the one thing.
func (c *candidate) rare(o Options) (taken []*refusal) {
	for _, class := range c.classes() {
		var of []*group
		for _, g := range c.groups {
			if g.class == class {
				of = append(of, g)
			}
		}
		e := evidence(of)
		why := ""
		switch {
		case e.Count < uint64(o.MinCount):
			why = fmt.Sprintf("it was seen %s: what happens so seldom may be a theft", times(e.Count))
		case e.Days < o.MinDays:
			why = fmt.Sprintf("it was seen on %d day, and %d are wanted: what happens on one day alone may be a theft, or somebody at work", e.Days, o.MinDays)
			if e.Days > 1 {
				why = fmt.Sprintf("it was seen on %d days alone, and %d are wanted", e.Days, o.MinDays)
			}
		}
		if why == "" {
			continue
		}
		taken = append(taken, &refusal{of, rail{why, "wait until it has happened again; or, if you know it, write the grant by hand, or ask for less with --min-count and --min-days"}})
		c.groups = slices.DeleteFunc(c.groups, func(g *group) bool { return g.class == class })
	}
	return taken
}

// strays takes away what others start than those who mostly do: one who has a tool run a
// few times must not be let through by what it does all the time, nor widen that grant.
func (c *candidate) strays(o Options) (taken []*refusal) {
	if _, tool := policy.Tool(c.groups[0].executable); !tool || c.contained {
		return nil
	}
	type start struct{ class, parent string }
	of := map[start][]*group{}
	for _, g := range c.groups {
		k := start{g.class, g.parent}
		of[k] = append(of[k], g)
	}
	for _, k := range slices.SortedFunc(maps.Keys(of), func(a, b start) int {
		return cmp.Or(strings.Compare(a.class, b.class), strings.Compare(a.parent, b.parent))
	}) {
		e := evidence(of[k])
		if e.Count >= uint64(o.MinCount) && e.Days >= o.MinDays {
			continue
		}
		taken = append(taken, &refusal{of[k], rail{fmt.Sprintf("%s started it %s alone, which is not who mostly does: it may be a theft", k.parent, times(e.Count)),
			"look at the events; wait until it has happened again, or write the grant by hand"}})
		c.groups = slices.DeleteFunc(c.groups, func(g *group) bool { return g.class == k.class && g.parent == k.parent })
	}
	return taken
}

// briefly is how old a process may be for its parent to narrow a grant: those that live
// longer outlive the daemon, which then does not know for certain who has forked them.
const briefly = 10 * time.Minute

// maxPaths is how many a grant lists; with more it names the class alone.
const maxPaths = 6

// grant makes the narrowest one that covers all of a candidate.
func (c *candidate) grant() policy.Grant {
	g := policy.Grant{Who: policy.Who{Executable: versions(c.executables()), Unit: c.unit, User: c.user}}
	if c.contained {
		one := c.groups[0]
		if g.Pod = one.pod; g.Pod == "" {
			g.Container = one.container
		}
		g.Unit, g.User = "", ""
		if ids := c.each(func(g *group) string { return g.userID }); len(ids) == 1 && c.all(oneUser) {
			g.User = ids[0] // the names in there are others
		}
	}
	g.Classes = c.classes()
	if paths := c.each(func(g *group) string { return g.paths }); len(paths) <= maxPaths && !slices.ContainsFunc(paths, func(p string) bool { return !plain(p) }) {
		g.Paths = paths
	}
	if !c.any(overV1) && !c.any(otherTasks) { // who know no tokens
		g.API = policy.V2
	}
	g.OwnToken = !c.any(foreign)
	_, tool := policy.Tool(g.Executable[0])
	parents := c.each(func(g *group) string { return g.parent })
	oldest := slices.MaxFunc(c.groups, func(a, b *group) int { return cmp.Compare(a.oldest, b.oldest) }).oldest
	if tool && !c.contained && len(parents) == 1 && c.all(bornHere|parentVerified|parentOwned) && !c.any(parentLoader) && oldest < briefly && policy.CheckExecutable(parents[0]) == nil {
		g.Parent = parents[0]
	}
	return g
}

// versions puts "*" in the place of what differs, where that is the version in the name
// of one directory: root alone can add another there, and the next deployment does.
func versions(files []string) []string {
	if len(files) < 2 {
		return files
	}
	split := make([][]string, len(files))
	for i, file := range files {
		if split[i] = strings.Split(file, "/"); len(split[i]) != len(split[0]) {
			return files
		}
	}
	at := -1
	for k, segment := range split[0] {
		if slices.ContainsFunc(split, func(s []string) bool { return s[k] != segment }) {
			if at >= 0 {
				return files // in two places
			}
			at = k
		}
	}
	if at < 2 || at == len(split[0])-1 { // "*" is not for the first directory, nor for the program
		return files
	}
	before := ""
	for i, s := range split {
		digit := strings.IndexAny(s[at], "0123456789")
		if digit < 0 || strings.Trim(s[at][digit:], "0123456789.-_+~") != "" || i > 0 && s[at][:digit] != before {
			return files
		}
		before = s[at][:digit]
	}
	one := slices.Clone(split[0])
	one[at] = before + "*"
	pattern := strings.Join(one, "/")
	if policy.CheckExecutable(pattern) != nil {
		return files
	}
	return []string{pattern}
}

// plain reports whether a path can stand in a grant as it is.
func plain(p string) bool {
	return strings.HasPrefix(p, "/") && !strings.ContainsAny(strings.TrimSuffix(strings.TrimSuffix(p, "*"), "*"), "*?#%[]{}\\; ") && path.Clean(p) == strings.TrimSuffix(p, "/")
}

// name says what a grant is for, so that no two are alike.
func (c *candidate) name(g *policy.Grant) string {
	name := c.program
	switch {
	case g.Unit != "":
		name += " in " + g.Unit
	case g.Pod != "":
		name += " in pod " + g.Pod
	case g.Container != "":
		name += " in container " + g.Container[:min(12, len(g.Container))]
	}
	if g.User != "" {
		name += " as " + g.User
	}
	return name
}

// place is the unit of a group, if a grant can rest on it.
func (g *group) place() string {
	if g.contained() || g.unit == "" || policy.CheckUnit(g.unit) != nil {
		return ""
	}
	return g.unit
}

// ofLogin reports whether a person runs it, or his own service manager.
func (g *group) ofLogin() bool {
	return strings.HasPrefix(g.unit, "session-") || strings.HasPrefix(g.unit, "user@") || g.subject != nil && g.subject.UserUnit != ""
}

func (g *group) contained() bool { return g.container != "" || g.pod != "" }

// who describes a group. What has another number each time is left to the evidence.
func (g *group) who() string {
	if g.subject == nil {
		return "nobody known"
	}
	text := cmp.Or(g.executable, "a program that could not be read")
	switch {
	case g.pod != "":
		text += " in a pod"
	case g.container != "":
		text += " in a container"
	case strings.HasPrefix(g.unit, "session-"):
		text += " in a login session"
	case g.unit != "":
		text += " in " + g.unit
	case g.subject.UserUnit != "":
		text += " in the user unit " + g.subject.UserUnit
	default:
		text += " in no unit"
	}
	if g.user != "" {
		text += " as " + g.user
	}
	if g.parent != "" {
		text += ", started by " + g.parent
	}
	return text
}

// Report says what to do about all that was read.
func (t *Tuner) Report() *Report {
	r := &Report{Policy: t.options.Policy.Digest, Sum: t.sum, tuner: t, Proposals: []*Proposal{}, Refused: []Finding{}, Unexplained: []Finding{}}
	candidates, refused := t.candidates()
	names := map[string]int{}
	for _, g := range t.options.Policy.Grants() {
		names[g.Name]++
	}
	for _, c := range candidates {
		refused = append(refused, c.rare(t.options)...)
		if len(c.groups) > 0 {
			refused = append(refused, c.strays(t.options)...)
		}
		if len(c.groups) == 0 {
			continue
		}
		if why := c.rail(); why.why != "" {
			refused = append(refused, &refusal{c.groups, why})
			continue
		}
		p := t.proposal(c)
		if err := policy.CheckGrant(p.Grant, t.options.Classes); err != nil {
			refused = append(refused, &refusal{c.groups, rail{"there can be no grant for it: " + err.Error(), "look at the events: no daemon writes such names"}})
			continue
		}
		if missed := p.misses(); missed != "" {
			refused = append(refused, &refusal{c.groups, rail{"no grant covers it: " + missed, "look at the events; imdsgate explain says what a grant looks at"}})
			continue
		}
		if names[p.Grant.Name]++; names[p.Grant.Name] > 1 {
			p.Grant.Name = fmt.Sprintf("%s (%d)", p.Grant.Name, names[p.Grant.Name])
		}
		r.Proposals = append(r.Proposals, p)
	}
	r.Refused = findings(refused)
	var suspects []*refusal
	for _, g := range t.sorted() {
		if g.why != "" {
			suspects = append(suspects, &refusal{[]*group{g}, rail{why: g.why}})
		}
	}
	r.Unexplained = findings(suspects)
	t.counterfactuals(r, refused)
	for _, p := range r.Proposals {
		p.grade()
		p.Grant.Reason = p.reason()
	}
	slices.SortStableFunc(r.Proposals, func(a, b *Proposal) int {
		return cmp.Or(cmp.Compare(a.Risk, b.Risk), cmp.Compare(b.Count, a.Count), cmp.Compare(a.Grant.Name, b.Grant.Name))
	})
	r.Take(nil)
	return r
}

func (t *Tuner) proposal(c *candidate) *Proposal {
	p := &Proposal{Grant: c.grant(), Evidence: evidence(c.groups), Also: []Finding{}, groups: c.groups}
	p.Grant.Name = c.name(&p.Grant)
	p.Grant.Owner = cmp.Or(t.options.Owner, "whoever has taken it from imdsgate tune")
	end := t.sum.Last.Add(t.options.Lifetime).UTC()
	p.Grant.Expires = policy.Date{Time: time.Date(end.Year(), end.Month(), end.Day(), 0, 0, 0, 0, time.UTC)}
	return p
}

// misses is what keeps a grant from covering what it was made for.
func (p *Proposal) misses() string {
	for _, g := range p.groups {
		if ok, missed := p.Grant.Allows(g.subject, &g.asked); !ok {
			return missed
		}
	}
	return ""
}

// covers reports whether a request that stands for a group would pass by this grant, if
// all others who have a part in it have one, too.
func (p *Proposal) covers(g *group) bool {
	if g.subject == nil || !g.is(sufficient) || g.asked.Request.Malformed != "" {
		return false
	}
	ok, _ := p.Grant.Allows(g.subject, &g.asked)
	return ok
}

// reason is what stands in the grant: why it is there, with the evidence.
func (p *Proposal) reason() string {
	hosts := fmt.Sprintf("%d hosts", p.Hosts)
	if p.Hosts == 1 {
		hosts = p.HostNames[0]
	}
	return fmt.Sprintf("seen %s on %s from %s to %s (%s); risk %s: %s; such as event %s",
		times(p.Count), hosts, p.First.UTC().Format(time.DateOnly), p.Last.UTC().Format(time.DateOnly), counts(p.Classes), p.Risk, p.Because[0], cmp.Or(append(p.IDs, "without an ID")...))
}

func counts(of map[string]uint64) string {
	var all []string
	for _, class := range slices.Sorted(maps.Keys(of)) {
		all = append(all, fmt.Sprintf("%s %d", class, of[class]))
	}
	return strings.Join(all, ", ")
}

// counterfactuals adds to each proposal what else it would have let through: what is in
// no proposal.
func (t *Tuner) counterfactuals(r *Report, refused []*refusal) {
	var rest []*refusal
	for _, of := range refused {
		for _, g := range of.groups {
			rest = append(rest, &refusal{[]*group{g}, of.rail})
		}
	}
	for _, g := range t.sorted() {
		if g.why != "" {
			rest = append(rest, &refusal{[]*group{g}, rail{why: g.why}})
		}
	}
	for _, p := range r.Proposals {
		var also []*refusal
		for _, of := range rest {
			if p.covers(of.groups[0]) {
				also = append(also, of)
			}
		}
		p.Also = findings(also)
	}
}
