package replay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

var (
	base    = time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	classes = []string{"token", "credentials", "inventory"}
)

func compile(t testing.TB, c policy.Config) *policy.Policy {
	t.Helper()
	p, err := policy.Compile(c, classes)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// backup is a grant for a script that a service runs.
var backup = policy.Grant{Name: "backup", Who: policy.Who{Executable: policy.OneOrMore{"/usr/bin/python3"}, Unit: "backup.service"},
	What: policy.What{Classes: []string{"credentials"}}, Owner: "ops", Reason: "copies to S3"}

// fleet records what a policy in audit mode has done on some hosts.
type fleet struct {
	t      testing.TB
	hosts  []*event.Host
	engine *policy.Engine
	n      int
}

func newFleet(t testing.TB, hosts int, c policy.Config) *fleet {
	f := &fleet{t: t, engine: policy.NewEngine(compile(t, c))}
	for i := range hosts {
		f.hosts = append(f.hosts, &event.Host{ID: fmt.Sprintf("%032d", i), Name: fmt.Sprint("ip-10-0-0-", i), BootID: fmt.Sprint("boot-", i), AgentID: fmt.Sprint("agent-", i),
			Architecture: "x86_64", Kernel: "6.1.112-122.189.amzn2023.x86_64", OSName: "Amazon Linux", OSVersion: "2023", OSPlatform: "amzn", Version: "0.1.0"})
	}
	return f
}

// process is one that root's files make up.
func process(executable, unit string, args ...string) *event.Process {
	name := executable[strings.LastIndexByte(executable, '/')+1:]
	p := &event.Process{EntityID: "e-" + name + unit, PID: 4711, Start: base, Executable: executable, Name: name, Args: append([]string{name}, args...),
		UserID: "0", RealUserID: "0", SavedUserID: "0", UserName: "root", GroupID: "0", RealGroupID: "0", SavedGroupID: "0", GroupName: "root", WorkingDir: "/",
		Unit: unit, Cgroup: "/system.slice/" + unit, Known: true, HostVerified: true, RootOwned: true, Ancestry: "birth",
		Parent: &event.Process{EntityID: "e-init", PID: 1, Start: base, Executable: "/usr/lib/systemd/systemd", Name: "systemd", Args: []string{"/usr/lib/systemd/systemd"},
			CommandLine: "/usr/lib/systemd/systemd", UserID: "0", RealUserID: "0", SavedUserID: "0", Known: true, HostVerified: true, RootOwned: true}}
	p.CommandLine = strings.Join(p.Args, " ")
	return p
}

// record is the line of a request.
func (f *fleet) record(host int, p *event.Process, change func(*event.Event)) []byte {
	f.n++
	at := base.Add(time.Duration(f.n) * time.Second)
	ev := &event.Event{
		Host: f.hosts[host], Time: at, Roles: []string{"connector"}, Subjects: []*event.Process{p},
		Connection: event.Connection{Source: netip.MustParseAddrPort("10.0.0.1:40000"), Destination: netip.MustParseAddrPort("169.254.169.254:80"), First: true, Accepted: at},
		Request: event.Request{Method: "GET", Target: "/latest/meta-data/iam/security-credentials/app", Path: "/latest/meta-data/iam/security-credentials/app",
			Class: "credentials", Guarded: true, HTTP: "1.1", Host: "169.254.169.254", UserAgent: "Boto3/1.35.0 Python/3.11", Token: true, Version: "latest", Bytes: 180},
		Attribution: event.Attribution{Level: "L1", Confidence: "high", Via: "exact", Complete: true, Took: 90 * time.Microsecond, Cookie: 77},
		Response:    event.Response{Status: 200, Bytes: 1300}, Duration: 2 * time.Millisecond,
	}
	if change != nil {
		change(ev)
	}
	f.engine.Judge(ev)
	f.engine.Observe(ev)
	var lines []byte
	for _, v := range ev.Views() {
		v.ID, v.Sequence, v.Created = fmt.Sprintf("01KAT%d%v", f.n, v.Document), uint64(f.n), at
		lines = append(v.AppendJSON(lines), '\n')
	}
	return lines
}

// decision is its line on the verdict alone.
func (f *fleet) decision(host int, p *event.Process, change func(*event.Event)) []byte {
	for line := range strings.Lines(string(f.record(host, p, change))) {
		if strings.Contains(line, `"dataset":"imdsgate.decision"`) {
			return []byte(strings.TrimSpace(line))
		}
	}
	f.t.Fatal("no decision is written")
	return nil
}

func play(t testing.TB, r *Replay, lines ...[]byte) *Diff {
	t.Helper()
	for _, all := range lines {
		for line := range strings.Lines(string(all)) {
			if err := r.Line([]byte(strings.TrimSpace(line))); err != nil {
				t.Fatalf("%v in %s", err, line)
			}
		}
	}
	return r.Diff()
}

func inventory(ev *event.Event) {
	ev.Request.Class, ev.Request.Guarded, ev.Request.Path = "inventory", false, "/latest/meta-data/instance-id"
}

// TestDiff tries policies on what a fleet has recorded.
func TestDiff(t *testing.T) {
	granted := policy.Config{Grants: []policy.Grant{backup}}
	f := newFleet(t, 3, granted)
	python, agent := process("/usr/bin/python3", "backup.service"), process("/usr/bin/amazon-ssm-agent", "amazon-ssm-agent.service")
	curl := process("/usr/bin/curl", "web.service", "-H", "X-aws-ec2-metadata-token: AQAEAOsWxG-s", "http://169.254.169.254/latest/meta-data/iam/security-credentials/app")
	var lines [][]byte
	for host := range 3 {
		for range 4 {
			lines = append(lines, f.record(host, python, nil), f.record(host, agent, nil), f.record(host, agent, inventory))
		}
	}
	lines = append(lines, f.record(1, curl, nil), f.record(1, nil, func(ev *event.Event) {
		ev.Subjects, ev.Roles, ev.Attribution = nil, nil, event.Attribution{Level: "L0", Reason: "the socket is gone"}
	}))

	t.Run("the same", func(t *testing.T) {
		d := play(t, New(Options{Policy: compile(t, granted)}), lines...)
		if d.New.Requests+d.Opened.Requests+d.Undecided.Requests != 0 || d.Requests != 38 || d.Allowed != 36 || d.Still.Requests != 2 || d.Hosts != 3 || d.Late != 0 || d.Passed == 0 {
			t.Errorf("%+v", d)
		}
		if len(d.Still.Groups) != 2 || !d.Still.Groups[0].Passed || d.Still.Groups[0].Executable != "/usr/bin/curl" || d.Still.Groups[1].After.Step != policy.StepUnattributed {
			t.Errorf("%+v", d.Still.Groups)
		}
	})
	t.Run("enforced", func(t *testing.T) {
		d := play(t, New(Options{Policy: compile(t, granted), Actual: true}), lines...)
		if d.New.Requests != 2 || d.Still.Requests != 0 || d.Against != "actual" {
			t.Errorf("%+v", d)
		}
	})
	t.Run("a grant less", func(t *testing.T) {
		for _, against := range []*policy.Policy{nil, compile(t, granted)} {
			d := play(t, New(Options{Policy: compile(t, policy.Config{}), Against: against}), lines...)
			if d.New.Requests != 12 || len(d.New.Groups) != 1 || d.Opened.Requests != 0 || d.Undecided.Requests != 0 {
				t.Fatalf("%+v", d)
			}
			g := d.New.Groups[0]
			if g.Executable != "/usr/bin/python3" || g.Place != "unit backup.service" || g.User != "root" || g.Parent != "/usr/lib/systemd/systemd" || g.Class != "credentials" ||
				g.Before != (policy.Basis{Step: policy.StepGrant, Name: "backup"}) || g.After.Step != policy.StepRule || g.After.ID == "" || g.Hosts != 3 || len(g.HostNames) != 3 ||
				len(g.Examples) != 3 || !strings.HasPrefix(g.Examples[0], "01KAT") || !g.Last.After(g.First) || !g.Passed || len(g.Paths) != 1 || g.Nearest != nil {
				t.Errorf("%+v", g)
			}
			if i := slices.IndexFunc(d.Classes, func(c Class) bool { return c.Class == "credentials" }); d.Classes[i] != (Class{"credentials", 12, 0, 0, 2, 12}) {
				t.Errorf("%+v", d.Classes)
			}
		}
	})
	t.Run("a grant that is not quite it", func(t *testing.T) {
		almost := backup
		almost.Unit = "backups.service"
		d := play(t, New(Options{Policy: compile(t, policy.Config{Grants: []policy.Grant{almost}})}), lines...)
		if near := d.New.Groups[0].Nearest; near == nil || near.Name != "backup" || !slices.Equal(near.Missed, []string{`unit "backup.service"`}) {
			t.Errorf("%+v", near)
		}
	})
	t.Run("a grant more", func(t *testing.T) {
		more := policy.Grant{Name: "web", Who: policy.Who{Executable: policy.OneOrMore{"/usr/bin/curl"}, Unit: "web.service"}, What: policy.What{Classes: []string{"credentials"}}, Owner: "o", Reason: "r"}
		d := play(t, New(Options{Policy: compile(t, policy.Config{Grants: []policy.Grant{backup, more}})}), lines...)
		if d.Opened.Requests != 1 || d.New.Requests != 0 || d.Opened.Groups[0].After.Name != "web" || d.Opened.Groups[0].Before.Step != policy.StepRule {
			t.Errorf("%+v", d.Opened)
		}
	})
	t.Run("strict", func(t *testing.T) {
		d := play(t, New(Options{Policy: compile(t, policy.Config{Posture: policy.Strict, Grants: []policy.Grant{backup}})}), lines...)
		if d.New.Requests != 12 || d.New.Groups[0].After != (policy.Basis{Step: policy.StepClass, Name: "strict"}) {
			t.Errorf("%+v", d.New)
		}
	})
	t.Run("since and until", func(t *testing.T) {
		d := play(t, New(Options{Policy: compile(t, policy.Config{}), Since: base.Add(13 * time.Second), Until: base.Add(25 * time.Second)}), lines...)
		if d.Requests != 12 || d.New.Requests != 4 || d.Hosts != 1 {
			t.Errorf("%+v", d)
		}
	})
	t.Run("out of order", func(t *testing.T) {
		if d := play(t, New(Options{Policy: compile(t, granted)}), slices.Concat(lines, lines)...); d.Late != 0 {
			t.Errorf("%d late within what a request takes", d.Late)
		}
		f.n += 1000
		late := f.record(0, agent, nil)
		if d := play(t, New(Options{Policy: compile(t, granted)}), late, lines[0]); d.Late != 1 {
			t.Errorf("%d late", d.Late)
		}
	})
}

// TestUndecidable: where a rule looks at what was redacted, nobody can say what it would
// have found.
func TestUndecidable(t *testing.T) {
	f := newFleet(t, 1, policy.Config{})
	app := process("/opt/app/bin/app", "app.service", "--password", "hunter22")
	hidden, open := f.record(0, app, nil), f.record(0, process("/opt/app/bin/other", "app.service", "--verbose"), nil)
	if strings.Contains(string(hidden), "hunter22") {
		t.Fatal("the secret is written")
	}
	rule := writeRule(t, `process where process.args : "hunter*"`)
	d := play(t, New(Options{Policy: compile(t, policy.Config{Rules: policy.RulesConfig{Paths: []string{rule}, WithoutShipped: true}})}), hidden, open)
	if d.Undecided.Requests != 1 || d.Allowed != 1 || !strings.Contains(d.Undecided.Groups[0].Doubt, "arguments") || d.Undecided.Groups[0].Executable != "/opt/app/bin/app" {
		t.Errorf("%+v", d)
	}
	// One that fails for another reason is as certain as it was.
	rule = writeRule(t, `process where process.args : "hunter*" and process.name == "curl"`)
	if d := play(t, New(Options{Policy: compile(t, policy.Config{Rules: policy.RulesConfig{Paths: []string{rule}, WithoutShipped: true}})}), hidden, open); d.Allowed != 2 {
		t.Errorf("%+v", d)
	}
}

// TestGroups: whatever is in the files, what is remembered is bounded.
func TestGroups(t *testing.T) {
	f := newFleet(t, 1, policy.Config{Grants: []policy.Grant{backup}})
	r := New(Options{Policy: compile(t, policy.Config{Posture: policy.Strict})})
	for i := range MaxGroups + 10 {
		if err := r.Line(f.decision(0, process(fmt.Sprintf("/opt/%d/app", i), "app.service"), nil)); err != nil {
			t.Fatal(err)
		}
	}
	if d := r.Diff(); d.New.Requests != MaxGroups+10 || len(d.New.Groups) != MaxGroups || d.New.Others != 10 {
		t.Errorf("%d in %d groups, %d others", d.New.Requests, len(d.New.Groups), d.New.Others)
	}
	if err := r.Line([]byte(`{"message":"hello"}`)); !errors.Is(err, event.ErrForeign) {
		t.Error(err)
	}
}

// BenchmarkLine is an event of a fleet of thirty hosts, each with twenty programs that
// come back, and one in fifty that is new.
func BenchmarkLine(b *testing.B) {
	lines := fleetLines(b, 30, 20)
	bytes := 0
	for _, l := range lines {
		bytes += len(l)
	}
	r := New(Options{Policy: compile(b, policy.Config{})})
	for _, l := range lines {
		if err := r.Line(l); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(bytes / len(lines)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		r.Line(lines[i%len(lines)])
	}
}

// fleetLines are the decisions of some minutes.
func fleetLines(t testing.TB, hosts, programs int) [][]byte {
	f := newFleet(t, hosts, policy.Config{Grants: []policy.Grant{backup}})
	var lines [][]byte
	decision := func(host int, p *event.Process, change func(*event.Event)) {
		lines = append(lines, f.decision(host, p, change))
	}
	var all []*event.Process
	for i := range hosts * programs {
		p := process(fmt.Sprintf("/opt/service-%d/bin/agent", i%programs), fmt.Sprintf("service-%d.service", i%programs), "--config", "/etc/service/agent.yaml", "--region", "eu-central-1")
		if i%programs == 0 {
			p = process("/usr/bin/python3", "backup.service", "/usr/local/bin/backup.py")
		}
		p.EntityID, p.PID = fmt.Sprintf("%032d", i), int64(1000+i)
		all = append(all, p)
	}
	for round := range 10 {
		for i, p := range all {
			switch {
			case (round+i)%50 == 0:
				curl := process("/usr/bin/curl", "cron.service", "-s", "-H", "X-aws-ec2-metadata-token: AQAEAOsWxG-s", "http://169.254.169.254/latest/meta-data/instance-id")
				curl.EntityID, curl.PID = fmt.Sprintf("c%031d", len(lines)), int64(len(lines))
				decision(i/programs, curl, inventory)
			case round%2 == 0:
				decision(i/programs, p, inventory)
			default:
				decision(i/programs, p, nil)
			}
		}
	}
	return lines
}

func writeRule(t testing.TB, query string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rule.toml")
	src := "[rule]\nrule_id = \"r\"\nname = \"n\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = '''\n" + query + "\n'''\n"
	if err := os.WriteFile(path, []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDecisions is about what operators had decided for a time when events were recorded.
func TestDecisions(t *testing.T) {
	f := newFleet(t, 1, policy.Config{})
	python, curl := process("/usr/bin/python3", "backup.service"), process("/usr/bin/curl", "web.service")
	app := process("/opt/app/bin/app", "app.service")
	decisions, err := policy.NewDecisions([]policy.Decision{
		{ID: "let", Effect: policy.Allows, Executable: "/usr/bin/python3", Unit: "backup.service", Reason: "r", Added: base, Expires: base.Add(time.Hour)},
		{ID: "stop", Effect: policy.Denies, Unit: "app.service", Reason: "r", Added: base, Expires: base.Add(time.Hour)},
	})
	if err != nil {
		t.Fatal(err)
	}
	f.engine.SetDecisions(decisions)
	both := func(ev *event.Event) {
		ev.Subjects, ev.Roles = append(ev.Subjects, curl), []string{"connector", "holder"}
	}
	lines := [][]byte{f.record(0, python, nil), f.record(0, app, nil), f.record(0, curl, nil)}
	denied := policy.Config{Denies: []policy.Deny{{Name: "no", Who: policy.Who{Unit: "backup.service"}, Reason: "r"}}}
	for _, c := range []struct {
		config                            policy.Config
		without                           bool
		newly, opened, undecided, decided uint64
	}{
		{policy.Config{}, false, 0, 0, 0, 2},
		{policy.Config{}, true, 1, 1, 0, 2},
		{policy.Config{Grants: []policy.Grant{backup}}, true, 0, 1, 0, 2},
		{denied, false, 1, 0, 0, 2},
	} {
		d := play(t, New(Options{Policy: compile(t, c.config), WithoutDecisions: c.without}), lines...)
		if d.New.Requests != c.newly || d.Opened.Requests != c.opened || d.Undecided.Requests != c.undecided || d.Decided != c.decided {
			t.Errorf("%+v: %+v", c, d)
		}
	}
	// A decision and a grant have let this pass, and which let whom is in no record.
	g := newFleet(t, 1, policy.Config{Grants: []policy.Grant{{Name: "curl", Who: policy.Who{Executable: policy.OneOrMore{"/usr/bin/curl"}, Unit: "web.service", User: "root"},
		What: policy.What{Classes: []string{"credentials"}}, Owner: "o", Reason: "r"}}})
	g.engine.SetDecisions(decisions)
	line := g.record(0, python, both)
	all := policy.Config{Grants: append(g.engine.Policy().Grants(), backup)}
	if d := play(t, New(Options{Policy: compile(t, all)}), line); d.Allowed != 1 || d.Decided != 1 {
		t.Errorf("%+v", d)
	}
	if d := play(t, New(Options{Policy: compile(t, policy.Config{})}), line); d.Undecided.Requests != 1 {
		t.Errorf("%+v", d)
	}
}
