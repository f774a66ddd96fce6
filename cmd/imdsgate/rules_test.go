package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRulesCheck(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rule := func(id, kind, language, query string) string {
		return "[metadata]\nmaturity = \"development\"\n[rule]\nrule_id = \"" + id + "\"\nname = \"A rule\"\ntype = \"" + kind + "\"\nlanguage = \"" + language +
			"\"\nseverity = \"low\"\nrisk_score = 21\ntags = [\"OS: Linux\"]\nquery = '''\n" + query + "\n'''\n"
	}
	write("a.toml", rule("a", "eql", "eql", `process where process.name == "curl" and not process.parent.name : "sh*"`))
	write("b.toml", rule("b", "query", "kuery", `event.category:process and file.path:/etc/* and not "proc\u001bess.x":y`))
	write("c.toml", rule("c", "threshold", "kuery", "host.os.type:linux"))
	write("d.toml", rule("d", "eql", "eql", "process where file.path == 1 or file.name == 2"))
	write("e.toml", "[rule]\nname = \n")
	write("f.txt", "no rule")
	write("g.toml", rule("a", "eql", "eql", "any where true"))
	t.Chdir(dir)

	const want = `FILE    RULE  TYPE       RESULT                                                                                                         FIELDS THAT NO EVENT HERE HAS
a.toml  a     eql        ok                                                                                                             -
b.toml  b     query      ok                                                                                                             file.path proc�ess.x
c.toml  c     threshold  refused: line 6: a rule of the type threshold counts the hits of a s…  -
d.toml  d     eql        refused: line 12: unknown field file.path (and 1 more)                                                         file.name file.path
e.toml  -     -          refused: line 2: `
	got, code := imdsgate("rules", "check", ".")
	if code != 1 || !strings.HasPrefix(squeeze(got), squeeze(want)) {
		t.Errorf("%d\n%s", code, got)
	}
	for _, line := range []string{
		"\nrefused\n  c.toml:6:8: a rule of the type threshold",
		"\n  d.toml:12:15: unknown field file.path",
		"\n  d.toml:12:33: unknown field file.name",
		"\n  g.toml: rule_id a is also in a.toml",
		"\nwarnings\n  b.toml:12:28: no event has the field file.path",
		"\nnot as in Elastic\n  a.toml: in development",
		"\nexceptions that do not excuse from a block; only a grant does, or honour_exclusions\n  a.toml: line 12: not process.parent.name : \"sh*\"\n",
		"\n2 load, 4 refused\n",
	} {
		if !strings.Contains(got, line) {
			t.Errorf("%s\nwant %s", got, line)
		}
	}
	if strings.Contains(got, "\x1b") {
		t.Error("a control character comes through")
	}

	got, code = imdsgate("rules", "check", "--json", "a.toml", "c.toml")
	var report rulesReport
	if err := json.Unmarshal([]byte(got), &report); code != 1 || err != nil {
		t.Fatalf("%d, %v\n%s", code, err, got)
	}
	a, c := report.Rules[0], report.Rules[1]
	if report.Loaded != 1 || report.Refused != 1 || !a.OK || a.Action != "block" || a.RiskScore != 21 || len(a.Tags) != 1 || len(a.Exclusions) != 1 ||
		c.OK || !c.Unsupported || !strings.HasPrefix(c.Error, "c.toml:6:8") || !strings.HasPrefix(c.Reason, "line 6: a rule") {
		t.Errorf("%s", got)
	}

	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"a.toml"}, 0, "1 load, 0 refused"},
		{[]string{"a.toml", "none"}, 2, "none"},
		{[]string{}, 2, "imdsgate rules check /etc/imdsgate/elastic"},
		{[]string{"f.txt"}, 1, "f.txt"},
		{[]string{t.TempDir()}, 0, "no files named *.toml there"},
	} {
		if got, code := imdsgate(append([]string{"rules", "check"}, c.args...)...); code != c.code || !strings.Contains(got, c.says) {
			t.Errorf("%v: %d, want %d\n%s", c.args, code, c.code, got)
		}
	}
}

// squeeze makes runs of blanks one: the table is as wide as its widest reason.
func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }
