package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/imdsgate/imdsgate/test/shared"
)

// elasticsearch are cases of Elasticsearch's own, with the events that they are about as
// lines of JSON, in the order in which they stand there.
type elasticsearch struct {
	Queries []struct {
		Name  string
		Query string
		Want  []int `toml:"expected_event_ids"`
	}
	dir    string
	events []map[string]any
}

func elasticCases(t *testing.T) *elasticsearch {
	c := &elasticsearch{dir: filepath.Join(shared.Dir(t), "eql")}
	src, err := os.ReadFile(filepath.Join(c.dir, "elasticsearch_test_queries.toml"))
	if err == nil {
		err = toml.Unmarshal(src, c)
	}
	if err != nil {
		t.Fatal(err)
	}
	if src, err = os.ReadFile(filepath.Join(c.dir, "test_data.json")); err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(src))
	d.UseNumber()
	if err := d.Decode(&c.events); err != nil {
		t.Fatal(err)
	}
	for _, e := range c.events {
		e["category"] = strings.TrimSuffix(e["event_type_full"].(string), "_event")
	}
	if len(c.Queries) < 100 || len(c.events) < 100 {
		t.Fatalf("%d cases, %d events", len(c.Queries), len(c.events))
	}
	return c
}

// write puts the events into a file.
func (c *elasticsearch) write(t *testing.T) string {
	var b bytes.Buffer
	for _, e := range c.events {
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(append(line, '\n'))
	}
	return writeFile(t, "events.ndjson", b.String())
}

// TestElasticsearchEvents runs Elasticsearch's cases with the command, over the events in
// the reverse of their order.
func TestElasticsearchEvents(t *testing.T) {
	c := elasticCases(t)
	slices.Reverse(c.events)
	path := c.write(t)
	for _, test := range c.Queries {
		t.Run(test.Name, func(t *testing.T) {
			out, stderr, code := eqlRun("--category", "category", "--timestamp", "timestamp:filetime",
				"--tiebreaker", "serial_event_id", "--id", "serial_event_id", test.Query, path)
			got := []int{}
			for line := range strings.Lines(out) {
				var ids []int
				if !strings.HasPrefix(line, "[") {
					line = "[" + line + "]"
				}
				if err := json.Unmarshal([]byte(line), &ids); err != nil {
					t.Fatal(err)
				}
				got = append(got, ids...)
			}
			if !slices.Equal(got, test.Want) || code == 2 {
				t.Errorf("%s\ngot  %v, exit %d\nwant %v\n%s", test.Query, got, code, test.Want, stderr)
			}
		})
	}
}

// TestReference compares the command with the slow evaluator in Python, whose times
// are milliseconds, match by match.
func TestReference(t *testing.T) {
	c := elasticCases(t)
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Fatalf("needs python3, as test/deps.sh installs it: %v", err)
	}
	for _, e := range c.events {
		ticks, err := e["timestamp"].(json.Number).Int64()
		if err != nil {
			t.Fatal(err)
		}
		ticks -= 116_444_736_000_000_000
		e["timestamp"] = json.Number(fmt.Sprintf("%d.%04d", ticks/1e4, ticks%1e4))
	}
	path := c.write(t)
	var queries []string
	for _, test := range c.Queries {
		queries = append(queries, test.Query)
	}
	input, err := json.Marshal(queries)
	if err != nil {
		t.Fatal(err)
	}
	evaluate := exec.Command(python, "-c", `
import json, sys
sys.path.insert(0, sys.argv[1])
import refeql
events = refeql.load(sys.argv[2], "timestamp", "serial_event_id", "serial_event_id")
for query in json.load(sys.stdin):
    try:
        found = refeql.Engine(query, "category").run(events)
        print(json.dumps([[None if i == -1 else i for i in ids] for ids, _ in found]))
    except refeql.EQLError:  # it has not all of the language
        print("null")
`, c.dir, path)
	evaluate.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	evaluate.Stdin, evaluate.Stderr = bytes.NewReader(input), os.Stderr
	answers, err := evaluate.Output()
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for i, answer := range strings.Split(strings.TrimSuffix(string(answers), "\n"), "\n") {
		if answer == "null" {
			continue
		}
		compared++
		out, stderr, code := eqlRun("--category", "category", "--timestamp", "timestamp:ms",
			"--tiebreaker", "serial_event_id", "--id", "serial_event_id", queries[i], path)
		var got []string
		for line := range strings.Lines(out) {
			line = strings.TrimSuffix(line, "\n")
			if !strings.HasPrefix(line, "[") {
				line = "[" + line + "]"
			}
			got = append(got, line)
		}
		if want := strings.ReplaceAll(answer, " ", ""); "["+strings.Join(got, ",")+"]" != want || code == 2 {
			t.Errorf("%s\ngot  %v, exit %d\nwant %v\n%s", queries[i], got, code, want, stderr)
		}
	}
	if compared < 100 {
		t.Errorf("only %d compared", compared)
	}
}
