package eql_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// BenchmarkStream is a busy host: a stream of decoded events (see linuxEvents) to the
// sequence that the metadata service is watched with.
func BenchmarkStream(b *testing.B) {
	src, err := os.ReadFile("testdata/rules/imds.eql")
	if err != nil {
		b.Fatal(err)
	}
	q := compile(b, linux, string(src))
	m := q.NewMachine(0)
	stream(b, func(e eql.Event) int { return len(m.Observe(e)) })
}

// stream shows events to observe, as long as the benchmark runs. There are some
// hundred of them, which come again a second later: like those that were just decoded,
// they are in the processor's cache.
func stream(b *testing.B, observe func(eql.Event) int) {
	events := newRandom(1).linuxEvents(300, 100)
	matches, n := 0, 0
	b.ReportAllocs()
	for b.Loop() {
		e := events[n]
		e.at = e.at.Add(time.Second)
		matches += observe(e)
		if n++; n == len(events) {
			n = 0
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
	b.ReportMetric(float64(matches)/float64(b.N), "matches/op")
}

// BenchmarkRules is the same stream to many rules at once, sequences among them. The
// rules are as many and of the shapes as those that Elastic publishes for Linux; where
// IMDSGATE_RULES names a directory of rule files, theirs.
func BenchmarkRules(b *testing.B) {
	queries := manyRules(b)
	var stages []*eql.Stage
	var of []int // which query a stage is of
	for i, q := range queries {
		for _, s := range q.Stages() {
			stages, of = append(stages, s), append(of, i)
		}
	}
	machines := func() []*eql.Machine {
		all := make([]*eql.Machine, len(queries))
		for i, q := range queries {
			if q.IsSequence() {
				all[i] = q.NewMachine(0)
			}
		}
		return all
	}
	b.Run("together", func(b *testing.B) {
		m, all := eql.NewSet(stages...).NewMatcher(), machines()
		stream(b, func(e eql.Event) int {
			matches, last := 0, -1
			for _, s := range m.Match(e) {
				switch i := of[s]; {
				case all[i] == nil:
					matches++
				case i != last: // once for all of its stages
					matches += len(all[i].Observe(e))
					last = i
				}
			}
			return matches
		})
	})
	b.Run("in turn", func(b *testing.B) {
		all := machines()
		stream(b, func(e eql.Event) int {
			matches := 0
			for i, s := range stages {
				switch q := of[i]; {
				case all[q] == nil:
					if s.Match(e) {
						matches++
					}
				case i == 0 || of[i-1] != q:
					matches += len(all[q].Observe(e))
				}
			}
			return matches
		})
	})
	b.Run("compiled", func(b *testing.B) {
		for b.Loop() {
			eql.NewSet(stages...)
		}
	})
}

func manyRules(b *testing.B) []*eql.Query {
	dir := os.Getenv("IMDSGATE_RULES")
	var queries []*eql.Query
	if dir == "" {
		r := newRandom(2)
		for range 280 {
			queries = append(queries, compile(b, linux, r.rule()))
		}
		return queries
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.toml"))
	if err != nil {
		b.Fatal(err)
	}
	for _, file := range files {
		var f struct {
			Rule struct{ Type, Query string }
		}
		readTOML(b, file, &f)
		if f.Rule.Type != "eql" {
			continue
		}
		tree, err := syntax.Parse(file, f.Rule.Query)
		if err != nil {
			b.Fatal(err)
		}
		q, err := eql.Compile(tree, anyField{linux})
		if err != nil {
			b.Log(err)
			continue
		}
		queries = append(queries, q)
	}
	b.Log(len(queries), "rules")
	return queries
}

// anyField is a schema that has every field. Of those that it adds no event has a value.
type anyField struct{ schema }

func (s anyField) Field(name string) (eql.Field, bool) {
	if f, ok := s.schema[name]; ok {
		return f, true
	}
	return eql.Field{Name: name, Slot: s.schema["container.id"].Slot}, true
}
