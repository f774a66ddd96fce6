package eql_test

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/imdsgate/imdsgate/test/shared"
)

// The reference is an evaluator that was written in Python, apart from this
// package. It knows no samples, addresses or dates.
//
// What comparing with it, and with the definition in slow_test.go, has found, and
// is mended: a pattern in parentheses of its own was accepted; an event whose key
// has a value twice completed a sequence of one event and a missing one twice; keys
// of 1 and 1.0 were different.

// askReference runs a Python program, which reads in from its standard input and
// prints what goes into out. refeql is imported.
func askReference(t *testing.T, program string, in, out any) {
	t.Helper()
	text, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	python := exec.Command("python3", "-c", "import json, sys\nsys.path.insert(0, sys.argv[1])\nimport refeql\n"+program, filepath.Join(shared.Dir(t), "eql"))
	var answer, complaints bytes.Buffer
	python.Stdin, python.Stdout, python.Stderr = bytes.NewReader(text), &answer, &complaints
	if err := python.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &complaints)
	}
	if err := json.Unmarshal(answer.Bytes(), out); err != nil {
		t.Fatal(err)
	}
}

func TestAgainstReference(t *testing.T) {
	const cases = 1500
	type asked struct {
		Query  string           `json:"query"`
		Events []map[string]any `json:"events"`
	}
	r := newRandom(4)
	r.untyped = true
	var in []asked
	var trees []*syntax.Query
	var all [][]*event
	for len(in) < cases {
		tree, err := syntax.Parse("", r.query())
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := tree.Body.(*syntax.Sample); ok {
			continue
		}
		events := r.events(20)
		trees, all = append(trees, tree), append(all, events)
		in = append(in, asked{tree.Source, plainObjects(events)})
	}
	var found [][][]int
	askReference(t, `
found = []
for case in json.load(sys.stdin):
    rows = [((e["@timestamp"], n), e["@timestamp"] * 1000000, e["id"], e) for n, e in enumerate(case["events"])]
    found.append([ids for ids, _ in refeql.Engine(case["query"]).run(rows)])
print(json.dumps(found))
`, in, &found)
	matches := 0
	for i, tree := range trees {
		q, err := eql.CompileBatch(tree, letters)
		if err != nil {
			t.Fatal(err)
		}
		got, want := search(q.NewBatch(0), all[i]), found[i]
		if !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("%s\ngot  %s\nwant %s\n%s", tree.Source, matchList(got), matchList(want), describe(all[i]))
		}
		matches += len(got)
	}
	if matches < cases {
		t.Errorf("only %d matches", matches)
	}
}

// plainObjects are events as JSON objects, without addresses and dates.
func plainObjects(events []*event) []map[string]any {
	var objects []map[string]any
	for _, e := range events {
		object := map[string]any{"id": e.id, "@timestamp": e.at.Sub(epoch).Milliseconds()}
		for name, vs := range e.plain {
			if name == "d" {
				vs = slices.Clone(vs)
				for i, v := range vs {
					vs[i] = json.RawMessage(slowString(v)) // 1.0 must not become 1
				}
			}
			if name != "ip" && name != "at" {
				object[name] = vs
			}
		}
		objects = append(objects, object)
	}
	return objects
}

// TestParsesAsTheReference compares what is a query at all.
func TestParsesAsTheReference(t *testing.T) {
	r := newRandom(6)
	var in []string
	for len(in) < 5000 {
		// The reference takes an until without its bracket.
		if q := r.mangled(); !strings.Contains(q, "until") && !strings.Contains(q, "sample") {
			in = append(in, q)
		}
	}
	var refused []string
	askReference(t, `
refused = []
for query in json.load(sys.stdin):
    try:
        refeql.P(query).parse()
        refused.append("")
    except refeql.EQLError as e:
        refused.append(str(e))
print(json.dumps(refused))
`, in, &refused)
	accepted := 0
	for i, query := range in {
		_, err := syntax.Parse("", query)
		if (err == nil) != (refused[i] == "") {
			t.Errorf("%s\nhere: %v\nthere: %s", query, err, refused[i])
		}
		if err == nil {
			accepted++
		}
	}
	if accepted < 500 {
		t.Errorf("only %d are queries", accepted)
	}
}
