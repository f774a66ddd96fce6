package policytest_test

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/policytest"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

func classes() (names []string) {
	for _, c := range imds.Classes() {
		names = append(names, c.String())
	}
	return names
}

func run(t *testing.T, name, src string) policytest.Report {
	t.Helper()
	f, err := policytest.Parse(name, []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	if f.Policy == nil {
		f.Policy = &policy.Config{}
	}
	p, err := f.Compile()
	if err != nil {
		t.Fatal(err)
	}
	results, err := f.Run(p, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var r policytest.Report
	r.Add(results)
	return r
}

// All cases of testdata pass, and none is left out.
func TestCases(t *testing.T) {
	files, err := filepath.Glob("testdata/*" + policytest.Suffix)
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		r := run(t, file, string(src))
		if r.Failed > 0 || r.Passed < strings.Count(string(src), "- name:") {
			var b strings.Builder
			r.WriteText(&b, false)
			t.Error(b.String())
		}
	}
}

// failing has a case for each thing that can be expected, none of which comes true.
const failing = `
policy:
  grants: [{name: app, executable: /opt/app, unit: app.service, owner: o, reason: r}]
subjects:
  app: {executable: /opt/app, unit: app.service}
  curl: {executable: /usr/bin/curl}
cases:
  - {name: "verdict", subject: app, request: GET /latest/user-data, expect: deny}
  - {name: "rule", subject: curl, request: GET /latest/user-data, expect: {rule: imdsv1}}
  - {name: "rule", subject: curl, request: GET /latest/user-data, expect: {rule: none}}
  - {name: "rule", subject: app, request: GET /latest/user-data, expect: {rule: odd-client}}
  - {name: "grant", subject: app, request: GET /latest/user-data, expect: {grant: none}}
  - {name: "grant", subject: curl, request: GET /latest/user-data, expect: {grant: app}}
  - {name: "class", subject: app, request: GET /latest/user-data, expect: {class: inventory}}
  - {name: "alert", subject: app, request: GET /latest/user-data, expect: {alert: true}}
  - {name: "alert", subject: curl, request: GET /latest/user-data, expect: {alert: false}}
  - {name: "alert", subject: curl, request: GET /latest/user-data, expect: {alert: odd-client}}
  - {name: "alert", subject: curl, request: GET /latest/user-data, expect: {alert: []}}
  - {name: "matches", subject: curl, request: GET /latest/user-data, expect: {matches: odd-client}}
  - {name: "matches", subject: curl, request: GET /latest/user-data, expect: {matches: none}}
  - {name: "reason", subject: app, request: GET /latest/user-data, expect: {reason: "no # such <reason> \\ here"}}
  - {name: "verdict rule", subject: curl, request: GET /latest/user-data, expect: {verdict: allow, rule: imdsv1, class: user-data}}
`

func TestFailures(t *testing.T) {
	r := run(t, "failing_test.yaml", failing)
	if r.Passed > 0 || r.Failed != strings.Count(failing, "- {name") {
		t.Errorf("%d passed and %d failed", r.Passed, r.Failed)
	}
	for _, result := range r.Results {
		var keys []string
		for _, d := range result.Wrong {
			keys = append(keys, d.Key)
		}
		if got := strings.Join(keys, " "); got != result.Name || result.OK {
			t.Errorf("line %d: %q is wrong, and should be %q", result.Line, got, result.Name)
		}
	}
	var b strings.Builder
	if err := r.WriteText(&b, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"FAIL  failing_test.yaml:8: verdict: GET /latest/user-data\n      by       /opt/app, user root, unit app.service, forked by /usr/lib/systemd/systemd\n      verdict  expected deny, got allow\n",
		"because  granted by app", "grant    app covers it", "grant    app does not cover it: executable", "+ process.parent.executable != null",
		"0 passed, 15 failed, in 1 file\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%s\nis without %q", b.String(), want)
		}
	}
}

// What is wrong with a file is said with its place, and all at once.
func TestErrors(t *testing.T) {
	for _, c := range []struct{ name, src, want string }{
		{"empty", "", "there are no cases"},
		{"no cases", "subjects: {}", "there are no cases"},
		{"unknown key", "cases:\n  - name: a\n    requst: GET /\n", ":3:5: unknown key \"requst\" of cases; is it request?"},
		{"unknown key of a subject", "cases:\n  - name: a\n    subject: {exe: /a}\n    request: GET /\n    expect: deny\n", ":3:15: unknown key \"exe\" of subject; there are like, executable, "},
		{"unknown key of an expectation", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    expect: {verdit: deny}\n", ":5:14: unknown key \"verdit\" of expect; is it verdict?"},
		{"unknown key of the policy", "policy: {postur: strict}\ncases: []\n", ":1:10: unknown key \"postur\" of policy; is it posture?"},
		{"key twice", "cases:\n  - name: a\n    name: b\n", ":3:5: mapping key \"name\" already defined"},
		{"verdict", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    expect: denied\n", ":5:13: unknown verdict \"denied\"; there are allow, deny"},
		{"api", "cases:\n  - name: a\n    subject: /a\n    request: {path: /, api: v3}\n    expect: deny\n", ":4:29: unknown api \"v3\""},
		{"endpoint", "cases:\n  - name: a\n    subject: /a\n    request: {path: /, endpoint: imds}\n    expect: deny\n", "endpoint \"imds\" is not an address"},
		{"age", "cases:\n  - name: a\n    subject: {executable: /a, age: 3 days}\n    request: GET /\n    expect: deny\n", ":3:36: time: unknown unit"},
		{"mode", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    mode: on\n    expect: deny\n", "unknown mode \"on\""},
		{"subject", "cases:\n  - name: a\n    subject: z\n    request: GET /\n    expect: deny\n", ":3:14: there is no subject \"z\"; there are none in this file"},
		{"no subject", "cases:\n  - name: a\n    request: GET /\n    expect: deny\n", ":2:5: case \"a\" does not say who asks"},
		{"no request", "cases:\n  - name: a\n    subject: /a\n    expect: deny\n", "does not say what is asked"},
		{"no path", "cases:\n  - name: a\n    subject: /a\n    request: {method: GET}\n    expect: deny\n", ":4:15: what is asked for?"},
		{"expects nothing", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n", "case \"a\" expects nothing"},
		{"no name", "cases:\n  - subject: /a\n    request: GET /\n    expect: deny\n", "a case needs a name"},
		{"class", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    expect: {class: secrets}\n", ":5:21: there is no class \"secrets\""},
		{"like itself", "subjects:\n  a: {like: b}\n  b: {parent: a}\ncases: []\n", "its own parent, or like itself"},
		{"like nobody known", "subjects:\n  a: {like: b}\n", ":2:13: there is no subject \"b\""},
		{"no program", "subjects:\n  a: {user: app}\n", "which program is it?"},
		{"parent", "subjects:\n  a: {executable: /a, parent: [/b, c]}\n", "there is no subject \"c\""},
		{"reserved", "subjects:\n  own: {executable: /a}\n", "cannot be named \"own\""},
		{"ancestry", "subjects:\n  a: {executable: /a, ancestry: adopted}\n", ":2:33: ancestry \"adopted\""},
		{"token", "cases:\n  - name: a\n    subject: /a\n    request: {path: /, token: his}\n    expect: deny\n", ":4:31: whose token?"},
		{"order", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    before: [{ago: 1s, subject: /b}, {ago: 2s, subject: /b}]\n    expect: deny\n", "write the oldest first"},
		{"future", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    before: [{ago: -1s, subject: /b}]\n    expect: deny\n", ":5:20: -1s is negative"},
		{"times", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    before: [{ago: 1s, times: 1000000000}]\n    expect: deny\n", "times is from 1 to 10000"},
		{"nobody starts", "cases:\n  - name: a\n    subject: nobody\n    request: GET /\n    before: [{ago: 1s}]\n    expect: deny\n", "a program that starts is somebody"},
		{"nobody with others", "cases:\n  - name: a\n    subject: nobody\n    others: [/a]\n    request: GET /\n    expect: deny\n", "where nobody is known there are no others"},
		{"two lines", "cases:\n  - name: a\n    subject: /a\n    request: {path: /, headers: {X: \"a\\r\\nHost: b\"}}\n    expect: deny\n", "a header is one line"},
		{"its own parent, in a list", "subjects:\n  a: {executable: /a, parent: [/b, {executable: /c, parent: a}]}\ncases: []\n", "its own parent, or like itself"},
		{"alias to itself", "cases: &a\n  - *a\n", ":2:6: no anchor &a is above"},
		{"brackets", "cases: " + strings.Repeat("[", 2000), ":1:71: more than 64 levels"},
		{"a second document", "cases: []\n---\ncases: []\n", ":3:1: a second document"},
		{"a number", "cases:\n  - name: a\n    subject: /a\n    request: GET /\n    before: [{ago: 1s, times: many}]\n    expect: deny\n", ":5:31: a number is wanted here, and not a text"},
		{"tag", "!!binary cases", "x_test.yaml:"},
		{"terminal", "cases: \x1b[31m\n", "x_test.yaml:"},
	} {
		f, err := policytest.Parse("x_test.yaml", []byte(c.src))
		if f != nil && err == nil {
			t.Errorf("%s: no error", c.name)
		} else if !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "x_test.yaml:") || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%s: %v\nis without %q", c.name, err, c.want)
		}
	}
	f, err := policytest.Parse("x_test.yaml", []byte("cases:\n  - name: a\n    subject: y\n    request: GET /\n    expect: {}\n  - name: b\n    subject: z\n    request: GET /\n    expect: deny\n"))
	if err == nil || strings.Count(err.Error(), "x_test.yaml:") != 3 {
		t.Errorf("three errors are %v, %v", f, err)
	}
}

// What is wrong with the policy of a file is shown there.
func TestPolicyErrors(t *testing.T) {
	f, err := policytest.Parse("x_test.yaml", []byte("policy:\n  profiles: [nosuch]\n  grants:\n    - name: a\n      executable: [/opt/a, /tmp/a]\n      unit: a.service\n      owner: o\n  rules:\n    paths: [none]\ncases:\n  - {name: a, subject: /a, request: GET /, expect: deny}\n"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Compile()
	for _, want := range []string{"x_test.yaml:2:14: no profile \"nosuch\"", "x_test.yaml:4:7: a grant needs a reason", "x_test.yaml:5:28: \"/tmp/a\" is below /tmp", "x_test.yaml:9:13: read rules: open none"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nis without %q", err, want)
		}
	}
}

// A rule or a grant that is expected must be there.
func TestUnknownRuleOrGrant(t *testing.T) {
	f, err := policytest.Parse("x_test.yaml", []byte("cases:\n  - name: a\n    subject: /a\n    request: GET /\n    expect: {rule: odd-clint, alert: [none, imdsv2], matches: [x], grant: app}\n"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile(policy.Config{}, classes())
	if err != nil {
		t.Fatal(err)
	}
	results, err := f.Run(p, time.Now())
	if err == nil || len(results) > 0 {
		t.Fatal(results, err)
	}
	for _, want := range []string{
		":5:20: the policy has no rule \"odd-clint\"; there are command-line, ", "the policy has no rule \"imdsv2\"",
		"the policy has no rule \"x\"", "the policy has no grant \"app\"; there are none",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nis without %q", err, want)
		}
	}
}

// TAP as its specification has it: a version, a plan, test points in order, and below
// one that has failed a block of YAML.
func TestTAP(t *testing.T) {
	r := run(t, "failing_test.yaml", failing+"  - {name: 'a # hash \\ and', subject: app, request: GET /latest/user-data, expect: allow}\n")
	var b bytes.Buffer
	if err := r.WriteTAP(&b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	if len(lines) < 2 || lines[0] != "TAP version 13" || lines[1] != fmt.Sprintf("1..%d", len(r.Results)) {
		t.Fatalf("%q", lines[:2])
	}
	point := regexp.MustCompile(`^(not )?ok (\d+) - ((?:[^\\#]|\\[\\#])+)$`)
	lines = lines[2:]
	for i, result := range r.Results {
		m := point.FindStringSubmatch(lines[0])
		if m == nil || (m[1] == "") != result.OK || m[2] != strconv.Itoa(i+1) || !strings.Contains(m[3], "failing_test.yaml:") {
			t.Fatalf("%q is no test point %d", lines[0], i+1)
		}
		if lines = lines[1:]; result.OK {
			continue
		}
		end := slices.Index(lines, "  ...")
		if lines[0] != "  ---" || end < 0 {
			t.Fatalf("%q begins no block of YAML", lines[0])
		}
		var block struct {
			Message string
			File    string
			Line    int
			Subject string
			Wrong   []policytest.Difference
		}
		text := ""
		for _, line := range lines[1:end] {
			inner, ok := strings.CutPrefix(line, "  ")
			if !ok {
				t.Fatalf("%q is not indented", line)
			}
			text += inner + "\n"
		}
		if err := yaml.UnmarshalWithOptions([]byte(text), &block, yaml.Strict()); err != nil {
			t.Fatal(err)
		}
		if block.File != result.File || block.Line != result.Line || !slices.Equal(block.Wrong, result.Wrong) || block.Message == "" {
			t.Errorf("%+v is not of %+v", block, result)
		}
		lines = lines[end+1:]
	}
	if len(lines) > 0 {
		t.Errorf("%q is left", lines)
	}
}

// JUnit's XML has the elements and attributes of its schema, and no other.
func TestJUnit(t *testing.T) {
	r := run(t, "failing_test.yaml", failing+"  - {name: \"passes <&\\x01>\", subject: app, request: GET /latest/user-data, expect: allow}\n")
	var b bytes.Buffer
	if err := r.WriteJUnit(&b); err != nil {
		t.Fatal(err)
	}
	allowed := map[string][]string{
		"testsuites": {"name", "tests", "failures", "errors", "time"},
		"testsuite":  {"name", "tests", "failures", "errors", "skipped", "time"},
		"testcase":   {"name", "classname", "file", "line", "time"},
		"failure":    {"message", "type"},
	}
	within := map[string]string{"testsuites": "", "testsuite": "testsuites", "testcase": "testsuite", "failure": "testcase"}
	counts := map[string]int{}
	var open []string
	for dec := xml.NewDecoder(&b); ; {
		token, err := dec.Token()
		if token == nil {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch e := token.(type) {
		case xml.StartElement:
			name, parent := e.Name.Local, ""
			if len(open) > 0 {
				parent = open[len(open)-1]
			}
			if in, ok := within[name]; !ok || in != parent {
				t.Errorf("<%s> within <%s>", name, parent)
			}
			for _, a := range e.Attr {
				if !slices.Contains(allowed[name], a.Name.Local) {
					t.Errorf("<%s %s>", name, a.Name.Local)
				}
				switch a.Name.Local {
				case "tests", "failures", "errors", "skipped", "line":
					if n, err := strconv.Atoi(a.Value); err != nil {
						t.Error(err)
					} else if name == "testsuite" {
						counts[a.Name.Local] = n
					}
				case "time":
					if s, err := strconv.ParseFloat(a.Value, 64); err != nil || s < 0 {
						t.Error(a.Value, err)
					}
				}
			}
			if len(e.Attr) != len(allowed[name]) {
				t.Errorf("<%s> has %d attributes", name, len(e.Attr))
			}
			counts["<"+name]++
			open = append(open, name)
		case xml.EndElement:
			open = open[:len(open)-1]
		}
	}
	if counts["<testcase"] != len(r.Results) || counts["tests"] != len(r.Results) || counts["<failure"] != r.Failed || counts["failures"] != r.Failed || r.Passed != 1 {
		t.Errorf("%v of %d, %d of which have failed", counts, len(r.Results), r.Failed)
	}
}

func TestJSON(t *testing.T) {
	r := run(t, "failing_test.yaml", failing)
	var b bytes.Buffer
	if err := r.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var back policytest.Report
	if err := json.Unmarshal(b.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if back.Failed != r.Failed || len(back.Results) != len(r.Results) || len(back.Results[1].RuleFindings) == 0 || back.Results[1].Rule != "odd-client" {
		t.Errorf("%+v", back)
	}
	b.Reset()
	if err := new(policytest.Report).WriteJSON(&b); err != nil || !strings.Contains(b.String(), `"results":[]`) {
		t.Error(b.String(), err)
	}
}

// The example of the documentation passes, and the documentation has every key.
func TestDocumentation(t *testing.T) {
	page, err := os.ReadFile("../../docs/testing-policy.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(page), "```yaml\n")
	block, _, _ = strings.Cut(block, "```")
	const granted = "policy:\n  posture: strict\n  grants: [{name: app, executable: /opt/app/bin/app, unit: app.service, owner: o, reason: r}]\n"
	if r := run(t, "app_test.yaml", granted+block); r.Failed > 0 || r.Passed != 3 {
		t.Errorf("%+v", r)
	}
	for _, of := range []any{policytest.File{}, policytest.Case{}, policytest.Step{}, policytest.Subject{}, policytest.Request{}, policytest.Expect{}} {
		for _, field := range reflect.VisibleFields(reflect.TypeOf(of)) {
			key := field.Tag.Get("yaml")
			if key == "" || key == "-" {
				continue
			}
			if !regexp.MustCompile("[`{ ]" + key + "[`,}]").Match(page) {
				t.Errorf("docs/testing-policy.md is without the key %s of a %T", key, of)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	src, err := os.ReadFile("testdata/passes_test.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(src)
	f.Add([]byte(failing))
	f.Fuzz(func(t *testing.T, src []byte) {
		if len(src) > 8<<10 {
			return
		}
		if file, err := policytest.Parse("x", src); err == nil && len(file.Cases) == 0 {
			t.Errorf("%q is a file without cases", src)
		}
	})
}
