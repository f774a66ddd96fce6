package eql_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql"
)

const seedFile = "seed-2025-02-credential_access_unusual_instance_metadata_service_api_request.toml"

func ownRule(t testing.TB) *eql.Query {
	t.Helper()
	src, err := os.ReadFile("testdata/rules/imds.eql")
	if err != nil {
		t.Fatal(err)
	}
	return compile(t, host, string(src))
}

// TestScenarios asks the rule in testdata what happened, by day and by night.
func TestScenarios(t *testing.T) { scenarios(t, ownRule(t)) }

// TestScenariosOfTheSeed asks the rule that ours restates.
func TestScenariosOfTheSeed(t *testing.T) {
	src, ok := elasticRules(t)[seedFile]
	if !ok {
		t.Fatalf("no %s", seedFile)
	}
	scenarios(t, compile(t, host, src))
}

// TestScenariosOfThePack asks the rule that is shipped.
func TestScenariosOfThePack(t *testing.T) {
	var f struct{ Rule struct{ Query string } }
	readTOML(t, "../rules/odd-client.toml", &f)
	scenarios(t, compile(t, host, f.Rule.Query))
}

func scenarios(t *testing.T, q *eql.Query) {
	data, err := os.ReadFile("testdata/rules/imds.scenarios")
	if err != nil {
		t.Fatal(err)
	}
	var title string
	var events []*event
	for i, line := range strings.Split(string(data), "\n") {
		switch {
		case line == "", line[0] == '#':
		case line[0] == '\t':
			e, err := scenario(len(events)+1, strings.TrimSpace(line))
			if err != nil {
				t.Fatalf("line %d: %v", i+1, err)
			}
			events = append(events, e)
		case strings.HasPrefix(line, "=>"):
			if got, want := matchList(observe(q.NewMachine(0), events)), strings.TrimSpace(line[2:]); got != want {
				t.Errorf("%s: got %q, want %q", title, got, want)
			}
			events = nil
		default:
			title = line
		}
	}
}

// scenario reads one event.
func scenario(id int, line string) (*event, error) {
	kind, rest, _ := strings.Cut(line, " ")
	e := map[string]string{
		"host.id":                  "i-1",
		"host.os.type":             "linux",
		"process.parent.entity_id": "bash",
		"process.entity_id":        "child",
		"process.name":             "curl",
		"process.executable":       "/usr/bin/curl",
	}
	switch kind {
	case "exec", "fork":
		e["event.category"], e["event.type"], e["event.action"] = "process", "start", kind
		e["process.command_line"] = "curl http://169.254.169.254/latest/meta-data/"
		e["process.working_directory"] = "/root"
		e["process.parent.executable"] = "/usr/bin/bash"
	case "connect":
		e["event.category"], e["event.action"], e["destination.ip"] = "network", "connection_attempted", "169.254.169.254"
	default:
		return nil, fmt.Errorf("%q is not exec, fork or connect", kind)
	}
	at := time.Duration(0)
	for rest != "" {
		var word string
		word, rest, _ = strings.Cut(rest, " ")
		name, v, _ := strings.Cut(word, "=")
		if strings.HasPrefix(v, `"`) {
			more, after, _ := strings.Cut(rest, `"`)
			v, rest = v[1:]+" "+more, strings.TrimSpace(after)
		}
		if ms, ok := strings.CutPrefix(word, "@"); ok {
			n, err := strconv.Atoi(ms)
			if err != nil {
				return nil, err
			}
			at = time.Duration(n) * time.Millisecond
			continue
		}
		if name == "parent" {
			name = "process.parent.entity_id"
		}
		if _, ok := host[name]; !ok {
			return nil, fmt.Errorf("no field %s", name)
		}
		e[name] = v
	}
	plain := map[string][]any{}
	for name, v := range e {
		if v == "" {
			continue
		}
		p, err := parseValue(v, host[name].Type)
		if err != nil {
			return nil, err
		}
		plain[name] = []any{p}
	}
	event := newEvent(host, plain)
	event.id, event.at = id, epoch.Add(at)
	return event, nil
}

// TestSeedWithoutExclusions: no working directory and no name of a parent or of
// itself helps a process against the rule that blocks it.
func TestSeedWithoutExclusions(t *testing.T) {
	chosen := func(field string) bool {
		switch field {
		case "process.working_directory", "process.executable", "process.parent.executable", "process.command_line":
			return true
		}
		return false
	}
	strict, out := ownRule(t).WithoutExclusions(chosen)
	if len(out) != 3 {
		t.Errorf("removed %v", out)
	}
	for _, line := range []string{
		"exec process.working_directory=/opt/rapid7",
		"exec process.parent.executable=/usr/sbin/dhclient-script",
		"exec process.parent.executable=",
	} {
		e, err := scenario(1, line)
		if err != nil {
			t.Fatal(err)
		}
		if ownRule(t).Stages()[0].Match(e) || !strict.Stages()[0].Match(e) {
			t.Errorf("%s: should match only without the exclusions", line)
		}
	}
}

func seedEvents(b *testing.B, lines ...string) []*event {
	b.Helper()
	var events []*event
	for i, line := range lines {
		e, err := scenario(i, line)
		if err != nil {
			b.Fatal(err)
		}
		events = append(events, e)
	}
	return events
}

func BenchmarkStage(b *testing.B) {
	exec, connect := ownRule(b).Stages()[0], ownRule(b).Stages()[1]
	for _, bench := range []struct {
		name  string
		stage *eql.Stage
		event string
		want  bool
	}{
		{"exec-matches", exec, "exec", true},
		{"exec-by-address", exec, `exec process.name=tool process.executable=/usr/local/bin/tool process.command_line="tool --endpoint http://169.254.169.254/latest/meta-data/"`, true},
		{"exec-ordinary", exec, `exec process.name=ls process.executable=/usr/bin/ls process.command_line="ls --color=auto -la /home/admin/projects/imdsgate"`, false},
		{"exec-excluded", exec, "exec process.working_directory=/opt/rapid7/agent", false},
		{"exec-other-category", exec, "connect", false},
		{"connect-matches", connect, "connect", true},
		{"connect-elsewhere", connect, "connect destination.ip=10.0.0.1", false},
	} {
		b.Run(bench.name, func(b *testing.B) {
			e := eql.Event(seedEvents(b, bench.event)[0])
			b.ReportAllocs()
			for b.Loop() {
				if bench.stage.Match(e) != bench.want {
					b.Fatal("wrong")
				}
			}
		})
	}
}

// later is an event that happens again.
type later struct {
	*event
	at time.Time
}

func (l later) Time() time.Time { return l.at }

// BenchmarkObserve is a busy host: of a hundred events, a millisecond apart, eighty
// are starts of programs, a quarter of which the rule looks for; of the twenty
// connections six are to the metadata service.
func BenchmarkObserve(b *testing.B) {
	var hundred []*event
	for i := range 100 {
		line := "exec process.name=sed process.executable=/usr/bin/sed process.command_line=sed"
		switch {
		case i%5 == 3 && i > 70:
			line = "connect"
		case i%5 == 3:
			line = "connect destination.ip=10.0.0.1"
		case i%4 == 0:
			line = "exec"
		}
		hundred = append(hundred, seedEvents(b, fmt.Sprintf("%s parent=p%d", line, i*7%37))...)
	}
	q := ownRule(b)
	events := make([]eql.Event, 10_000)
	for i := range events {
		events[i] = later{hundred[i%100], epoch.Add(time.Duration(i) * time.Millisecond)}
	}
	for _, bench := range []struct {
		name   string
		events []eql.Event
	}{{"ordinary", events[1:4]}, {"mixed", events}} {
		b.Run(bench.name, func(b *testing.B) {
			m := q.NewMachine(0)
			b.ReportAllocs()
			n, matches := 0, 0
			for b.Loop() {
				at := n % len(bench.events)
				if at == 0 && bench.name == "mixed" {
					m = q.NewMachine(0) // time begins anew
				}
				matches += len(m.Observe(bench.events[at]))
				n++
			}
			b.ReportMetric(float64(matches)/float64(n), "matches/op")
		})
	}
}

// BenchmarkPatterns has the shapes of patterns that rules are made of.
func BenchmarkPatterns(b *testing.B) {
	long := strings.Repeat("/usr/bin/java -cp /opt/app/lib/one.jar:/opt/app/lib/two.jar ", 20)
	e := newEvent(letters, map[string][]any{"s": {"/usr/local/bin/some-program"}, "t": {long}, "n": {int64(80)}})
	for _, bench := range []struct{ name, condition string }{
		{"equal", `s == "/usr/bin/curl"`},
		{"in", `s in ("/usr/bin/a", "/usr/bin/b", "/usr/bin/c", "/usr/bin/d")`},
		{"in-fold", `s in~ ("/usr/bin/a", "/usr/bin/b", "/usr/bin/c", "/usr/local/bin/some-thing!!")`},
		{"prefixes", `s : ("/tmp/*", "/var/tmp/*", "/dev/shm/*", "/run/*", "/srv/*")`},
		{"contains-1200-bytes", `t : ("*169.254.169.254*", "*security-credentials*", "*computeMetadata*")`},
		{"glob-1200-bytes", `t : "*java*three.jar*"`},
		{"regex", `s regex "/usr/(s?bin|lib)/.*"`},
		{"number", "n == 443"},
		{"function", "length(s) > 100"},
		{"two-fields", "startsWith(s, t)"},
	} {
		b.Run(bench.name, func(b *testing.B) {
			stage := compile(b, letters, "any where "+bench.condition).Stages()[0]
			b.ReportAllocs()
			for b.Loop() {
				if stage.Match(e) {
					b.Fatal("matches")
				}
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	src, err := os.ReadFile("testdata/rules/imds.eql")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		compile(b, host, string(src))
	}
}
