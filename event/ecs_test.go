package event

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// What ECS 9.5 allows, as far as our documents go.
var (
	ecsKinds = []string{"alert", "event", "metric", "state"}
	ecsTypes = map[string][]string{ // of event.category
		"process":             {"access", "change", "end", "info", "start"},
		"network":             {"access", "allowed", "connection", "denied", "end", "info", "protocol", "start"},
		"web":                 {"access", "error", "info"},
		"intrusion_detection": {"allowed", "denied", "info"},
		"configuration":       {"access", "change", "creation", "deletion", "info"},
	}
	ecsOutcomes = []string{"failure", "success", "unknown"}
	ecsArrays   = []string{"event.category", "event.type", "process.args", "process.parent.args", "process.supplemental_groups.id",
		"process.parent.supplemental_groups.id", "related.hosts", "related.ip", "related.user", "threat.tactic.id", "threat.tactic.name",
		"threat.technique.id", "threat.technique.name", "threat.technique.subtechnique.id", "threat.technique.subtechnique.name"}
	// What Elastic Security wants of every document, and we do.
	always = []string{"@timestamp", "ecs.version", "event.kind", "event.category", "event.type", "event.action", "event.outcome", "event.id",
		"event.sequence", "event.created", "event.module", "event.dataset", "message", "data_stream.type", "data_stream.dataset",
		"data_stream.namespace", "agent.id", "agent.type", "host.id", "host.name", "host.os.type"}
	severities = []any{21.0, 47.0, 73.0, 99.0}
)

// every is one event for each kind of document and each of its variants.
func every() []*Event {
	var all []*Event
	for _, verdict := range []Verdict{Allow, Deny} {
		for _, wouldBe := range []Verdict{Allow, Deny} {
			e := denied()
			e.Connection.First, e.Starts = true, e.Subjects
			e.Decision.Verdict, e.Decision.WouldBe = verdict, wouldBe
			all = append(all, e)
		}
	}
	for _, kind := range []string{"info", "change"} {
		all = append(all, &Event{Kind: Lifecycle, Host: testHost, Time: time.Unix(1, 0), State: State{Action: "daemon-started", Type: kind, Message: "m"}})
	}
	for action := range findings {
		for _, failed := range []bool{false, true} {
			all = append(all, &Event{Kind: Integrity, Host: testHost, Time: time.Unix(1, 0), State: State{Action: action, Type: "change", Message: "m", Failed: failed}})
		}
	}
	odd := denied()
	odd.Request = Request{Malformed: "no request at all"}
	nobody := denied()
	nobody.Subjects, nobody.Connection.First, nobody.Decision.Matches = nil, true, nil
	started := denied()
	started.Kind, started.Starts, started.Request, started.Connection = Started, started.Subjects, Request{}, Connection{}
	return append(all, odd, nobody, started)
}

func TestECS(t *testing.T) {
	seen := map[string]bool{}
	for _, layout := range []Layout{Own, Defend} {
		testHost.Layout = layout
		for _, e := range every() {
			for _, doc := range render(t, e) {
				dataset, _ := at(doc, "data_stream.dataset").(string)
				seen[dataset] = true
				text := func(name string) string { s, _ := at(doc, name).(string); return s }
				for _, name := range always {
					if at(doc, name) == nil {
						t.Errorf("%s has no %s", dataset, name)
					}
				}
				if !slices.Contains(ecsKinds, text("event.kind")) || !slices.Contains(ecsOutcomes, text("event.outcome")) || text("event.dataset") != dataset {
					t.Errorf("%s: %v", dataset, doc["event"])
				}
				for _, kind := range at(doc, "event.type").([]any) {
					if !slices.ContainsFunc(at(doc, "event.category").([]any), func(c any) bool { return slices.Contains(ecsTypes[c.(string)], kind.(string)) }) {
						t.Errorf("%s: event.type %v does not go with event.category %v", dataset, kind, at(doc, "event.category"))
					}
				}
				// Dashboards count what is of the type denied: that, and nothing that audit mode let pass.
				types, _ := json.Marshal(at(doc, "event.type"))
				if verdict := at(doc, "imdsgate.verdict"); verdict != nil && (verdict == "deny") != strings.Contains(string(types), "denied") {
					t.Errorf("%s of %v is of the types %s", dataset, verdict, types)
				}
				if at(doc, "imdsgate.verdict") != nil && at(doc, "imdsgate.audit_verdict") == nil {
					t.Errorf("%s has a verdict, and not what it would have been", dataset)
				}
				if n := at(doc, "event.severity"); text("event.kind") == "alert" && !slices.Contains(severities, n) {
					t.Errorf("%s: event.severity %v of %s, for which Kibana has no name", dataset, n, text("event.action"))
				}
				for i := range Fields {
					name := Fields[i].Name
					got := at(doc, name)
					if _, is := got.([]any); got != nil && !strings.HasPrefix(name, "imdsgate.") && is != slices.Contains(ecsArrays, name) {
						t.Errorf("%s: %s is %v", dataset, name, got)
					}
				}
				// Names with a hyphen are no data streams.
				if stream := dataset + text("data_stream.namespace"); strings.ContainsAny(stream, "-/ ") {
					t.Errorf("%s is no part of a data stream's name", stream)
				}
			}
		}
	}
	testHost.Layout = Own
	for _, dataset := range []string{"imdsgate.process", "imdsgate.network", "endpoint.events.process", "endpoint.events.network",
		"imdsgate.decision", "imdsgate.alert", "imdsgate.lifecycle", "imdsgate.integrity"} {
		if !seen[dataset] {
			t.Errorf("no event is rendered as %s", dataset)
		}
	}
}

// Everything that the daemon finds has a severity; who tampers, a technique.
func TestFindings(t *testing.T) {
	files, err := filepath.Glob("../cmd/imdsgated/*.go")
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for _, name := range files {
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\.(?:integrity|finding|noticed|absent)\("([^"]+)"`).FindAllSubmatch(src, -1) {
			used[string(m[1])] = true
			if findings[string(m[1])] == nil {
				t.Errorf("%s: %s is not in the table of findings", name, m[1])
			}
		}
	}
	for action, r := range findings {
		if !used[action] {
			t.Errorf("%s is never found", action)
		}
		if high := r.Severity == "high"; high != (len(r.Threat) > 0) {
			t.Errorf("%s is %s, with %v", action, r.Severity, r.Threat)
		}
		for _, threat := range r.Threat {
			if threat.TechniqueNames[0] == "" {
				t.Errorf("%s: technique %s has no name", action, threat.TechniqueIDs)
			}
		}
	}
	doc := render(t, &Event{Kind: Integrity, Host: testHost, Time: time.Unix(1, 0), State: State{Action: "redirect-rule-changed", Type: "change", Message: "m"}})[0]
	if ids, _ := at(doc, "threat.technique.id").([]any); len(ids) != 1 || ids[0] != "T1686" || at(doc, "event.severity") != 73.0 || at(doc, "threat.framework") != "MITRE ATT&CK" {
		t.Errorf("%v", doc)
	}
}

// A line says whether it has less than the rules saw.
func TestLoss(t *testing.T) {
	for _, c := range []struct {
		name                string
		change              func(*Process)
		redacted, shortened any
	}{
		{"nothing", func(*Process) {}, nil, nil},
		{"suspicious, and no secret", func(p *Process) { p.Args = []string{"passwd"}; p.CommandLine = "passwd" }, nil, nil},
		{"a secret argument", func(p *Process) { p.Args = []string{"a", "--password", "hunter22"} }, true, nil},
		{"in the command line", func(p *Process) {
			p.Args = []string{"a", "--password", "hunter22"}
			p.CommandLine = strings.Join(p.Args, " ")
		}, true, nil},
		{"of the parent", func(p *Process) {
			p.Parent.CommandLine, p.Parent.Args = "a --token=hunter222222", []string{"a", "--token=hunter222222"}
		}, true, nil},
		{"a name", func(p *Process) { p.Name = "Bearer hunter22" }, true, nil},
		{"no UTF-8", func(p *Process) { p.WorkingDir = "/tmp/\xff" }, true, nil},
		{"escaped", func(p *Process) { p.WorkingDir = "/tmp/\"\n\u2028ü" }, nil, nil},
		{"too long", func(p *Process) { p.WorkingDir = "/" + strings.Repeat("x", maxText) }, true, true},
		{"too many", func(p *Process) { p.Args = slices.Repeat([]string{"x"}, maxTexts+1) }, true, true},
	} {
		e := denied()
		e.Connection.First, e.Starts = true, e.Subjects
		c.change(e.Subjects[0])
		docs := render(t, e)
		for _, doc := range append(docs, render(t, e)...) { // and from what is kept
			if r, s := at(doc, "imdsgate.redacted"), at(doc, "imdsgate.truncated"); r != c.redacted || s != c.shortened {
				t.Errorf("%s: %s says redacted %v, truncated %v", c.name, at(doc, "event.dataset"), r, s)
			}
		}
	}
}
