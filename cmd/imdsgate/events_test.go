package main

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// requests is a file of events, as the daemon writes it: one a minute from base on.
func requests(t *testing.T) string {
	t.Helper()
	host := &event.Host{ID: "host", Name: "h"}
	rule := &event.Rule{ID: "rule-id", Name: "A rule", Severity: "low"}
	var text []byte
	for i, c := range []struct {
		name, user, class string
		wouldBe, verdict  event.Verdict
		matched           bool
	}{
		{"curl", "root", "credentials", event.Deny, event.Allow, true},
		{"curl", "www-data", "inventory", event.Allow, event.Allow, false},
		{"agent", "root", "credentials", event.Allow, event.Allow, true},
		{"nc", "www-data", "userdata", event.Deny, event.Deny, false},
	} {
		e := &event.Event{Host: host, Time: time.Date(2026, 11, 23, 18, i, 0, 0, time.UTC),
			Subjects:   []*event.Process{{PID: int64(100 + i), Name: c.name, Executable: "/usr/bin/" + c.name, UserID: fmt.Sprint(i), UserName: c.user, Known: true}},
			Connection: event.Connection{Source: netip.MustParseAddrPort("10.0.0.1:1"), Destination: netip.MustParseAddrPort("169.254.169.254:80")},
			Request:    event.Request{Method: "GET", Path: fmt.Sprint("/", i), Class: c.class},
			Decision:   event.Decision{Verdict: c.verdict, WouldBe: c.wouldBe}}
		e.Starts, e.Connection.First = e.Subjects, i == 0 // which people are not shown
		if i > 0 {
			e.Starts = nil
		}
		if c.matched {
			e.Decision.Matches = []event.Match{{Rule: rule}}
		}
		for _, v := range e.Views() {
			v.ID, v.Created = fmt.Sprint(i), e.Time
			text = append(v.AppendJSON(text), '\n')
		}
	}
	return writeFile(t, "events.ndjson", string(text))
}

func eventsRun(stdin string, args ...string) (stdout, stderr string, code int) {
	var out, err bytes.Buffer
	if stdin != "" {
		was := os.Stdin
		r, w, _ := os.Pipe()
		w.WriteString(stdin)
		w.Close()
		os.Stdin = r
		defer func() { os.Stdin = was }()
	}
	code = run(context.Background(), append([]string{"events"}, args...), &out, &err)
	return out.String(), err.String(), code
}

func TestEventsFilter(t *testing.T) {
	path := requests(t)
	for args, want := range map[string]string{
		"":                                   "0123",
		"-n 1":                               "3",
		"--verdict would-deny":               "0",
		"--verdict deny":                     "3",
		"--verdict allow":                    "12",
		"--class credentials":                "02",
		"--class credentials -n 3":           "2",
		"--process curl --user www-data":     "1",
		"--process /usr/bin/nc":              "3",
		"--process 102":                      "2",
		"--user 3":                           "3",
		"--rule rule-id":                     "02",
		"--since 2026-11-23T18:01:00Z":       "123",
		"--until 2026-11-23T19:01:00+01:00":  "01",
		"--class credentials --verdict deny": "",
		"--since 1m":                         "",
		"--process curl --since 876000h":     "01",
	} {
		out, stderr, code := eventsRun("", append(strings.Fields(args), path)...)
		got := ""
		for line := range strings.Lines(out) {
			_, rest, _ := strings.Cut(line, "GET /")
			got += rest[:1]
		}
		if got != want || code != 0 {
			t.Errorf("%s: %q, want %q (exit %d, %s)", args, got, want, code, stderr)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if out, stderr, code := eventsRun(string(text), "--json", "--verdict", "deny", "-"); code != 0 || strings.Count(out, "\n") != 1 || !strings.Contains(string(text), out) {
		t.Errorf("of standard input: %q, exit %d, %s", out, code, stderr)
	}
	for args, want := range map[string]string{
		"--verdict no":     "would-deny",
		"--class secrets":  "credentials",
		"--since tomorrow": "how long ago",
	} {
		if _, stderr, code := eventsRun("", append(strings.Fields(args), path)...); code == 0 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit %d, %s", args, code, stderr)
		}
	}
	if _, stderr, code := eventsRun("", "--class", "token", writeFile(t, "bad", "no event\n")); code == 0 || !strings.Contains(stderr, "no event") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// Each run with a cursor shows what came since the last.
func TestEventsCursor(t *testing.T) {
	path, cursor := requests(t), filepath.Join(t.TempDir(), "cursor")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	run := func(want int, complaint string) {
		t.Helper()
		out, stderr, code := eventsRun("", "--json", "--cursor", cursor, path)
		if code != 0 || strings.Count(out, "\n") != want || !strings.Contains(stderr, complaint) || complaint == "" && stderr != "" {
			t.Errorf("%d events, want %d; exit %d, %s", strings.Count(out, "\n"), want, code, stderr)
		}
	}
	run(6, "")
	run(0, "")
	more := bytes.ReplaceAll(text, []byte(`"id":"0"`), []byte(`"id":"4"`))
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, more, 0o600); err != nil {
		t.Fatal(err)
	}
	run(6, "")
	os.Remove(path + ".1")
	if err := os.WriteFile(path, bytes.ReplaceAll(text, []byte(`"id":"0"`), []byte(`"id":"8"`)), 0o600); err != nil {
		t.Fatal(err)
	}
	run(6, "events are missing")
}
