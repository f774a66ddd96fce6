package policy

import (
	"iter"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Schema is the fields that events have, for the language.
func Schema() eql.Schema { return schema{} }

// schema shows the fields of events to the language.
type schema struct{}

func (schema) Field(name string) (eql.Field, bool) {
	i, ok := event.Lookup(name)
	if !ok {
		return eql.Field{}, false
	}
	return eql.Field{Name: name, Type: types[event.Fields[i].Type], Slot: i}, true
}

func (s schema) Category() eql.Field {
	f, _ := s.Field("event.category")
	return f
}

func (schema) Names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, f := range event.Fields {
			if !yield(f.Name) {
				return
			}
		}
	}
}

// didYouMean is a hint for a field that there is not.
func didYouMean(name string) string {
	if near := syntax.Nearest(name, schema{}.Names()); near != "" {
		return "did you mean " + near + "?"
	}
	return ""
}

var types = [...]eql.Type{
	event.Keyword: eql.Keyword, event.IP: eql.IP, event.Long: eql.Long, event.Boolean: eql.Boolean, event.Date: eql.Date,
}

// document is one document of an event, as rules are asked about it.
type document struct{ event.View }

func (d *document) Time() time.Time { return d.Timestamp() }

func (d *document) Value(slot int) eql.Value {
	f := &event.Fields[slot]
	if text, is := f.Text(&d.View); is {
		if text == "" {
			return eql.Value{}
		}
		return eql.String(text)
	}
	v := f.Value(&d.View)
	if !v.Set {
		return eql.Value{}
	}
	switch f.Type {
	case event.Keyword:
		if v.Texts != nil {
			return eql.Strings(v.Texts)
		}
		return eql.String(v.Text)
	case event.IP:
		return eql.Addr(v.Addr)
	case event.Long:
		if v.Ints != nil {
			list := make([]eql.Value, len(v.Ints))
			for i, n := range v.Ints {
				list[i] = eql.Int(n)
			}
			return eql.List(list...)
		}
		return eql.Int(v.Int)
	case event.Boolean:
		return eql.Bool(v.Bool)
	case event.Date:
		return eql.Time(v.Time)
	}
	return eql.Value{}
}

// callerChosen are the fields that the one who asks can make say what he likes.
// A clause of a rule that rests on one excuses nobody from a block.
func callerChosen(field string) bool {
	switch field {
	case "process.working_directory", "process.executable", "process.name", "process.args", "process.args_count",
		"process.command_line", "process.thread.name", "process.interactive", "user_agent.original", "url.domain":
		return true
	}
	for _, prefix := range []string{"process.parent.", "process.group_leader.", "process.session_leader.",
		"process.entry_leader.", "process.env_vars", "imdsgate.ancestors.", "imdsgate.process.parent"} {
		if len(field) >= len(prefix) && field[:len(prefix)] == prefix {
			return true
		}
	}
	return false
}
