package syntax_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// alike compares trees whatever the positions and the text they came from.
var alike = cmp.Options{
	cmpopts.IgnoreTypes(syntax.Pos{}),
	cmpopts.IgnoreFields(syntax.Query{}, "File", "Source"),
}

// TestGrammar decides the grammar: what is written, and its one canonical form.
func TestGrammar(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"process where true", "process where true"},
		{"  process\twhere\r\n true  ", "process where true"},
		{"any where false", "any where false"},
		{`"any" where null`, `"any" where null`},
		{`"dns-query" where true`, `"dns-query" where true`},
		{`"""net""" where true`, `net where true`},
		{`"where" where true`, `"where" where true`},

		// Precedence.
		{"a where b and c or d", "a where b and c or d"},
		{"a where (b and c) or d", "a where b and c or d"},
		{"a where b and (c or d)", "a where b and (c or d)"},
		{"a where b and c and d", "a where b and c and d"},
		{"a where b and (c and d)", "a where b and (c and d)"},
		{"a where (b and c) and d", "a where (b and c) and d"},
		{"a where not b == c", "a where not b == c"},
		{"a where not (b == c)", "a where not b == c"},
		{"a where (not b) == c", "a where (not b) == c"},
		{"a where not b and c", "a where not b and c"},
		{"a where not (b and c)", "a where not (b and c)"},
		{"a where not not b", "a where not not b"},
		{"a where (b == c) == d", "a where (b == c) == d"},
		{"a where b+c*d-e == 1", "a where b + c * d - e == 1"},
		{"a where (b+c)*d == 1", "a where (b + c) * d == 1"},
		{"a where b-(c-d) == 1", "a where b - (c - d) == 1"},
		{"a where b-c-d == 1", "a where b - c - d == 1"},
		{"a where b/c%d*e == 1", "a where b / c % d * e == 1"},
		{"a where -b + +c - -1 == -(d)", "a where -b + +c - -1 == -d"},
		{"a where -(b+c) < 1", "a where -(b + c) < 1"},
		{"a where b + c in (1)", "a where b + c in (1)"},
		{"a where (b + c) in (1)", "a where (b + c) in (1)"},
		{"a where -b in (1)", "a where -b in (1)"},
		{"a where b in (1) == true", "a where b in (1) == true"},
		{"a where not b in (1)", "a where not b in (1)"},
		{"a where b not in (1)", "a where b not in (1)"},
		{"a where b not in~ (1, c == d, (e))", "a where b not in~ (1, c == d, e)"},

		// Predicates. A list of one is the constant itself, but for in.
		{`a where b:"x"`, `a where b : "x"`},
		{`a where b : ("x")`, `a where b : "x"`},
		{`a where b : ("x","y")`, `a where b : ("x", "y")`},
		{`a where b like~ ("x", 1, null, true)`, `a where b like~ ("x", 1, null, true)`},
		{`a where b like "x" and c regex~("y") or d regex """\w+"""`, `a where b like "x" and c regex~ "y" or d regex "\\w+"`},
		{`a where (b : "x") : "y"`, `a where (b : "x") : "y"`},
		{`a where b : (/* none */ "x", // one
			"y" /* of /* these */ two */)`, `a where b : ("x", "y")`},

		// Names.
		{"a where b.c.d == null", "a where b.c.d == null"},
		{"a where @b . _c1 == 1", "a where @b._c1 == 1"},
		{"a where ?b.c == 1", "a where ?b.c == 1"},
		{"a where `b`.`c.d` == 1", "a where b.c.d == 1"},
		{"a where `b-c`.d.`until` == 1", "a where `b-c`.d.`until` == 1"},
		{"a where ?`b``c` == 1", "a where ?`b``c` == 1"},
		{"a where `b..c` == 1", "a where `b..c` == 1"},
		{"a where `.` == 1", "a where `.` == 1"},
		{"a where runs == head", "a where runs == head"},
		{"a where f()", "a where f()"},
		{"a where startsWith~ (b, concat(c, 1))", "a where startsWith~(b, concat(c, 1))"},

		// Numbers.
		{"a where 0 == 007", "a where 0 == 7"},
		{"a where 1. == .5", "a where 1.0 == 0.5"},
		{"a where 1e3 == 1.5E-7", "a where 1000.0 == 1.5e-07"},
		{"a where 9223372036854775807 == 9223372036854775808", "a where 9223372036854775807 == 9.223372036854776e+18"},

		// Strings.
		{`a where "" == "\b\t\n\f\r\"\'\\"`, `a where "" == "\b\t\n\f\r\"'\\"`},
		{`a where "\u{41}\u{1F511}\u{7f}\u{000000e9}" == "é"`, `a where "A🔑\u{7f}é" == "é"`},
		{`a where """C:\x\"y" """ == """"""`, `a where "C:\\x\\\"y\" " == ""`},
		{`a where """a"""" == """b"""""`, `a where "a\"" == "b\"\""`},
		{`a where """"a""" == "/*"`, `a where "\"a" == "/*"`},
		{"a where \"\t\u200b\" == \"//\"", `a where "\t\u{200b}" == "//"`},

		// Sequences.
		{"sequence [a where b] [c where d]", "sequence\n  [a where b]\n  [c where d]"},
		{"sequence by x, ?y.z with maxspan = 1s [a where b] by p [any where d] by ?q until [e where f] by r",
			"sequence by x, ?y.z with maxspan=1s\n  [a where b] by p\n  [any where d] by ?q\nuntil [e where f] by r"},
		{"sequence with maxspan=120s [a where b] with runs=3", "sequence with maxspan=2m\n  [a where b] with runs=3"},
		{"sequence with maxspan=1500ms [a where b] by k with runs=1 ![c where d] by k", "sequence with maxspan=1500ms\n  [a where b] by k\n  ![c where d] by k"},
		{"sequence by k[process where x] [a where b]", "sequence by k\n  [process where x]\n  [a where b]"},
		{"sequence with maxspan=48h [a where b] [a where b] | head 5 | tail 1", "sequence with maxspan=2d\n  [a where b]\n  [a where b]\n| head 5\n| tail 1"},
		{"sample by k [a where b] [c where d]", "sample by k\n  [a where b]\n  [c where d]"},
		{"sample [a where b] by k [c where d] by ?l", "sample\n  [a where b] by k\n  [c where d] by ?l"},
		{"a where b | head 0", "a where b | head 0"},
	} {
		q, err := syntax.Parse("", test.in)
		if err != nil {
			t.Errorf("%s\n%v", test.in, err)
			continue
		}
		got := syntax.Format(q)
		if got != test.want {
			t.Errorf("%s\n got %s\nwant %s", test.in, got, test.want)
		}
		roundTrip(t, q)
		syntax.Walk(q, func(n syntax.Node) bool {
			if part := syntax.Format(n); part == "" || !strings.Contains(got, part) {
				t.Errorf("%s\nhas a %T that prints as %q", got, n, part)
			}
			return true
		})
	}
}

func roundTrip(t *testing.T, q *syntax.Query) {
	t.Helper()
	printed := syntax.Format(q)
	again, err := syntax.Parse("", printed)
	if err != nil {
		t.Fatalf("what was printed does not parse:\n%s\n%v", printed, err)
	}
	if diff := cmp.Diff(q, again, alike); diff != "" {
		t.Fatalf("%s\nreads back otherwise:\n%s", printed, diff)
	}
	if twice := syntax.Format(again); twice != printed {
		t.Fatalf("not canonical:\n%s\n%s", printed, twice)
	}
}

// TestComplaints reads testdata/*.eql: queries separated by lines of dashes. A
// line that is wrong ends in //! and a part of the complaint it earns; two
// complaints have two marks.
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
		line int
		text string
	}
	var want []complaint
	var src strings.Builder
	for i, line := range strings.Split(chunk, "\n") {
		parts := strings.Split(line, "//!")
		src.WriteString(strings.TrimRight(parts[0], " ") + "\n")
		for _, text := range parts[1:] {
			want = append(want, complaint{i + 1, strings.TrimSpace(text)})
		}
	}
	_, err := syntax.Parse(file, src.String())
	var got syntax.ErrorList
	if err != nil && !errors.As(err, &got) {
		t.Fatalf("%s: error is a %T", file, err)
	}
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(got):
			t.Errorf("%s:%d: no complaint; want %s", file, first+want[i].line-1, want[i].text)
		case i >= len(want):
			t.Errorf("%s:%d: unexpected complaint: %v", file, first+got[i].Line-1, got[i])
		case got[i].Line != want[i].line || !strings.Contains(got[i].Error(), want[i].text):
			t.Errorf("%s:%d: want %s, got %v", file, first+want[i].line-1, want[i].text, got[i])
		}
	}
}

// TestErrorText shows errors whole.
func TestErrorText(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"process were true", `
q:1:9: expected where, found were; did you mean where?
	process were true
	        ^`},
		{"process where\n\tname = \"é\" and\n\tuser == 'root'", `
q:2:7: expected the end of the query, found =; equality is ==
		name = "é" and
		     ^
q:3:10: strings of this form are no longer a part of EQL; write double quotes
		user == 'root'
		        ^`},
		{"process where \"é\" : \"\x1b[31m\" in", `
q:1:29: expected the end of the query, found in
	process where "é" : "` + "\uFFFD" + `[31m" in
	                            ^`},
		{"process where " + strings.Repeat("a or ", 30) + ")" + strings.Repeat(" or b", 30), `
q:1:165: expected an expression, found )
	…a or a or a or a or a or a or a or a or a or a or a or a or a or a or ) or b or b or b or b or b or …
	                                                                       ^`},
	} {
		_, err := syntax.Parse("q", test.in)
		if err == nil {
			t.Errorf("%s: no error", test.in)
			continue
		}
		if got := "\n" + err.Error(); got != test.want {
			t.Errorf("got %s\nwant %s", got, test.want)
		}
	}
}

func TestRefusedIsNotWrong(t *testing.T) {
	for _, test := range []struct {
		in          string
		unsupported bool
	}{
		{"process where args[0] == 1", true},
		{"join [a where b] [c where d]", true},
		{"process where descendant of [a where b]", true},
		{"process where true | sort x", true},
		{"process where", false},
	} {
		_, err := syntax.Parse("", test.in)
		if err == nil || errors.Is(err, errors.ErrUnsupported) != test.unsupported {
			t.Errorf("%s: unsupported should be %v: %v", test.in, test.unsupported, err)
		}
	}
}

// TestBounds is what somebody would try who means harm.
func TestBounds(t *testing.T) {
	for name, src := range map[string]string{
		"parentheses": "a where " + strings.Repeat("(", 100_000),
		"not":         "a where " + strings.Repeat("not ", 100_000) + "b",
		"signs":       "a where " + strings.Repeat("-", 100_000) + "1 == 1",
		"calls":       "a where " + strings.Repeat("f(", 100_000),
		"sum":         "a where 1" + strings.Repeat("+1", 100_000) + " == 1",
		"size":        "a where b == \"" + strings.Repeat("x", 1<<20) + "\"",
		"quotes":      strings.Repeat("'", 100_000),
		"controls":    strings.Repeat("\x01", 100_000),
		"comments":    strings.Repeat("/*", 100_000),
		"utf-8":       "a where b == \"\xff\"",
	} {
		_, err := syntax.Parse("", src)
		if err == nil {
			t.Errorf("%s: no error", name)
		} else if n := len(err.Error()); n > 20_000 {
			t.Errorf("%s: an error of %d bytes", name, n)
		}
	}
	for name, src := range map[string]string{
		"chain": "a where b" + strings.Repeat(" or b", 100_000),
		"list":  "a where b in (1" + strings.Repeat(", 2", 100_000) + ")",
		"deep":  "a where " + strings.Repeat("(", 190) + "b" + strings.Repeat(")", 190),
	} {
		q, err := syntax.Parse("", src)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		nodes := 0
		syntax.Walk(q, func(syntax.Node) bool { nodes++; return true })
		if nodes < 3 {
			t.Errorf("%s: %d nodes", name, nodes)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, src := range []string{
		`sequence by h, ?p with maxspan=1s [process where a : ("x*", "y") and not b.c in~ (1, null)] by k [any where true] by ?l with runs=2 until [f where -1 + 2.5 >= x] by m | head 3`,
		"sample by `a-b` [\"x\" where f~(a, \"\"\"\\d\"\"\") ] [b where not /* n /* o */ */ c regex~ \"\\u{41}\"]",
		`process where (a == "b" or c != 1e9) and d not in (2) // e`,
	} {
		f.Add(src)
	}
	f.Fuzz(func(t *testing.T, src string) {
		q, err := syntax.Parse("fuzz", src)
		if err != nil {
			var list syntax.ErrorList
			if !errors.As(err, &list) || len(list) == 0 || err.Error() == "" {
				t.Fatalf("error %#v", err)
			}
			return
		}
		roundTrip(t, q)
	})
}
