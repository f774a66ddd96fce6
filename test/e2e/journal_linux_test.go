package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// journald is where distributions have it; it is on no PATH.
const journald = "/lib/systemd/systemd-journald"

// keeps runs journald so that it writes to /var/log/journal at once, as after the boot,
// and to nobody's terminal.
const keeps = `mkdir -p /run/systemd/journal /run/systemd/journald.conf.d /var/log/journal
printf '[Journal]\nStorage=persistent\nReadKMsg=no\nAudit=no\nForwardToWall=no\nRateLimitIntervalSec=0\n' >/run/systemd/journald.conf.d/test.conf
: >/run/systemd/journal/flushed
[ -s /etc/machine-id ] || echo 0123456789abcdef0123456789abcdef >/etc/machine-id
exec ` + journald

// journal runs systemd's own journald beside the daemon, in whose mount namespace /run and
// /var/log are of its own, until stop.
func (h *host) journal() (stop func()) {
	h.t.Helper()
	if _, err := os.Stat(journald); err != nil {
		h.t.Fatalf("%v: it is in the package systemd", err)
	}
	cmd := h.Operator("sh", "-ec", keeps)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := h.Instance.Start(cmd); err != nil {
		h.t.Fatal(err)
	}
	return func() {
		cmd.Process.Signal(os.Interrupt) // writes what it has and ends, as on SIGTERM
		if err := cmd.Wait(); err != nil {
			h.t.Errorf("journald: %v\n%s", err, out.Bytes())
		}
	}
}

// journalctl reads what was written, and waits for so many entries.
func (h *host) journalctl(want int, match ...string) (entries []map[string]any) {
	h.t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, err := h.Operator("journalctl", append([]string{"--directory=/var/log/journal", "--output=json", "--all", "--quiet", "--no-pager"}, match...)...).Output()
		entries = nil
		for line := range bytes.Lines(out) {
			var e map[string]any
			if err := json.Unmarshal(line, &e); err != nil {
				h.t.Fatalf("%v in %s", err, line)
			}
			entries = append(entries, e)
		}
		if len(entries) >= want {
			return entries
		}
		if time.Now().After(end) {
			stderr := []byte(nil)
			if exit, ok := err.(*exec.ExitError); ok {
				stderr = exit.Stderr
			}
			h.t.Fatalf("%d entries of %q, want %d: %v %s\n%s", len(entries), match, want, err, stderr, h.Log())
		}
	}
}

// inJournal waits until status says so of what is passed on to journald.
func (h *host) inJournal(says func(report.Journal) bool) {
	h.t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		s, err := h.Status()
		switch {
		case err == nil && s.Events.Journal != nil && says(*s.Events.Journal):
			return
		case time.Now().After(end):
			h.t.Errorf("status says %+v, %v", s.Events.Journal, err)
			return
		}
	}
}

// What journald has of the daemon, over a restart of journald: what somebody should see, each once,
// as the events have it, by the daemon's user.
func TestJournald(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.startWith(gate.Settings{Config: "mode: enforce\nevents:\n  journal: true\n", Installed: true})
	stop := h.journal()
	if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
		t.Fatalf("curl got %s", got)
	}
	if got := h.curl(client{uid: ordinaryUser}, instanceID); got != "200" {
		t.Fatalf("curl got %s", got)
	}
	denied := h.journalctl(1, "IMDSGATE_DATASET=imdsgate.decision", "IMDSGATE_VERDICT=deny")[0]
	event := h.decided(role, "curl")
	for field, want := range map[string]string{
		"MESSAGE": event.At("message").(string), "PRIORITY": "4", "SYSLOG_IDENTIFIER": "imdsgated", "_UID": "61080", "_TRANSPORT": "journal",
		"IMDSGATE_EVENT_ID": event.At("event.id").(string), "IMDSGATE_EXECUTABLE": "/usr/bin/curl", "IMDSGATE_CLASS": "credentials", "IMDSGATE_PATH": role,
		"IMDSGATE_MODE": "enforce", "IMDSGATE_UID": "4321",
	} {
		if denied[field] != want {
			t.Errorf("%s is %v, want %q", field, denied[field], want)
		}
	}
	h.journalctl(1, "IMDSGATE_DATASET=imdsgate.alert", "PRIORITY=3")

	// journald is away: what happens meanwhile comes afterwards.
	stop()
	for range 2 {
		h.curl(client{uid: ordinaryUser}, role)
	}
	h.logged("takes no events")
	h.inJournal(func(j report.Journal) bool { return j.Error != "" && j.Missed == 0 })
	if e := h.doctor("--socket", h.Socket()); !strings.Contains(e.message("events-missing"), "journald") {
		t.Errorf("doctor does not say so: %s", e.text)
	}
	defer h.journal()()
	h.journalctl(3, "IMDSGATE_DATASET=imdsgate.decision", "IMDSGATE_VERDICT=deny")
	h.logged("passed on to journald again")
	h.inJournal(func(j report.Journal) bool { return j == report.Journal{} })

	seen := map[any]int{}
	for _, e := range h.journalctl(1, "SYSLOG_IDENTIFIER=imdsgated") {
		seen[e["IMDSGATE_EVENT_ID"]]++
		if strings.Contains(e["MESSAGE"].(string), instanceID) && e["IMDSGATE_DATASET"] == "imdsgate.decision" {
			t.Errorf("nobody needs to see %v", e["MESSAGE"])
		}
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("event %v is there %d times", id, n)
		}
	}
}
