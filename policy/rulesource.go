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
		said := strings.TrimPrefix(decode.Error(), "toml: ")
		if found, ok := strings.CutPrefix(said, "cannot decode TOML "); ok { // and then Go types
			found, _, _ = strings.Cut(found, " ")
			said = fmt.Sprintf("%s cannot be of the type %s", strings.Join(decode.Key(), "."), found)
		}
		return s.errorf(syntax.Pos{Line: line, Col: column}, "", "%s", said)
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

// embedded is a query, which stands in the file as the value of a key, as it stands there:
// behind blanks, so that its lines and columns are those of the file, and with the
// file's lines for what is said of them. One that is written with escapes has its own, and
// its own name.
func (s source) embedded(query string) (name, padded, lines string) {
	from := s.find("rule", "query")
	lines = strings.ReplaceAll(string(s.text), "\r\n", "\n")
	query = strings.ReplaceAll(query, "\r\n", "\n")
	value := 0 // where that of the key begins
	for range from.Line - 1 {
		value += strings.IndexByte(lines[value:], '\n') + 1
	}
	at := strings.Index(lines[value:], query)
	if at < 0 {
		return s.name + ": query", query, query
	}
	before := lines[:value+at]
	first := before[strings.LastIndexByte(before, '\n')+1:]
	return s.name, strings.Repeat("\n", strings.Count(before, "\n")) + strings.Repeat(" ", utf8.RuneCountInString(first)) + query, lines
}

// quoting gives errors about the text in which a query was parsed the lines of another,
// which has it in the same place.
func quoting(lines string, err error) error {
	list := syntax.ErrorList(nil)
	errors.As(err, &list)
	for _, e := range list {
		e.Text = (&syntax.Query{Source: lines}).Errorf(e.Pos, "").Text
	}
	return err
}
