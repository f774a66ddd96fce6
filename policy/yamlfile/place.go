package yamlfile

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// Fault is what is wrong in a file, and where.
type Fault struct {
	File         string
	Line, Column int // from 1; 0 where it is the file as a whole
	Message      string
	Excerpt      string // the lines around it, with a caret
	Err          error  // of the package that has the key
}

func (f *Fault) Error() string {
	if f.Line == 0 {
		return fmt.Sprintf("%s: %s", f.File, f.Message)
	}
	return fmt.Sprintf("%s:%d:%d: %s\n%s", f.File, f.Line, f.Column, f.Message, f.Excerpt)
}

func (f *Fault) Unwrap() error { return f.Err }

func (f *File) whole(err error) *Fault {
	message := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\n' {
			return r
		}
		return unicode.ReplacementChar
	}, err.Error())
	return &Fault{File: f.Name, Message: message, Err: err}
}

// At is a fault at a token, or of the whole file if that is nil.
func (f *File) At(t *token.Token, err error) *Fault {
	if t == nil {
		return f.whole(err)
	}
	return f.at(t.Position.Line, t.Position.Column, err)
}

// at has the line and the two before it, with a caret below. The library's own excerpt
// counts lines otherwise behind a text of several.
func (f *File) at(line, column int, err error) *Fault {
	fault := f.whole(err)
	fault.Line, fault.Column = line, column
	var b strings.Builder
	for n := max(line-2, 1); n <= min(line, len(f.lines)); n++ {
		if n < line {
			text, _ := syntax.Excerpt(f.lines[n-1], 1)
			fmt.Fprintf(&b, "  %4d | %s\n", n, text)
			continue
		}
		text, blanks := syntax.Excerpt(f.lines[n-1], column)
		fmt.Fprintf(&b, "> %4d | %s\n       | %s^", n, text, blanks)
	}
	fault.Excerpt = strings.TrimSuffix(b.String(), "\n")
	return fault
}

// Locate is a fault of a value, or of the nearest that it is in.
func (f *File) Locate(path []string, err error) *Fault {
	t, _ := f.Find(path)
	return f.At(t, err)
}

// Path is the way of a key as policy.KeyError has it, "grants[3].executable[1]", one name
// or number at a time.
func Path(key string) []string {
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

// Find follows a path as far as the file has it, and tells how far that is. The token is
// that of the value, where it is one, and else of its key; nil if the file has no content.
func (f *File) Find(path []string) (t *token.Token, depth int) {
	node := f.Root
	if node == nil {
		return nil, 0
	}
	t = firstToken(node)
	for depth < len(path) {
		name, n := path[depth], 1
		next, key := Child(node, name)
		for ; next == nil && depth+n < len(path); n++ { // one that has dots
			name += "." + path[depth+n]
			next, key = Child(node, name)
		}
		if next == nil {
			return t, depth
		}
		node, depth = next, depth+n
		if t = firstToken(node); key != nil {
			t = key
		}
	}
	if scalar, ok := bare(node).(ast.ScalarNode); ok {
		t = scalar.GetToken()
	}
	return t, depth
}

// Line is where a value is, or the nearest that it is in; 0 if the file has no content.
func (f *File) Line(path []string) int {
	t, _ := f.Find(path)
	if t == nil {
		return 0
	}
	return t.Position.Line
}

// Child is an element of a node, with its key if it has one. A value stands for a list
// of it.
func Child(node ast.Node, name string) (ast.Node, *token.Token) {
	switch n := bare(node).(type) {
	case ast.MapNode:
		for i := n.MapRange(); i.Next(); {
			if key := i.Key().GetToken(); key.Value == name {
				return i.Value(), key
			}
		}
		if name == "0" {
			return n.(ast.Node), nil
		}
	case *ast.SequenceNode:
		if i, err := strconv.Atoi(name); err == nil && i >= 0 && i < len(n.Values) {
			return n.Values[i], nil
		}
	case ast.ScalarNode:
		if name == "0" {
			return n, nil
		}
	}
	return nil, nil
}

// Length is how many elements a list has.
func (f *File) Length(path ...string) int {
	node := f.Root
	for _, name := range path {
		if node == nil {
			return 0
		}
		node, _ = Child(node, name)
	}
	if list, ok := bare(node).(*ast.SequenceNode); ok {
		return len(list.Values)
	}
	return 0
}

// bare is a node without the anchor and the tags that are before it.
func bare(node ast.Node) ast.Node {
	for {
		switch n := node.(type) {
		case *ast.AnchorNode:
			node = n.Value
		case *ast.TagNode:
			node = n.Value
		default:
			return node
		}
	}
}

// firstToken is where a node begins, for a person: that of a mapping is its first key.
func firstToken(node ast.Node) *token.Token {
	node = bare(node)
	if m, ok := node.(ast.MapNode); ok {
		if i := m.MapRange(); i.Next() {
			return i.Key().GetToken()
		}
	}
	if node == nil {
		return nil
	}
	return node.GetToken()
}
