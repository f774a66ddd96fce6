package eql

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// A sampler finds samples: for each key one event for each stage, no two of them
// the same. Which ones, where there is a choice, Elasticsearch leaves open. Here
// it is the earliest for the first stage that leaves something for the others,
// then the earliest for the second, and so on. One sample is found for each key,
// and they are in the order of their keys.
type sampler struct {
	query   *Query
	limit   int
	evicted uint64

	keys   map[string]*candidates
	order  []*candidates // by their first event
	seq    uint64        // of the event that is being observed
	joined joined
}

// candidates are the events that have one combination of keys. A stage needs no
// more of them than there are stages: the others cannot take all.
type candidates struct {
	key    string
	value  []Value
	stages [][]candidate
}

type candidate struct {
	event Event
	seq   uint64
}

func (q *Query) newSampler(limit int) *sampler {
	if limit <= 0 {
		limit = defaultLimit
	}
	return &sampler{query: q, limit: limit, keys: map[string]*candidates{}}
}

func (s *sampler) observe(e Event) {
	for i, stage := range s.query.stages {
		if stage.Match(e) && !s.joined.each(stage, i, e, time.Time{}, s.limit, s) {
			s.evicted++
		}
	}
	s.seq++
}

func (s *sampler) take(stage int, e Event, _ time.Time) {
	c := s.keys[string(s.joined.key)]
	if c == nil {
		c = &candidates{string(s.joined.key), slices.Clone(s.joined.value), make([][]candidate, len(s.query.stages))}
		s.keys[c.key] = c
		s.order = append(s.order, c)
		if len(s.keys) > s.limit {
			s.forget()
		}
	}
	if len(c.stages[stage]) < len(c.stages) {
		c.stages[stage] = append(c.stages[stage], candidate{e, s.seq})
	}
}

// forget gives up the key that came first.
func (s *sampler) forget() {
	delete(s.keys, s.order[0].key)
	s.order[0] = nil
	s.order = s.order[1:]
	s.evicted++
}

func (s *sampler) matches() []Match {
	slices.SortFunc(s.order, func(a, b *candidates) int { return slices.CompareFunc(a.value, b.value, order) })
	var found []Match
	for _, c := range s.order {
		if events := c.choose(); events != nil {
			found = append(found, Match{events, c.value})
		}
	}
	return found
}

// order is that of keys; no value comes first.
func order(a, b Value) int {
	switch {
	case a.kind != b.kind && !(a.isNumber() && b.isNumber()):
		return cmp.Compare(a.kind, b.kind)
	case a.kind == isString:
		return strings.Compare(a.str(), b.str())
	case a.kind == isAddr:
		return cmp.Or(cmp.Compare(a.hi, b.hi), cmp.Compare(a.lo, b.lo))
	}
	n, _ := compare(&a, &b)
	return n
}

// choose picks an event for each stage, the earliest that leaves one for each of
// the stages that follow, or returns nil.
func (c *candidates) choose() []Event {
	chosen := make([]Event, len(c.stages))
	used := map[uint64]bool{}
	for i := range c.stages {
		j := slices.IndexFunc(c.stages[i], func(x candidate) bool {
			if used[x.seq] {
				return false
			}
			used[x.seq] = true
			if c.suffices(i+1, used) {
				return true
			}
			delete(used, x.seq)
			return false
		})
		if j < 0 {
			return nil
		}
		chosen[i] = c.stages[i][j].event
	}
	return chosen
}

// suffices reports whether the stages from the ith on can have an event each that
// is not used: whether a matching of stages and events covers them. Each stage
// takes an event that is free, or one whose stage can take another.
func (c *candidates) suffices(i int, used map[uint64]bool) bool {
	owner := map[uint64]int{}
	var assign func(stage int, tried map[uint64]bool) bool
	assign = func(stage int, tried map[uint64]bool) bool {
		for _, x := range c.stages[stage] {
			if used[x.seq] || tried[x.seq] {
				continue
			}
			tried[x.seq] = true
			if other, taken := owner[x.seq]; !taken || assign(other, tried) {
				owner[x.seq] = stage
				return true
			}
		}
		return false
	}
	for ; i < len(c.stages); i++ {
		if !assign(i, map[uint64]bool{}) {
			return false
		}
	}
	return true
}
