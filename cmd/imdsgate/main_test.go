package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func imdsgate(args ...string) (out string, code int) {
	var b bytes.Buffer
	code = run(context.Background(), args, &b, &b)
	return b.String(), code
}

func TestOffline(t *testing.T) {
	dir := t.TempDir()
	events := filepath.Join(dir, "events.ndjson")
	const lines = `{"@timestamp":"2026-11-25T16:54:31.404Z","message":"denied GET /x for curl (pid 7, uid 0) by rule R","event":{"kind":"event","reason":"rule \"R\" matches"},"process":{"pid":7,"executable":"/usr/bin/curl","parent":{"executable":"/usr/bin/bash"}},"http":{"response":{"status_code":403}}}
{"@timestamp":"2026-11-25T16:54:31.404Z","message":"R","event":{"kind":"alert"},"process":{"pid":7,"executable":"/usr/bin/curl","parent":{"executable":"/usr/bin/bash"}}}
{"@timestamp":"2026-11-25T16:54:32.000Z","message":"allowed GET /c for app (pid 8, uid 5)","event":{"kind":"event","reason":"granted by app"},"process":{"pid":8,"executable":"/opt/app"},"http":{"response":{"status_code":200}},"imdsgate":{"credential":{"access_key_id":"ASIAEXAMPLEFAKE00001"},"subjects":{"pid":[8,9,8],"executable":["/opt/app","/bin/cat","/bin/sh"],"role":["connector","holder","connector"]}}}
`
	if err := os.WriteFile(events, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	const want = `2026-11-25T16:54:31.404Z  denied GET /x for curl (pid 7, uid 0) by rule R; parent /usr/bin/bash; 403
2026-11-25T16:54:31.404Z  ALERT R; /usr/bin/curl (pid 7); parent /usr/bin/bash
2026-11-25T16:54:32.000Z  allowed GET /c for app (pid 8, uid 5); holder /bin/cat (pid 9); 200; got ASIAEXAMPLEFAKE00001; granted by app
`
	if got, code := imdsgate("events", events); code != 0 || got != want {
		t.Errorf("%d\n%s", code, got)
	}
	if got, code := imdsgate("events", "-n", "1", "--json", events); code != 0 || strings.Count(got, "\n") != 1 || !strings.Contains(got, `"pid":8`) {
		t.Errorf("%d\n%s", code, got)
	}
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(events, []byte("not an event\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	hostile := filepath.Join(dir, "hostile.yaml")
	if err := os.WriteFile(hostile, []byte("foo: \"\x1b]0;x\a\x1b[2J\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "no.ndjson"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"events", events}, 2, "no event"},
		{[]string{"events", filepath.Join(dir, "none")}, 2, "none"},
		{[]string{"--socket", filepath.Join(dir, "none"), "status"}, 3, "not running"},
		{[]string{"--config", filepath.Join(dir, "none"), "status"}, 78, "none"},
		{[]string{"stauts"}, 2, "status"},
		{[]string{"--config", hostile, "decisions", "list"}, 78, "\ufffd]0;x\ufffd\ufffd[2J"},
		{[]string{"fmt", hostile}, 2, "\ufffd]0;x\ufffd\ufffd[2J"},
		{[]string{"decisions", "add", "--for", "1h", "--reason", "x"}, 2, "one of allow, deny, and not nothing, as in imdsgate decisions add allow --exe"},
		{[]string{"mode", "set", "audti", "--reason", "x"}, 2, `one of audit, enforce, off, and not "audti"`},
		{[]string{"replay", filepath.Join(dir, "no.ndjson")}, 2, "no requests to compare"},
		{[]string{"explain", "--event", "x", filepath.Join(dir, "none")}, 2, "no event has the id x: nothing could be read"},
		{[]string{"explain"}, 2, "explain --pid 4711"},
		{[]string{"explain", "--pid", "1", "--exe", "/bin/sh"}, 2, "[exe pid]"},
		{[]string{"explain", "--pid", "1", "file"}, 2, "files go with --event"},
		{[]string{"explain", "--exe", "sh"}, 2, "whole path"},
		{[]string{"replay", filepath.Join(dir, "none")}, 2, "none: no such file"},
		{[]string{"replay", dir + "/empty"}, 2, "no files of events"},
		{[]string{"explain", "--exe", "/bin/sh", "--method", "G T"}, 2, "not a method"},
		{[]string{"explain", "4711"}, 2, "explain --pid 4711"},
		{[]string{"whois"}, 2, "whois LOCAL:PORT"},
		{[]string{"events", filepath.Join(dir, "a"), filepath.Join(dir, "b")}, 2, "no such file"},
	} {
		if got, code := imdsgate(c.args...); code != c.code || !strings.Contains(got, c.says) {
			t.Errorf("%v: %d, want %d\n%s", c.args, code, c.code, got)
		}
	}
}

// Every verb says what it does and what its exit codes mean, and one that is misspelt in a
// script does not look as if it had been done.
func TestHelp(t *testing.T) {
	root := newRoot()
	for _, cmd := range root.Commands() {
		if cmd.Short == "" {
			t.Errorf("%s has no help", cmd.Name())
		}
		if cmd.HasAvailableSubCommands() {
			if got, code := imdsgate(cmd.Name(), "misspelt"); code != 2 {
				t.Errorf("%s misspelt: %d\n%s", cmd.Name(), code, got)
			}
		}
	}
	if got, code := imdsgate("redirect", "verify", "--help"); code != 0 || !strings.Contains(got, "Exit status") {
		t.Errorf("%d\n%s", code, got)
	}
}
