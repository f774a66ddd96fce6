package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// recordedWeek writes events of two programs that enforce mode would refuse, seven days
// long, into a directory, and beside it a configuration. It returns both.
func recordedWeek(t *testing.T) (dir, config string) {
	t.Helper()
	return recordedWeekOf(t, "h", "/usr/bin/python3.11")
}

// recordedWeekOf is that of a host, and of a program.
func recordedWeekOf(t *testing.T, host, executable string) (dir, config string) {
	t.Helper()
	dir = t.TempDir()
	p, err := policy.Compile(policy.Config{}, []string{"credentials"})
	if err != nil {
		t.Fatal(err)
	}
	engine, text := policy.NewEngine(p), []byte(nil)
	for day := range 7 {
		for i, unit := range []string{"reports.service", "mail.service"} {
			at := time.Date(2026, 11, 2+day, 8, i, 0, 0, time.UTC)
			who := &event.Process{
				EntityID: fmt.Sprint(day, unit), PID: int64(100 + day), Start: at, Executable: executable, Name: filepath.Base(executable), Args: []string{"python3", "run.py"}, CommandLine: "python3 run.py",
				UserID: "1", RealUserID: "1", SavedUserID: "1", UserName: "u", Unit: unit, Known: true, HostVerified: true, RootOwned: true, Ancestry: "birth",
				Parent: &event.Process{EntityID: "init", PID: 1, Executable: "/usr/lib/systemd/systemd", Known: true, HostVerified: true, RootOwned: true},
			}
			ev := &event.Event{
				Host: &event.Host{ID: host, Name: "worker"}, Time: at, Attribution: event.Attribution{Level: "L2", Complete: true}, Subjects: []*event.Process{who}, Roles: []string{"connector"},
				Request: event.Request{Method: "GET", Path: "/latest/meta-data/iam/security-credentials/r", Class: "credentials", Version: "latest", Guarded: true},
			}
			engine.Judge(ev)
			for _, v := range ev.Views() {
				v.ID, v.Created = fmt.Sprintf("event-%d-%d", day, i), at
				text = append(v.AppendJSON(text), '\n')
			}
		}
	}
	config = filepath.Join(dir, "config.yaml")
	for file, text := range map[string][]byte{config: nil, filepath.Join(dir, "events.ndjson"): text} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, config
}

// tuned runs imdsgate tune, without a terminal.
func tuned(args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	code = run(context.Background(), append([]string{"tune"}, args...), &out, &errs)
	return out.String(), errs.String(), code
}

// TestTuneInteractive answers on a terminal: details and yes to one, no to the other.
func TestTuneInteractive(t *testing.T) {
	for _, test := range []struct {
		answers []string
		want    string // unit of the grant that is written; "" for no file
		code    int
		says    []string
	}{
		{[]string{"d", "yes", "n"}, "mail.service", 1, []string{"1 of 2. python in mail.service as u  [risk medium]", "command lines python3 run.py", "2 of 2.", "NOT YET"}},
		{[]string{"what?", "n", "y"}, "reports.service", 1, nil},
		{[]string{"y", "q"}, "mail.service", 1, nil},
		{[]string{"q"}, "", 1, []string{"not taken"}},
		{[]string{"y", "\x04"}, "", 2, []string{"nothing is written: the answers ended"}}, // the end of input
	} {
		dir, config := recordedWeek(t)
		out := filepath.Join(dir, "50-tune.yaml")
		master, terminal, err := pty.Open()
		if err != nil {
			t.Fatal(err)
		}
		var shown bytes.Buffer
		copied := make(chan struct{})
		go func() {
			defer close(copied)
			io.Copy(&shown, master) // ends with an error, as the terminal is closed
		}()
		for _, a := range test.answers {
			if a != "\x04" {
				a += "\n"
			}
			if _, err := io.WriteString(master, a); err != nil {
				t.Fatal(err)
			}
		}
		root := newRoot()
		root.SetArgs([]string{"tune", "--interactive", "--config", config, "-o", out, filepath.Join(dir, "events.ndjson")})
		root.SetIn(terminal)
		root.SetOut(terminal)
		root.SetErr(terminal)
		code := exitCode(root.Execute(), terminal)
		terminal.Close()
		<-copied
		master.Close()
		text, err := os.ReadFile(out)
		if code != test.code || (err == nil) != (test.want != "") || test.want != "" && !strings.Contains(string(text), "unit: "+test.want) || strings.Count(string(text), "unit:") > 1 {
			t.Errorf("%q: exit status %d, want %d; written %v:\n%s\nshown:\n%s", test.answers, code, test.code, err, text, shown.Bytes())
		}
		for _, s := range test.says {
			if !strings.Contains(strings.ReplaceAll(shown.String(), "\r\n", "\n"), s) {
				t.Errorf("%q is not shown:\n%s", s, shown.Bytes())
			}
		}
	}
}

// TestTuneBatch is what is written without questions, where to, and the exit status.
func TestTuneBatch(t *testing.T) {
	dir, configured := recordedWeek(t)
	file := filepath.Join(dir, "50-tune.yaml")
	events := filepath.Join(dir, "events.ndjson")

	if out, errs, code := tuned("--config", configured, events); code != 1 || !strings.Contains(out, "PROPOSALS") || !strings.Contains(out, "14 left") || errs != "" ||
		!strings.Contains(out, "imdsgate tune --interactive -o /etc/imdsgate/config.d/50-tune.yaml "+events) {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	if out, errs, code := tuned("--config", configured, "--batch", "--max-risk", "low", events); code != 1 || strings.Contains(out, "grants:") {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	out, errs, code := tuned("--config", configured, "--batch", dir) // the directory: its other files are no events
	if code != 0 || !strings.Contains(out, "grants:\n") || strings.Contains(out, "PROPOSALS") || !strings.Contains(errs, "PROPOSALS") {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	if out, errs, code := tuned("--config", configured, "--batch", "-o", file, events); code != 0 || !strings.Contains(errs, "written with 2 of 2 proposals") ||
		!strings.Contains(out, "put "+file+" into /etc/imdsgate/config.d") || !strings.Contains(out, "imdsgate replay --actual /var/log/imdsgate\n") || strings.Contains(out, "--interactive") {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	before, err := os.ReadFile(file)
	if err != nil || string(before) != out {
		t.Errorf("%v: %s", err, before)
	}
	if formatted, err := config.Format(file, before); err != nil || !bytes.Equal(formatted, before) {
		t.Errorf("imdsgate fmt would write it otherwise: %v\n%s", err, formatted)
	}
	if out, errs, code := tuned("--config", configured, "--batch", "-o", "-", events); code != 0 || out != string(before) || !strings.Contains(errs, "PROPOSALS") {
		t.Errorf("-o -: %d\n%s\n%s", code, out, errs)
	}
	linked := filepath.Join(t.TempDir(), "linked.ndjson")
	if err := os.Symlink(events, linked); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", filepath.Join(filepath.Dir(linked), "endless.ndjson")); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := tuned("--config", configured, "--batch", filepath.Dir(linked)); code != 0 || out != string(before) {
		t.Errorf("a link in a directory: %d\n%s\n%s", code, out, errs)
	}
	// It is there already, and stays as it is.
	if _, errs, code := tuned("--config", configured, "--batch", "--max-risk", "low", "-o", file, events); code != 2 || !strings.Contains(errs, "is there already") {
		t.Errorf("%d, %s", code, errs)
	}
	if _, errs, code := tuned("--config", file, "--batch", "--force", "-o", file, events); code != 2 || !strings.Contains(errs, "would be lost") {
		t.Errorf("%d, %s", code, errs)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(before, after) {
		t.Errorf("%v: %s", err, after)
	}
	// With it nothing is left.
	if out, errs, code := tuned("--config", file, "--batch", "-o", filepath.Join(dir, "none.yaml"), events); code != 0 || strings.Contains(out, "PROPOSALS") || !strings.Contains(out, "imdsgate mode set enforce") {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	if out, errs, code := tuned("--config", file, "--since", "2026-11-05", events); code != 0 || !strings.Contains(out, "NEXT\n   imdsgate tune "+events+"\n       again when") || strings.Contains(out, "mode set") {
		t.Errorf("four days are enough: %d\n%s\n%s", code, out, errs)
	}
	if _, err := os.Stat(filepath.Join(dir, "none.yaml")); !os.IsNotExist(err) {
		t.Error("a file without grants was written")
	}
	if _, errs, code := tuned("--config", configured, "--batch", "--force", "-o", file, events); code != 0 {
		t.Errorf("%d, %s", code, errs)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".tune-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}

	elastic := filepath.Join(dir, "exceptions.ndjson")
	if _, errs, code := tuned("--config", configured, "--batch", "--format", "elastic", "-o", elastic, events); code != 0 || !strings.Contains(errs, "let nothing through") {
		t.Errorf("%d, %s", code, errs)
	}
	text, err := os.ReadFile(elastic)
	if err != nil || bytes.Count(text, []byte("\n")) != 4 || !bytes.Contains(text, []byte(`"expire_time":"2027-02-06T23:59:59.000Z"`)) {
		t.Errorf("%v: %s", err, text)
	}
}

// TestTuneGroup: the group that may read the configuration may read what is added to it.
func TestTuneGroup(t *testing.T) {
	labtest.RequireRoot(t)
	dir, config := recordedWeek(t)
	dropIns := filepath.Join(dir, "config.d")
	const group = 4711
	if err := errors.Join(os.Mkdir(dropIns, 0o750), os.Chown(dropIns, 0, group)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dropIns, "50-tune.yaml")
	for _, args := range [][]string{{"--batch"}, {"--batch", "--force"}} {
		if _, errs, code := tuned(append(args, "--config", config, "-o", file, filepath.Join(dir, "events.ndjson"))...); code != 0 {
			t.Fatalf("%v: %d, %s", args, code, errs)
		}
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 0 || owner.Gid != group || info.Mode() != 0o640 {
			t.Errorf("%v: %v %d:%d", args, info.Mode(), owner.Uid, owner.Gid)
		}
	}
}

// TestTuneReadiness is the verdict alone.
func TestTuneReadiness(t *testing.T) {
	dir, config := recordedWeek(t)
	out, _, code := tuned("--config", config, "--readiness", filepath.Join(dir, "events.ndjson"))
	if code != 1 || !strings.HasPrefix(out, "READINESS\n   7 days seen, 2026-11-02 to 2026-11-08, 14 requests of 1 host\n") || !strings.Contains(out, "14 requests for which a proposal was not taken") {
		t.Errorf("%d\n%s", code, out)
	}
	out, _, code = tuned("--config", config, "--readiness", "--json", "--batch", filepath.Join(dir, "events.ndjson"))
	var a struct {
		Left    *uint64
		Classes []struct{ Safe bool }
	}
	if err := json.Unmarshal([]byte(out), &a); err != nil || code != 0 || a.Left == nil || *a.Left != 0 || len(a.Classes) != 1 || !a.Classes[0].Safe {
		t.Errorf("%v, %d\n%s", err, code, out)
	}
}

// TestTuneWrong is what a user gets wrong, and what files have in them.
func TestTuneWrong(t *testing.T) {
	dir, config := recordedWeek(t)
	events := filepath.Join(dir, "events.ndjson")
	empty, torn := t.TempDir(), filepath.Join(t.TempDir(), "torn.ndjson")
	text, err := os.ReadFile(events)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(torn, text[:len(text)-300], 0o600); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.ndjson")
	if err := os.WriteFile(other, []byte(`{"data_stream":{"dataset":"nginx.access"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want string
		code int
	}{
		{nil, "which events?", 2},
		{[]string{"--interactive", "-o", "x", events}, "standard input is none", 2},
		{[]string{"--interactive", "--batch", events}, "choose one", 2},
		{[]string{"-o", "x", events}, "choose with --interactive", 2},
		{[]string{"--batch", "--max-risk", "high", events}, "taken one by one", 2},
		{[]string{"--format", "xml", events}, `unknown format "xml"`, 2},
		{[]string{"--format", "elastic", events}, "writes what is taken", 2},
		{[]string{"--batch", "--json", "-o", "x", events}, "leave out one", 2},
		{[]string{"--min-days", "0", events}, "at least 1", 2},
		{[]string{"--batch", "-o", filepath.Join(dir, "none", "x.yaml"), filepath.Join(dir, "no.ndjson")}, "look for where to write", 2}, // before anything is read
		{[]string{"--since", "tomorrow", events}, "--since", 2},
		{[]string{filepath.Join(dir, "no.ndjson")}, "no such file", 2},
		{[]string{empty}, "has no files of events", 2},
		{[]string{config}, "", 2}, // an empty file
		{[]string{other}, "no events of imdsgate", 2},
		{[]string{torn}, "1 bad line was left out", 1},
	} {
		if out, errs, code := tuned(append([]string{"--config", config}, test.args...)...); code != test.code || !strings.Contains(errs, test.want) {
			t.Errorf("%q: exit status %d, want %d\n%s\n%s", test.args, code, test.code, out, errs)
		}
	}
}

// TestPrinterText is about names that would do something to a terminal, or be a line of
// the report.
func TestPrinterText(t *testing.T) {
	var b bytes.Buffer
	p := &printer{w: &b}
	p.text("who  %s", "/tmp/x\x1b[2J\nPROPOSALS")
	if want := "who  /tmp/x\uFFFD[2J\uFFFDPROPOSALS\n"; b.String() != want || p.err != nil {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

// TestTuneExecutables has the hashes and packages of programs where the events are this
// host's, and not where they are another's.
func TestTuneExecutables(t *testing.T) {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		t.Fatal(err)
	}
	const program = "/usr/bin/env"
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%x", sha256.Sum256(text))
	for host, here := range map[string]bool{strings.TrimSpace(string(id)): true, "another": false} {
		dir, config := recordedWeekOf(t, host, program)
		out, errs, _ := tuned("--config", config, dir)
		if !strings.Contains(out, program) || strings.Contains(out, want) != here {
			t.Errorf("%s: %s%s", host, out, errs)
		}
		out, errs, _ = tuned("--config", config, "--json", dir)
		var r struct {
			Proposals []struct {
				SHA256   map[string]string
				Packages map[string]string
			}
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.Proposals) == 0 {
			t.Fatalf("%v: %s%s", err, out, errs)
		}
		for _, p := range r.Proposals {
			if p.SHA256[program] == want != here || p.Packages[program] == "coreutils" != here {
				t.Errorf("%s: %+v", host, p)
			}
		}
	}
}
