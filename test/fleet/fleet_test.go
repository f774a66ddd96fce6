package fleet

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/replay"
	"github.com/imdsgate/imdsgate/policy/tune"
)

var (
	times = flag.Int("times", 1, "how many times as often programs ask: 13 for a million requests")
	keep  = flag.String("keep", "", "directory for the files of events, which stay there")
)

// configuration is of a fleet that has begun with audit mode, and has one grant: of a
// program that a thief will have start another.
const configuration = `
mode: audit
grants:
  - name: backup
    executable: /opt/backup/bin/backup-agent
    unit: backup.service
    user: backup
    classes: [credentials]
    owner: storage team
    reason: copies to S3, over IMDSv1 until it is replaced
`

// graded is what is to be proposed, with the risk.
var graded = map[string]string{
	"node in shop.service as shop":               "medium",
	"ruby in puppet.service as root":             "medium",
	"python in reports.service as reports":       "medium",
	"billing in billing.service as billing":      "medium", // over IMDSv1
	"python in crond.service as root":            "medium",
	"python in cron.service as root":             "medium",
	"python in cloud-init-local.service as root": "medium",
}

// TestWeek is a week from audit to enforce: what is recorded of a fleet is tuned, what is
// taken in batch is written, and then every request of the week is judged in enforce mode.
func TestWeek(t *testing.T) {
	f, dir := Fleet{Seed: 1, Times: *times}, t.TempDir()
	events := filepath.Join(dir, "events")
	if *keep != "" {
		events = *keep
	}
	if err := os.MkdirAll(events, 0o700); err != nil {
		t.Fatal(err)
	}
	main := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(main, []byte(configuration), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(main)
	if err != nil {
		t.Fatal(err)
	}
	before := compiled(t, c)
	begun := time.Now()
	requests, err := f.Write(events, before)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d requests made up, judged and written in %v", requests, time.Since(begun).Round(time.Millisecond))

	command, dropIn := build(t, dir), filepath.Join(dir, "50-tune.yaml")
	begun = time.Now()
	out, code := run(t, command, "tune", "--config", main, "--batch", "--owner", "platform team", "-o", dropIn, events)
	t.Logf("tuned in %v:\n%s", time.Since(begun).Round(time.Millisecond), out)
	if code != 1 {
		t.Errorf("exit status %d, and there are thefts: want 1", code)
	}
	if again, code := run(t, command, "tune", "--config", main, "--batch", "-o", dropIn, events); code != 2 || !bytes.Contains(again, []byte("--force")) {
		t.Errorf("exit status %d; the drop-in was written over:\n%s", code, again)
	}
	text, err := os.ReadFile(dropIn)
	if err != nil {
		t.Fatal(err)
	}
	with, err := c.With(dropIn, text)
	if err != nil {
		t.Fatal(err)
	}
	after := compiled(t, with)

	t.Run("proposals", func(t *testing.T) {
		out, _ := run(t, command, "tune", "--config", main, "--json", events)
		var r struct {
			Proposals []struct {
				Grant struct{ Name string }
				Risk  string
				Also  []tune.Finding `json:"also_lets_through"`
			}
			Refused, Unexplained []tune.Finding
			Readiness            tune.Readiness
		}
		if err := json.Unmarshal(out, &r); err != nil {
			t.Fatalf("%v in %.200s", err, out)
		}
		got := map[string]string{}
		for _, p := range r.Proposals {
			got[p.Grant.Name] = p.Risk
			if len(p.Also) > 0 {
				t.Errorf("%s would also let through %+v", p.Grant.Name, p.Also)
			}
		}
		if diff := cmp.Diff(graded, got); diff != "" {
			t.Errorf("proposals (-want +got):\n%s", diff)
		}
		t.Logf("%d proposals, %d refused, %d unexplained", len(r.Proposals), len(r.Refused), len(r.Unexplained))
		if len(r.Refused) > 4 || len(r.Unexplained) > 6 {
			t.Errorf("%d refused, %d unexplained: more than somebody goes through", len(r.Refused), len(r.Unexplained))
		}
		var gaps []string
		for _, g := range r.Readiness.Gaps {
			gaps = append(gaps, g.Host)
		}
		if !slices.Equal(gaps, []string{"backup-29", "worker-28"}) {
			t.Errorf("hosts with gaps: %v", gaps)
		}
	})
	judged := sync.OnceValue(func() *outcome { return enforce(f, before) })
	t.Run("enforce", func(t *testing.T) {
		was, is := judged(), enforce(f, after)
		t.Logf("blocked before:\n%safter:\n%s", was, is)
		if n := was.sum(Legitimate); n == 0 {
			t.Error("nothing legitimate was blocked before: this says little")
		}
		if n := is.sum(Legitimate); n > 0 {
			t.Errorf("%d legitimate requests are blocked", n)
		}
		if passed := is.passed[Theft]; len(passed) > 0 {
			t.Errorf("thefts get through: %v", passed)
		}
		if n := len(is.blocked[Theft]); n != 5 {
			t.Errorf("%d thefts are blocked, want 5", n)
		}
		if n := len(is.blocked[Operators]); n > 3 {
			t.Errorf("the operator has %d things to see to: %v", n, is.blocked[Operators])
		}
	})
	t.Run("replay", func(t *testing.T) {
		r, again := replay.New(replay.Options{Policy: after}), tune.New(tune.Options{Policy: after})
		eachLine(t, events, func(line []byte) error { return errors.Join(r.Line(line), again.Line(line)) })
		d := r.Diff()
		if d.New.Requests != 0 || d.Undecided.Requests != 0 || d.Opened.Requests != judged().sum(Legitimate) {
			t.Errorf("newly blocked %d, undecidable %d, newly allowed %d", d.New.Requests, d.Undecided.Requests, d.Opened.Requests)
		}
		if r := again.Report(); len(r.Proposals) > 0 { // of what was taken
			t.Errorf("proposed again: %+v", r.Proposals[0].Grant)
		}
	})
}

func compiled(t *testing.T, c config.Config) *policy.Policy {
	t.Helper()
	p, err := c.Policy()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// outcome counts by truth and actor what enforce mode does with guarded requests.
type outcome struct{ blocked, passed [Theft + 1]map[string]uint64 }

func enforce(f Fleet, p *policy.Policy) *outcome {
	var o outcome
	for i := range o.blocked {
		o.blocked[i], o.passed[i] = map[string]uint64{}, map[string]uint64{}
	}
	hosts, _ := f.size()
	for n := range hosts {
		e := policy.NewEngine(p)
		e.SetMode(policy.Enforce)
		for a := range f.Host(n) {
			e.Judge(a.Event)
			e.Observe(a.Event)
			switch {
			case a.Event.Decision.Verdict == event.Deny:
				o.blocked[a.Truth][a.Actor]++
			case a.Event.Request.Guarded:
				o.passed[a.Truth][a.Actor]++
			}
		}
	}
	return &o
}

func (o *outcome) sum(t Truth) (n uint64) {
	for _, of := range o.blocked[t] {
		n += of
	}
	return n
}

func (o *outcome) String() string {
	var b bytes.Buffer
	for i, name := range []string{"legitimate", "the operator's to see to", "theft"} {
		for _, actor := range slices.Sorted(maps.Keys(o.blocked[i])) {
			fmt.Fprintf(&b, "  %s: %s %d\n", name, actor, o.blocked[i][actor])
		}
	}
	return b.String()
}

func eachLine(t *testing.T, dir string, take func([]byte) error) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.ndjson"))
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(text) {
			if err := take(bytes.TrimSpace(line)); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
		}
	}
}

func build(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(dir, "imdsgate")
	if out, err := exec.Command("go", "build", "-o", file, "github.com/imdsgate/imdsgate/cmd/imdsgate").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return file
}

// run runs a command. With --json it returns what it prints, and else also its messages.
func run(t *testing.T, command string, args ...string) (out []byte, code int) {
	t.Helper()
	cmd := exec.Command(command, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if failed := (*exec.ExitError)(nil); err != nil && !errors.As(err, &failed) {
		t.Fatal(err)
	}
	if !slices.Contains(args, "--json") {
		stdout.Write(stderr.Bytes())
	}
	return stdout.Bytes(), cmd.ProcessState.ExitCode()
}
