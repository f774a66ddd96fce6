package policy

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// source is the text of a rule file, for errors that have its name, line and column,
// and the line with a caret.
type source struct {
	name string
	text []byte
}

// decode reads the file, whatever other tables and keys it has.
func (s source) decode(f *file) error {
	err := toml.Unmarshal(s.text, f)
	if decode := (*toml.DecodeError)(nil); errors.As(err, &decode) {
		line, column := decode.Position()
		return s.errorf(syntax.Pos{Line: line, Col: column}, "", "%s", strings.TrimPrefix(decode.Error(), "toml: "))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}

func (s source) errorf(at syntax.Pos, hint, format string, args ...any) *syntax.Error {
	e := (&syntax.Query{File: s.name, Source: string(s.text)}).Errorf(at, format, args...)
	e.Hint = hint
	return e
}

// at complains about the value of a key, or about the file where it has none.
func (s source) at(table, key, hint, format string, args ...any) *syntax.Error {
	return s.errorf(s.find(table, key), hint, format, args...)
}

// refuse is at, for what the file may ask for and is not done here.
func (s source) refuse(table, key, hint, format string, args ...any) *syntax.Error {
	e := s.at(table, key, hint, format, args...)
	e.Err = errors.ErrUnsupported
	return e
}

// find is where the value of a key is, or else where its table begins.
func (s source) find(table, key string) syntax.Pos {
	at := syntax.Pos{Line: 1, Col: 1}
	var p unstable.Parser
	p.Reset(s.text)
	inside := ""
	for p.NextExpression() {
		e := p.Expression()
		var names []string
		begin := unstable.Range{}
		for keys := e.Key(); keys.Next(); {
			if len(names) == 0 {
				begin = keys.Node().Raw
			}
			names = append(names, string(keys.Node().Data))
		}
		name := strings.Join(names, ".")
		if e.Kind == unstable.KeyValue {
			if inside != "" {
				name = inside + "." + name
			}
			if name == table+"."+key {
				if v := e.Value().Raw; v.Length > 0 {
					begin = v
				}
				return s.position(int(begin.Offset))
			}
			continue
		}
		if inside = name; name == table {
			at = s.position(int(begin.Offset))
		}
	}
	return at
}

func (s source) position(offset int) syntax.Pos {
	before := string(s.text[:offset])
	start := strings.LastIndexByte(before, '\n') + 1
	return syntax.Pos{Line: strings.Count(before, "\n") + 1, Col: utf8.RuneCountInString(before[start:]) + 1}
}

// relocate moves the errors of a query, which stands in the file as the value of a
// key, to where it stands. One that is written with escapes keeps its own lines.
func (s source) relocate(query string, list syntax.ErrorList) {
	if len(list) == 0 {
		return
	}
	from := s.find("rule", "query")
	lines := strings.SplitAfter(strings.ReplaceAll(string(s.text), "\r\n", "\n"), "\n")
	file := strings.Join(lines[from.Line-1:], "")
	query = strings.ReplaceAll(query, "\r\n", "\n")
	key := len(string([]rune(lines[from.Line-1])[:from.Col-1])) // before the value
	at := strings.Index(file[key:], query)
	if at < 0 {
		return
	}
	at += key
	above := from.Line - 1 + strings.Count(file[:at], "\n")
	before := file[strings.LastIndexByte(file[:at], '\n')+1 : at] // on the query's first line
	for _, e := range list {
		if e.Line == 1 {
			e.Col += utf8.RuneCountInString(before)
			e.Text = strings.TrimRight(lines[above], "\n")
		}
		e.Line += above
	}
}

// errorList is the faults in err, which come with their places.
func errorList(err error) syntax.ErrorList {
	list := syntax.ErrorList(nil)
	errors.As(err, &list)
	return list
}
