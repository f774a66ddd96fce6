package event

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

var testHost = &Host{ID: "6f1c2b7a9d0e4c5f8a3b1d2e4f506172", Name: "ip-10-0-3-17", BootID: "a1d3e8c2", AgentID: "agent", Version: "0.1.0", OSName: "Debian"}

func denied() *Event {
	parent := &Process{EntityID: "parent", PID: 4710, Name: "bash", Executable: "/usr/bin/bash", Known: true}
	p := &Process{
		EntityID: "subject", PID: 4711, Start: time.Unix(1, 0), Name: "curl", Executable: "/usr/bin/curl",
		Args:   []string{"curl", "-s", "http://169.254.169.254/latest/meta-data/iam/security-credentials/"},
		UserID: "48", UserName: "apache", Known: true, HostVerified: true, RootOwned: true, Parent: parent,
	}
	p.CommandLine = strings.Join(p.Args, " ")
	rule := &Rule{ID: "rule-id", Name: "A rule", Severity: "medium", RiskScore: 47,
		Threat: []Threat{{Framework: "MITRE ATT&CK", TacticID: "TA0006", TechniqueIDs: []string{"T1552"}, SubtechniqueIDs: []string{"T1552.005"}}}}
	return &Event{
		Host: testHost, Time: time.Date(2026, 11, 23, 18, 4, 5, 164_000_000, time.UTC), Duration: 1830 * time.Microsecond,
		Connection: Connection{Source: netip.MustParseAddrPort("10.0.3.17:49812"), Destination: netip.MustParseAddrPort("169.254.169.254:80"), Accepted: time.Unix(2, 0)},
		Subjects:   []*Process{p},
		Request:    Request{Method: "GET", Target: "/latest/meta-data/iam/security-credentials/", Path: "/latest/meta-data/iam/security-credentials/", Class: "credentials", Guarded: true, HTTP: "1.1"},
		Response:   Response{Status: 403, Refused: true},
		Decision: Decision{Mode: "enforce", Verdict: Deny, WouldBe: Deny, Rule: rule,
			Matches: []Match{{Rule: rule, Subject: p, Action: "block", Bound: true, Alert: true}}},
	}
}

// render gives the documents of an event, each parsed back.
func render(t testing.TB, e *Event) []map[string]any {
	t.Helper()
	var docs []map[string]any
	for i, v := range e.Views() {
		v.ID, v.Sequence, v.Created = "01KAT", uint64(i+1), time.Unix(3, 0)
		line := v.AppendJSON(nil)
		if strings.ContainsAny(string(line), "\n\r") || !utf8.Valid(line) {
			t.Errorf("not one line of UTF-8: %q", line)
		}
		var doc map[string]any
		if err := json.Unmarshal(line, &doc); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		docs = append(docs, doc)
	}
	return docs
}

func at(doc map[string]any, name string) any {
	parts := strings.Split(name, ".")
	for _, p := range parts[:len(parts)-1] {
		next, ok := doc[p].(map[string]any)
		if !ok {
			return nil
		}
		doc = next
	}
	return doc[parts[len(parts)-1]]
}

func TestDocuments(t *testing.T) {
	docs := render(t, denied())
	if len(docs) != 2 {
		t.Fatalf("%d documents, want a decision and an alert", len(docs))
	}
	for _, test := range []struct {
		doc  int
		name string
		want any
	}{
		{0, "@timestamp", "2026-11-23T18:04:05.164000000Z"},
		{0, "event.kind", "event"},
		{0, "event.action", "imds-request-denied"},
		{0, "event.outcome", "success"},
		{0, "event.code", "IG1002"},
		{0, "event.duration", 1830000.0},
		{0, "event.sequence", 1.0},
		{0, "process.entity_id", "subject"},
		{0, "process.parent.executable", "/usr/bin/bash"},
		{0, "process.working_directory", ""},
		{0, "user.name", "apache"},
		{0, "source.ip", "10.0.3.17"},
		{0, "destination.port", 80.0},
		{0, "http.response.status_code", 403.0},
		{0, "imdsgate.verdict", "deny"},
		{0, "imdsgate.request.api", "v1"},
		{0, "rule.name", "A rule"},
		{0, "data_stream.dataset", "imdsgate.decision"},
		{1, "event.kind", "alert"},
		{1, "event.severity", 47.0},
		{1, "message", "A rule"},
		{1, "imdsgate.alert.match", "bound"},
		{1, "data_stream.dataset", "imdsgate.alert"},
	} {
		if got := at(docs[test.doc], test.name); got != test.want {
			t.Errorf("document %d: %s is %v, want %v", test.doc, test.name, got, test.want)
		}
	}
}

// In audit mode a request that would have been denied is told as allowed.
func TestAuditDoesNotLie(t *testing.T) {
	e := denied()
	e.Decision.Mode, e.Decision.Verdict, e.Response = "audit", Allow, Response{Status: 200}
	doc := render(t, e)[0]
	types, _ := at(doc, "event.type").([]any)
	if !slices.Contains(types, any("allowed")) || slices.Contains(types, any("denied")) {
		t.Errorf("event.type %v", types)
	}
	if at(doc, "event.action") != "imds-request-would-deny" || at(doc, "imdsgate.verdict") != "allow" || at(doc, "imdsgate.audit_verdict") != "deny" {
		t.Errorf("%v", doc)
	}
}

// What a rule is asked is what is written, but for secrets.
func TestRulesSeeWhatIsWritten(t *testing.T) {
	e := denied()
	v := View{Event: e, Document: RequestDecision, Subject: e.Subjects[0]}
	doc := render(t, e)[0]
	for i := range Fields {
		f := &Fields[i]
		value := f.Value(&v)
		if value.Set && f.Type == Keyword && value.Texts == nil && f.Name != "event.id" {
			if got := at(doc, f.Name); got != value.Text {
				t.Errorf("%s: rules see %q, the line has %v", f.Name, value.Text, got)
			}
		}
		if index, ok := Lookup(f.Name); !ok || index != i {
			t.Errorf("%s is not found", f.Name)
		}
	}
	if _, ok := Lookup("process.nam"); ok {
		t.Error("found a field that does not exist")
	}
}

// A secret in argv shows nowhere in the documents: not of the subject, not of
// its parent, not in the message.
func TestNoSecretLeaves(t *testing.T) {
	e := denied()
	for p := e.Subjects[0]; p != nil; p = p.Parent {
		p.Args = []string{"curl", "-H", "X-aws-ec2-metadata-token: " + token, "--password", "hunter22 swordfish", "http://169.254.169.254/"}
		p.CommandLine = strings.Join(p.Args, " ")
		p.WorkingDir = "/tmp/" + token
		p.Thread = "AWS_SECRET_ACCESS_KEY=x1234567"
	}
	e.Request.UserAgent = "Bearer hunter22"
	e.Request.Target += "?X-aws-ec2-metadata-token=" + token
	e.Request.Path = e.Request.Target
	for _, v := range e.Views() {
		line := string(v.AppendJSON(nil))
		for _, secret := range []string{token, "hunter22", "swordfish", "x1234567"} {
			if strings.Contains(line, secret) {
				t.Errorf("%q in %s", secret, line)
			}
		}
		if !strings.Contains(line, "169.254.169.254") {
			t.Errorf("the address is gone, for which rules look: %s", line)
		}
	}
}

func TestCut(t *testing.T) {
	var e *Event
	for _, test := range []struct{ size, args, first int }{
		{5000, 1, maxText}, // one that is longer than the field may be
		{50, maxText / 100, 100},
		{1, maxTexts, 2},
	} {
		e = denied()
		p := e.Subjects[0]
		p.Args = slices.Repeat([]string{strings.Repeat("ü", test.size)}, 1000)
		p.CommandLine = strings.Join(p.Args, " ")
		got := at(render(t, e)[0], "process.args").([]any)
		if len(got) != test.args && len(got) != test.args+1 || len(got[0].(string)) != test.first {
			t.Errorf("%d arguments, the first of %d bytes; want %d of %d", len(got), len(got[0].(string)), test.args, test.first)
		}
	}
	doc := render(t, e)[0]
	if at(doc, "imdsgate.truncated") != true || at(doc, "imdsgate.redacted") != true || at(doc, "process.args_count") != 1000.0 {
		t.Errorf("%v, count %v", doc["imdsgate"], at(doc, "process.args_count"))
	}
}

// The zone of an address is the name of an interface, which root chooses.
func TestZone(t *testing.T) {
	e := denied()
	e.Connection.Source = netip.AddrPortFrom(netip.MustParseAddr(`fe80::1%a"b`), 1)
	doc := render(t, e)[0]
	for _, name := range []string{"source.address", "source.ip"} {
		if got := at(doc, name); got != `fe80::1%a"b` {
			t.Errorf("%s is %v", name, got)
		}
	}
}

func TestPod(t *testing.T) {
	e := denied()
	if doc := render(t, e)[0]; at(doc, "orchestrator") != nil {
		t.Errorf("no pod is rendered as %v", at(doc, "orchestrator"))
	}
	e = denied()
	e.Subjects[0].Pod = "1e597579-417e-482f-bf65-5fe170c3aebd"
	doc := render(t, e)[0]
	if at(doc, "orchestrator.resource.type") != "pod" || at(doc, "orchestrator.resource.id") != e.Subjects[0].Pod {
		t.Errorf("pod is rendered as %v", at(doc, "orchestrator"))
	}
}

// ECS names that take one value and those that take several, as the flat schema
// of 9.5.0 has them; a wrong shape is rejected by some consumers.
func TestShapes(t *testing.T) {
	arrays := []string{"event.category", "event.type", "process.args", "process.parent.args", "related.ip", "related.hosts",
		"related.user", "threat.tactic.id", "threat.technique.id", "threat.technique.subtechnique.id"}
	doc := render(t, denied())[0]
	for i := range Fields {
		name := Fields[i].Name
		got := at(doc, name)
		if _, is := got.([]any); got != nil && !strings.HasPrefix(name, "imdsgate.") && !strings.HasPrefix(name, "threat.") &&
			is != slices.Contains(arrays, name) {
			t.Errorf("%s is rendered as %v", name, got)
		}
	}
}

func FuzzJSON(f *testing.F) {
	f.Add("curl", "http://169.254.169.254/\x00\x7f\u2028\xff")
	f.Add("--password", "x\" } {")
	f.Fuzz(func(t *testing.T, a, b string) {
		e := denied()
		p := e.Subjects[0]
		p.Name, p.Executable, p.Args, p.WorkingDir, p.Thread, p.CommandLine = a, b, []string{a, b}, b, a, a+" "+b
		e.Request = Request{Method: a, Target: b, Path: b, UserAgent: a, Host: b, Class: "unknown", HTTP: "1.1"}
		e.Decision.Reason = a
		for _, doc := range render(t, e) {
			if at(doc, "event.module") != "imdsgate" {
				t.Errorf("a field was overwritten: %v", doc)
			}
		}
	})
}

func BenchmarkAppendJSON(b *testing.B) {
	e := denied()
	v := View{Event: e, Document: RequestDecision, Subject: e.Subjects[0], ID: "01KAT", Sequence: 1, Created: time.Now()}
	buf := make([]byte, 0, 8192)
	b.ReportAllocs()
	for b.Loop() {
		buf = v.AppendJSON(buf[:0])
	}
	b.SetBytes(int64(len(buf)))
}

// The path by which the agent of ECS knows a task is its password.
func TestSecretPath(t *testing.T) {
	const id = "2d8c2a5e-6c0e-4d5e-8d3c-0123456789ab"
	for _, c := range []struct {
		target, path string
		evasive      bool
		original     string
	}{
		{"/v2/credentials/" + id, "/v2/credentials/" + id, false, "/v2/credentials/[redacted]"},
		{"/v2/%63redentials/" + id, "/v2/credentials/" + id, true, "[redacted]"},
		{"/v4/" + id + "/task", "/v4/" + id + "/task", false, "/v4/" + id + "/task"}, // what is there is no secret
	} {
		e := denied()
		e.Connection.Destination = netip.MustParseAddrPort("169.254.170.2:80")
		e.Request = Request{Method: "GET", Target: c.target, Path: c.path, Class: "credentials", Guarded: true, Container: true, Evasive: c.evasive}
		for _, doc := range render(t, e) {
			if at(doc, "url.original") != c.original || at(doc, "imdsgate.request.api") != "container" {
				t.Errorf("%s: written %v, %v", c.target, at(doc, "url.original"), at(doc, "imdsgate.request.api"))
			}
			for _, name := range []string{"url.path", "message"} {
				if text, _ := at(doc, name).(string); strings.Contains(text, id) && strings.Contains(c.path, "credentials") {
					t.Errorf("%s: %s has the secret: %s", c.target, name, text)
				}
			}
		}
		i, _ := Lookup("url.original")
		if v := e.Views()[0]; Fields[i].Value(&v).Text != c.target {
			t.Errorf("%s: rules are asked about %q", c.target, Fields[i].Value(&v).Text)
		}
	}
}

// Times have the form that package time gives them, and every time is one that JSON can hold.
func TestTimes(t *testing.T) {
	for _, at := range []time.Time{
		time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC), time.Date(1999, 12, 31, 23, 59, 59, 999_999_999, time.UTC),
		time.Date(2026, 11, 26, 1, 2, 3, 1_000_000, time.FixedZone("", 3600)), {}, time.Unix(0, 0), time.Unix(253402300799, 0),
	} {
		at = at.UTC()
		if got, want := string(appendTime(nil, at, true)), at.Format(`"2006-01-02T15:04:05.000000000Z"`); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		if got, want := string(appendTime(nil, at, false)), at.Format(`"2006-01-02T15:04:05.000Z"`); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	for _, at := range []time.Time{time.Unix(1<<40, 0).UTC(), time.Unix(-1<<40, 0).UTC()} {
		var back time.Time
		if got := appendTime(nil, at, true); json.Unmarshal(got, &back) != nil {
			t.Errorf("%s is no time of JSON", got)
		}
	}
}
