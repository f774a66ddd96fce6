package eql_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// schema maps names to fields; it has event.category in slot 0.
type schema map[string]eql.Field

func newSchema(types map[string]eql.Type) schema {
	s := schema{"event.category": {Name: "event.category", Type: eql.Keyword}}
	for _, name := range slices.Sorted(maps.Keys(types)) {
		if _, ok := s[name]; !ok {
			s[name] = eql.Field{Name: name, Type: types[name], Slot: len(s)}
			if strings.HasPrefix(name, "missing.") {
				s[name] = eql.Field{Name: name, Type: types[name], Slot: -1}
			}
		}
	}
	return s
}

func (s schema) Field(name string) (eql.Field, bool) { f, ok := s[name]; return f, ok }
func (s schema) Category() eql.Field                 { return s["event.category"] }
func (s schema) Names() iter.Seq[string]             { return maps.Keys(s) }

// letters is the schema of most tests. No event has the fields that begin with
// missing.
var letters = newSchema(map[string]eql.Type{
	"missing.there": eql.Keyword, "missing.port": eql.Long,
	"s": eql.Keyword, "t": eql.Keyword, "args": eql.Keyword, "process.name": eql.Keyword, "process.parent.name": eql.Keyword,
	"n": eql.Long, "m": eql.Long, "d": eql.Double, "ip": eql.IP, "ok": eql.Boolean, "at": eql.Date,
})

// event is an event for package eql and, as plain Go values, for the slow
// evaluator.
type event struct {
	id     int
	at     time.Time
	plain  map[string][]any // string, int64, float64, bool, netip.Addr or time.Time
	values []eql.Value
}

func (e *event) Value(slot int) eql.Value { return e.values[slot] }
func (e *event) Time() time.Time          { return e.at }

func newEvent(s schema, plain map[string][]any) *event {
	e := &event{plain: plain, values: make([]eql.Value, len(s))}
	for name, vs := range plain {
		f, ok := s[name]
		if !ok {
			panic("no field " + name)
		}
		values := make([]eql.Value, len(vs))
		for i, v := range vs {
			values[i] = value(v)
		}
		if len(values) == 1 {
			e.values[f.Slot] = values[0]
		} else {
			e.values[f.Slot] = eql.List(values...)
		}
	}
	return e
}

func value(v any) eql.Value {
	switch v := v.(type) {
	case string:
		return eql.String(v)
	case int64:
		return eql.Int(v)
	case float64:
		return eql.Float(v)
	case bool:
		return eql.Bool(v)
	case netip.Addr:
		return eql.Addr(v)
	case time.Time:
		return eql.Time(v)
	}
	panic(fmt.Sprintf("no value of type %T", v))
}

// parseEvent reads a JSON object with nested or dotted names.
func parseEvent(s schema, text []byte) (*event, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var object map[string]any
	if err := d.Decode(&object); err != nil {
		return nil, err
	}
	plain := map[string][]any{}
	if err := flatten(s, "", object, plain); err != nil {
		return nil, err
	}
	return newEvent(s, plain), nil
}

func flatten(s schema, prefix string, object map[string]any, plain map[string][]any) error {
	for name, v := range object {
		name = prefix + name
		if sub, ok := v.(map[string]any); ok {
			if err := flatten(s, name+".", sub, plain); err != nil {
				return err
			}
			continue
		}
		list, ok := v.([]any)
		if !ok {
			list = []any{v}
		}
		f, ok := s[name]
		if !ok {
			return fmt.Errorf("no field %s", name)
		}
		for _, v := range list {
			if v == nil {
				continue
			}
			p, err := convert(v, f.Type)
			if err != nil {
				return fmt.Errorf("field %s: %w", name, err)
			}
			plain[name] = append(plain[name], p)
		}
	}
	return nil
}

func convert(v any, t eql.Type) (any, error) {
	switch v := v.(type) {
	case json.Number:
		if t == eql.Double {
			return v.Float64()
		}
		return v.Int64()
	case string:
		switch t {
		case eql.IP:
			return netip.ParseAddr(v)
		case eql.Date:
			return time.Parse(time.RFC3339Nano, v)
		}
	}
	return v, nil
}

func compile(t testing.TB, s eql.Schema, src string) *eql.Query {
	t.Helper()
	q, err := tryCompile(s, "", src)
	if err != nil {
		t.Fatalf("%s\n%v", src, err)
	}
	return q
}

func compileBatch(t testing.TB, s eql.Schema, src string) *eql.Query {
	t.Helper()
	tree, err := syntax.Parse("", src)
	if err != nil {
		t.Fatalf("%s\n%v", src, err)
	}
	q, err := eql.CompileBatch(tree, s)
	if err != nil {
		t.Fatalf("%s\n%v", src, err)
	}
	return q
}

func tryCompile(s eql.Schema, name, src string) (*eql.Query, error) {
	tree, err := syntax.Parse(name, src)
	if err != nil {
		return nil, err
	}
	return eql.Compile(tree, s)
}

// TestTruth reads testdata/*.truth: a line "event" with the fields of an event,
// and lines "yes" and "no" with conditions that hold for it, or don't.
func TestTruth(t *testing.T) {
	files, err := filepath.Glob("testdata/*.truth")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
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
					if e, err = parseEvent(letters, []byte(rest)); err != nil {
						t.Fatalf("%s: %v", where, err)
					}
				case "yes", "no":
					truth(t, where, e, strings.TrimSpace(rest), word == "yes")
				case "", "#":
				default:
					t.Fatalf("%s: %q is not event, yes, no or #", where, word)
				}
			}
		})
	}
}

func truth(t *testing.T, where string, e *event, condition string, want bool) {
	t.Helper()
	tree, err := syntax.Parse("", "any where "+condition)
	if err != nil {
		t.Errorf("%s: %v", where, err)
		return
	}
	q, err := eql.Compile(tree, letters)
	if err != nil {
		t.Errorf("%s: %v", where, err)
		return
	}
	if got := q.Stages()[0].Match(e); got != want {
		t.Errorf("%s: %s is %v", where, condition, got)
	}
	if strings.Contains(where, "regex.truth") {
		return // Lucene's expressions, which the slow evaluator does not translate
	}
	if got := slowMatch(letters, tree.Body.(*syntax.Event), e); got != want {
		t.Errorf("%s: %s is %v to the slow evaluator", where, condition, got)
	}
}

// TestComplaints reads testdata/*.eql: queries separated by lines of dashes. A
// line that is wrong ends in //! and a part of the complaint it earns, one that
// deserves a warning in //? and a part of that.
func TestComplaints(t *testing.T) {
	files, err := filepath.Glob("testdata/*.eql")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			line := 1
			for _, chunk := range strings.SplitAfter(string(data), "\n---\n") {
				complaints(t, file, line, strings.TrimSuffix(chunk, "---\n"))
				line += strings.Count(chunk, "\n")
			}
		})
	}
}

func complaints(t *testing.T, file string, first int, chunk string) {
	t.Helper()
	type complaint struct {
		line    int
		warning bool
		text    string
	}
	var want []complaint
	var src strings.Builder
	for i, line := range strings.Split(chunk, "\n") {
		parts := strings.Split(strings.ReplaceAll(line, "//?", "//!?"), "//!")
		src.WriteString(strings.TrimRight(parts[0], " ") + "\n")
		for _, text := range parts[1:] {
			text, warning := strings.CutPrefix(text, "?")
			want = append(want, complaint{i + 1, warning, strings.TrimSpace(text)})
		}
	}
	q, err := tryCompile(letters, file, src.String())
	var got syntax.ErrorList
	if err == nil {
		got = q.Warnings()
	} else if !errors.As(err, &got) {
		t.Fatalf("%s: error is a %T", file, err)
	}
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(got):
			t.Errorf("%s:%d: no complaint; want %s", file, first+want[i].line-1, want[i].text)
		case i >= len(want):
			t.Errorf("%s:%d: unexpected complaint: %v", file, first+got[i].Line-1, got[i])
		case got[i].Line != want[i].line || !strings.Contains(got[i].Error(), want[i].text) || want[i].warning != (err == nil):
			t.Errorf("%s:%d: want %s, got %v", file, first+want[i].line-1, want[i].text, got[i])
		}
	}
}

func TestBatchIsRefusedAsUnsupported(t *testing.T) {
	for _, test := range []struct {
		src         string
		unsupported bool
	}{
		{"sample by s [a where ok] [b where ok]", true},
		{"any where ok | head 3", true},
		{"sample by s [a where okay] [b where ok]", false},
		{"any where okay | head 3", false},
	} {
		_, err := tryCompile(letters, "", test.src)
		if err == nil || errors.Is(err, errors.ErrUnsupported) != test.unsupported {
			t.Errorf("%s: unsupported should be %v: %v", test.src, test.unsupported, err)
		}
	}
}

func TestErrorText(t *testing.T) {
	_, err := tryCompile(letters, "curl.eql", "process where wildcrad(proces.name) or\n\tstartWith(s, \"é\", 1) and length(n) > 0")
	want := `
curl.eql:1:15: unknown function wildcrad
	process where wildcrad(proces.name) or
	              ^
curl.eql:1:24: unknown field proces.name; did you mean process.name?
	process where wildcrad(proces.name) or
	                       ^
curl.eql:2:2: unknown function startWith; did you mean startsWith?
		startWith(s, "é", 1) and length(n) > 0
		^
curl.eql:2:34: argument 1 of length must be a string; n is an integer
		startWith(s, "é", 1) and length(n) > 0
		                                ^`
	if got := "\n" + err.Error(); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestStages(t *testing.T) {
	q := compile(t, letters, `sequence by s, ?gone with maxspan=90s
		[process where n > 1 and (ok and (d < 1 and not (t == "x" and m == 1)))] by process.name
		[any where ?none == "x" or args : "y*"] by t with runs=2
		until ["odd one" where true] by t`)
	if !q.IsSequence() || q.MaxSpan() != 90*time.Second || len(q.Warnings()) != 2 {
		t.Errorf("sequence %v, span %v, warnings %v", q.IsSequence(), q.MaxSpan(), q.Warnings())
	}
	var got []string
	for _, s := range append(q.Stages(), q.Until()) {
		name, any := s.Category()
		line := fmt.Sprintf("%q %v:", name, any)
		for _, f := range s.Fields() {
			line += " " + f.Name
		}
		got = append(got, line)
		for _, c := range s.Conjuncts() {
			got = append(got, fmt.Sprintf("%v %s", c.Pos, c.Text))
		}
	}
	want := []string{
		`"process" false: d m n ok process.name s t`,
		`2:18 n > 1`, `2:29 ok`, `2:37 d < 1`, `2:47 not (t == "x" and m == 1)`,
		`"" true: args s t`,
		`3:14 ?none == "x" or args : "y*"`,
		`"odd one" false: s t`,
		`4:26 true`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if q := compile(t, letters, "any where ok"); q.IsSequence() || q.MaxSpan() != 0 || q.Until() != nil || len(q.Stages()) != 1 {
		t.Error("a condition is not a sequence")
	}
}

func TestConjunctsTellWhichPartFails(t *testing.T) {
	e, err := parseEvent(letters, []byte(`{"event.category": "process", "process.name": "curl", "n": 2}`))
	if err != nil {
		t.Fatal(err)
	}
	stage := compile(t, letters, `process where process.name : ("curl", "wget") and n > 2 and s == null`).Stages()[0]
	var got []bool
	for _, c := range stage.Conjuncts() {
		got = append(got, c.Match(e))
	}
	if !slices.Equal(got, []bool{true, false, true}) || stage.Match(e) {
		t.Errorf("conjuncts %v, stage %v", got, stage.Match(e))
	}
}

func TestCategory(t *testing.T) {
	for _, test := range []struct {
		query, event string
		want         bool
	}{
		{"process where true", `{"event.category": "process"}`, true},
		{"process where true", `{"event.category": ["network", "process"]}`, true},
		{"process where true", `{"event.category": "Process"}`, false},
		{"process where true", `{"event.category": "processes"}`, false},
		{"process where true", `{}`, false},
		{`"process" where true`, `{"event.category": "process"}`, true},
		{"any where true", `{}`, true},
		{"any where true", `{"event.category": "x"}`, true},
		{`"any" where true`, `{"event.category": "x"}`, false},
		{`"any" where true`, `{"event.category": "any"}`, true},
		{"any where false", `{}`, false},
	} {
		e, err := parseEvent(letters, []byte(test.event))
		if err != nil {
			t.Fatal(err)
		}
		if got := compile(t, letters, test.query).Stages()[0].Match(e); got != test.want {
			t.Errorf("%s: %s is %v", test.event, test.query, got)
		}
	}
}

// TestMisfitValues: a value of another type than its field's is none.
func TestMisfitValues(t *testing.T) {
	e := newEvent(letters, nil)
	for _, v := range []eql.Value{{}, eql.Bool(true), eql.List(eql.List(eql.Int(1))), eql.Addr(netip.Addr{}), eql.Time(time.Time{}), eql.Strings(nil), eql.List()} {
		e.values[letters["s"].Slot], e.values[letters["n"].Slot], e.values[letters["ip"].Slot], e.values[letters["at"].Slot] = v, v, v, v
		for _, none := range []string{"s == null", "n == null", "ip == null", "at == null", "length(s) == null", "n + 1 == null", `s != ""`, "not n >= 0"} {
			if !compile(t, letters, "any where "+none).Stages()[0].Match(e) {
				t.Errorf("%v: %s does not hold", v, none)
			}
		}
	}
	e.values[letters["d"].Slot] = eql.Int(2)
	if !compile(t, letters, "any where d == 2.0 and d > 1 and d + 0.5 == 2.5").Stages()[0].Match(e) {
		t.Error("a double may be an integer")
	}
	if s := fmt.Sprint(eql.List(eql.Int(1), eql.Bool(false)), eql.Strings([]string{"a", "b"}), eql.Value{}); s != "1, false a, b " {
		t.Errorf("values print as %q", s)
	}
	e.values[letters["args"].Slot] = eql.Strings([]string{"a", "b"})
	if !compile(t, letters, `any where args == "b" and length(args) == 1 and args != "c" and args != null`).Stages()[0].Match(e) {
		t.Error("strings are several values")
	}
}

func TestWithoutExclusions(t *testing.T) {
	chosen := func(field string) bool { return field == "s" || field == "args" }
	for _, test := range []struct {
		src  string
		want []string
	}{
		{`any where ok and not s : "x*"`, []string{`0 1:18 not s : "x*" [s]`}},
		{`any where ok and (n > 1 and (s != "x" and t != "y"))`, []string{`0 1:30 s != "x" [s]`}},
		{`any where s != null and args not in ("a") and s == null and t not in ("x")`, []string{`0 1:11 s != null [s]`, `0 1:25 args not in ("a") [args]`}},
		{`any where not (ok or s == "x" or args == "y" or s == "z")`, []string{`0 1:11 not (ok or s == "x" or args == "y" or s == "z") [s args]`}},
		{`any where ok or not s == "x"`, nil},
		{`any where not t == "x" and s == "y"`, nil},
		{`sequence by s [a where not s == "x"] [b where s == "y" and not startsWith(t, args)] until [c where not args == "z"]`,
			[]string{`0 1:24 not s == "x" [s]`, `1 1:60 not startsWith(t, args) [args]`, `2 1:92 until [c where not args == "z"] [args]`}},
		{`sequence with maxspan=1s ![m where s == "x"] [a where s == "x" and not s == "y"] ![n where ok] with runs=2`,
			[]string{`0 1:28 ![m where s == "x"] [s]`, `1 1:68 not s == "y" [s]`}},
		{`sequence [a where not s == "x"] with runs=3 until [c where ok]`, []string{`0 1:19 not s == "x" [s]`}},
	} {
		q := compile(t, letters, test.src)
		strict, out := q.WithoutExclusions(chosen)
		var got []string
		for _, x := range out {
			got = append(got, fmt.Sprintf("%d %v %s %v", x.Stage, x.Pos, x.Text, x.Fields))
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: removed %q, want %q", test.src, got, test.want)
		}
		if len(strict.Stages()) != len(q.Stages()) {
			t.Errorf("%s: %d stages", test.src, len(strict.Stages()))
		}
	}

	q := compile(t, letters, `sequence [a where s == "x" and not s == "y"] with runs=2 until [b where s == "z"]`)
	strict, _ := q.WithoutExclusions(chosen)
	a := newEvent(letters, map[string][]any{"event.category": {"a"}, "s": {"x", "y"}})
	b := newEvent(letters, map[string][]any{"event.category": {"b"}, "s": {"z"}})
	for _, test := range []struct {
		query *eql.Query
		want  int
	}{{q, 0}, {strict, 1}} {
		m := test.query.NewMachine(0)
		n := 0
		for _, e := range []*event{a, b, a} {
			n += len(m.Observe(e))
		}
		if n != test.want {
			t.Errorf("%d matches, want %d", n, test.want)
		}
	}

	q = compile(t, letters, `sequence with maxspan=1s [a where true] ![b where s == "z"] [a where true]`)
	strict, _ = q.WithoutExclusions(chosen)
	if m := q.NewMachine(0); len(m.Observe(a))+len(m.Observe(b))+len(m.Observe(a)) != 0 {
		t.Error("what came in between does not matter")
	}
	if m := strict.NewMachine(0); len(m.Observe(a))+len(m.Observe(b))+len(m.Observe(a)) != 1 {
		t.Error("what the caller can bring about excuses him")
	}
}

// TestConcurrentUse is for the race detector: a query is shared, its machines are
// not.
func TestConcurrentUse(t *testing.T) {
	q := compile(t, letters, `sequence by s [any where length(concat(s, t)) > 1 and s regex "a+"] [any where args : ("*b*", "?")]`)
	e := newEvent(letters, map[string][]any{"s": {"a", "aa"}, "t": {"b"}, "args": {"xbx"}})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			m := q.NewMachine(0)
			n := 0
			for range 100 {
				n += len(m.Observe(e))
			}
			if n != 2*99 {
				t.Errorf("%d matches", n)
			}
		})
	}
	wg.Wait()
}
