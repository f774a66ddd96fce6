package eql_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
	"github.com/imdsgate/imdsgate/test/shared"
)

// TestElasticsearch runs Elasticsearch's own cases.
func TestElasticsearch(t *testing.T) {
	dir := filepath.Join(shared.Dir(t), "eql")
	var cases struct {
		Queries []struct {
			Name  string
			Query string
			Want  []int `toml:"expected_event_ids"`
		}
	}
	readTOML(t, filepath.Join(dir, "elasticsearch_test_queries.toml"), &cases)
	s, events := endgame(t, filepath.Join(dir, "test_data.json"))
	for _, test := range cases.Queries {
		t.Run(test.Name, func(t *testing.T) {
			tree, err := syntax.Parse(test.Name, test.Query)
			if err != nil {
				t.Fatal(err)
			}
			q, err := eql.CompileBatch(tree, s)
			if err != nil {
				t.Fatal(err)
			}
			found := search(q.NewBatch(0), events)
			if got := slices.Concat(found...); !slices.Equal(got, test.Want) {
				t.Errorf("%s\ngot  %v\nwant %v", test.Query, got, test.Want)
			}
		})
	}
	if len(cases.Queries) < 100 {
		t.Errorf("only %d cases", len(cases.Queries))
	}
}

func readTOML(t testing.TB, path string, v any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := toml.Unmarshal(data, v); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// endgame reads events of Elasticsearch's tests, in order.
func endgame(t *testing.T, path string) (schema, []*event) {
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var objects []map[string]any
	if err := json.Unmarshal(data, &objects); err != nil {
		t.Fatal(err)
	}
	types := map[string]eql.Type{"source_address": eql.IP, "destination_address": eql.IP}
	for _, o := range objects {
		delete(o, "mysterious_field") // an object with parts of several types
		for name, v := range o {
			if _, ok := v.(float64); ok {
				types[name] = eql.Long
			} else if _, ok := types[name]; !ok {
				types[name] = eql.Keyword
			}
		}
	}
	s := newSchema(types)
	var events []*event
	for _, o := range objects {
		o["event.category"] = strings.TrimSuffix(o["event_type_full"].(string), "_event")
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		e, err := parseEvent(s, text)
		if err != nil {
			t.Fatal(err)
		}
		e.id = int(o["serial_event_id"].(float64))
		const toUnix = 11_644_473_600 // seconds from 1601 to 1970
		ticks := e.plain["timestamp"][0].(int64)
		e.at = time.Unix(ticks/1e7-toUnix, ticks%1e7*100)
		events = append(events, e)
	}
	slices.SortStableFunc(events, func(a, b *event) int {
		if c := a.at.Compare(b.at); c != 0 {
			return c
		}
		return a.id - b.id
	})
	return s, events
}

// host has the fields that rules about processes and the metadata service read.
var host = newSchema(map[string]eql.Type{
	"destination.ip":                   eql.IP,
	"destination.port":                 eql.Long,
	"event.action":                     eql.Keyword,
	"event.module":                     eql.Keyword,
	"event.type":                       eql.Keyword,
	"host.id":                          eql.Keyword,
	"host.os.type":                     eql.Keyword,
	"http.request.method":              eql.Keyword,
	"process.args":                     eql.Keyword,
	"process.command_line":             eql.Keyword,
	"process.entity_id":                eql.Keyword,
	"process.executable":               eql.Keyword,
	"process.name":                     eql.Keyword,
	"process.parent.entity_id":         eql.Keyword,
	"process.parent.executable":        eql.Keyword,
	"process.parent.name":              eql.Keyword,
	"process.working_directory":        eql.Keyword,
	"process.entry_leader.executable":  eql.Keyword,
	"process.group_leader.entity_id":   eql.Keyword,
	"process.session_leader.entity_id": eql.Keyword,
	"url.path":                         eql.Keyword,
	"user.name":                        eql.Keyword,
	"user_agent.original":              eql.Keyword,
})

// elasticRules are the EQL queries of Elastic's rule files, by file.
func elasticRules(t testing.TB) map[string]string {
	files, err := filepath.Glob(filepath.Join(shared.Dir(t), "rules", "*.toml"))
	if err != nil {
		t.Fatal(err)
	}
	rules := map[string]string{}
	for _, file := range files {
		var f struct {
			Rule struct{ Type, Query string }
		}
		readTOML(t, file, &f)
		if f.Rule.Type == "eql" {
			rules[filepath.Base(file)] = f.Rule.Query
		}
	}
	if len(rules) == 0 {
		t.Fatal("no rules of type eql")
	}
	return rules
}

func TestElasticRules(t *testing.T) {
	rules := elasticRules(t)
	for _, name := range slices.Sorted(maps.Keys(rules)) {
		t.Run(name, func(t *testing.T) {
			tree, err := syntax.Parse(name, rules[name])
			if err != nil {
				t.Fatal(err)
			}
			q, err := eql.Compile(tree, host)
			if err != nil {
				t.Fatal(err)
			}
			if w := q.Warnings(); len(w) > 0 {
				t.Error(w)
			}
			if _, err := tryCompile(host, name, syntax.Format(tree)); err != nil {
				t.Error(err)
			}
		})
	}
}
