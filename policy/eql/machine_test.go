package eql_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// TestChains reads testdata/*.chains: a query, below it the events that come,
// each with its category, and "=>" with the numbers of those that make a match,
// matches in order, a dash for a missing one. A query that can be asked inline is,
// too.
func TestChains(t *testing.T) {
	files, err := filepath.Glob("testdata/*.chains")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var src string
		var events []*event
		for i, line := range strings.Split(string(data), "\n") {
			where := fmt.Sprintf("%s:%d", file, i+1)
			switch {
			case line == "", line[0] == '#':
			case line[0] == '\t':
				e, err := chainEvent(letters, len(events)+1, line)
				if err != nil {
					t.Fatalf("%s: %v", where, err)
				}
				events = append(events, e)
			case strings.HasPrefix(line, "=>"):
				want := strings.TrimSpace(line[2:])
				if got := matchList(search(compileBatch(t, letters, src).NewBatch(0), events)); got != want {
					t.Errorf("%s: %s\ngot  %s\nwant %s", where, src, got, want)
				}
				if q, err := tryCompile(letters, "", src); err == nil {
					if got := matchList(observe(q.NewMachine(0), events)); got != want {
						t.Errorf("%s: inline %s\ngot  %s\nwant %s", where, src, got, want)
					}
				} else if !errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("%s: %v", where, err)
				}
				events = nil
			default:
				src = line
			}
		}
	}
}

// chainEvent reads "category @milliseconds field=value field=value|value".
func chainEvent(s schema, id int, line string) (*event, error) {
	words := strings.Fields(line)
	plain := map[string][]any{"event.category": {words[0]}}
	at := time.Duration(id) * time.Millisecond
	for _, w := range words[1:] {
		if ms, ok := strings.CutPrefix(w, "@"); ok {
			n, err := strconv.Atoi(ms)
			if err != nil {
				return nil, err
			}
			at = time.Duration(n) * time.Millisecond
			continue
		}
		name, values, _ := strings.Cut(w, "=")
		for _, v := range strings.Split(values, "|") {
			p, err := parseValue(v, s[name].Type)
			if err != nil {
				return nil, err
			}
			plain[name] = append(plain[name], p)
		}
	}
	e := newEvent(s, plain)
	e.id, e.at = id, epoch.Add(at)
	return e, nil
}

var epoch = time.Date(2025, 2, 4, 0, 0, 0, 0, time.UTC)

func parseValue(v string, t eql.Type) (any, error) {
	switch t {
	case eql.Long:
		return strconv.ParseInt(v, 10, 64)
	case eql.Double:
		return strconv.ParseFloat(v, 64)
	case eql.Boolean:
		return strconv.ParseBool(v)
	}
	return convert(v, t)
}

// observe shows events to a machine, and at the end a time long after.
func observe(m *eql.Machine, events []*event) [][]int {
	var found [][]int
	for _, e := range events {
		found = append(found, numbers(m.Observe(e))...)
	}
	return append(found, numbers(m.Tick(epoch.AddDate(1, 0, 0)))...)
}

// search shows events to a batch.
func search(b *eql.Batch, events []*event) [][]int {
	var found [][]int
	for _, e := range events {
		if !b.Done() {
			found = append(found, numbers(b.Observe(e))...)
		}
	}
	return append(found, numbers(b.Close())...)
}

// numbers are the ids of the events that match, -1 for a missing one.
func numbers(matches []eql.Match) [][]int {
	var found [][]int
	for _, match := range matches {
		var ids []int
		for _, e := range match.Events {
			if e == nil {
				ids = append(ids, -1)
			} else {
				ids = append(ids, e.(*event).id)
			}
		}
		found = append(found, ids)
	}
	return found
}

func matchList(matches [][]int) string {
	var list []string
	for _, ids := range matches {
		list = append(list, strings.ReplaceAll(strings.Trim(fmt.Sprint(ids), "[]"), "-1", "-"))
	}
	return strings.Join(list, "; ")
}

// chain makes events of category a or b with increasing ids and times.
func chain(words ...string) []*event {
	events := make([]*event, len(words))
	for i, w := range words {
		e, err := chainEvent(letters, i+1, w)
		if err != nil {
			panic(err)
		}
		events[i] = e
	}
	return events
}

func TestMatchHasItsKey(t *testing.T) {
	m := compile(t, letters, `sequence by s, ?n, ip [a where true] by args [b where true] by t`).NewMachine(0)
	events := chain("a s=x ip=::ffff:10.0.0.1 args=p|q", "b s=x ip=10.0.0.1 t=q")
	m.Observe(events[0])
	found := m.Observe(events[1])
	if len(found) != 1 || fmt.Sprint(found[0].Key) != "[x  10.0.0.1 q]" {
		t.Fatalf("found %v", found)
	}
	if found := compile(t, letters, "a where true").NewMachine(0).Observe(events[0]); len(found) != 1 || found[0].Key != nil {
		t.Errorf("a single event matches as %v", found)
	}
}

func TestLimit(t *testing.T) {
	m := compile(t, letters, "sequence by n [a where true] [b where true]").NewMachine(3)
	var events []*event
	for i := range 10 {
		events = append(events, chain(fmt.Sprintf("a n=%d", i))...)
	}
	observe(m, events)
	if m.Pending() != 3 || m.Evicted() != 7 {
		t.Errorf("pending %d, evicted %d", m.Pending(), m.Evicted())
	}
	// The youngest three are still there.
	if got := observe(m, chain("b n=6", "b n=7", "b n=8", "b n=9")); len(got) != 3 || m.Pending() != 0 {
		t.Errorf("found %v, %d pending", got, m.Pending())
	}
	// A newer chain of the same key takes the place of the older and evicts none.
	observe(m, chain("a n=1", "a n=1", "a n=2", "a n=2", "a n=3", "a n=3"))
	if m.Pending() != 3 || m.Evicted() != 7 {
		t.Errorf("pending %d, evicted %d", m.Pending(), m.Evicted())
	}
}

// TestTick: that an event is missing at the end is known when the span is over,
// without another event.
func TestTick(t *testing.T) {
	q := compile(t, letters, "sequence by n with maxspan=10ms [a where true] ![b where true]")
	if !q.Late() || compile(t, letters, "sequence with maxspan=10ms ![a where true] [b where true]").Late() {
		t.Error("late is what ends in a missing event")
	}
	m := q.NewMachine(0)
	if got := observe(m, nil); got != nil {
		t.Errorf("found %v in nothing", got)
	}
	m = q.NewMachine(0)
	m.Observe(chain("a n=1 @0")[0])
	m.Observe(chain("a n=2 @5")[0])
	at := func(ms int) string {
		return matchList(numbers(m.Tick(epoch.Add(time.Duration(ms) * time.Millisecond))))
	}
	if m.Pending() != 2 || at(10) != "" || at(11) != "1 -" || at(11) != "" || m.Pending() != 1 || at(3) != "" || at(16) != "1 -" || m.Pending() != 0 {
		t.Errorf("pending %d", m.Pending())
	}

	// A chain, too, is over when its span is.
	m = compile(t, letters, "sequence with maxspan=10ms [a where true] [b where true]").NewMachine(0)
	m.Observe(chain("a @0")[0])
	if at(10); m.Pending() != 1 {
		t.Error("dropped too early")
	}
	if at(11); m.Pending() != 0 {
		t.Error("not dropped")
	}
}

// TestLimitOfMissing: what is kept for missing events is bounded like chains.
func TestLimitOfMissing(t *testing.T) {
	end := compile(t, letters, "sequence by n with maxspan=1s [a where true] ![b where true]").NewMachine(3)
	var events []*event
	for i := range 10 {
		events = append(events, chain(fmt.Sprintf("a n=%d @%d", i, i))...)
	}
	if got := observe(end, events); len(got) != 3 || end.Evicted() != 7 || end.Pending() != 0 {
		t.Errorf("found %v, evicted %d, pending %d", got, end.Evicted(), end.Pending())
	}

	// Of ten keys that were forbidden the youngest three still are. One that
	// comes again is young again.
	begin := compile(t, letters, "sequence by n with maxspan=1s ![b where true] [a where true]").NewMachine(3)
	events = nil
	for i := range 10 {
		events = append(events, chain(fmt.Sprintf("b n=%d @%d", i, i))...)
		if i > 0 {
			events = append(events, chain(fmt.Sprintf("b n=0 @%d", i))...)
		}
	}
	for i := range 10 {
		events = append(events, chain(fmt.Sprintf("a n=%d @20", i))...)
	}
	got := observe(begin, events)
	if len(got) != 7 || begin.Evicted() != 7 {
		t.Errorf("%d found, evicted %d", len(got), begin.Evicted())
	}
	if got := observe(begin, chain("b n=1 @100", "a n=1 @1101")); len(got) != 1 || begin.Evicted() != 7 {
		t.Errorf("after the span: found %v, evicted %d", got, begin.Evicted())
	}
}

// TestMissingAtOneTime: events without times are all at once, and in order.
func TestMissingAtOneTime(t *testing.T) {
	for src, want := range map[string]string{
		"sequence with maxspan=1s ![m where true] [a where true] ![m where true]": "- 1 -; - 3 -",
		"sequence with maxspan=1s [a where true] ![m where true]":                 "3 -",
		"sequence with maxspan=1s ![m where true] [a where true]":                 "- 1",
		"sequence with maxspan=1s [a where true] ![m where true] [a where true]":  "",
	} {
		events := chain("a", "m", "a")
		for _, e := range events {
			e.at = time.Time{}
		}
		if got := matchList(search(compileBatch(t, letters, src).NewBatch(0), events)); got != want {
			t.Errorf("%s: %s, want %s", src, got, want)
		}
	}
}

// TestBatch is what Done and the limit are for.
func TestBatch(t *testing.T) {
	b := compileBatch(t, letters, "a where true | head 2 | tail 1").NewBatch(0)
	for i, e := range chain("a", "b", "a") {
		if found := b.Observe(e); found != nil || b.Done() != (i == 2) {
			t.Errorf("event %d: found %v, done %v", i+1, found, b.Done())
		}
	}
	if got := matchList(numbers(b.Close())); got != "3" {
		t.Errorf("found %s", got)
	}
	sample := compileBatch(t, letters, "sample by n [a where true] [b where true]").NewBatch(2)
	if got := matchList(search(sample, chain("a n=1", "a n=2", "a n=3", "b n=2", "b n=3"))); got != "2 4; 3 5" || sample.Evicted() != 1 {
		t.Errorf("found %s, evicted %d", got, sample.Evicted())
	}
	sequence := compileBatch(t, letters, "sequence by n [a where true] [b where true] | head 9").NewBatch(1)
	if got := matchList(search(sequence, chain("a n=1", "a n=2", "b n=1", "b n=2"))); got != "2 4" || sequence.Evicted() != 1 {
		t.Errorf("found %s, evicted %d", got, sequence.Evicted())
	}
	for _, src := range []string{"a where true | head 1", "sample by n [a where true] [b where true]"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s has a machine", src)
				}
			}()
			compileBatch(t, letters, src).NewMachine(0)
		}()
	}
}

func TestAdvancedChainsCountOnce(t *testing.T) {
	m := compile(t, letters, "sequence by n [a where true] [b where true] [c where true]").NewMachine(2)
	// The chain of 1 began first and is given up first, though it has come further.
	got := observe(m, chain("a n=1", "b n=1", "a n=2", "a n=3", "c n=1", "b n=2", "c n=2"))
	if matchList(got) != "3 6 7" || m.Evicted() != 1 || m.Pending() != 1 {
		t.Errorf("found %v, evicted %d, pending %d", got, m.Evicted(), m.Pending())
	}
}

func TestExpiryIsNotEviction(t *testing.T) {
	m := compile(t, letters, "sequence by n with maxspan=10ms [a where true] [b where true]").NewMachine(100)
	for i := range 10_000 {
		m.Observe(chain(fmt.Sprintf("a n=%d @%d", i, i))[0])
		if m.Pending() > 11 {
			t.Fatalf("%d chains are pending within 10 ms", m.Pending())
		}
	}
	m.Observe(chain("z @100000")[0]) // any event will do
	if m.Pending() != 0 || m.Evicted() != 0 {
		t.Errorf("pending %d, evicted %d", m.Pending(), m.Evicted())
	}
}

// TestManyKeys: an event with more combinations of keys than there may be chains,
// as somebody may craft it, costs no more than the limit.
func TestManyKeys(t *testing.T) {
	m := compile(t, letters, "sequence by args, s [a where true] [b where true] until [c where true]").NewMachine(1000)
	many := make([]any, 100_000)
	for i := range many {
		many[i] = strconv.Itoa(i)
	}
	for _, category := range []string{"a", "b", "c", "a"} {
		m.Observe(newEvent(letters, map[string][]any{"event.category": {category}, "args": many, "s": many}))
	}
	if m.Pending() != 1000 || m.Evicted() == 0 {
		t.Errorf("pending %d, evicted %d", m.Pending(), m.Evicted())
	}
}

// TestManyValues: neither do two long arrays in one atom.
func TestManyValues(t *testing.T) {
	many := make([]any, 100_000)
	for i := range many {
		many[i] = strconv.Itoa(i)
	}
	e := newEvent(letters, map[string][]any{"args": many, "s": many})
	if compile(t, letters, `any where startsWith(args, concat(s, "x"))`).Stages()[0].Match(e) {
		t.Error("matches")
	}
	if !compile(t, letters, `any where length(args) == 5 and substring(args, 0) == "99999"`).Stages()[0].Match(e) {
		t.Error("the last of a long array is not found")
	}
}

func TestChainsAgainstSlow(t *testing.T) {
	r := newRandom(1)
	for range 4000 {
		src := r.query()
		tree, err := syntax.Parse("", src)
		if err != nil {
			t.Fatalf("%s\n%v", src, err)
		}
		q, err := eql.CompileBatch(tree, letters)
		if err != nil {
			t.Fatalf("%s\n%v", src, err)
		}
		events := r.events(25)
		want := slowSearch(letters, tree, events)
		if got := search(q.NewBatch(0), events); !slices.EqualFunc(got, want, slices.Equal) {
			t.Fatalf("%s\ngot  %s\nwant %s\n%s", src, matchList(got), matchList(want), describe(events))
		}
		if q, err := eql.Compile(tree, letters); err == nil {
			if got := observe(q.NewMachine(0), events); !slices.EqualFunc(got, want, slices.Equal) {
				t.Fatalf("inline %s\ngot  %s\nwant %s\n%s", src, matchList(got), matchList(want), describe(events))
			}
		}
	}
}

func TestConditionsAgainstSlow(t *testing.T) {
	r := newRandom(2)
	for range 4000 {
		src := "any where " + r.condition(3)
		tree, err := syntax.Parse("", src)
		if err != nil {
			t.Fatalf("%s\n%v", src, err)
		}
		q, err := eql.Compile(tree, letters)
		if err != nil {
			t.Fatalf("%s\n%v", src, err)
		}
		again, err := tryCompile(letters, "", syntax.Format(tree))
		if err != nil {
			t.Fatalf("%s\n%v", src, err)
		}
		for _, e := range r.events(15) {
			want := slowMatch(letters, tree.Body.(*syntax.Event), e)
			stage := q.Stages()[0]
			all := true
			for _, c := range stage.Conjuncts() {
				all = all && c.Match(e)
			}
			if got := stage.Match(e); got != want || all != want || again.Stages()[0].Match(e) != want {
				t.Fatalf("%s is %v, its conjuncts %v, want %v\n%s", src, got, all, want, describe([]*event{e}))
			}
		}
	}
}

// TestNeverIsNever: what earns the warning that it is never true is not.
func TestNeverIsNever(t *testing.T) {
	r := newRandom(5)
	warned := 0
	for range 4000 {
		src := "any where " + r.pick("", "not ") + "(" + r.atom() + ")"
		for r.IntN(2) == 0 {
			src += r.pick(" and ", " and not ") + r.pick("s == null", "s == \"a\"", "ok", "n > 1", "("+r.atom()+")")
		}
		q := compile(t, letters, src)
		if !slices.ContainsFunc(q.Warnings(), func(w *syntax.Error) bool { return strings.Contains(w.Msg, "never true") }) {
			continue
		}
		warned++
		for _, e := range r.events(15) {
			if q.Stages()[0].Match(e) {
				t.Fatalf("%s\n%v\n%s", src, q.Warnings(), describe([]*event{e}))
			}
		}
	}
	if warned < 100 {
		t.Errorf("only %d warnings", warned)
	}
}
