package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Fault is what is wrong in a file, and where.
type Fault struct {
	File         string
	Line, Column int // from 1; 0 where it is the file as a whole
	Message      string
	Excerpt      string // the lines around it, with a caret
	Err          error  // of the package that has the key; or nil
}

func (f *Fault) Error() string {
	if f.Line == 0 {
		return fmt.Sprintf("%s: %s", f.File, f.Message)
	}
	return fmt.Sprintf("%s:%d:%d: %s\n%s", f.File, f.Line, f.Column, f.Message, f.Excerpt)
}

func (f *Fault) Unwrap() error { return f.Err }

// source is one file.
type source struct {
	name string
	text []byte
	root ast.Node // nil if the file has no content
}

// parse reads a file as YAML, whatever it says.
func parse(name string, text []byte) (s *source, err error) {
	s = &source{name: name, text: text}
	if len(text) > policy.MaxYAML {
		return nil, s.whole(fmt.Errorf("%d bytes are more than the %d that a configuration may have", len(text), policy.MaxYAML))
	}
	if line, _, deep := policy.TooDeep(text); deep {
		return nil, s.whole(fmt.Errorf("more than %d levels are in each other in line %d", policy.MaxDepth, line))
	}
	defer s.recovered(&err)
	file, err := parser.ParseBytes(text, parser.ParseComments)
	if err != nil {
		return nil, s.fault(err)
	}
	for _, doc := range file.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.CommentType {
			continue
		}
		if s.root != nil {
			return nil, s.at(firstToken(doc.Body), errors.New("a second document: everything after --- would be left out; put it into a file of its own"))
		}
		s.root = doc.Body
	}
	return s, nil
}

// decode reads the file into c. Unknown keys are faults, all of them, and so are
// repeated ones.
func (s *source) decode(c *Config) (err error) {
	defer s.recovered(&err)
	if unknown := s.unknown(s.root, reflect.TypeFor[Config](), ""); unknown != nil {
		return errors.Join(unknown...)
	}
	err = yaml.NewDecoder(bytes.NewReader(s.text), yaml.Strict()).Decode(c)
	if err == nil || errors.Is(err, io.EOF) {
		return nil
	}
	return s.fault(err)
}

// unknown finds the keys below a node that a value of type t does not have. parent is the
// key that it has.
func (s *source) unknown(node ast.Node, t reflect.Type, parent string) (faults []error) {
	switch n := node.(type) {
	case *ast.AnchorNode:
		return s.unknown(n.Value, t, parent)
	case *ast.SequenceNode:
		if t.Kind() == reflect.Slice {
			for _, e := range n.Values {
				faults = append(faults, s.unknown(e, t.Elem(), parent)...)
			}
		}
	case *ast.MappingValueNode:
		return s.unknownKey(n, t, parent)
	case *ast.MappingNode:
		for _, v := range n.Values {
			faults = append(faults, s.unknownKey(v, t, parent)...)
		}
	}
	return faults
}

func (s *source) unknownKey(v *ast.MappingValueNode, t reflect.Type, parent string) []error {
	if v.Key.IsMergeKey() {
		return nil // what it takes in was looked at where it is
	}
	name := v.Key.GetToken().Value
	switch {
	case isText(t):
	case t.Kind() == reflect.Map:
		return s.unknown(v.Value, t.Elem(), name)
	case t.Kind() == reflect.Struct:
		keys := keysOf(t)
		for _, k := range keys {
			if k.name == name {
				return s.unknown(v.Value, k.typ, name)
			}
		}
		return []error{s.at(v.Key.GetToken(), errors.New(unknownKey(name, parent, keys)))}
	}
	return nil
}

// unknownKey says what to write in place of a key that is not among those there are.
func unknownKey(name, parent string, keys []key) string {
	message := fmt.Sprintf("unknown key %q", name)
	if parent != "" {
		message += " of " + parent
	}
	if why, ok := policy.NotInGrants[name]; ok && (parent == "grants" || parent == "denies") {
		return message + ": " + why
	}
	near := syntax.Nearest(name, func(yield func(string) bool) {
		for _, k := range keys {
			if !yield(k.name) {
				return
			}
		}
	})
	if near != "" {
		return message + "; is it " + near + "?"
	}
	var names []string
	for _, k := range keys {
		names = append(names, k.name)
	}
	return message + "; there are " + strings.Join(names, ", ")
}

// recovered takes a panic of the YAML library for an error: it has some, with tags that
// no configuration needs, and a daemon that reloads must not end by one.
func (s *source) recovered(err *error) {
	if p := recover(); p != nil {
		*err = s.whole(fmt.Errorf("not understood as YAML: a tag (!) or anchor (&) where none belongs? (%v)", p))
	}
}

// fault gives an error of the YAML library, or of one of our own types, its place.
// That of the latter the library does not tell: it is the first value that the error
// quotes.
func (s *source) fault(err error) *Fault {
	if known := yaml.Error(nil); errors.As(err, &known) && known.GetToken() != nil {
		message := known.GetMessage()
		if mismatch := (*yaml.TypeError)(nil); errors.As(err, &mismatch) && mismatch.SrcType != nil && mismatch.DstType != nil {
			message = fmt.Sprintf("%s is wanted here, and not %s", kindOf(mismatch.DstType), kindOf(mismatch.SrcType))
		}
		return s.at(known.GetToken(), errors.New(message))
	}
	for _, t := range lexer.Tokenize(string(s.text)) {
		if t.Value != "" && strings.Contains(err.Error(), strconv.Quote(t.Value)) {
			return s.at(t, err)
		}
	}
	return s.whole(err)
}

// kindOf is what a type is to who writes YAML.
func kindOf(t reflect.Type) string {
	switch indirect(t).Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a text"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "a mapping of keys"
	}
	return "a number"
}

func (s *source) whole(err error) *Fault { return &Fault{File: s.name, Message: err.Error(), Err: err} }

func (s *source) at(t *token.Token, err error) *Fault {
	at := t.Position
	return &Fault{File: s.name, Line: at.Line, Column: at.Column, Message: err.Error(), Excerpt: s.excerpt(at.Line, at.Column), Err: err}
}

// excerpt is a line with the two before it, and a caret below. The library's own counts
// lines otherwise behind a text of several.
func (s *source) excerpt(line, column int) string {
	var b strings.Builder
	n := 0
	for text := range bytes.Lines(s.text) {
		text = bytes.TrimRight(text, "\r\n")
		switch n++; {
		case n < line && n >= line-2:
			fmt.Fprintf(&b, "  %4d | %s\n", n, text)
		case n == line:
			before := []rune(string(text))
			for i, c := range before {
				if c != '\t' {
					before[i] = ' '
				}
			}
			fmt.Fprintf(&b, "> %4d | %s\n       | %s^", n, text, string(before[:min(max(column-1, 0), len(before))]))
			return b.String()
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// find follows a key as far as the file has it, and tells how far that is. The token is
// that of the value, where it is one, and else of its key.
func (s *source) find(path []string) (t *token.Token, depth int) {
	node := s.root
	if node == nil {
		return nil, 0
	}
	t = firstToken(node)
	for depth < len(path) {
		next, key := child(node, path[depth])
		if next == nil {
			return t, depth
		}
		node, depth = next, depth+1
		if t = firstToken(node); key != nil {
			t = key
		}
	}
	if scalar, ok := node.(ast.ScalarNode); ok {
		t = scalar.GetToken()
	}
	return t, depth
}

// child is an element of a node, with its key if it has one. A value stands for a list
// of it.
func child(node ast.Node, name string) (ast.Node, *token.Token) {
	switch n := node.(type) {
	case *ast.AnchorNode:
		return child(n.Value, name)
	case *ast.TagNode:
		return child(n.Value, name)
	case *ast.MappingNode:
		for _, v := range n.Values {
			if v.Key.GetToken().Value == name {
				return v.Value, v.Key.GetToken()
			}
		}
	case *ast.MappingValueNode:
		if n.Key.GetToken().Value == name {
			return n.Value, n.Key.GetToken()
		}
	case *ast.SequenceNode:
		if i, err := strconv.Atoi(name); err == nil && i < len(n.Values) {
			return n.Values[i], nil
		}
	case ast.ScalarNode:
		if name == "0" {
			return n, nil
		}
	}
	return nil, nil
}

// merges reports whether a mapping takes in another.
func merges(node ast.Node) bool {
	switch n := node.(type) {
	case *ast.AnchorNode:
		return merges(n.Value)
	case *ast.MappingNode:
		return slices.ContainsFunc(n.Values, func(v *ast.MappingValueNode) bool { return merges(v) })
	case *ast.MappingValueNode:
		return n.Key.IsMergeKey()
	}
	return false
}

// firstToken is where a node begins, for a person: that of a mapping is its first key.
func firstToken(node ast.Node) *token.Token {
	switch n := node.(type) {
	case *ast.AnchorNode:
		return firstToken(n.Value)
	case *ast.TagNode:
		return firstToken(n.Value)
	case *ast.MappingNode:
		if len(n.Values) > 0 {
			return n.Values[0].Key.GetToken()
		}
	case *ast.MappingValueNode:
		return n.Key.GetToken()
	}
	return node.GetToken()
}

// length is how many elements a list has.
func (s *source) length(path ...string) int {
	node := s.root
	for _, name := range path {
		if node == nil {
			return 0
		}
		node, _ = child(node, name)
	}
	for {
		switch n := node.(type) {
		case *ast.AnchorNode:
			node = n.Value
			continue
		case *ast.TagNode:
			node = n.Value
			continue
		case *ast.SequenceNode:
			return len(n.Values)
		}
		return 0
	}
}

// splitKey is the way of a policy.KeyError, one name or number at a time. Names may
// have dots in them only where nothing follows.
func splitKey(key string) []string {
	var path []string
	for part := range strings.SplitSeq(key, ".") {
		name, indexes, _ := strings.Cut(part, "[")
		path = append(path, name)
		for indexes != "" {
			var i string
			i, indexes, _ = strings.Cut(indexes, "]")
			path = append(path, strings.TrimPrefix(i, "["))
		}
	}
	return path
}
