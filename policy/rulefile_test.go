package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
)

// published are files as a checkout of Elastic's rules has them: with long notes, and
// one in five about first-seen values.
func published(tb testing.TB, n int) fstest.MapFS {
	tb.Helper()
	note := "note = \"\"\"## Triage and analysis\n" + strings.Repeat("- Review the process and its parent, and who has started them, \"twice\".\n", 90) + "\"\"\"\n"
	sources := []string{strings.Replace(firstClient, "severity", note+"severity", 1)}
	for _, name := range []string{"odd-client", "shell-or-tool", "untrusted-executable", "odd-client-elsewhere"} {
		src, err := shipped.ReadFile("rules/" + name + ".toml")
		if err != nil {
			tb.Fatal(err)
		}
		sources = append(sources, strings.Replace(string(src), "severity", note+"severity", 1))
	}
	files := fstest.MapFS{}
	for i := range n {
		src := sources[i%len(sources)]
		at := strings.Index(src, `rule_id = "`) + len(`rule_id = "`)
		files[fmt.Sprintf("rules/%04d.toml", i)] = &fstest.MapFile{Data: fmt.Appendf(nil, "%s%d-%s", src[:at], i, src[at:])}
	}
	return files
}

// TestRuleFiles is what a file may have that is not what the plainest has, and what
// becomes of it: a part of the error, or nothing.
func TestRuleFiles(t *testing.T) {
	const plain = `[metadata]
maturity = "production"
[rule]
rule_id = "x"
name = "X"
type = "eql"
language = "eql"
severity = "low"
tags = ["OS: Linux"]
query = '''
process where process.name == "curl"
'''
`
	const anywhere = "\x00" // no place
	for _, c := range []struct {
		name, from, old, new string
		at, err              string
		unsupported          bool
	}{
		{"plain", plain, "", "", "", "", false},
		{"KQL", plain, `type = "eql"`, "type = 'query'", "7:12", "kuery", true},
		{"a list of numbers", plain, `["OS: Linux"]`, `[1]`, "9:9", "", false},
		{"a fraction for a number", plain, `tags`, "risk_score = 47.5\ntags", "9:14", "rule.risk_score cannot be of the type float\n", false},
		{"a query with escapes", plain, "'''\nprocess where process.name == \"curl\"\n'''", `"process where proces.name == \"curl\""`, " query:1:15", "did you mean process.name?\n\tprocess where proces.name", false},
		{"a number for a name", plain, `name = "X"`, `name = 7`, "5:8", "", false},
		{"a key twice", plain, `name = "X"`, "name = \"X\"\nname = \"Y\"", "6:1", "", false},
		{"a table not closed", plain, `[rule]`, `[rule`, "3:", "", false},
		{"no severity", plain, `severity = "low"`, ``, "3:2", "unknown severity", false},
		{"odd severity", plain, `"low"`, `"mild"`, "8:12", `unknown severity "mild"`, false},
		{"an empty query", plain, `process where process.name == "curl"`, ``, anywhere, "", false},
		{"no query", plain, "query", "quarry", "3:2", "the rule has no query", false},
		{"threshold", plain, `type = "eql"`, `type = "threshold"`, "6:8", "counts the hits of a search", true},
		{"ES|QL", plain, `type = "eql"`, `type = "esql"`, "6:8", "ES|QL", true},
		{"machine learning", plain, `type = "eql"`, `type = "machine_learning"`, "6:8", "a model", true},
		{"threat match", plain, `type = "eql"`, `type = "threat_match"`, "6:8", "indicators", true},
		{"saved query", plain, `type = "eql"`, `type = "saved_query"`, "6:8", "Kibana", true},
		{"unknown type", plain, `type = "eql"`, `type = "eqll"`, "6:8", `"eqll" is not known here`, true},
		{"no type", plain, `type = "eql"`, ``, "3:2", `"" is not known here`, true},
		{"Lucene", firstClient, `"kuery"`, `"lucene"`, "5:12", `"lucene" is not run here`, true},
		{"filters", plain, `severity`, "filters = [{query = {}}]\nseverity", "8:1", "filters narrow the search", true},
		{"timestamp_override", plain, `severity`, "timestamp_override = \"event.ingested\"\nseverity", "", "", false},
		{"odd timestamp_override", plain, `severity`, "timestamp_override = \"file.created\"\nseverity", "8:22", "judged as they happen", true},
		{"timestamp_field", plain, `severity`, "timestamp_field = \"@timestamp\"\nseverity", "", "", false},
		{"odd timestamp_field", plain, `severity`, "timestamp_field = \"my.time\"\nseverity", "8:19", "in the order of @timestamp", true},
		{"tiebreaker_field", plain, `severity`, "tiebreaker_field = \"event.sequence\"\nseverity", "", "", false},
		{"odd tiebreaker_field", plain, `severity`, "tiebreaker_field = \"serial\"\nseverity", "8:20", "in which they were seen", true},
		{"odd event_category_override", plain, `severity`, "event_category_override = \"event_type\"\nseverity", "8:27", "no event here has a category in the field event_type", true},
		{"a category of others", plain, `process where process.name == "curl"`, `file where process.name == "curl"`, "11:1", "events of the category file are not observed here; there are process and network", true},
		{"a stage of others", plain, `process where process.name == "curl"`, "sequence by host.id\n [process where true]\n [library where true]", "13:3", "category library", true},
		{"a field of others", plain, `process.name`, `file.path`, "11:15", "unknown field file.path", false},
		{"two", plain, `process.name == "curl"`, "file.path == 1 and\nfile.nam == 2", "11:15", ":12:1: unknown field file.nam", false},
		{"a query on the line of its key", plain, "'''\nprocess", "'''process", "10:26", "did you mean process.name?\n\tquery = '''process where process.namee", false},
		{"new terms", firstClient, "", "", "", "", false},
		{"new terms in EQL", firstClient, "event.category:network and destination.ip:169.254.169.254 and not process.executable:/usr/bin/known", "network where true", "8:1", "", false},
		{"new terms without fields", firstClient, `"new_terms_fields"`, `"fields"`, "11:9", "new_terms_fields", false},
		{"new terms without window", firstClient, `"now-7d"`, `"yesterday"`, "15:9", `"yesterday" is no beginning of a window`, false},
		{"no table of new terms", firstClient, `new_terms]`, `other]`, "1:1", "needs a table [rule.new_terms]", false},
		{"new terms of four", firstClient, `["host.id", "process.executable"]`, `["a", "b", "c", "d"]`, "12:1", "3 are the most", true},
		{"new terms of no field", firstClient, `"process.executable"]`, `"proces.executable"]`, "12:1", "proces.executable; did you mean process.executable?", true},
		{"a KQL error", firstClient, `network and destination.ip:169.254.169.254`, "network\n destination.ip:x", "9:2", "write and, or or, before it", false},
	} {
		src := strings.Replace(c.from, c.old, c.new, 1)
		if c.name == "a query on the line of its key" {
			src = strings.Replace(src, "process.name ", "process.namee ", 1)
		}
		if c.name == "new terms in EQL" {
			src = strings.Replace(src, "kuery", "eql", 1)
			c.at = ""
		}
		_, err := ParseRule("x.toml", []byte(src))
		if c.at == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		where := "x.toml:" + c.at
		if c.at == anywhere {
			where = ""
		}
		if err == nil || !strings.HasPrefix(err.Error(), where) || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), "^") {
			t.Errorf("%s: %v\nwant it at %s, and to say %q", c.name, err, c.at, c.err)
		}
		if errors.Is(err, errors.ErrUnsupported) != c.unsupported {
			t.Errorf("%s: unsupported: %v\n%v", c.name, !c.unsupported, err)
		}
	}
}

func TestNotes(t *testing.T) {
	const endpoint = `
[rule]
id = "e"
name = "E"
os_list = ["linux", "macos"]
version = "1.0.3"
reference = ["https://example.org"]
query = '''
process where event.action == "exec" and process.name == "curl" and not ?process.Ext.x == "y" and process.parent.executable != "/a"
'''
[[actions]]
action = "kill_process"
[[threat]]
framework = "MITRE ATT&CK"
tactic = { id = "TA0006", name = "Credential Access" }
`
	r, err := ParseRule("e.toml", []byte(endpoint))
	if err != nil {
		t.Fatal(err)
	}
	if r.ID != "e" || r.Severity != "medium" || r.Type != "eql" || len(r.Threat) != 1 || len(r.Notes) != 2 ||
		strings.Join(r.Missing, "") != "process.Ext.x" || len(r.Excluded) != 1 || r.Excluded[0].Line != 9 || len(r.Warnings) != 1 || r.Warnings[0].Line != 9 {
		t.Errorf("%+v", r)
	}
	_, err = ParseRule("e.toml", []byte(strings.Replace(endpoint, `"linux", "macos"`, `"windows"`, 1)))
	if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "e.toml:5:1: this rule is for windows, and not for linux") {
		t.Errorf("for another system: %v", err)
	}

	const more = `[metadata]
maturity = "deprecated"
deprecation_date = "2026/01/02"
[rule]
rule_id = "x"
name = "X"
type = "query"
language = "kuery"
severity = "low"
building_block_type = "default"
event_category_override = "event.action"
alert_suppression = { group_by = ["host.id"] }
query = "event.category:process"
`
	if r, err = ParseRule("x.toml", []byte(more)); err != nil {
		t.Fatal(err)
	}
	notes := strings.Join(r.Notes, "\n")
	for _, want := range []string{"deprecated by whoever has published it 2026/01/02", "alert_suppression is not done here", "a building block"} {
		if !strings.Contains(notes, want) {
			t.Errorf("%s\nwant it to say %q", notes, want)
		}
	}
	if r.Action == nil || *r.Action != Log {
		t.Errorf("action of a building block: %v", r.Action)
	}
}

// With another field for the category, "exec where" is about that.
func TestCategoryOverride(t *testing.T) {
	src := strings.NewReplacer(`"new_terms"`, `"eql"`, `"kuery"`, `"eql"`, "severity", "event_category_override = \"event.action\"\nseverity",
		"event.category:network and destination.ip:169.254.169.254 and not process.executable:/usr/bin/known", `connection_attempted where process.name == "curl"`).Replace(firstClient)
	e := NewEngine(compile(t, only(t, src, Config{})))
	if !alerts(judge(e, asking("/usr/bin/curl", nil)), "first") || alerts(judge(e, asking("/usr/bin/wget", nil)), "first") {
		t.Error("the category is not tested in the other field")
	}
}

// What BenchmarkLoad reads is there and is taken.
func TestPublished(t *testing.T) {
	if rules, err := ParseRules(published(t, 10), "rules"); err != nil || len(rules) != 10 {
		t.Errorf("%d rules, %v", len(rules), err)
	}
}

func BenchmarkLoad(b *testing.B) {
	files := published(b, 2000)
	b.ReportAllocs()
	for b.Loop() {
		rules, err := ParseRules(files, "rules")
		if err != nil || len(rules) != 2000 {
			b.Fatal(len(rules), err)
		}
	}
	b.ReportMetric(b.Elapsed().Seconds()/float64(b.N)*1000/2000, "ms/rule")
}
