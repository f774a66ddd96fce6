package eql

import "time"

// joined tries the combinations of the keys of an event. A key without a value
// keeps the event out, unless it is optional; one with several stands for each.
type joined struct {
	value []Value             // the combination that is being tried
	key   []byte              // its encoding
	left  int                 // how many more may be tried
	seen  map[string]struct{} // those that were, if a key has several values
}

// joiner takes an event whose keys are those that joined is trying.
type joiner interface {
	take(step int, e Event, now time.Time)
}

// each calls to.take for each combination of the keys of e, the first key varying
// slowest. It returns false if there were more than limit.
func (j *joined) each(s *Stage, step int, e Event, now time.Time, limit int, to joiner) bool {
	j.left, j.seen = limit, nil
	return j.choose(s, step, e, now, to)
}

func (j *joined) choose(s *Stage, step int, e Event, now time.Time, to joiner) bool {
	n := len(j.value)
	if n == len(s.keys) {
		if j.left == 0 {
			return false
		}
		j.left--
		if j.isNew() {
			to.take(step, e, now)
		}
		return true
	}
	mark := len(j.key)
	defer func() { j.key, j.value = j.key[:mark], j.value[:n] }()
	f, v := s.keys[n], Value{}
	if f.Slot >= 0 {
		v = e.Value(f.Slot)
	}
	if !v.present(f.Type) {
		if !s.optional[n] {
			return true
		}
		j.push(Value{})
		return j.choose(s, step, e, now, to)
	}
	if v.len() > 1 && j.seen == nil {
		j.seen = map[string]struct{}{}
	}
	for i := range v.len() {
		x := v.single(i)
		if !x.fits(f.Type) {
			continue
		}
		j.key, j.value = j.key[:mark], j.value[:n]
		j.push(x)
		if !j.choose(s, step, e, now, to) {
			return false
		}
	}
	return true
}

func (j *joined) push(v Value) {
	j.key = v.appendKey(j.key)
	j.value = append(j.value, v)
}

// isNew reports whether the combination is the first of its kind: a key that has a
// value twice stands for one event, not for two.
func (j *joined) isNew() bool {
	if j.seen == nil {
		return true
	}
	if _, ok := j.seen[string(j.key)]; ok {
		return false
	}
	j.seen[string(j.key)] = struct{}{}
	return true
}
