package policytest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/printer"
	"github.com/goccy/go-yaml/token"
	"github.com/imdsgate/imdsgate/policy"
)

// maxLine bounds a line: to take one apart takes the YAML library the square of its
// length.
const maxLine = 4 << 10

// Read reads a file of cases from the disk.
func Read(name string) (*File, error) {
	src, err := policy.ReadYAML(name)
	if err != nil {
		return nil, fmt.Errorf("read cases: %w", err)
	}
	return Parse(name, src)
}

// Parse reads a file of cases; name is for errors, which have line and caret. Keys that
// there are not are errors, and so is a case that expects nothing.
func Parse(name string, src []byte) (*File, error) {
	if len(src) > policy.MaxYAML {
		return nil, fmt.Errorf("%s: a file of cases has at most %d bytes", name, policy.MaxYAML)
	}
	number := 0
	for line := range bytes.Lines(src) {
		if number++; len(line) > maxLine {
			return nil, fmt.Errorf("%s:%d:%d: a line of more than %d bytes", name, number, maxLine, maxLine)
		}
	}
	if line, column, deep := policy.TooDeep(src); deep {
		return nil, fmt.Errorf("%s:%d:%d: more than %d lists or mappings within each other", name, line, column, policy.MaxDepth)
	}
	s := source{name: name}
	f := new(File)
	if err := s.decode(src, f); err != nil {
		return nil, err
	}
	f.Name, f.source = name, s
	if f.Policy != nil { // whose paths are from where it is written
		for _, paths := range [][]string{f.Policy.Rules.Paths, f.Policy.ProfilePaths} {
			for i, p := range paths {
				if !filepath.IsAbs(p) {
					paths[i] = filepath.Join(filepath.Dir(name), p)
				}
			}
		}
	}
	return f, f.check()
}

// source is a file of cases as it is written.
type source struct {
	name   string
	tokens token.Tokens
	file   *ast.File // nil if it is empty
}

// decode takes a panic of the YAML library for an error: it has some, with tags that no
// file of cases needs.
func (s *source) decode(src []byte, f *File) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: not understood as YAML: a tag (!) or anchor (&) where none belongs? (%v)", s.name, p)
		}
	}()
	s.tokens = lexer.Tokenize(string(src))
	if s.file, err = parser.Parse(s.tokens, 0); err != nil {
		return s.located(err)
	}
	err = yaml.NewDecoder(bytes.NewReader(src), yaml.Strict()).Decode(f)
	if err == nil || errors.Is(err, io.EOF) {
		return nil
	}
	return s.located(err)
}

// located prints an error with line and caret, without colours, and without what would
// do more to a terminal than to show itself. Where the YAML library does not know the
// place, it is the first value that the error quotes.
func (s *source) located(err error) error {
	known := yaml.Error(nil)
	if !errors.As(err, &known) || known.GetToken() == nil {
		i := slices.IndexFunc(s.tokens, func(t *token.Token) bool {
			return t.Value != "" && strings.Contains(err.Error(), strconv.Quote(t.Value))
		})
		if i < 0 {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		known = &yaml.SyntaxError{Message: err.Error(), Token: s.tokens[i]}
	}
	at := known.GetToken()
	var p printer.Printer
	excerpt := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\n' {
			return r
		}
		return unicode.ReplacementChar
	}, p.PrintErrorToken(at, false))
	return fmt.Errorf("%s:%d:%d: %s\n%s", s.name, at.Position.Line, at.Position.Column, known.GetMessage(), strings.TrimRight(excerpt, "\n"))
}

// place is the way to a value: keys and indices.
type place []any

func (p place) at(more ...any) place { return append(slices.Clip(p), more...) }

// token is where a value is, or the nearest that it is in.
func (s *source) token(p place) *token.Token {
	if s.file == nil || len(s.file.Docs) == 0 || s.file.Docs[0].Body == nil {
		return nil
	}
	node := s.file.Docs[0].Body
	for _, step := range p {
		next := child(node, step)
		if next == nil {
			break
		}
		node = next
	}
	if m, ok := node.(*ast.MappingNode); ok && len(m.Values) > 0 {
		return m.Values[0].Key.GetToken() // that of the mapping is a colon
	}
	return node.GetToken()
}

// child is a value of a mapping, by its key, or of a list, by its index; nil if it is
// not there.
func child(node ast.Node, step any) ast.Node {
	switch n := node.(type) {
	case *ast.AnchorNode:
		return child(n.Value, step)
	case *ast.MappingNode:
		for _, v := range n.Values {
			if key, ok := step.(string); ok && v.Key.GetToken().Value == key {
				return v.Value
			}
		}
	case *ast.SequenceNode:
		if i, ok := step.(int); ok && i < len(n.Values) {
			return n.Values[i]
		}
	}
	return nil
}

// line is where a value is; 0 if nobody knows.
func (s *source) line(p place) int {
	if t := s.token(p); t != nil {
		return t.Position.Line
	}
	return 0
}

// wrong is an error about a value.
func (s *source) wrong(p place, format string, args ...any) error {
	message := fmt.Sprintf(format, args...)
	if t := s.token(p); t != nil {
		return s.located(&yaml.SyntaxError{Message: message, Token: t})
	}
	return fmt.Errorf("%s: %s", s.name, message)
}

// named reads one of an enumeration's names. The library has encoding.TextUnmarshaler
// for that, which takes time by the size of the whole file for each.
func named[T ~uint8](to *T, what string, names []string, decode decoder) error {
	var text string
	if err := decode(&text); err != nil {
		return err
	}
	i := slices.Index(names, text)
	if i < 0 {
		return fmt.Errorf("unknown %s %q; there are %s", what, text, strings.Join(names, ", "))
	}
	*to = T(i)
	return nil
}

// decoder reads a value as the YAML library does.
type decoder = func(any) error

// UnmarshalYAML reads a verdict alone, or a mapping.
func (e *Expect) UnmarshalYAML(decode func(any) error) error {
	if kindOf(decode) == scalar {
		e.Verdict = new(Verdict)
		return decode(e.Verdict)
	}
	type plain Expect
	return decode((*plain)(e))
}

// UnmarshalYAML reads one name or a list.
func (n *Names) UnmarshalYAML(decode func(any) error) error {
	if kindOf(decode) == scalar {
		*n = Names{""}
		return decode(&(*n)[0])
	}
	*n = Names{} // an empty list is none, which is not the same as no list
	type plain Names
	return decode((*plain)(n))
}

// UnmarshalYAML reads true, false, or the names of rules.
func (a *Alert) UnmarshalYAML(decode func(any) error) error {
	if kindOf(decode) == truth {
		return decode(&a.Any)
	}
	return decode(&a.Rules)
}

// kind is what a value is in YAML.
type kind uint8

const (
	other kind = iota
	scalar
	truth
	list
)

func kindOf(decode decoder) kind {
	var node ast.Node
	if decode(&node) != nil {
		return other
	}
	switch node.(type) {
	case *ast.StringNode, *ast.LiteralNode, *ast.IntegerNode, *ast.FloatNode:
		return scalar
	case *ast.BoolNode:
		return truth
	case *ast.SequenceNode:
		return list
	}
	return other
}
