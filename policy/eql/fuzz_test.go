package eql_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// FuzzQuery compiles anything and asks it about random events: in a batch and, if it
// can be asked so, inline.
func FuzzQuery(f *testing.F) {
	r := newRandom(3)
	for seed := range uint64(20) {
		f.Add("any where "+r.condition(3), seed)
		f.Add(r.query(), seed)
	}
	f.Add(`a where cidrMatch(ip, "10.0.0.0/8") and s regex~ "[^a-c]{1,3}\\d" or at > "2025-01-01" and -9223372036854775807 - n * 7 % d == 1 / m`, uint64(0))
	f.Fuzz(func(t *testing.T, src string, seed uint64) {
		tree, err := syntax.Parse("fuzz", src)
		var q *eql.Query
		if err == nil {
			q, err = eql.CompileBatch(tree, letters)
		}
		if err != nil {
			var list syntax.ErrorList
			if !errors.As(err, &list) || len(list) == 0 {
				t.Fatalf("error %#v", err)
			}
			return
		}
		events := newRandom(seed).events(10)
		found := search(q.NewBatch(0), events)
		few := q.NewBatch(4)
		search(few, events)
		if inline, err := eql.Compile(tree, letters); err == nil {
			if got := observe(inline.NewMachine(0), events); !slices.EqualFunc(got, found, slices.Equal) {
				t.Errorf("inline %s, in a batch %s", matchList(got), matchList(found))
			}
			m := inline.NewMachine(4)
			if observe(m, events); m.Pending() > 8 {
				t.Errorf("%d chains", m.Pending())
			}
		} else if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("not inline: %v", err)
		}
		strict, _ := q.WithoutExclusions(func(field string) bool { return field < "p" })
		search(strict.NewBatch(4), events)
		for _, e := range events {
			for i, s := range q.Stages() {
				all := !slices.ContainsFunc(s.Conjuncts(), func(c eql.Conjunct) bool { return !c.Match(e) })
				matches := s.Match(e)
				if _, any := s.Category(); any && matches != all {
					t.Errorf("the stage is %v, its conjuncts %v", matches, all)
				}
				if matches && !strict.Stages()[i].Match(e) {
					t.Error("it matches only with its exclusions")
				}
			}
		}
	})
}

// FuzzWildcard compares the compiled lists with the definition.
func FuzzWildcard(f *testing.F) {
	f.Add("*a*b?|x*|*y|*z*|q", "aXbc", true)
	f.Add("*é?*|É|**", "\xffé", false)
	f.Fuzz(func(t *testing.T, patterns, s string, fold bool) {
		if !utf8.ValidString(patterns) || !utf8.ValidString(s) || len(patterns)*len(s) > 10_000 {
			return
		}
		m := &syntax.Match{Op: syntax.Like, X: &syntax.Field{Name: "s"}}
		if fold {
			m.Op = syntax.LikeFold
		}
		want := false
		for _, p := range strings.Split(patterns, "|") {
			m.Patterns = append(m.Patterns, &syntax.Literal{Value: p})
			want = want || slowWildcard(p, s, fold)
		}
		q, err := eql.Compile(&syntax.Query{Body: &syntax.Event{Any: true, Where: m}}, letters)
		if err != nil {
			t.Fatal(err)
		}
		e := newEvent(letters, map[string][]any{"s": {s}})
		if got := q.Stages()[0].Match(e); got != want {
			t.Errorf("%q like %q is %v, want %v", s, patterns, got, want)
		}
	})
}

// FuzzRegex looks for patterns whose translation Go refuses, or reads otherwise.
func FuzzRegex(f *testing.F) {
	f.Add(`a+?[^\d]{2,3}|(x"*")*`, "aab", true)
	f.Add(`[]a-c\-]\W\S^$`, "]x", false)
	f.Fuzz(func(t *testing.T, pattern, s string, fold bool) {
		m := &syntax.Match{Op: syntax.Regex, X: &syntax.Field{Name: "s"}, Patterns: []*syntax.Literal{{Value: pattern}}}
		if fold {
			m.Op = syntax.RegexFold
		}
		q, err := eql.Compile(&syntax.Query{Body: &syntax.Event{Any: true, Where: m}}, letters)
		if err != nil {
			if strings.Contains(err.Error(), "cannot be used") && !strings.Contains(err.Error(), "repeat count") {
				t.Errorf("%q: %v", pattern, err)
			}
			return
		}
		match := q.Stages()[0].Match(newEvent(letters, map[string][]any{"s": {s}}))
		if !strings.ContainsAny(pattern, `.?*+{}[]()|"\`) && utf8.ValidString(pattern) && utf8.ValidString(s) {
			if want := s == pattern || fold && slowFold(s) == slowFold(pattern); match != want {
				t.Errorf("%q regex %q is %v", s, pattern, match)
			}
		}
	})
}

// TestBounds is what somebody would try who means harm and may write rules.
func TestBounds(t *testing.T) {
	var words strings.Builder
	for i := range 20_000 {
		if i > 0 {
			words.WriteString(", ")
		}
		words.WriteString(`"*` + strings.Repeat(string(rune('A'+i%50)), 10) + strings.Repeat(string(rune(0x4E00+i)), 5) + `*"`)
	}
	for name, src := range map[string]string{
		"chain":    "any where ok" + strings.Repeat(" or not ok", 50_000),
		"list":     "any where length(s) + n in (1" + strings.Repeat(", 1", 100_000) + ")",
		"names":    "any where ok" + strings.Repeat(" and ?gone.x", 50_000),
		"contains": "any where s : (" + words.String() + ")",
		"deep":     "any where " + strings.Repeat("not (ok and ", 90) + "ok" + strings.Repeat(")", 90),
		"constant": "any where " + strings.Repeat("true == (", 190) + "true" + strings.Repeat(")", 190) + " and ok",
		"in":       "any where " + strings.Repeat("true in (ok, ", 190) + "ok" + strings.Repeat(")", 190),
		"errors":   "any where gone == 1" + strings.Repeat(" or gone == 1", 5000),
		"stars":    `any where s regex "a` + strings.Repeat("*", 500) + `"`,
		"regex":    `any where s regex "` + strings.Repeat("(a", 1000) + `"`,
		"repeats":  `any where s regex "` + strings.Repeat("(", 50) + "a" + strings.Repeat("{20})", 50) + `"`,
	} {
		q, err := tryCompile(letters, name, src)
		if err == nil {
			q.Stages()[0].Match(newEvent(letters, map[string][]any{"s": {"AAAAAAAAAA"}, "n": {int64(1)}}))
		} else if n := len(err.Error()); n > 50_000 {
			t.Errorf("%s: an error of %d bytes", name, n)
		}
	}
}
