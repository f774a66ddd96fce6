package kql_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/imdsgate/imdsgate/policy/kql"
)

type schema map[string]eql.Field

func (s schema) Field(name string) (eql.Field, bool) { f, ok := s[name]; return f, ok }
func (s schema) Category() eql.Field                 { return s["event.category"] }
func (s schema) Names() iter.Seq[string]             { return maps.Keys(s) }

var fields = func() schema {
	s := schema{}
	for name, t := range map[string]eql.Type{
		"event.category": eql.Keyword, "process.name": eql.Keyword, "process.args": eql.Keyword, "process.parent.name": eql.Keyword,
		"process.pid": eql.Long, "load": eql.Double, "ip": eql.IP, "ok": eql.Boolean, "at": eql.Date,
	} {
		s[name] = eql.Field{Name: name, Type: t, Slot: len(s)}
	}
	return s
}()

// event has its values as JSON has them, and as package eql wants them.
type event struct {
	plain  map[string][]any
	values []eql.Value
}

func (e *event) Value(slot int) eql.Value { return e.values[slot] }
func (e *event) Time() time.Time          { return time.Time{} }

func newEvent(plain map[string][]any) (*event, error) {
	e := &event{plain, make([]eql.Value, len(fields))}
	for name, vs := range plain {
		f, ok := fields[name]
		if !ok {
			return nil, fmt.Errorf("no field %s", name)
		}
		var list []eql.Value
		for _, v := range vs {
			switch v := v.(type) {
			case float64:
				if f.Type == eql.Long {
					list = append(list, eql.Int(int64(v)))
				} else {
					list = append(list, eql.Float(v))
				}
			case bool:
				list = append(list, eql.Bool(v))
			case string:
				switch f.Type {
				case eql.IP:
					list = append(list, eql.Addr(netip.MustParseAddr(v)))
				case eql.Date:
					at, err := time.Parse(time.RFC3339, v)
					if err != nil {
						return nil, err
					}
					list = append(list, eql.Time(at))
				default:
					list = append(list, eql.String(v))
				}
			}
		}
		e.values[f.Slot] = eql.List(list...)
	}
	return e, nil
}

func parseEvent(text string) (*event, error) {
	var object map[string]any
	if err := json.Unmarshal([]byte(text), &object); err != nil {
		return nil, err
	}
	plain := map[string][]any{}
	for name, v := range object {
		if list, ok := v.([]any); ok {
			plain[name] = list
		} else {
			plain[name] = []any{v}
		}
	}
	return newEvent(plain)
}

func compile(file, src string) (*kql.Query, *eql.Query, error) {
	tree, err := kql.Parse(file, src)
	if err != nil {
		return nil, nil, err
	}
	q, err := translated(tree)
	return tree, q, err
}

func translated(q *kql.Query) (*eql.Query, error) {
	tree, err := kql.Translate(q, fields)
	if err != nil {
		return nil, err
	}
	return eql.Compile(tree, fields)
}

// TestTruth reads testdata/*.truth: a line "event" with the fields of an event, and
// lines "yes" and "no" with conditions that hold for it, or don't.
func TestTruth(t *testing.T) {
	files, err := filepath.Glob("testdata/*.truth")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var e *event
		for i, line := range strings.Split(string(data), "\n") {
			word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
			where := fmt.Sprintf("%s:%d", file, i+1)
			switch word {
			case "event":
				if e, err = parseEvent(rest); err != nil {
					t.Fatalf("%s: %v", where, err)
				}
			case "yes", "no":
				tree, q, err := compile("", rest)
				if err != nil {
					t.Errorf("%s: %v", where, err)
					continue
				}
				if got := q.Stages()[0].Match(e); got != (word == "yes") {
					t.Errorf("%s: %s is %v", where, strings.TrimSpace(rest), got)
				}
				if got := slow(tree.Where, "", e); got != (word == "yes") {
					t.Errorf("%s: %s is %v to the slow evaluator", where, strings.TrimSpace(rest), got)
				}
			case "", "#":
			default:
				t.Fatalf("%s: %q is not event, yes, no or #", where, word)
			}
		}
	}
}

// TestComplaints reads testdata/*.kql: conditions separated by lines of dashes. A
// line that is wrong ends in ##! and a part of the complaint it earns, one that
// deserves a warning in ##? and a part of that.
func TestComplaints(t *testing.T) {
	data, err := os.ReadFile("testdata/complaints.kql")
	if err != nil {
		t.Fatal(err)
	}
	first := 1
	for _, chunk := range strings.SplitAfter(string(data), "\n---\n") {
		complaints(t, first, strings.TrimSuffix(chunk, "---\n"))
		first += strings.Count(chunk, "\n")
	}
}

func complaints(t *testing.T, first int, chunk string) {
	t.Helper()
	var want []string
	var src strings.Builder
	warn := strings.Contains(chunk, "##?")
	for i, line := range strings.Split(chunk, "\n") {
		parts := strings.Split(strings.ReplaceAll(line, "##?", "##!"), "##!")
		src.WriteString(strings.TrimRight(parts[0], " ") + "\n")
		for _, text := range parts[1:] {
			want = append(want, fmt.Sprintf("%d:%s", i+1, strings.TrimSpace(text)))
		}
	}
	tree, q, err := compile("", src.String())
	var got syntax.ErrorList
	switch {
	case err == nil:
		got = append(tree.Warnings, q.Warnings()...)
	case !errors.As(err, &got):
		t.Fatalf("error is a %T", err)
	}
	if warn != (err == nil) {
		t.Errorf("line %d: %v", first, err)
	}
	if len(got) != len(want) {
		t.Errorf("line %d: %v\nwant %q", first, got, want)
		return
	}
	for i, e := range got {
		line, text, _ := strings.Cut(want[i], ":")
		if strconv.Itoa(e.Line) != line || !strings.Contains(e.Error(), text) {
			t.Errorf("line %d: want %s, got %v", first, want[i], e)
		}
	}
}

// TestCaret: an error has the place in the file, the line, and a caret.
func TestCaret(t *testing.T) {
	_, _, err := compile("rule.toml", "event.category:network and\n  process.pid:many")
	const want = "rule.toml:2:15: \"many\" is not a number, and process.pid is one\n\t  process.pid:many\n\t              ^"
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	_, _, err = compile("", "process.name:a and /dev/tcp")
	if !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v is not errors.ErrUnsupported", err)
	}
}

// TestGrammar decides the grammar: what is written, and its one canonical form.
func TestGrammar(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{`a:b`, `a: "b"`},
		{" a : b \n", `a: "b"`},
		{`a:"b c"`, `a: "b c"`},
		{`a: b  c `, `a: "b  c"`},
		{`"a b":c`, `"a b": "c"`},
		{`a:*`, `a: *`},
		{`a:b*c`, `a: b*c`},
		{`a: b c*d e`, `a: b\u0020c*d\u0020e`},
		{`a*b:"c*d"`, `a*b: "c*d"`},
		{`a:b\*c`, `a: "b*c"`},
		{`a:"b\"c\\d\e"`, `a: "b\"c\\d\\e"`},
		{`a:\(\)\{\}\:\<\>\"\\`, `a: "(){}:<>\"\\"`},
		{`a:\u00e9\t\and`, "a: \"é\tand\""},
		{`a:b or c:d and e:f`, `a: "b" or c: "d" and e: "f"`},
		{`(a:b or c:d) and e:f`, `(a: "b" or c: "d") and e: "f"`},
		{`a:b OR c:d AND NOT e:f`, `a: "b" or c: "d" and not e: "f"`},
		{`not a:b and c:d`, `not a: "b" and c: "d"`},
		{`not (a:b and c:d)`, `not (a: "b" and c: "d")`},
		{`not(a:b)`, `not a: "b"`},
		{`not not a:b`, `not not a: "b"`},
		{`a:b and (c:d and e:f)`, `a: "b" and (c: "d" and e: "f")`},
		{`a:(b)`, `a: "b"`},
		{`a:(b or c and not d)`, `a: ("b" or "c" and not "d")`},
		{`a:(b or (c or d*))`, `a: ("b" or ("c" or d*))`},
		{`a:(not b)`, `a: (not "b")`},
		{`a:orange`, `a: "orange"`},
		{`a > 1 and b>=2 and c< 3 and d <= 4`, `a > "1" and b >= "2" and c < "3" and d <= "4"`},
		{`a:{ b:c and d:{e > 1} }`, `a: { b: "c" and d: { e > "1" } }`},
		{`"or":"or"`, `"or": "or"`},
		{`\or:\or`, `"or": "or"`},
	} {
		q, err := kql.Parse("", test.in)
		if err != nil {
			t.Errorf("%s\n%v", test.in, err)
			continue
		}
		got := kql.Format(q.Where)
		if got != test.want {
			t.Errorf("%s\ngot  %s\nwant %s", test.in, got, test.want)
		}
		again, err := kql.Parse("", got)
		if err != nil {
			t.Errorf("%s\n%v", got, err)
			continue
		}
		if d := cmp.Diff(q.Where, again.Where, cmpopts.IgnoreTypes(syntax.Pos{})); d != "" {
			t.Errorf("%s\n%s", got, d)
		}
	}
}

// TestTranslation is what a condition is in EQL.
func TestTranslation(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{`event.category:network`, `network where true`},
		{`event.category:network and process.name:curl`, `network where process.name == "curl"`},
		{`process.name:curl and event.category:"network" and ok:true`, `network where process.name == "curl" and ok == true`},
		{`event.category:(network or process)`, `any where event.category in ("network", "process")`},
		{`not event.category:network`, `any where not event.category == "network"`},
		{`process.name:("a" or "b" or c* or *d)`, `any where process.name in ("a", "b") or process.name like ("c*", "*d")`},
		{`process.name:(a or (b and not c))`, `any where process.name == "b" and not process.name == "c" or process.name == "a"`},
		{`process.name:"a*"`, `any where process.name == "a*"`},
		{`process.name:*`, `any where process.name != null`},
		{`process.name:a?\**`, `any where process.name regex "a\\?\\*.*"`},
		{`process.pid:("80" or 443)`, `any where process.pid in (80, 443)`},
		{`ip:("10.0.0.0/8" or "::1")`, `any where ip in ("10.0.0.0/8", "::1")`},
		{`process.pid >= "1" and process.pid < 2.5`, `any where process.pid >= 1 and process.pid < 2.5`},
		{`process:{ name:a and parent:{ name:b } }`, `any where process.name == "a" and process.parent.name == "b"`},
		{`process.*name:a`, `any where process.name == "a" or process.parent.name == "a"`},
		{`proc*:8`, `any where process.args == "8" or process.name == "8" or process.parent.name == "8" or process.pid == 8`},
		{`file.path:/etc/*`, `any where ?file.path like "/etc/*"`},
	} {
		q, err := kql.Parse("", test.in)
		if err != nil {
			t.Errorf("%s\n%v", test.in, err)
			continue
		}
		tree, err := kql.Translate(q, fields)
		if err != nil {
			t.Errorf("%s\n%v", test.in, err)
			continue
		}
		if got := syntax.Format(tree); got != test.want {
			t.Errorf("%s\ngot  %s\nwant %s", test.in, got, test.want)
		}
	}
}

// slow is the definition: a walk over the tree for each event.
func slow(e kql.Expr, prefix string, ev *event) bool {
	switch e := e.(type) {
	case *kql.Logic:
		for _, x := range e.X {
			if slow(x, prefix, ev) == (e.Op == syntax.Or) {
				return e.Op == syntax.Or
			}
		}
		return e.Op == syntax.And
	case *kql.Not:
		return !slow(e.X, prefix, ev)
	case *kql.Nested:
		return slow(e.X, prefix+e.Field.Parts[0]+".", ev)
	case *kql.Is:
		return slowIs(e.Value, func(v *kql.Text) bool {
			return slowAny(prefix, e.Field, ev, func(t eql.Type, x any) bool { return slowEqual(t, x, v.Parts) })
		})
	case *kql.Range:
		return slowAny(prefix, e.Field, ev, func(t eql.Type, x any) bool { return slowWithin(t, x, e.Op, e.Value.Parts[0]) })
	}
	panic("unknown")
}

func slowIs(e kql.Expr, is func(*kql.Text) bool) bool {
	switch e := e.(type) {
	case *kql.Text:
		return is(e)
	case *kql.Not:
		return !slowIs(e.X, is)
	case *kql.Logic:
		for _, x := range e.X {
			if slowIs(x, is) == (e.Op == syntax.Or) {
				return e.Op == syntax.Or
			}
		}
		return e.Op == syntax.And
	}
	panic("unknown")
}

// slowAny tries all values of all fields of that name.
func slowAny(prefix string, name *kql.Text, ev *event, holds func(eql.Type, any) bool) bool {
	for field, values := range ev.plain {
		f := fields[field]
		if rest, ok := strings.CutPrefix(field, prefix); ok && slowGlob(rest, name.Parts) &&
			slices.ContainsFunc(values, func(v any) bool { return v != nil && holds(f.Type, v) }) {
			return true
		}
	}
	return false
}

func slowGlob(s string, parts []string) bool {
	if len(parts) == 1 {
		return s == parts[0]
	}
	rest, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	for i := range len(rest) + 1 {
		if slowGlob(rest[i:], parts[1:]) {
			return true
		}
	}
	return false
}

func slowEqual(t eql.Type, x any, parts []string) bool {
	if len(parts) > 1 && strings.Join(parts, "") == "" {
		return true
	}
	if t == eql.Keyword {
		return slowGlob(x.(string), parts)
	}
	if len(parts) > 1 {
		return false
	}
	switch x := x.(type) {
	case float64:
		n, err := strconv.ParseFloat(parts[0], 64)
		return err == nil && n == x
	case bool:
		return strconv.FormatBool(x) == parts[0]
	case string:
		if t != eql.IP {
			return false
		}
		if block, err := netip.ParsePrefix(parts[0]); err == nil {
			return block.Masked().Contains(netip.MustParseAddr(x).Unmap())
		}
		a, err := netip.ParseAddr(parts[0])
		return err == nil && a.Unmap() == netip.MustParseAddr(x).Unmap()
	}
	return false
}

func slowWithin(t eql.Type, x any, op syntax.Op, s string) bool {
	order := 0
	switch x := x.(type) {
	case float64:
		n, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return false
		}
		order = int(max(-1, min(1, (x-n)*1e300)))
	case string:
		switch t {
		case eql.Keyword:
			order = strings.Compare(x, s)
		case eql.Date:
			a, _ := time.Parse(time.RFC3339, x)
			for _, zone := range []string{"", "Z07:00", "Z0700", "Z07"} {
				for _, layout := range []string{"2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02T15", time.DateOnly, "2006-01", "2006"} {
					if b, err := time.Parse(layout+zone, s); err == nil && (zone == "" || strings.Contains(layout, "T")) {
						order = a.Compare(b)
					}
				}
			}
		default:
			return false
		}
	default:
		return false
	}
	switch op {
	case syntax.Lt:
		return order < 0
	case syntax.Le:
		return order <= 0
	case syntax.Gt:
		return order > 0
	}
	return order >= 0
}

// FuzzQuery compiles anything. What compiles agrees with the definition on a few
// events, and what parses is printed so that it parses to the same.
func FuzzQuery(f *testing.F) {
	for _, src := range []string{
		`event.category:network and not process.name:(curl or w* and not wget) and ip:"10.0.0.0/8"`,
		`process:{ args:(*x?y* or "-o") and pid > 10 } or *name:b\*c`,
		`(ok:true or at >= "2026-01-01") and load <= 1e3 and not process.name:*`,
		`process.args:"a\u00e9\"\\" or file.path:\(\and\)`,
		`a*:"0.0.0.0/0" or *:(80 or true)`, "a:((((((((b", "a:b c:d", `a:"`, "not not not", "a<b", ":", "a:{b:c",
	} {
		f.Add(src)
	}
	var events []*event
	for _, text := range []string{
		`{}`,
		`{"event.category": ["network", "x"], "process.name": "curl", "process.args": ["-o", "ax?yb"], "process.pid": 80, "ip": "10.1.2.3", "ok": true, "at": "2026-11-26T00:00:00Z", "load": 0.5}`,
		`{"process.name": ["b*c", ""], "process.parent.name": "b", "ip": ["::1", "::ffff:10.0.0.1"], "ok": false, "process.pid": [0, 11]}`,
	} {
		e, err := parseEvent(text)
		if err != nil {
			f.Fatal(err)
		}
		events = append(events, e)
	}
	f.Fuzz(func(t *testing.T, src string) {
		tree, err := kql.Parse("fuzz", src)
		if err != nil {
			var list syntax.ErrorList
			if !errors.As(err, &list) || len(list) == 0 {
				t.Fatalf("error %#v", err)
			}
			return
		}
		text := kql.Format(tree.Where)
		again, err := kql.Parse("", text)
		if err != nil {
			t.Fatalf("%s\n%v", text, err)
		}
		if d := cmp.Diff(tree.Where, again.Where, cmpopts.IgnoreTypes(syntax.Pos{})); d != "" {
			t.Fatalf("%s\n%s", text, d)
		}
		q, err := translated(tree)
		if err != nil {
			var list syntax.ErrorList
			if !errors.As(err, &list) || len(list) == 0 {
				t.Fatalf("error %#v", err)
			}
			return
		}
		for i, e := range events {
			if got, want := q.Stages()[0].Match(e), slow(tree.Where, "", e); got != want {
				t.Errorf("event %d: %v, want %v", i, got, want)
			}
		}
	})
}

// TestBounds is what somebody would try who means harm and may write rules.
func TestBounds(t *testing.T) {
	for name, src := range map[string]string{
		"parentheses": strings.Repeat("(", 1000) + "a:b" + strings.Repeat(")", 1000),
		"not":         strings.Repeat("not ", 1000) + "a:b",
		"group":       "a:" + strings.Repeat("(not ", 1000) + "b" + strings.Repeat(")", 1000),
		"nested":      strings.Repeat("a:{", 1000) + "b:c" + strings.Repeat("}", 1000),
		"long":        strings.Repeat("a:b or ", 200_000) + "a:b",
		"bytes":       "a:\xff",
	} {
		if _, err := kql.Parse(name, src); err == nil || len(err.Error()) > 1000 {
			t.Errorf("%s: %.200v", name, err)
		}
	}
	if _, _, err := compile("names", "*:a"+strings.Repeat(" or *:a", 10_000)); err == nil || !strings.Contains(err.Error(), "stand for more than") {
		t.Errorf("%.200v", err)
	}
	for name, src := range map[string]string{
		"list":  "process.name:(a" + strings.Repeat(" or b*c", 20_000) + ")",
		"chain": "process.name:a" + strings.Repeat(" and not ok:true", 20_000),
		"lines": "process.name:" + strings.Repeat("a\n", 100_000),
		"stars": "process.name:" + strings.Repeat("*a", 10_000),
	} {
		if _, _, err := compile(name, src); err != nil {
			t.Errorf("%s: %.200v", name, err)
		}
	}
}
