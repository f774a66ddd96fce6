package policy

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
)

// same reports whether a rule does in another policy what it did in this one.
func (r *rule) same(other *rule) bool {
	return r.text == other.text && reflect.DeepEqual(r.action, other.action) && reflect.DeepEqual(r.Rule.Action, other.Rule.Action)
}

// inherit takes over, for the rules of p that were in an old policy as they are now, what
// that remembers. Nothing is taken over where something else means another process than
// before. It is called before anybody else has m.
func (m *memory) inherit(p *Policy, old *state) {
	m.policy = old.memory.policy + 1
	was := map[string]int{}
	if p.tokenScope == old.tokenScope {
		for i, r := range old.rules {
			was[r.ID] = i
		}
	}
	now := make([]int, len(old.rules)) // by old rule: the new one, or -1
	for i := range now {
		now[i] = -1
	}
	for i, r := range p.rules {
		m.since[i] = m.policy
		if j, ok := was[r.ID]; ok && r.same(old.rules[j]) {
			now[j], m.since[i], m.machines[i] = i, old.memory.since[j], old.memory.machines[j]
		}
	}

	o := old.memory
	o.mu.Lock()
	defer o.mu.Unlock()
	m.swept = o.swept
	m.started = o.started.clone()
	for entity := range o.blocked.oldestFirst() {
		rules := newBitset(len(p.rules))
		some := false
		for j, i := range now {
			if i >= 0 && o.blocked.keys[entity].has(j) {
				rules.set(i)
				some = true
			}
		}
		if some {
			m.blocked.put(entity, rules)
			m.latches.Store(true)
		}
	}
}

// clone is a copy that can change by itself.
func (r *remembered[K, V]) clone() remembered[K, V] {
	return remembered[K, V]{r.max, maps.Clone(r.keys), slices.Clone(r.order), r.next}
}

// oldestFirst lists the keys in the order in which they are forgotten.
func (r *remembered[K, V]) oldestFirst() func(func(K) bool) {
	return slices.Values(slices.Concat(r.order[r.next:], r.order[:r.next]))
}

// Changes lists what is different in another policy, a line for each, for who has
// replaced one by the other.
func (p *Policy) Changes(to *Policy) (lines []string) {
	changed := func(what, name string) { lines = append(lines, fmt.Sprintf("%s %s", what, name)) }
	diff(p.rules, to.rules, (*rule).name, (*rule).same, "rule", changed)
	diff(pointers(p.grants), pointers(to.grants), func(g *Grant) string { return g.Name }, func(a, b *Grant) bool { return reflect.DeepEqual(a, b) }, "grant", changed)
	diff(pointers(p.denies), pointers(to.denies), func(d *Deny) string { return d.Name }, func(a, b *Deny) bool { return reflect.DeepEqual(a, b) }, "deny", changed)
	for _, of := range []struct{ what, before, after string }{{"name", p.Name, to.Name}, {"revision", p.Revision, to.Revision}} {
		if of.before != of.after {
			lines = append(lines, fmt.Sprintf("%s %q, was %q", of.what, of.after, of.before))
		}
	}
	if p.Posture != to.Posture {
		lines = append(lines, fmt.Sprintf("posture %s, was %s", to.Posture, p.Posture))
	}
	for _, class := range slices.Sorted(maps.Keys(merged(p.classes, to.classes))) {
		before, had := p.classes[class]
		after, has := to.classes[class]
		if had != has || before != after {
			lines = append(lines, fmt.Sprintf("posture of %s: %s, was %s", class, or(after, has), or(before, had)))
		}
	}
	if p.tokenScope != to.tokenScope {
		lines = append(lines, fmt.Sprintf("scope of tokens %s, was %s", to.tokenScope, p.tokenScope))
	}
	return lines
}

func (r *rule) name() string { return fmt.Sprintf("%s (%s)", r.ID, r.Name) }

func or(p Posture, set bool) string {
	if !set {
		return "not set"
	}
	return p.String()
}

func merged[V any](a, b map[string]V) map[string]V {
	all := maps.Clone(a)
	if all == nil {
		all = map[string]V{}
	}
	maps.Copy(all, b)
	return all
}

func pointers[T any](list []T) []*T {
	all := make([]*T, len(list))
	for i := range list {
		all[i] = &list[i]
	}
	return all
}

// diff tells of what came, went and differs, by name.
func diff[T any](before, after []T, name func(T) string, same func(a, b T) bool, kind string, tell func(what, name string)) {
	was := map[string]T{}
	for _, b := range before {
		was[name(b)] = b
	}
	is := map[string]bool{}
	for _, a := range after {
		is[name(a)] = true
		switch b, ok := was[name(a)]; {
		case !ok:
			tell("+ "+kind, name(a))
		case !same(b, a):
			tell("~ "+kind, name(a))
		}
	}
	for _, b := range before {
		if !is[name(b)] {
			tell("- "+kind, name(b))
		}
	}
}
