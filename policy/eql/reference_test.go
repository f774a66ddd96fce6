package eql_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/imdsgate/imdsgate/test/shared"
)

// askReference reads queries with their events, one JSON object in a line, and
// prints what the reference finds.
const askReference = `
import json, sys
sys.path.insert(0, sys.argv[1])
from refeql import Engine
for line in sys.stdin:
    case = json.loads(line)
    rows = [((e["@timestamp"], n), e["@timestamp"] * 1000000, e["id"], e) for n, e in enumerate(case["events"])]
    print(json.dumps([ids for ids, _ in Engine(case["query"]).run(rows)]))
`

// TestAgainstReference compares with an evaluator that was written in Python, apart
// from this package. It knows no samples, addresses or dates.
func TestAgainstReference(t *testing.T) {
	const cases = 1500
	python := exec.Command("python3", "-c", askReference, filepath.Join(shared.Dir(t), "eql"))
	r := newRandom(4)
	r.untyped = true
	var trees []*syntax.Query
	var all [][]*event
	var in, out, complaints bytes.Buffer
	for len(trees) < cases {
		tree, err := syntax.Parse("", r.query())
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := tree.Body.(*syntax.Sample); ok {
			continue
		}
		events := r.events(20)
		trees, all = append(trees, tree), append(all, events)
		asked := struct {
			Query  string           `json:"query"`
			Events []map[string]any `json:"events"`
		}{Query: tree.Source}
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
			asked.Events = append(asked.Events, object)
		}
		if err := json.NewEncoder(&in).Encode(asked); err != nil {
			t.Fatal(err)
		}
	}
	python.Stdin, python.Stdout, python.Stderr = &in, &out, &complaints
	if err := python.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &complaints)
	}
	lines := bufio.NewScanner(&out)
	found := 0
	for i, tree := range trees {
		if !lines.Scan() {
			t.Fatalf("%d answers", i)
		}
		var want [][]int
		if err := json.Unmarshal(lines.Bytes(), &want); err != nil {
			t.Fatal(err)
		}
		q, err := eql.CompileBatch(tree, letters)
		if err != nil {
			t.Fatal(err)
		}
		got := search(q.NewBatch(0), all[i])
		if !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("%s\ngot  %s\nwant %s\n%s", tree.Source, matchList(got), matchList(want), describe(all[i]))
		}
		found += len(got)
	}
	if found < cases {
		t.Errorf("only %d matches", found)
	}
}
