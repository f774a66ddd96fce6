package sink

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// TestJournal speaks to a socket at the place of journald's, in a mount namespace of its
// own: what should be seen arrives, once, also over a restart of either side, and
// nothing else does.
func TestJournal(t *testing.T) {
	labtest.RequireRoot(t)
	if os.Getenv("IMDSGATE_TEST_JOURNAL") == "" {
		cmd := exec.Command("unshare", "--mount", "--propagation=private", "sh", "-ec",
			`mount -t tmpfs none /run; mkdir -p /run/systemd/journal; exec "$0" -test.run='^TestJournal$' -test.v`, os.Args[0])
		cmd.Env = append(os.Environ(), "IMDSGATE_TEST_JOURNAL=yes")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestJournal") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	const socket = "/run/systemd/journal/socket"
	listen := func() *net.UnixConn {
		t.Helper()
		os.Remove(socket)
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	journald := listen()
	entry := func(want ...string) {
		t.Helper()
		buf := make([]byte, 64<<10)
		journald.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, err := journald.Read(buf)
		if err != nil {
			t.Fatalf("%v; want %q", err, want)
		}
		for _, w := range want {
			if !strings.Contains(string(buf[:n]), w+"\n") {
				t.Errorf("no %q in\n%s", w, buf[:n])
			}
		}
	}
	nothing := func() {
		t.Helper()
		buf := make([]byte, 64<<10)
		journald.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if n, err := journald.Read(buf); err == nil {
			t.Errorf("and more:\n%s", buf[:n])
		}
	}

	dir := t.TempDir()
	path, state := filepath.Join(dir, "events.ndjson"), filepath.Join(dir, "state", "cursor")
	place := func() {
		t.Helper()
		if err := os.Mkdir(filepath.Dir(state), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	place()
	f := open(t, Options{Path: path})
	defer f.Close()
	failures := make(chan error, 10)
	run := func() (stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- Journal(ctx, path, state, func(err error) { failures <- err }) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	stop := run()

	allowed := asked()
	allowed.Request.UserAgent = `"code":"IG1002"` // no client says what is seen
	denied := asked()
	denied.Decision = event.Decision{Mode: "audit", WouldBe: event.Deny, Reason: "two\nlines"}
	alert := asked()
	rule := &event.Rule{ID: "r", Name: "A rule", Severity: "high"}
	alert.Decision.Matches = []event.Match{{Rule: rule, Subject: alert.Subjects[0], Alert: true}}
	for _, e := range []*event.Event{started(1), allowed, denied, alert} {
		f.Record(e)
	}
	entry("MESSAGE=number 1", "PRIORITY=6", "IMDSGATE_ACTION=daemon-started", "SYSLOG_IDENTIFIER=imdsgated")
	entry("MESSAGE=would deny GET /latest/meta-data/instance-id for curl (pid 4711, uid 48)", "PRIORITY=4", "IMDSGATE_AUDIT_VERDICT=deny", "IMDSGATE_VERDICT=allow",
		"IMDSGATE_CLASS=inventory", "IMDSGATE_EXECUTABLE=/usr/bin/curl", "IMDSGATE_PARENT=/usr/bin/bash", "IMDSGATE_PID=4711", "IMDSGATE_UID=48", "two\nlines")
	entry("MESSAGE=A rule: /usr/bin/curl (pid 4711)", "PRIORITY=3", "IMDSGATE_RULE=A rule", "IMDSGATE_DATASET=imdsgate.alert")
	nothing()
	stop()

	f.Record(started(2))
	stop = run()
	entry("MESSAGE=number 2")
	nothing()

	journald.Close()
	f.Record(started(3))
	says := func() error {
		t.Helper()
		select {
		case err := <-failures:
			return err
		case <-time.After(5 * time.Second):
			t.Fatal("it says nothing")
			return nil
		}
	}
	if says() == nil {
		t.Error("nobody listens, and that is no failure")
	}
	journald = listen()
	defer journald.Close()
	entry("MESSAGE=number 3")
	if err := says(); err != nil {
		t.Error(err)
	}

	// Nobody can write down where it is: it goes on. It may be writing right now, so the
	// directory goes in one step.
	if err := os.Rename(filepath.Dir(state), filepath.Join(dir, "gone")); err != nil {
		t.Fatal(err)
	}
	f.Record(started(4))
	entry("MESSAGE=number 4")
	if err := says(); !errors.Is(err, ErrNotCommitted) {
		t.Error(err)
	}
	f.Record(started(5))
	entry("MESSAGE=number 5")
	place()
	if err := says(); err != nil {
		t.Error(err)
	}
	stop()
	stop = run()
	nothing()
	stop()

	// The file in which it was is gone.
	if err := os.WriteFile(state, []byte(`{"file":"gone","offset":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	stop = run()
	if err := says(); !errors.Is(err, ErrMissed) {
		t.Error(err)
	}
	entry("MESSAGE=number 1")

	// And another, while it reads that one: it says so again.
	for range 6 {
		entry()
	}
	nothing()
	line, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(path+".new", line, 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
	if err := says(); !errors.Is(err, ErrMissed) {
		t.Error(err)
	}
	stop()
	if len(failures) > 0 {
		t.Errorf("and then it says %v", <-failures)
	}
}
