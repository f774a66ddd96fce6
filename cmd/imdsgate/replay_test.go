package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

const (
	withGrant = `mode: audit
grants:
  - {name: backup, executable: /usr/bin/python3, unit: backup.service, classes: [credentials], owner: ops, reason: copies to S3}
`
	withoutGrant = "mode: enforce\n"
)

// recordedBy are the documents of what some programs have asked for in audit mode.
func recordedBy(t *testing.T, yaml string) []byte {
	t.Helper()
	c, err := config.Parse("test", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Policy()
	if err != nil {
		t.Fatal(err)
	}
	e := policy.NewEngine(p)
	host := &event.Host{ID: "6f1c2b7a9d0e4c5f8a3b1d2e4f506172", Name: "ip-10-0-3-17", BootID: "b", AgentID: "a", Version: "test"}
	at := time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	init := &event.Process{EntityID: "init", PID: 1, Start: at, Executable: "/usr/lib/systemd/systemd", Name: "systemd", UserID: "0", Known: true, HostVerified: true, RootOwned: true}
	var lines []byte
	for i, who := range []struct{ executable, unit, args string }{
		{"/usr/bin/python3", "backup.service", "python3 /usr/local/bin/backup.py"},
		{"/usr/bin/amazon-ssm-agent", "amazon-ssm-agent.service", "amazon-ssm-agent"},
		{"/usr/bin/curl", "web.service", "curl -H X-aws-ec2-metadata-token:AQAEAOsWxG-s 169.254.169.254/x"},
	} {
		name := filepath.Base(who.executable)
		process := &event.Process{EntityID: name, PID: int64(100 + i), Start: at, Executable: who.executable, Name: name, Args: strings.Fields(who.args), CommandLine: who.args,
			UserID: "0", RealUserID: "0", SavedUserID: "0", UserName: "root", Unit: who.unit, Cgroup: "/system.slice/" + who.unit, Known: true, HostVerified: true, RootOwned: true, Ancestry: "birth", Parent: init}
		ev := &event.Event{Host: host, Time: at.Add(time.Duration(i) * time.Minute), Subjects: []*event.Process{process}, Roles: []string{"connector"},
			Connection: event.Connection{Source: netip.MustParseAddrPort("10.0.3.17:50000"), Destination: netip.MustParseAddrPort("169.254.169.254:80"), First: true, Accepted: at},
			Request: event.Request{Method: "GET", Target: "/latest/meta-data/iam/security-credentials/app", Path: "/latest/meta-data/iam/security-credentials/app",
				Class: "credentials", Guarded: true, HTTP: "1.1", Host: "169.254.169.254", UserAgent: "x", Token: true, Version: "latest"},
			Attribution: event.Attribution{Level: "L1", Confidence: "high", Via: "exact", Complete: true}, Response: event.Response{Status: 200}}
		e.Judge(ev)
		e.Observe(ev)
		for k, v := range ev.Views() {
			v.ID, v.Sequence, v.Created = fmt.Sprintf("01K%d%d", i, k), uint64(i), at
			if v.Document == event.RequestDecision {
				v.ID = "01KDECISION" + name
			} else {
				v.Related = []string{"01KPROCESS", "01KDECISION" + name}
			}
			lines = append(v.AppendJSON(lines), '\n')
		}
	}
	return lines
}

// files writes files into a directory of their own.
func files(t *testing.T, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func packed(t *testing.T, text []byte) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(text); err != nil {
		t.Fatal(err)
	}
	z.Close()
	return b.String()
}

func TestReplay(t *testing.T) {
	lines := recordedBy(t, withGrant)
	dir := files(t, map[string]string{
		"with.yaml": withGrant, "without.yaml": withoutGrant, "wrong.yaml": "mod: audit\n", "web.log": "GET / 200\n",
		"bad.ndjson": string(lines) + "{\"data_stream\":\n" + `{"message":"of somebody else"}` + "\n",
	})
	events := files(t, map[string]string{"events.ndjson.1.gz": packed(t, lines)})
	f := func(name string) string { return filepath.Join(dir, name) }
	for _, c := range []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"--policy", f("with.yaml"), events}, 0, []string{"3 requests on 1 host", "would still be refused: 1 request", "it passed, because of audit mode", "imdsgate replay --actual"}},
		{[]string{"--policy", f("without.yaml"), events}, 1, []string{"WOULD NEWLY BE REFUSED: 1 request", "/usr/bin/python3, unit backup.service, user root", `was: grant "backup"`, "now: rule ",
			`-> grant "backup" let it pass, and no grant of this policy is for the program`, "event 01KDECISIONpython3"}},
		{[]string{"--policy", f("with.yaml"), "--against", f("without.yaml"), events}, 0, []string{"would newly pass: 1 request", "compared with the other policy"}},
		{[]string{"--config", f("with.yaml"), "--actual", events}, 1, []string{"WOULD NEWLY BE REFUSED: 1 request", "/usr/bin/curl", "compared with what clients got", "imdsgate tune", "imdsgate mode set enforce"}},
		{[]string{"--config", f("with.yaml"), "--actual", "--until", "2026-11-26T08:01:30Z", events}, 0, []string{"2 requests on 1 host", "refuses nothing that clients got"}},
		{[]string{"--policy", f("with.yaml"), "--since", "2026-11-26T08:00:30Z", "--until", "2026-11-26T08:01:30Z", events}, 0, []string{"1 request on 1 host"}},
		{[]string{"--policy", f("with.yaml"), f("bad.ndjson")}, 0, []string{"bad.ndjson:", "byte 16: the line ends", "1 bad line was left out", "1 line was no document of imdsgate", "3 requests"}},
		{[]string{"--policy", f("with.yaml"), f("web.log"), events}, 2, []string{"web.log:1: byte 1: 'G' where { should be", "web.log has no events of imdsgate in it"}},
		{[]string{"--policy", f("with.yaml"), f("none.ndjson")}, 2, []string{"none.ndjson: no such file"}},
		{[]string{"--policy", f("wrong.yaml"), events}, 78, []string{"wrong.yaml", "mod"}},
		{[]string{"--policy", f("with.yaml"), "--config", f("with.yaml"), events}, 2, []string{"leave one out"}},
		{[]string{"--policy", f("with.yaml"), "--since", "soon", events}, 2, []string{"--since soon: a time as in"}},
		{[]string{"--policy", f("with.yaml"), "--since", "2026-11-27", "--until", "2026-11-26", events}, 2, []string{"not before"}},
		{[]string{"--policy", f("with.yaml"), "--against", f("with.yaml"), "--actual", events}, 2, []string{"against", "actual"}},
	} {
		got, code := imdsgate(append([]string{"replay"}, c.args...)...)
		for _, says := range c.says {
			if code != c.code || !strings.Contains(got, says) {
				t.Errorf("%v: %d, want %d and %q\n%s", c.args, code, c.code, says, got)
			}
		}
		if code > 1 && strings.Contains(got, "NEXT") {
			t.Errorf("%v: %d, it is not the whole of the answer, and says what comes next:\n%s", c.args, code, got)
		}
	}

	var d struct {
		Requests     uint64 `json:"requests"`
		NewlyBlocked struct {
			Groups []struct {
				Executable string
				After      struct{ Step, ID string }
			}
		} `json:"newly_blocked"`
	}
	got, code := imdsgate("replay", "--json", "--policy", f("without.yaml"), events)
	if err := json.Unmarshal([]byte(got), &d); err != nil || code != 1 || d.Requests != 3 || len(d.NewlyBlocked.Groups) != 1 ||
		d.NewlyBlocked.Groups[0].Executable != "/usr/bin/python3" || d.NewlyBlocked.Groups[0].After.Step != "rule" || d.NewlyBlocked.Groups[0].After.ID == "" {
		t.Errorf("%d, %v, %+v\n%s", code, err, d, got)
	}
}

// What cannot be read has no class and no path, and is named all the same.
func TestMalformedIsNamed(t *testing.T) {
	p, err := policy.Compile(policy.Config{}, []string{"credentials"})
	if err != nil {
		t.Fatal(err)
	}
	ev := &event.Event{
		Host: &event.Host{ID: "h", Name: "worker"}, Time: time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC), Attribution: event.Attribution{Level: "L2", Complete: true}, Roles: []string{"connector"},
		Subjects: []*event.Process{{EntityID: "p", PID: 100, Executable: "/usr/bin/app", Name: "app", UserID: "1", UserName: "u", Known: true, HostVerified: true, RootOwned: true, Ancestry: "birth"}},
		Request:  event.Request{Malformed: "two lengths"},
	}
	policy.NewEngine(p).Judge(ev)
	var lines []byte
	for _, v := range ev.Views() {
		v.ID, v.Created = "01KMALFORMED", ev.Time
		lines = append(v.AppendJSON(lines), '\n')
	}
	dir := files(t, map[string]string{"events.ndjson": string(lines), "config.yaml": ""})
	events, config := filepath.Join(dir, "events.ndjson"), filepath.Join(dir, "config.yaml")
	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"replay", "--policy", config, events}, []string{"1  malformed: /usr/bin/app", "e.g. event 01KMALFORMED\n", "\n(malformed) "}},
		{[]string{"tune", "--config", config, events}, []string{"for       (malformed)\n", "\n   (malformed)     NOT YET (1 requests, "}},
	} {
		got, _ := imdsgate(c.args...)
		for _, says := range c.says {
			if !strings.Contains(got, says) {
				t.Errorf("%v: no %q\n%s", c.args, says, got)
			}
		}
	}
}

// What somebody wrote into a path must not do anything to a terminal.
func TestReplayTerminal(t *testing.T) {
	line := strings.Replace(string(recordedBy(t, withGrant)), `"executable":"/usr/bin/python3","group"`, `"executable":"/tmp/\u001b[2J","group"`, 1)
	line = strings.ReplaceAll(line, "/usr/bin/python3", `/tmp/\u001b[2J`)
	dir := files(t, map[string]string{"events.ndjson": line, "without.yaml": withoutGrant})
	got, code := imdsgate("replay", "--policy", filepath.Join(dir, "without.yaml"), filepath.Join(dir, "events.ndjson"))
	if code != 1 || strings.Contains(got, "\x1b") || !strings.Contains(got, `/tmp/\x1b[2J`) {
		t.Errorf("%d\n%q", code, got)
	}
}

func TestExplain(t *testing.T) {
	lines := recordedBy(t, withGrant)
	dir := files(t, map[string]string{"with.yaml": withGrant, "without.yaml": withoutGrant})
	events := files(t, map[string]string{"events.ndjson": string(lines)})
	with, without := filepath.Join(dir, "with.yaml"), filepath.Join(dir, "without.yaml")
	alert := ""
	for line := range strings.Lines(string(lines)) {
		if strings.Contains(line, `"dataset":"imdsgate.alert"`) {
			var doc struct{ Event struct{ ID string } }
			if err := json.Unmarshal([]byte(line), &doc); err != nil {
				t.Fatal(err)
			}
			alert = doc.Event.ID
		}
	}
	made := []string{"--exe", "/usr/bin/python3", "--unit", "backups.service", "--parent", "/usr/lib/systemd/systemd"}
	for _, c := range []struct {
		args []string
		code int
		says []string
	}{
		{append(made, "--config", with), 0, []string{"DENY in enforce mode, and it is in audit mode: rule ", "├─ rule DECIDES", `"backup" misses it by: unit "backups.service"`, "(not reached)", "+ process.parent.executable != null"}},
		{append(made, "--config", with, "--exit-code"), 1, []string{"DENY"}},
		{append(made, "--config", with, "--exit-code", "--path", "/latest/meta-data/instance-id"), 0, []string{"ALLOW", "└─ class DECIDES", "(inventory, v2)"}},
		{append(made, "--config", with, "--path", "/latest/user-data", "--v1"), 0, []string{"(user-data, v1)", "class user-data"}},
		{[]string{"--exe", "/usr/bin/python3", "--unit", "backup.service", "--config", with}, 0, []string{"ALLOW", "├─ grant DECIDES", `"backup" covers it`, "forked by          nobody that is known: --parent names one"}},
		{[]string{"--exe", "/usr/bin/python3", "--unit", "backup.service", "--file", "host", "--config", with}, 0, []string{`"backup" misses it by: others than root can change the executable`}},
		{[]string{"--exe", "/opt/app", "--path", "nonsense", "--config", with}, 0, []string{"├─ malformed DECIDES"}},
		{[]string{"--exe", "/opt/app", "--file", "mine", "--config", with}, 2, []string{"root, host and other"}},
		{[]string{"--event", "01KDECISIONpython3", "--config", with, events}, 0, []string{"recorded at 2026-11-26T08:00:00Z on ip-10-0-3-17 in audit mode: allow", "ALLOW in enforce mode by this policy: granted by backup"}},
		{[]string{"--event", "01KDECISIONpython3", "--config", without, "--exit-code", events}, 1, []string{"in enforce mode allow: granted by backup", "DENY in enforce mode by this policy", "evidence           level L1"}},
		{[]string{"--event", "01KDECISIONcurl", "--config", without, "--all", events}, 0, []string{"DENY", "? process.args : ", "not recorded whole: arguments"}},
		{[]string{"--event", alert, "--config", without, events}, 0, []string{"event_id", "recorded at"}[1:]},
		{[]string{"--event", "01KNONE", "--config", with, events}, 2, []string{"no event has the id 01KNONE in "}},
		{[]string{"--event", "01KDECISIONcurl", "--exe", "/bin/sh", events}, 2, []string{"event exe"}},
	} {
		got, code := imdsgate(append([]string{"explain"}, c.args...)...)
		for _, says := range c.says {
			if code != c.code || !strings.Contains(got, says) {
				t.Errorf("%v: %d, want %d and %q\n%s", c.args, code, c.code, says, got)
			}
		}
	}
	if alert == "" {
		t.Error("no alert was written")
	}
	var x struct {
		Verdict string
		Basis   policy.Basis
		Steps   []policy.StepFinding
	}
	got, code := imdsgate(append([]string{"explain", "--json", "--config", with}, made...)...)
	if err := json.Unmarshal([]byte(got), &x); err != nil || code != 0 || x.Verdict != "deny" || x.Basis.Step != policy.StepRule || len(x.Steps) != 7 ||
		x.Steps[policy.StepGrant].Of[0].Grants[0].Missed[0] != `unit "backups.service"` {
		t.Errorf("%d, %v\n%s", code, err, got)
	}
}
