package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/token"
	"github.com/imdsgate/imdsgate/policy/yamlfile"
)

// How a file is formatted
//
// Two blanks of indentation for each level, lists one level below their keys; the keys of
// a grant and a deny in the order of the reference, with an empty line between two of
// them. Everything else stays as it is written: the order of other keys, quotes, what is in
// brackets on one line, one empty line where there were some, and comments.
//
// A comment on a line of its own belongs to what follows it, unless it is indented
// further than that: then to what is before it. Which is told here by lines and columns,
// since the YAML library attaches some comments to nothing. What was written is read
// again before it is believed: same values, same comments, or the file is refused.

// Format returns a configuration file in its canonical form. It refuses a file that is
// wrong, or that it could not write again without a loss.
func Format(name string, text []byte) ([]byte, error) {
	once, err := format(name, text)
	if err != nil {
		return nil, err
	}
	lost := func(what string) error {
		return (&yamlfile.File{Name: name}).At(nil, fmt.Errorf("%s would not survive formatting; write that part more plainly", what))
	}
	if !slices.Equal(comments(text), comments(once)) {
		return nil, lost("a comment")
	}
	before, beforeErr := Parse(name, text)
	after, afterErr := Parse(name, once)
	before.layers, after.layers = nil, nil
	if beforeErr != nil || afterErr != nil || !reflect.DeepEqual(before, after) {
		return nil, lost("a value")
	}
	if twice, err := format(name, once); err != nil || !bytes.Equal(once, twice) {
		return nil, lost("the layout")
	}
	return once, nil
}

// comments are those of a text, sorted.
func comments(text []byte) (all []string) {
	for _, t := range lexer.Tokenize(string(text)) {
		if t.Type == token.CommentType {
			all = append(all, strings.TrimRight(t.Value, " \t\r"))
		}
	}
	slices.Sort(all)
	return all
}

func format(name string, text []byte) (out []byte, err error) {
	text = yamlfile.Newlines(text)
	s, err := yamlfile.Parse(name, text)
	if err != nil {
		return nil, err
	}
	if err := s.Decode(new(Config)); err != nil {
		return nil, err
	}
	f := &formatter{File: s, lines: strings.Split(string(text), "\n")}
	if s.Root != nil {
		if f.top, err = f.block(s.Root, reflect.TypeFor[Config](), nil); err != nil {
			return nil, err
		}
	}
	if err := f.attach(); err != nil {
		return nil, err
	}
	f.notes(f.header, 0, true)
	for i, e := range f.top {
		f.entry(e, 0, i == 0 && len(f.header) == 0)
	}
	f.notes(f.footer, 0, len(f.top) == 0 && len(f.header) == 0)
	return f.out.Bytes(), nil
}

// formatter writes one file.
type formatter struct {
	*yamlfile.File
	lines          []string
	top            []*entry
	all            []*entry // in the order of the file, what contains before what it contains
	header, footer []note
	out            bytes.Buffer
}

// entry is a key with its value, or an element of a list.
type entry struct {
	key    string // with its quotes; "" of an element
	value  ast.Node
	below  []*entry // of a value that has lines of its own
	line   int
	column int
	list   bool // below are elements of a list
	spaced bool // an empty line is between this and its neighbours

	head, foot []note
	comment    string // behind it, on the same line
	blank      bool   // an empty line is before it
}

// note is a comment on a line of its own.
type note struct {
	text  string
	blank bool // an empty line is before it
}

// block lists the entries of a mapping or list that is not in brackets. It is empty for
// other values.
func (f *formatter) block(node ast.Node, t reflect.Type, parent *entry) (entries []*entry, err error) {
	refuse := func(what string) error {
		return f.At(node.GetToken(), fmt.Errorf("%s cannot be formatted; write out what it stands for", what))
	}
	add := func(e *entry, at *token.Token, t reflect.Type) error {
		e.line, e.column = at.Position.Line, at.Position.Column
		e.blank = f.blankBefore(e.line)
		f.all = append(f.all, e)
		entries = append(entries, e)
		e.below, err = f.block(e.value, t, e)
		return err
	}
	switch n := node.(type) {
	case *ast.AnchorNode, *ast.AliasNode:
		return nil, refuse("an anchor or alias (& *)")
	case *ast.TagNode:
		return nil, refuse("a tag (!)")
	case *ast.MappingValueNode:
		return f.block(ast.Mapping(n.GetToken(), false, n), t, parent)
	case *ast.MappingNode:
		if n.IsFlowStyle {
			return nil, nil
		}
		for _, v := range n.Values {
			if v.Key.IsMergeKey() {
				return nil, f.At(v.Key.GetToken(), errors.New("a merge key (<<) cannot be formatted; write out what it stands for"))
			}
			if err := add(&entry{key: v.Key.String(), value: v.Value}, v.Key.GetToken(), valueType(t, v.Key.GetToken().Value)); err != nil {
				return nil, err
			}
		}
		if order := orderOf(t); order != nil {
			slices.SortStableFunc(entries, func(a, b *entry) int { return cmp.Compare(order[a.key], order[b.key]) })
		}
	case *ast.SequenceNode:
		if n.IsFlowStyle {
			return nil, nil
		}
		parent.list = true
		for i, v := range n.Values {
			at := n.Start
			if i < len(n.Entries) {
				at = n.Entries[i].Start
			}
			e := &entry{value: v, spaced: t != nil && t.Kind() == reflect.Slice && yamlfile.Indirect(t.Elem()).Kind() == reflect.Struct}
			if err := add(e, at, elemType(t)); err != nil {
				return nil, err
			}
		}
	}
	return entries, nil
}

// valueType is the type of a key's value; nil if that is not known.
func valueType(t reflect.Type, name string) reflect.Type {
	switch {
	case t == nil || yamlfile.IsText(t):
	case t.Kind() == reflect.Map:
		return yamlfile.Indirect(t.Elem())
	case t.Kind() == reflect.Struct:
		for _, k := range yamlfile.KeysOf(t) {
			if k.Name == name {
				return k.Type
			}
		}
	}
	return nil
}

func elemType(t reflect.Type) reflect.Type {
	if t == nil || t.Kind() != reflect.Slice {
		return nil
	}
	return yamlfile.Indirect(t.Elem())
}

// orderOf is the order of the keys of a grant or a deny.
func orderOf(t reflect.Type) map[string]int {
	for _, list := range []string{"grants", "denies"} {
		if t != elemType(valueType(reflect.TypeFor[Config](), list)) {
			continue
		}
		order := map[string]int{}
		for i, k := range yamlfile.KeysOf(t) {
			order[k.Name] = i
		}
		return order
	}
	return nil
}

// blankBefore reports whether the line before this one is empty.
func (f *formatter) blankBefore(line int) bool {
	return line >= 2 && strings.TrimSpace(f.lines[line-2]) == ""
}

// attach gives every comment to an entry, or to the file.
func (f *formatter) attach() error {
	last := 0 // line of the last token that is no comment
	for _, t := range lexer.Tokenize(string(f.Text)) {
		line := t.Position.Line
		if t.Type != token.CommentType {
			if t.Type != token.DocumentHeaderType {
				last = line
			}
			continue
		}
		text := "#" + strings.TrimRight(t.Value, " \t")
		if line == last {
			e := f.startingOn(line)
			if e == nil || e.comment != "" {
				return f.At(t, errors.New("a comment within brackets or behind them would be lost; put it on the line before"))
			}
			e.comment = text
			continue
		}
		f.alone(note{text, f.blankBefore(line)}, line, t.Position.Column)
	}
	if len(f.top) == 0 {
		return nil
	}
	// What an empty line keeps from the first entry is about the file.
	first := f.all[0]
	for i := len(first.head); i > 0; i-- {
		if blank := i < len(first.head) && first.head[i].blank || i == len(first.head) && first.blank; blank {
			f.header, first.head = first.head[:i], first.head[i:]
			break
		}
	}
	return nil
}

// startingOn is the innermost entry that starts on a line.
func (f *formatter) startingOn(line int) (found *entry) {
	for _, e := range f.all {
		if e.line == line {
			found = e
		}
	}
	return found
}

// alone attaches a comment on a line of its own.
func (f *formatter) alone(n note, line, column int) {
	var next, before *entry
	for _, e := range f.all {
		switch {
		case e.line > line && next == nil:
			next = e
		case e.line < line && e.column <= column:
			before = e
		}
	}
	switch {
	case next != nil && (column <= next.column || before == nil):
		next.head = append(next.head, n)
	case before != nil && column > 1:
		before.foot = append(before.foot, n)
	default:
		f.footer = append(f.footer, n)
	}
}

const step = 2 // blanks

func (f *formatter) notes(notes []note, indent int, first bool) {
	for i, n := range notes {
		if n.blank && (i > 0 || !first) {
			f.out.WriteByte('\n')
		}
		fmt.Fprintf(&f.out, "%*s%s\n", indent, "", n.text)
	}
}

// entry writes an entry with what is below it; first is that of its parent.
func (f *formatter) entry(e *entry, indent int, first bool) {
	head, blank := e.head, e.blank
	if len(head) > 0 {
		blank = head[0].blank
		head = slices.Clone(head)
		head[0].blank = false
	}
	if (blank || e.spaced) && !first {
		f.out.WriteByte('\n')
	}
	f.notes(head, indent, true)
	if len(e.head) > 0 && e.blank {
		f.out.WriteByte('\n')
	}
	comment := ""
	if e.comment != "" {
		comment = " " + e.comment
	}
	if e.key == "" {
		f.element(e, indent, comment)
	} else {
		fmt.Fprintf(&f.out, "%*s%s:%s%s\n", indent, "", e.key, f.inline(e, indent), comment)
		for i, b := range e.below {
			f.entry(b, indent+step, i == 0)
		}
	}
	f.literal(e, indent)
	f.notes(e.foot, indent, false)
}

// element writes an element of a list. What is before its first key goes before it.
func (f *formatter) element(e *entry, indent int, comment string) {
	if len(e.below) == 0 || e.list {
		fmt.Fprintf(&f.out, "%*s-%s%s\n", indent, "", f.inline(e, indent), comment)
		for i, b := range e.below {
			f.entry(b, indent+step, i == 0)
		}
		return
	}
	first := e.below[0]
	f.notes(first.head, indent, true)
	first.head, first.blank = nil, false
	at := f.out.Len()
	for i, b := range e.below {
		f.entry(b, indent+step, i == 0)
	}
	f.out.Bytes()[at+indent] = '-'
}

// inline is what follows a key on its line.
func (f *formatter) inline(e *entry, indent int) string {
	switch n := e.value.(type) {
	case nil, *ast.NullNode:
		if n != nil && n.GetToken().Value != "" && n.GetToken().Type != token.ImplicitNullType {
			return " " + n.GetToken().Value
		}
		return ""
	case *ast.LiteralNode:
		return " " + n.Start.Value
	}
	if len(e.below) > 0 {
		return ""
	}
	return " " + flow(e.value)
}

// literal writes the lines of a value that is written in lines (| >).
func (f *formatter) literal(e *entry, indent int) {
	n, ok := e.value.(*ast.LiteralNode)
	if !ok {
		return
	}
	for line := range strings.Lines(n.Value.Value) {
		line = strings.TrimSuffix(line, "\n")
		if line != "" {
			fmt.Fprintf(&f.out, "%*s%s", indent+step, "", line)
		}
		f.out.WriteByte('\n')
	}
}

// flow writes a value on one line.
func flow(node ast.Node) string {
	switch n := node.(type) {
	case *ast.MappingValueNode:
		return n.Key.String() + ": " + flow(n.Value)
	case *ast.MappingNode:
		var all []string
		for _, v := range n.Values {
			all = append(all, flow(v))
		}
		return "{" + strings.Join(all, ", ") + "}"
	case *ast.SequenceNode:
		var all []string
		for _, v := range n.Values {
			all = append(all, flow(v))
		}
		return "[" + strings.Join(all, ", ") + "]"
	}
	return strings.TrimSpace(node.String())
}
