package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// hostImage is the root of a host with a program of root's, and others.
func hostImage(t *testing.T) (root string) {
	t.Helper()
	labtest.RequireRoot(t)
	root = t.TempDir()
	for _, f := range []struct {
		path  string
		mode  os.FileMode
		owner int
	}{
		{"/opt/app", 0o755, 0},
		{"/opt/open", 0o757, 0},
		{"/opt/theirs", 0o755, 1000},
		{"/opt/data", 0o644, 0},
		{"/srv/wide/app", 0o755, 0},
		{"/usr/bin/python3.11", 0o755, 0},
		{"/usr/sbin/cron", 0o755, 0},
		{"/snap/app/12/app", 0o755, 0},
	} {
		path := filepath.Join(root, f.path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, f.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, f.owner, 0); err != nil {
			t.Fatal(err)
		}
	}
	for path, mode := range map[string]os.FileMode{"/srv/wide": 0o777, "/": 0o755} {
		if err := os.Chmod(filepath.Join(root, path), mode); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{"/bin": "usr/bin", "/opt/link": "/opt/app", "/opt/worker": "../usr/bin/python3.11", "/opt/loop": "loop", "/opt/out": "../../../../../opt/app"} {
		if err := os.Symlink(to, filepath.Join(root, from)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestCheckFiles(t *testing.T) {
	root := hostImage(t)
	for _, c := range []struct {
		name, grant string
		exit        int
		says        []string
	}{
		{"root's own", "executable: /opt/app, unit: app.service", 0, []string{"ok: mode audit"}},
		{"with a parent", "executable: /opt/app, unit: app.service, parent: /usr/sbin/cron", 0, []string{"ok"}},
		{"not there", "executable: /opt/none, unit: app.service", 0, []string{":2:25: warning: /opt/none does not exist", "0 errors, 1 warning"}},
		{"writable by all", "executable: /opt/open, unit: app.service", 1, []string{":2:25: error: /opt/open is writable by others", "chmod go-w /opt/open", "^"}},
		{"another's", "executable: /opt/theirs, unit: app.service", 1, []string{"error: /opt/theirs belongs to uid 1000", "chown root"}},
		{"in a directory that all can write", "executable: /srv/wide/app, unit: app.service", 1, []string{"error: /srv/wide is writable by others", "who can change /srv/wide/app"}},
		{"a directory", "executable: /srv/wide, unit: app.service", 1, []string{"no file that can be executed"}},
		{"not executable", "executable: /opt/data, unit: app.service", 0, []string{"warning: /opt/data is not executable"}},
		{"a link", "executable: /opt/link, unit: app.service", 0, []string{"warning: /opt/link is a link", "write /opt/app"}},
		{"a link out of the root, which stays in it", "executable: /opt/out, unit: app.service", 0, []string{"write /opt/app"}},
		{"a link to itself", "executable: /opt/loop, unit: app.service", 0, []string{"cannot be looked at"}},
		{"an interpreter under another name", "executable: /opt/worker, user: app", 1, []string{"error: /opt/worker is /usr/bin/python3.11 (python)"}},
		{"a parent that all can write", "executable: /opt/app, unit: app.service, parent: /opt/open", 1, []string{"error: /opt/open is writable"}},
		{"a directory of some version", "executable: /srv/*/app, unit: app.service", 1, []string{"error: /srv/wide is writable by others"}},
		{"a version of a snap, to which a link leads, too", "executable: /snap/app/*/app, unit: app.service", 0, []string{"ok: mode audit"}},
		{"a directory of no version", "executable: /srv/x*/app, unit: app.service", 0, []string{"warning: nothing on this host is at /srv/x*/app"}},
		{"a file in a container", "executable: /opt/open, container: 0123456789ab", 0, []string{"ok"}},
		{"refused", "executable: /tmp/x, unit: app.service", 1, []string{":2:25: error: ", "every user"}},
		{"everybody's", "executable: /opt/app, executable_only: true", 0, []string{"warning: grant \"g\" is everybody's"}},
		{"expired", "executable: /opt/app, unit: app.service, expires: 2020-01-01", 0, []string{"warning: grant \"g\" has expired"}},
	} {
		file := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(file, []byte("grants:\n- {name: g, executable"+strings.TrimPrefix(c.grant, "executable")+", owner: o, reason: r}\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		out, code := imdsgate("check", "--root", root, file)
		for _, want := range c.says {
			if !strings.Contains(out, want) {
				t.Errorf("%s: does not say %q:\n%s", c.name, want, out)
			}
		}
		if code != c.exit {
			t.Errorf("%s: exit %d, want %d:\n%s", c.name, code, c.exit, out)
		}
		if _, strict := imdsgate("check", "--strict", "--root", root, file); (strict == 0) != strings.Contains(out, "ok: ") {
			t.Errorf("%s: --strict exits %d", c.name, strict)
		}
		out, _ = imdsgate("check", "--json", "--root", root, file)
		var r checkResult
		if err := json.Unmarshal([]byte(out), &r); err != nil || (r.Errors > 0) != (c.exit == 1) || len(r.Findings) != r.Errors+r.Warnings {
			t.Errorf("%s: %v %s", c.name, err, out)
		}
	}
}

// Without a file it is all that the daemon would read, and root's alone.
func TestCheckHost(t *testing.T) {
	root := hostImage(t)
	if out, code := imdsgate("check", "--root", root); code != 0 || !strings.Contains(out, "no file") {
		t.Errorf("%d %s", code, out)
	}
	etc := filepath.Join(root, "etc/imdsgate")
	if err := os.MkdirAll(filepath.Join(etc, "config.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	dropIn := filepath.Join(etc, "config.d/10.yaml")
	for path, text := range map[string]string{filepath.Join(etc, "config.yaml"): "mode: enforce\n", dropIn: "posture: strict\n"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, code := imdsgate("check", "--root", root); code != 0 || !strings.Contains(out, "ok: mode enforce") {
		t.Errorf("%d %s", code, out)
	}
	os.Chmod(dropIn, 0o666)
	if out, code := imdsgate("check", "--root", root); code != 1 || !strings.Contains(out, "10.yaml is writable by others") || !strings.Contains(out, "mode enforce") {
		t.Errorf("%d %s", code, out)
	}
	os.Chmod(dropIn, 0o644)
	if err := os.Chown(etc, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	if out, code := imdsgate("check", "--root", root); code != 1 || !strings.Contains(out, "etc/imdsgate belongs to uid 1000") {
		t.Errorf("%d %s", code, out)
	}
}

func TestCheckUnread(t *testing.T) {
	if out, code := imdsgate("check", filepath.Join(t.TempDir(), "none.yaml")); code != 2 || !strings.Contains(out, "none.yaml") {
		t.Errorf("%d %s", code, out)
	}
	if out, code := imdsgate("check", "--root", filepath.Join(t.TempDir(), "none")); code != 2 || !strings.Contains(out, "none") {
		t.Errorf("%d %s", code, out)
	}
	if out, code := imdsgate("check", t.TempDir()); code != 2 || !strings.Contains(out, "is a directory") {
		t.Errorf("%d %s", code, out)
	}
}

// All that is wrong is said in one go: with the policy, the redirect and the files.
func TestCheckAll(t *testing.T) {
	root := hostImage(t)
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("redirect: {host_port: 80, forwarded_port: 80}\nrules: {paths: [/nonexistent]}\ngrants:\n- {name: g, executable: /opt/open, unit: app, owner: o, reason: r}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, code := imdsgate("check", "--root", root, file)
	for _, want := range []string{"c.yaml:1:1: error: host_port and forwarded_port are both 80", "c.yaml:2:17: error: read rules: open /nonexistent", "c.yaml:4:42: error: \"app\" is not the whole name", "c.yaml:4:25: error: /opt/open is writable"} {
		if !strings.Contains(out, want) {
			t.Errorf("does not say %q:\n%s", want, out)
		}
	}
	if code != 2 { // since a path could not be read
		t.Errorf("exit %d", code)
	}
}

func TestFmt(t *testing.T) {
	dir := t.TempDir()
	file, good := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")
	const text, formatted = "mode:   audit # now\nlog:\n      level: info\n", "mode: audit # now\nlog:\n  level: info\n"
	for path, text := range map[string]string{file: text, good: formatted} {
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if out, code := imdsgate("fmt", file); out != formatted || code != 0 {
		t.Errorf("%d %q", code, out)
	}
	if out, code := imdsgate("fmt", "--check", file, good); out != file+"\n" || code != 1 {
		t.Errorf("%d %q", code, out)
	}
	if out, code := imdsgate("fmt", "-d", file, good); !strings.Contains(out, "-mode:   audit # now\n") || !strings.Contains(out, "+  level: info\n") || strings.Contains(out, good) || code != 1 {
		t.Errorf("%d %s", code, out)
	}
	if out, code := imdsgate("fmt", "-w", file, good); out != "" || code != 0 {
		t.Errorf("%d %q", code, out)
	}
	b, err := os.ReadFile(file)
	info, _ := os.Stat(file)
	if err != nil || string(b) != formatted || info.Mode().Perm() != 0o640 {
		t.Errorf("%v %v %s", err, info.Mode(), b)
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 {
		t.Errorf("%v", left)
	}
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("mdoe: audit\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, code := imdsgate("fmt", "-w", bad); code != 2 || !strings.Contains(out, "is it mode?") {
		t.Errorf("%d %s", code, out)
	}
	if b, _ := os.ReadFile(bad); string(b) != "mdoe: audit\n" {
		t.Errorf("a file that is refused was written: %s", b)
	}
}

func TestConfigVerbs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("mode: enforce\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, code := imdsgate("config", "dump", "--origin", "--config", file); code != 0 || !strings.Contains(out, "mode: enforce # "+file+":1\n") || !strings.Contains(out, "posture: default # default\n") {
		t.Errorf("%d %s", code, out)
	}
	if out, code := imdsgate("config", "dump", "--json", "--config", file); code != 0 || !json.Valid([]byte(out)) {
		t.Errorf("%d %s", code, out)
	}
	if err := os.WriteFile(file, []byte("mode: block\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, code := imdsgate("config", "dump", "--config", file); code != exitConfig || !strings.Contains(out, "c.yaml:1:7:") {
		t.Errorf("%d %s", code, out)
	}
	if out, code := imdsgate("config", "schema"); code != 0 || !json.Valid([]byte(out)) {
		t.Errorf("%d %s", code, out)
	}
}

// TestPipeAmongCases is a directory with a named pipe in it, which nobody writes to.
func TestPipeAmongCases(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a_test.yaml"), []byte("cases:\n- {name: a, subject: /usr/bin/curl, request: GET /latest/user-data, expect: deny}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "b_test.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := imdsgate("test", dir); code != 0 {
		t.Errorf("%d\n%s", code, out)
	}
}
