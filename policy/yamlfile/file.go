// Package yamlfile reads what people write for this program in YAML: configurations,
// profiles and cases. It knows none of them; a Go type says which keys there are.
//
// A file may come from somebody who wants the reader to fail. The YAML library takes it
// apart into tokens and nodes, for which it calls itself and copies, and takes minutes or
// gigabytes for some files of a hundred kilobytes; so what it is given is bounded, and
// what the nodes mean is found out here, in one walk. What is wrong is told with its line
// and a caret, all in one go, and without what would do more to a terminal than to show
// itself.
package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds of a file, whoever wrote it.
const (
	// MaxSize is of its bytes. A thousand grants take a fifth of it.
	MaxSize = 1 << 20
	// maxDepth is of the levels that are in each other. No file has ten.
	maxDepth = 64
	// maxKeys is of one mapping: the library calls itself for each, and copies those
	// before it.
	maxKeys = 2000
	// maxEmpty is of the empty lines in a row: the library copies a text once for each
	// that is behind it. And of the tabs in a line: for each in quotes it looks for the end
	// of the blanks.
	maxEmpty = 100
	// maxValues is of all values, those that an alias stands for each time. A thousand
	// grants are a tenth of it.
	maxValues = 100_000
)

// File is a file as it is written.
type File struct {
	Name string
	Text []byte
	Root ast.Node // nil if it has no content

	lines []string
}

// Read reads the bytes of a file, and not many more than one may have.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadFrom(f)
}

// ReadFrom is Read of what is open already.
func ReadFrom(r io.Reader) ([]byte, error) { return io.ReadAll(io.LimitReader(r, MaxSize+1)) }

// Newlines has every line end with a newline. A carriage return alone ends one, too (YAML
// 1.2, section 5.4).
func Newlines(text []byte) []byte {
	return bytes.ReplaceAll(bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n")), []byte("\r"), []byte("\n"))
}

// Parse takes a file apart, whatever it says; name is for errors.
func Parse(name string, text []byte) (f *File, err error) {
	f = &File{Name: name, Text: text}
	if len(text) > MaxSize {
		return nil, f.whole(fmt.Errorf("more than %d bytes, which no file for imdsgate has: divide it", MaxSize))
	}
	defer func() {
		if p := recover(); p != nil { // of the library, which has some
			f, err = nil, f.whole(fmt.Errorf("not understood as YAML: a tag (!) or anchor (&) where none belongs? (%v)", p))
		}
	}()
	text = Newlines(text)
	f.lines = strings.Split(string(text), "\n")
	empty := 0
	for i, line := range f.lines {
		if empty++; strings.TrimSpace(line) != "" {
			empty = 0
		}
		if empty > maxEmpty {
			return nil, f.at(i+1, 1, fmt.Errorf("more than %d empty lines in a row: take some out", maxEmpty))
		}
		if strings.Count(line, "\t") > maxEmpty {
			return nil, f.at(i+1, 1, fmt.Errorf("more than %d tabs in a line: take some out", maxEmpty))
		}
	}
	tokens := lexer.Tokenize(string(text))
	if fault := f.bounded(tokens); fault != nil {
		return nil, fault
	}
	parsed, err := parser.Parse(tokens, 0)
	if known := yaml.Error(nil); errors.As(err, &known) && known.GetToken() != nil {
		return nil, f.At(known.GetToken(), errors.New(known.GetMessage()))
	}
	if err != nil {
		return nil, f.whole(err)
	}
	for _, doc := range parsed.Docs {
		if doc.Body == nil {
			continue
		}
		if f.Root != nil {
			return nil, f.At(firstToken(doc.Body), errors.New("a second document: everything after --- would be left out; put it into a file of its own"))
		}
		f.Root = doc.Body
	}
	return f, nil
}

// bounded says where tokens are in each other too deeply, or a mapping is too large.
func (f *File) bounded(tokens token.Tokens) error {
	type level struct {
		column, keys int
		list         bool
	}
	var blocks []level // that are not in brackets
	brackets, before := 0, 0
	for i, t := range tokens {
		switch t.Type {
		case token.AnchorType, token.TagType:
			before++ // of which the library takes each for one more level
		case token.CollectEntryType:
			before = 0
		case token.MappingStartType, token.SequenceStartType:
			brackets, before = brackets+1, 0
		case token.MappingEndType, token.SequenceEndType:
			brackets, before = max(brackets-1, 0), 0
		case token.MappingValueType, token.MappingKeyType, token.SequenceEntryType:
			if before++; brackets > 0 { // where only a comma is the end of it
				break
			}
			before = 0
			at := level{column: t.Position.Column, list: t.Type == token.SequenceEntryType}
			if t.Type == token.MappingValueType && i > 0 && tokens[i-1].Position.Line == t.Position.Line {
				at.column = tokens[i-1].Position.Column
			}
			n := len(blocks)
			for n > 0 && (blocks[n-1].column > at.column || blocks[n-1].column == at.column && blocks[n-1].list && !at.list) {
				n--
			}
			if blocks = blocks[:n]; n == 0 || blocks[n-1].column != at.column || blocks[n-1].list != at.list {
				blocks = append(blocks, at)
				n++
			}
			if blocks[n-1].keys++; blocks[n-1].keys > maxKeys && !at.list {
				return f.At(t, fmt.Errorf("more than %d keys in one mapping", maxKeys))
			}
		}
		if len(blocks)+brackets+before > maxDepth {
			return f.At(t, fmt.Errorf("more than %d levels are in each other", maxDepth))
		}
	}
	return nil
}
