package event

import (
	"slices"
	"strings"
	"sync/atomic"
)

// Most of a document says of the host, of the process and of the rule what all
// documents say of them. The objects that say nothing else are written once for each
// of them, and copied from then on: none changes once it is in a document. They
// are written from a View that has nothing else of the event, so that they cannot
// tell of it.
var (
	ofHost    = objects("agent", "host", "observer")
	ofProcess = objects("container", "imdsgate.ancestors", "imdsgate.executable", "imdsgate.process", "orchestrator", "process", "user")
	ofRule    = objects("rule", "threat")
)

// object is all fields below a name.
type object struct {
	path []string
	docs docs // that have it
	rows []row
}

func objects(names ...string) []object {
	var all []object
	for _, name := range names {
		o := object{path: strings.Split(name, ".")}
		for i := range Fields {
			if f := &Fields[i]; strings.HasPrefix(f.Name, name+".") {
				o.docs = f.docs
				o.rows = append(o.rows, row{path: f.parts[:len(f.parts)-1], field: f})
			}
		}
		follow(o.rows)
		all = append(all, o)
	}
	return all
}

// row is what a document has in one place: a field, or an object.
type row struct {
	path    []string               // the objects that it is in
	heads   []string               // with which they begin: the names, as JSON has them before an object
	shared  int                    // how many of them the row before is in, too
	field   *Field                 // nil for an object
	fixed   string                 // the field with its value, if that is always the same
	others  bool                   // the subjects that come after the first
	of      func(*View) *[]written // what has the object, if there is one
	ordinal int                    // of the object
}

// rows are those of each kind of document.
var rows = func() (all [IntegrityFinding + 1][]row) {
	for d := range all {
		all[d] = rowsOf(Document(d))
	}
	return all
}()

func rowsOf(d Document) []row {
	var all []row
	// in reports whether a field is in one of these objects, the first of whose
	// fields stands for all.
	in := func(f *Field, list []object, of func(*View) *[]written) bool {
		for i, o := range list {
			if len(f.parts) > len(o.path) && slices.Equal(f.parts[:len(o.path)], o.path) {
				if o.rows[0].field == f {
					all = append(all, row{path: o.path[:len(o.path)-1], of: of, ordinal: i})
				}
				return true
			}
		}
		return false
	}
	for i := range Fields {
		f := &Fields[i]
		if f.docs&(1<<d) == 0 || in(f, ofHost, (*View).ofHost) || in(f, ofProcess, (*View).ofProcess) || in(f, ofRule, (*View).ofRule) {
			continue
		}
		r := row{path: f.parts[:len(f.parts)-1], field: f}
		if f.fixed {
			v := View{Event: &Event{}, Document: d}
			value := f.get(&v)
			b, _ := f.append([]byte(f.key), &value)
			r.fixed = string(b)
		}
		all = append(all, r)
	}
	// After imdsgate.mode, as the alphabet has it.
	if i := slices.IndexFunc(all, func(r row) bool { return r.field != nil && r.field.Name == "imdsgate.mode" }); i >= 0 && d == RequestDecision {
		all = slices.Insert(all, i+1, row{path: all[i].path, others: true})
	}
	// At the end it is known what was lost.
	slices.SortStableFunc(all, func(x, y row) int { return x.last() - y.last() })
	follow(all)
	return all
}

// last puts our own fields behind all others, and behind them those that tell of these.
func (r *row) last() int {
	switch {
	case r.field != nil && r.field.tells != 0:
		return 2
	case len(r.path) > 0 && r.path[0] == "imdsgate":
		return 1
	}
	return 0
}

// follow completes rows that are written one after the other.
func follow(rows []row) {
	for i := range rows {
		r := &rows[i]
		for _, name := range r.path {
			r.heads = append(r.heads, string(append(appendString(nil, name), ':', '{')))
		}
		if i > 0 {
			for r.shared < min(len(r.path), len(rows[i-1].path)) && r.path[r.shared] == rows[i-1].path[r.shared] {
				r.shared++
			}
		}
	}
}

// written is an object with its name, as it stands in documents. It is empty if no
// field has a value.
type written struct {
	json []byte
	lost loss
}

func write(list []object, v *View) []written {
	all := make([]written, len(list))
	for i, o := range list {
		depth := len(o.path)
		b := append(appendString(nil, o.path[depth-1]), ':', '{')
		head := len(b)
		b, lost := v.appendRows(b, o.rows, depth)
		if len(b) > head {
			all[i] = written{slices.Clip(append(b, '}')), lost}
		}
	}
	return all
}

// once writes the objects if they are not there yet. Two that come at the same time
// write the same.
func once(to *atomic.Pointer[[]written], list []object, v *View) *[]written {
	all := write(list, v)
	to.Store(&all)
	return &all
}

func (v *View) ofHost() *[]written {
	if all := v.Host.written.Load(); all != nil {
		return all
	}
	return once(&v.Host.written, ofHost, &View{Event: &Event{Host: v.Host}, Document: RequestDecision})
}

func (v *View) ofProcess() *[]written {
	if v.Subject == nil {
		return nil
	}
	if all := v.Subject.written.Load(); all != nil {
		return all
	}
	return once(&v.Subject.written, ofProcess, &View{Event: &Event{}, Document: RequestDecision, Subject: v.Subject})
}

func (v *View) ofRule() *[]written {
	r := v.rule()
	if r == nil {
		return nil
	}
	if all := r.written.Load(); all != nil {
		return all
	}
	return once(&r.written, ofRule, &View{Event: &Event{}, Document: RequestDecision, Match: &Match{Rule: r}})
}
