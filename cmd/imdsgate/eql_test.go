package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

func eqlRun(args ...string) (stdout, stderr string, code int) {
	var out, err bytes.Buffer
	code = run(context.Background(), append([]string{"eql"}, args...), &out, &err)
	return out.String(), err.String(), code
}

// writeFile writes a file of the test's own.
func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// fromStdin lets standard input be a file, or a pipe.
func fromStdin(t *testing.T, path string, pipe bool) {
	t.Helper()
	in, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if pipe {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			w.Write(text)
			w.Close()
		}()
		in = r
	}
	was := os.Stdin
	os.Stdin = in
	t.Cleanup(func() {
		os.Stdin = was
		in.Close()
	})
}

func gzipped(t *testing.T, text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write([]byte(text))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Three events, the last first, with nested and with dotted keys.
const (
	execCurl   = `{"@timestamp":"2026-11-25T16:00:00.000Z","event":{"category":["process"],"action":"exec","id":"a","sequence":1},"process":{"name":"curl","entity_id":"p1","args":["curl","-s"]}}`
	connected  = `{"@timestamp":"2026-11-25T16:00:00.500Z","event.category":"network","event.id":"b","event":{"sequence":2},"process.entity_id":"p1","destination":{"ip":"169.254.169.254","port":"80"}}`
	execCron   = `{"@timestamp":"2026-11-25T16:01:00Z","event":{"category":"process","action":"exec","id":"c","sequence":3},"process":{"name":"cron","entity_id":"p2"},"labels":{"n":7}}`
	threeLines = execCron + "\n" + execCurl + "\n" + connected + "\n"
	sequence   = `sequence by process.entity_id with maxspan=1s [process where process.name : "CURL"] [network where destination.ip == "169.254.169.254"]`
)

// What somebody types, and what he sees.
func TestEQL(t *testing.T) {
	for _, c := range []struct {
		name   string
		args   []string
		file   string // of the events; "" for those above
		out    string
		stderr string
		code   int
	}{
		{name: "an event as it stands in its line", args: []string{`process where process.args == "-s"`}, out: execCurl + "\n"},
		{name: "in order", args: []string{`process where true`}, out: execCurl + "\n" + execCron + "\n"},
		{name: "dotted keys, and a number as text", args: []string{`network where destination.port == 80`}, out: connected + "\n"},
		{name: "a sequence", args: []string{sequence}, out: "[" + execCurl + "," + connected + "]\n"},
		{name: "ids", args: []string{"--id", "event.id", sequence}, out: `["a","b"]` + "\n"},
		{name: "the id of an event", args: []string{"--id", "event.sequence", `any where true | tail 2`}, out: "2\n3\n"},
		{name: "an event without that id", args: []string{"--id", "labels.n", `process where true`}, out: "null\n7\n"},
		{name: "a missing event", args: []string{"--id", "event.id", `sequence by process.entity_id with maxspan=1s [process where true] ![network where true]`}, out: `["c",null]` + "\n"},
		{name: "a sample", args: []string{"--id", "event.id", `sample by process.entity_id [network where true] [process where true]`}, out: `["b","a"]` + "\n"},
		{name: "nothing", args: []string{`process where process.name == "wget"`}, code: 1},
		{name: "no events", args: []string{`process where true`}, file: "\n", code: 1},
		{name: "another schema", args: []string{"--category", "kind", "--timestamp", "when:ms", "--tiebreaker", "n", "--id", "n",
			`sequence with maxspan=1ms [any where text == "1.50"] [x where n >= 2 and not flag]`},
			file: `{"kind":"x","when":5,"n":3,"flag":false,"text":"z"}` + "\n" + `{"kind":"y","when":4,"n":1,"text":1.50}`, out: "[1,3]\n"},
		{name: "the time, compared with a date", args: []string{"--timestamp", "when:filetime", "--id", "n", `any where when > "2017-08-31"`},
			file: `{"when":131485996510000000,"n":1}` + "\n" + `{"when":131485996520000000,"n":2}` + "\n" + `{"when":"2017-09-01T00:00:00Z","n":3}`, out: "3\n"},
		{name: "keys with and without a type in the schema", args: []string{"--category", "c", "--id", "c", `sequence [a where true] by process.pid, host.ip [b where true] by parent, address`},
			file: `{"@timestamp":1,"c":"a","process":{"pid":7},"host":{"ip":"::ffff:10.0.0.1"}}` + "\n" + `{"@timestamp":2,"c":"b","parent":7,"address":"::ffff:10.0.0.1"}`, out: `["a","b"]` + "\n"},
		{
			name: "a slip of the fingers", args: []string{`process where process.nam == "x"`}, code: 1,
			stderr: "imdsgate: query:1:15: no event has the field process.nam; did you mean process.name?\n\tprocess where process.nam == \"x\"\n\t              ^\n",
		},
		{name: "an optional field", args: []string{`process where ?process.nonesuch == "x"`}, code: 1},
		{
			name: "an unknown field", args: []string{`process where imaginary.thing == "x"`}, code: 1,
			stderr: "imdsgate: query:1:15: no event has the field imaginary.thing; write ?imaginary.thing if it may be missing\n\tprocess where imaginary.thing == \"x\"\n\t              ^\n",
		},
		{
			name: "never true", args: []string{`process where process.pid > 1 and false`}, code: 1,
			stderr: "imdsgate: query:1:35: this is never true\n\tprocess where process.pid > 1 and false\n\t                                  ^\n",
		},
		{
			name: "the wrong category", args: []string{"--category", "type", `process where true`}, code: 1,
			stderr: "imdsgate: no event has the field type, so that none is of the category that the query asks for; is it in another?\n",
		},
		{
			name: "a query with a fault", args: []string{`process where process.name = "x"`}, code: 2,
			stderr: "imdsgate: query:1:28: expected the end of the query, found =; equality is ==\n\tprocess where process.name = \"x\"\n\t                           ^\n",
		},
		{
			name: "a type from the data", args: []string{`process where labels.n == "7"`}, code: 2,
			stderr: "imdsgate: query:1:27: labels.n (a number) cannot be compared with a string\n\tprocess where labels.n == \"7\"\n\t                          ^\n",
		},
		{
			name: "bad lines", args: []string{"--id", "event.id", `process where true`},
			file: "nonsense\n" + execCurl + "\n\n{\"@timestamp\":\n" + `[1]` + "\n" + execCron + `{}` + "\n" + execCron,
			out:  `"a"` + "\n" + `"c"` + "\n",
			stderr: "imdsgate: f:1: invalid character 'o' in literal null (expecting 'u')\n" +
				"imdsgate: f:4: unexpected end of JSON input\nimdsgate: f:5: no JSON object\n" +
				"imdsgate: f:6: invalid character '{' after top-level value\n" +
				"imdsgate: 4 bad lines were left out, of 6\n",
		},
		{
			name: "no time", args: []string{"--id", "event.id", `process where true | head 1`},
			file: `{"event":{"category":"process","id":"x"}}` + "\n" + `{"@timestamp":"soon","event":{"category":"process"}}` + "\n" + execCurl,
			out:  `"a"` + "\n",
			stderr: "imdsgate: f:1: no time in @timestamp\nimdsgate: f:2: no time in @timestamp: \"soon\"\n" +
				"imdsgate: 2 bad lines were left out, of 3\n",
		},
		{name: "no time, where that does not matter", args: []string{"--id", "event.id", `process where true`},
			file: `{"event":{"category":"process","id":"x"}}` + "\n" + execCron + "\n" + `{"event":{"category":"process","id":"y"}}` + "\n" + execCurl,
			out:  `"x"` + "\n" + `"a"` + "\n" + `"c"` + "\n" + `"y"` + "\n"},
		{
			name: "no line is an event", args: []string{`process where true`}, file: "[\n", code: 2,
			stderr: "imdsgate: f:1: unexpected end of JSON input\nimdsgate: 1 bad line was left out, of 1\n" +
				"imdsgate: no line is a JSON object; jq -c . FILE, or jq -c '.[]' FILE for an array, makes lines of what is spread over several\n",
		},
		{
			name: "values that do not fit", args: []string{"--id", "event.id", `network where destination.port > 1 and destination.ip != null`}, code: 1,
			file:   `{"@timestamp":1,"event":{"category":"network","id":"x"},"destination":{"ip":"host","port":"http"}}`,
			stderr: "imdsgate: 1 value of destination.ip was taken for missing: not of type ip\nimdsgate: 1 value of destination.port was taken for missing: not of type long\n",
		},
		{
			name: "too many chains", args: []string{"--pending", "1", "--id", "event.id", `sequence by process.entity_id [process where true] [network where true]`},
			file:   execCurl + "\n" + strings.Replace(execCurl, "p1", "p0", 1) + "\n" + connected,
			code:   1,
			stderr: "imdsgate: matches may be missing: 1 unfinished sequence was given up, because no more than 1 are kept; --pending keeps more\n",
		},
		{name: "carriage returns, a byte order mark and no last newline", args: []string{"--id", "event.id", `process where true`},
			file: "\xef\xbb\xbf" + execCurl + "\r\n" + execCron, out: `"a"` + "\n" + `"c"` + "\n"},
		{name: "gzip, in two parts", args: []string{"--id", "event.id", `any where true`},
			file: gzipped(t, execCurl+"\n") + gzipped(t, connected+"\n"), out: `"a"` + "\n" + `"b"` + "\n"},
		{
			name: "gzip that ends too early", args: []string{"--id", "event.id", `any where true`},
			file: gzipped(t, execCurl+"\n") + gzipped(t, connected+"\n")[:30], out: `"a"` + "\n", code: 2,
			stderr: "imdsgate: read f: unexpected EOF\n",
		},
		{
			name: "zstd", args: []string{`any where true`}, file: "\x28\xb5\x2f\xfd\x00", code: 2,
			stderr: "imdsgate: read f: this is packed by zstd; go through zstdcat FILE | imdsgate eql QUERY\n",
		},
		{
			name: "UTF-16", args: []string{`any where true`}, file: "\xff\xfe{\x00}\x00", code: 2,
			stderr: "imdsgate: read f: this is UTF-16; save it as UTF-8, or go through iconv -f UTF-16 -t UTF-8\n",
		},
		{name: "text that is no UTF-8", args: []string{`any where x : "a?"`}, file: "{\"@timestamp\":1,\"x\":\"a\xff\"}", out: `{"@timestamp":1,"x":"a` + "\ufffd" + `"}` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			if err := os.WriteFile("f", []byte(cmp.Or(c.file, threeLines)), 0o600); err != nil {
				t.Fatal(err)
			}
			out, stderr, code := eqlRun(append(c.args, "f")...)
			if out != c.out || stderr != c.stderr || code != c.code {
				t.Errorf("exit %d, want %d\n%s\nwant\n%s\nstderr\n%s\nwant\n%s", code, c.code, out, c.out, stderr, c.stderr)
			}
			for _, pipe := range []bool{false, true} {
				fromStdin(t, "f", pipe)
				again, stderr, code := eqlRun(c.args...)
				if again != c.out || code != c.code {
					t.Errorf("from standard input, a pipe: %v: exit %d\n%s\n%s", pipe, code, again, stderr)
				}
			}
		})
	}
}

// Files are taken in the order of their first events, whatever that of the names, and packed
// ones as others; what cannot be read does not keep the rest from it.
func TestEQLFiles(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{"events": execCron + "\n", "events.1": connected + "\n", "events.2.gz": gzipped(t, execCurl+"\n")} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir("folder", 0o700); err != nil {
		t.Fatal(err)
	}
	out, stderr, code := eqlRun("--id", "event.id", "any where true", "events", "events.1", "events.2.gz")
	if want := "\"a\"\n\"b\"\n\"c\"\n"; out != want || stderr != "" || code != 0 {
		t.Errorf("%d\n%s%s", code, out, stderr)
	}
	out, stderr, code = eqlRun("--id", "event.id", sequence, "none", "events.1", "folder", "events.2.gz")
	if want := "imdsgate: read none: no such file or directory\nimdsgate: read folder: is a directory\n"; out != `["a","b"]`+"\n" || stderr != want || code != 2 {
		t.Errorf("%d\n%s%s", code, out, stderr)
	}
	if out, stderr, code = eqlRun("any where true", "none"); out != "" || code != 2 {
		t.Errorf("%d\n%s%s", code, out, stderr)
	}
}

func TestEQLQuery(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{"events": threeLines, "q.eql": "any where\n  event.id == \"b\" // one\n", "bad.eql": "any where\n  event.id = 1\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args  []string
		stdin string
		says  string
		code  int
	}{
		{[]string{"-f", "q.eql", "events"}, "", connected, 0},
		{[]string{"-f", "q.eql"}, "events", connected, 0},
		{[]string{"-f", "q.eql", "-"}, "events", connected, 0},
		{[]string{"-f", "-", "events"}, "q.eql", connected, 0},
		{[]string{"-f", "-"}, "q.eql", "both", 2},
		{[]string{"-f", "bad.eql", "events"}, "", "bad.eql:2:12: ", 2},
		{[]string{"q.eql", "events"}, "", "-f q.eql", 2},
		{[]string{"-f", "none", "events"}, "", "none", 2},
		{nil, "", "which query?", 2},
		{[]string{"--timestamp", "t:weeks", "any where true", "events"}, "", "auto, s, ms, us, ns, filetime", 2},
		{[]string{"--category", "", "any where true", "events"}, "", "--category", 2},
	} {
		if c.stdin != "" {
			fromStdin(t, c.stdin, true)
		}
		if out, stderr, code := eqlRun(c.args...); code != c.code || !strings.Contains(out+stderr, c.says) {
			t.Errorf("%v: exit %d, want %d and %q\n%s%s", c.args, code, c.code, c.says, out, stderr)
		}
	}
}

// A rule file says what is asked, and of which fields, unless flags do.
func TestEQLRule(t *testing.T) {
	t.Chdir(t.TempDir())
	const rule = `[metadata]
maturity = "production"

[rule]
name = "Twice"
rule_id = "0b7f6f0a"
type = "eql"
language = "eql"
index = ["logs-*"]
event_category_override = "kind"
timestamp_field = "seen"
tiebreaker_field = "serial"
query = '''
sequence by pid with maxspan=1s
  [start where name == "sh"]
  [file where ?path like~ "/ETC/*"]
'''

[rule.alert_suppression]
group_by = ["host.id"]

[rule.investigation_fields]
field_names = ["pid"]
`
	for name, text := range map[string]string{
		"rule.toml":   rule,
		"typo.toml":   strings.Replace(rule, "like~", "liek", 1),
		"wrong.toml":  strings.Replace(rule, `"sh"`, "7", 1),
		"kql.toml":    strings.NewReplacer(`type = "eql"`, `type = "query"`, `"eql"`, `"kuery"`).Replace(rule),
		"count.toml":  strings.Replace(rule, `"eql"`, `"threshold"`, 1),
		"narrow.toml": strings.Replace(rule, "index", "filters = [{}]\nindex", 1),
		"empty.toml":  strings.Replace(rule, "query", "other", 1),
		"agent.toml": `[rule]
name = "Agent"
id = "5d1c"
os_list = ["windows"]
query = '''any where event.id == "b"'''
[[actions]]
action = "kill_process"
`,
		"events": `{"id":2,"kind":"file","seen":1764089671000,"serial":2,"pid":1,"path":"/etc/shadow","time":1764089671000,"name":"sh"}
{"id":1,"kind":"start","seen":1764089671000,"serial":1,"pid":1,"name":"sh","time":1764089679000}
`,
		"ours": threeLines,
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		says string
		code int
	}{
		{[]string{"--rule", "rule.toml", "--id", "id", "events"}, "[1,2]\n", 0},
		{[]string{"--rule", "rule.toml", "--id", "id", "--tiebreaker", "none", "events"}, "", 1},
		{[]string{"--rule", "rule.toml", "--id", "id", "--timestamp", "time:ms", "events"}, "", 1},
		{[]string{"--rule", "rule.toml", "--id", "id", "--category", "name", "events"}, "", 1},
		{[]string{"--rule", "rule.toml", "--explain"}, "serial  tiebreaker", 0},
		{[]string{"--rule", "agent.toml", "ours"}, connected, 0},
		{[]string{"--rule", "typo.toml", "events"}, "typo.toml:16:21: expected ]", 2},
		{[]string{"--rule", "wrong.toml", "events"}, "wrong.toml:15:24: name (a string) cannot be compared with an integer\n\t  [start where name == 7]\n", 2},
		{[]string{"--rule", "kql.toml", "events"}, `kql.toml:7:8: the query of a rule of the type "query" cannot be asked by itself`, 2},
		{[]string{"--rule", "count.toml", "events"}, `"threshold"`, 2},
		{[]string{"--rule", "narrow.toml", "events"}, "narrow.toml:9:1: filters narrow the search", 2},
		{[]string{"--rule", "empty.toml", "events"}, "has no query", 2},
		{[]string{"--rule", "none.toml", "events"}, "read the rule: open none.toml", 2},
		{[]string{"--rule", "rule.toml", "-f", "q.eql", "events"}, "either", 2},
		{[]string{"rule.toml", "events"}, "--rule rule.toml takes the query from it", 2},
	} {
		out, stderr, code := eqlRun(c.args...)
		if code != c.code || !strings.Contains(out+stderr, c.says) {
			t.Errorf("%v: exit %d, want %d and %q\n%s%s", c.args, code, c.code, c.says, out, stderr)
		}
	}
}

func TestEQLExplain(t *testing.T) {
	events := writeFile(t, "events", threeLines)
	const query = `sequence by host.id, ?labels.n with maxspan=90s
		[process where process.name : ("c*", "*d") and event.action == "exec"] with runs=2
		![any where labels.n > 3 and when == "2026-11-25"]
		until [process where event.action == "end"] | head 3`
	const want = `sequence within 1m30s
  1  process by host.id, ?labels.n, 2 times
       event.action == "exec"
       process.name : ("c*", "*d")
  2  any missing by host.id, ?labels.n
       labels.n > 3
       when == "2026-11-25"
  until process by host.id, ?labels.n
       event.action == "end"
  | head 3

FIELD           TYPE         KNOWN FROM
event.category  keyword      schema
host.id         keyword      schema
labels.n        double       data
process.name    keyword      schema
event.action    keyword      schema
when            keyword      query
@timestamp      time (auto)  the order
event.sequence  tiebreaker   the order
`
	if out, stderr, code := eqlRun("--explain", query, events); out != want || code != 0 || !strings.Contains(stderr, "no event has the field when") {
		t.Errorf("%d\n%s%s", code, out, stderr)
	}
	// Without files nothing is read.
	if out, _, code := eqlRun("--explain", "--json", "process where process.pid > 1"); code != 0 || !strings.Contains(out, `{"name":"process.pid","type":"long","from":"schema"}`) {
		t.Errorf("%d\n%s", code, out)
	}
}

// The rule that we ship finds in the documents that we write what the daemon has found
// in the events.
func TestEQLFindsWhatTheDaemonFound(t *testing.T) {
	p, err := policy.Compile(policy.Config{}, []string{"credentials"})
	if err != nil {
		t.Fatal(err)
	}
	engine := policy.NewEngine(p)
	base := time.Date(2026, 11, 25, 16, 0, 0, 0, time.UTC)
	host := &event.Host{ID: "host", Name: "ip-172-31-0-10"}
	var text []byte
	var want []string
	for i, c := range []func(*event.Event, *event.Process){
		func(*event.Event, *event.Process) {},
		func(_ *event.Event, p *event.Process) { p.Name, p.Executable = "CURL", "/usr/bin/CURL" },
		func(_ *event.Event, p *event.Process) { p.Name, p.Executable = "httpd", "/usr/sbin/httpd" },
		func(_ *event.Event, p *event.Process) { p.Name, p.Executable = "x", "/tmp/x" },
		func(_ *event.Event, p *event.Process) { p.WorkingDir = "/opt/nessus_agent/x" },
		func(_ *event.Event, p *event.Process) { p.Parent.Executable = "/usr/bin/setup-policy-routes" },
		func(_ *event.Event, p *event.Process) { p.Parent = nil },
		func(_ *event.Event, p *event.Process) { p.Start = p.Start.Add(-2 * time.Second) },
		func(_ *event.Event, p *event.Process) {
			p.Name, p.Executable, p.CommandLine = "my tool", "/usr/bin/my tool", "my tool 'http://169.254.169.254/x'\n\x1b"
		},
		func(e *event.Event, _ *event.Process) {
			e.Connection.Destination = netip.MustParseAddrPort("[fd00:ec2::254]:80")
		},
		func(_ *event.Event, p *event.Process) { p.Args = []string{"./curl"} },
	} {
		at := base.Add(time.Duration(i) * time.Minute)
		subject := &event.Process{EntityID: fmt.Sprint("e", i), PID: 4711, Start: at, Executed: at, Executable: "/usr/bin/curl", Name: "curl",
			Args: []string{"curl"}, CommandLine: "curl", WorkingDir: "/var/www", UserID: "48", Known: true, Ancestry: "birth",
			Parent: &event.Process{EntityID: fmt.Sprint("p", i), PID: 4710, Executable: "/usr/bin/bash", Name: "bash", Known: true}}
		e := &event.Event{Host: host, Time: at.Add(40 * time.Millisecond), Subjects: []*event.Process{subject}, Roles: []string{"connector"},
			Connection: event.Connection{Source: netip.MustParseAddrPort("10.0.0.1:40000"), Destination: netip.MustParseAddrPort("169.254.169.254:80"),
				First: true, Accepted: at.Add(30 * time.Millisecond)},
			Attribution: event.Attribution{Level: "L3", Complete: true},
			Request:     event.Request{Method: "GET", Path: "/latest/meta-data/iam/security-credentials/role", Class: "credentials", Guarded: true, Token: true}}
		c(e, subject)
		subject.Executed = subject.Start
		engine.Judge(e)
		engine.Observe(e)
		connection := fmt.Sprintf(`"%d-connection"`, i)
		for _, m := range e.Decision.Matches {
			if m.Literal && m.Rule.Ruleset == "imdsgate-2025-02" {
				want = append(want, connection)
			}
		}
		// The file has the connection first: that of two writers.
		views := append([]event.View{{Event: e, Document: event.ConnectionAttempt, Subject: subject, ID: strings.Trim(connection, `"`)},
			{Event: e, Document: event.ProcessStart, Subject: subject, ID: fmt.Sprintf("%d-start", i)}}, e.Views()...)
		for n := range views {
			views[n].Sequence = uint64(100*i + n + 1)
			text = append(views[n].AppendJSON(text), '\n')
		}
	}
	src, err := os.ReadFile("../../policy/rules/odd-client.toml")
	if err != nil {
		t.Fatal(err)
	}
	var rule struct{ Rule struct{ Query string } }
	if err := toml.Unmarshal(src, &rule); err != nil {
		t.Fatal(err)
	}
	out, stderr, code := eqlRun("--id", "event.id", "-f", writeFile(t, "seed.eql", rule.Rule.Query), writeFile(t, "events.ndjson", string(text)))
	var got []string
	for line := range strings.Lines(out) {
		_, last, _ := strings.Cut(strings.TrimSuffix(line, "]\n"), ",")
		got = append(got, last)
	}
	if !slices.Equal(got, want) || len(want) < 4 || stderr != "" || code != 0 {
		t.Errorf("exit %d\ngot  %v\nwant %v\n%s", code, got, want, stderr)
	}
}

// As a program: a reader that goes away ends it, and so does an interrupt, and what is found
// in a stream is seen while it is open.
func TestEQLProgram(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "imdsgate")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	many := writeFile(t, "many", strings.Repeat(execCurl+"\n", 20_000))
	head := exec.Command("sh", "-c", `"$0" eql 'process where true' "$1" | head -n 1; echo "$?"`, bin, many)
	if out, err := head.CombinedOutput(); err != nil || string(out) != execCurl+"\n0\n" {
		t.Errorf("%v\n%.1000s", err, out)
	}

	live := exec.Command(bin, "eql", "process where true")
	in, err := live.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := live.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	live.Stderr = &stderr
	if err := live.Start(); err != nil {
		t.Fatal(err)
	}
	defer live.Process.Kill()
	fmt.Fprintln(in, execCurl)
	line := make([]byte, len(execCurl)+1)
	if n, err := out.Read(line); err != nil || string(line[:n]) != execCurl+"\n" {
		t.Errorf("%q, %v", line[:n], err)
	}
	live.Process.Signal(syscall.SIGINT)
	if err := live.Wait(); live.ProcessState.ExitCode() != 2 || !strings.Contains(stderr.String(), "interrupted") {
		t.Errorf("%v\n%s", err, stderr.String())
	}
}
