package ndjson

import (
	"iter"
	"maps"
	"slices"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Origin says from where the type of a field is known.
type Origin uint8

// Where types come from, the first that knows one.
const (
	FromSchema Origin = iota
	FromData          // the first value that was seen
	FromQuery         // what it is compared with
)

func (o Origin) String() string { return [...]string{"schema", "data", "query"}[o] }

// Field is a field that the query reads.
type Field struct {
	eql.Field
	Origin Origin

	time     bool          // it is the timestamp
	form     Form          // of dates
	at       *syntax.Field // where the query has it first; nil for the category
	optional bool          // everywhere
	absent   bool          // optional, and no event of all has it
	sampled  kind          // of the first value that was seen
}

// Fields are the fields that a query reads, as an eql.Schema.
//
// Lines have no mapping, so each field takes its type from where one is known: a
// schema that is given; else the first value that the data have for it; else what
// the query compares it with. A string is a date if it can be one and the query
// compares it with one.
type Fields struct {
	bySlot []*Field // the category first
	byName map[string]*Field
	known  eql.Schema
	data   *sample
}

// newFields collects the fields of a query.
func newFields(tree *syntax.Query, roles Roles, known eql.Schema) *Fields {
	fs := &Fields{byName: map[string]*Field{}, known: known}
	c := fs.add(roles.Category)
	c.Type, c.Origin = eql.Keyword, FromSchema
	for f := range fieldsOf(tree) {
		field := fs.byName[f.Name]
		if field == nil {
			field = fs.add(f.Name)
		}
		if field.at == nil {
			field.at, field.optional = f, true
		}
		field.optional = field.optional && f.Optional
	}
	if at := fs.byName[roles.Timestamp]; at != nil {
		at.form, at.time = roles.Form, true
	}
	return fs
}

func (fs *Fields) add(name string) *Field {
	f := &Field{Field: eql.Field{Name: name, Slot: len(fs.bySlot)}, Origin: FromQuery}
	if schema, ok := fs.known.Field(name); ok {
		f.Type, f.Origin = schema.Type, FromSchema
	}
	fs.bySlot = append(fs.bySlot, f)
	fs.byName[name] = f
	return f
}

// unknown are the fields that the schema does not have.
func (fs *Fields) unknown() []*Field {
	return slices.DeleteFunc(slices.Clone(fs.bySlot), func(f *Field) bool { return f.Origin == FromSchema })
}

// learn gives the fields that the schema does not have their types.
func (fs *Fields) learn(tree *syntax.Query, data *sample) {
	fs.data = data
	for _, f := range fs.unknown() {
		switch f.sampled = data.kinds[f.Name]; f.sampled {
		case none:
			f.absent = data.all && f.optional && len(f.Name) <= sampleName
			continue
		case isNumber:
			f.Type = eql.Double
		case isBool:
			f.Type = eql.Boolean
		}
		f.Origin = FromData
	}
	syntax.Walk(tree, func(n syntax.Node) bool {
		fs.use(n)
		return true
	})
	switch body := tree.Body.(type) {
	case *syntax.Sequence:
		items := body.Items
		if body.Until != nil {
			items = slices.Concat(items, []*syntax.Item{body.Until})
		}
		fs.joinKeys(items)
	case *syntax.Sample:
		fs.joinKeys(body.Items)
	}
}

// use learns from one expression.
func (fs *Fields) use(n syntax.Node) {
	switch n := n.(type) {
	case *syntax.Binary:
		if n.Op >= syntax.Add {
			fs.number(n.X)
			fs.number(n.Y)
			return
		}
		fs.compare(n.X, n.Y)
		fs.compare(n.Y, n.X)
	case *syntax.Unary:
		fs.number(n.X)
	case *syntax.In:
		for _, y := range n.List {
			fs.compare(n.X, y)
		}
	}
}

func (fs *Fields) number(e syntax.Expr) {
	if f := fs.untyped(e); f != nil {
		f.Type = eql.Double
	}
}

// compare learns from the comparison of an expression with another.
func (fs *Fields) compare(x, y syntax.Expr) {
	switch y := y.(type) {
	case *syntax.Binary:
		if y.Op >= syntax.Add {
			fs.number(x)
		}
	case *syntax.Literal:
		switch v := y.Value.(type) {
		case int64, float64:
			fs.number(x)
		case bool:
			if f := fs.untyped(x); f != nil {
				f.Type = eql.Boolean
			}
		case string:
			fs.text(x, v)
		}
	}
}

// untyped is the field that an expression is, if nothing is known of it yet.
func (fs *Fields) untyped(e syntax.Expr) *Field {
	at, ok := e.(*syntax.Field)
	if !ok {
		return nil
	}
	if f := fs.byName[at.Name]; f.Origin == FromQuery && f.Type == eql.Keyword {
		return f
	}
	return nil
}

// text makes a field one of dates that is compared with a date, if its strings are
// dates, or it is the timestamp.
func (fs *Fields) text(e syntax.Expr, with string) {
	at, ok := e.(*syntax.Field)
	if !ok {
		return
	}
	f := fs.byName[at.Name]
	if _, date := parseDate(with); date && f.Origin == FromData && (f.sampled == isDate || f.time) {
		f.Type = eql.Date
	}
}

// joinKeys makes keys that are to be equal equal in type. What is known of one is
// known of all.
func (fs *Fields) joinKeys(items []*syntax.Item) {
	for i := range items[0].By {
		best := fs.byName[items[0].By[i].Name]
		for _, it := range items {
			if f := fs.byName[it.By[i].Name]; f.Origin < best.Origin {
				best = f
			}
		}
		for _, it := range items {
			if f := fs.byName[it.By[i].Name]; f.Origin > best.Origin {
				f.Type = best.Type
			}
		}
	}
}

// fieldsOf are the fields that a query mentions.
func fieldsOf(tree *syntax.Query) iter.Seq[*syntax.Field] {
	return func(yield func(*syntax.Field) bool) {
		more := true
		syntax.Walk(tree, func(n syntax.Node) bool {
			if f, ok := n.(*syntax.Field); ok && more {
				more = yield(f)
			}
			return more
		})
	}
}

// Field finds a field that the query mentions.
func (fs *Fields) Field(name string) (eql.Field, bool) {
	f, ok := fs.byName[name]
	if !ok {
		return eql.Field{}, false
	}
	field := f.Field
	if f.absent {
		field.Slot = -1
	}
	return field, true
}

// Category is the field that "process where ..." tests.
func (fs *Fields) Category() eql.Field { return fs.bySlot[0].Field }

// Names are the names of the schema and of the data.
func (fs *Fields) Names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for name := range fs.known.Names() {
			if !yield(name) {
				return
			}
		}
		if fs.data != nil {
			for name := range maps.Keys(fs.data.kinds) {
				if !yield(name) {
					return
				}
			}
		}
	}
}

// All lists the fields, the category first.
func (fs *Fields) All() []Field {
	all := make([]Field, len(fs.bySlot))
	for i, f := range fs.bySlot {
		all[i] = *f
	}
	return all
}

// warnings are about fields that neither the schema nor the data have, unless the
// query marks them as optional.
func (fs *Fields) warnings(tree *syntax.Query) syntax.ErrorList {
	var list syntax.ErrorList
	for _, f := range fs.unknown() {
		if f.Origin != FromQuery || f.optional || fs.data.events == 0 {
			continue
		}
		w := tree.Errorf(f.at.Pos, "%s the field %s", fs.data.nobody(), f.Name)
		w.Hint = "write ?" + f.Name + " if it may be missing"
		if near := syntax.Nearest(f.Name, fs.Names()); near != "" {
			w.Hint = "did you mean " + near + "?"
		}
		list = append(list, w)
	}
	if len(list) > 0 {
		list.Sort()
	}
	return list
}
