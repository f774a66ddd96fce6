package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The exit status, and what is printed where, of imdsgate test.
func TestPolicyTest(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	config := write("config.yaml", "grants:\n  - {name: app, executable: /opt/app, unit: app.service, owner: o, reason: r}\n")
	const good = "cases:\n  - {name: granted, subject: {executable: /opt/app, unit: app.service}, request: GET /latest/user-data, expect: {grant: app}}\n"
	write("a_test.yaml", good)
	write("sub/b_test.yaml", good)
	write("sub/other.yaml", "not: cases\n")
	own := write("own/own_test.yaml", "policy: {posture: strict}\n"+strings.Replace(good, "{grant: app}", "deny", 1))
	failing := write("failing/c_test.yaml", strings.Replace(good, "{grant: app}", "deny", 1))
	wrong := write("wrong/d_test.yaml", "case: []\n")
	elsewhere := write("elsewhere/config.yaml", "mode: audit\n")
	broken := write("broken/config.yaml", "mode: sometimes\n")

	for _, c := range []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string
	}{
		{"beside the configuration", []string{"--config", config}, exitTrouble, "", "d_test.yaml:1:1: unknown key \"case\"; is it cases?"},
		{"a file", []string{"--config", config, filepath.Join(dir, "a_test.yaml")}, 0, "1 passed, 0 failed, in 1 file\n", ""},
		{"files once, and a directory", []string{"--config", config, filepath.Join(dir, "a_test.yaml"), filepath.Join(dir, "a_test.yaml"), filepath.Join(dir, "sub")}, 0, "2 passed, 0 failed, in 2 files\n", ""},
		{"what passes", []string{"--config", config, "-v", filepath.Join(dir, "sub")}, 0, "b_test.yaml:2: granted: GET /latest/user-data\n1 passed", ""},
		{"a failure", []string{"--config", config, failing}, exitNo, "verdict  expected deny, got allow", ""},
		{"another configuration", []string{"--config", elsewhere, filepath.Join(dir, "sub")}, exitTrouble, "", "the policy has no grant \"app\""},
		{"a broken configuration", []string{"--config", broken, filepath.Join(dir, "sub")}, exitConfig, "", "unknown mode"},
		{"a policy of its own needs none", []string{"--config", broken, own}, 0, "1 passed", ""},
		{"TAP", []string{"--config", config, "--format", "tap", failing}, exitNo, "TAP version 13\n1..1\nnot ok 1 - ", ""},
		{"JUnit", []string{"--config", config, "--format", "junit", failing}, exitNo, "<failure message=\"verdict: expected deny, got allow\"", ""},
		{"JSON", []string{"--config", config, "--json", failing}, exitNo, `"passed":0,"failed":1`, ""},
		{"no such format", []string{"--format", "xml", failing}, exitTrouble, "", "there are human, tap, junit, json"},
		{"no such file", []string{filepath.Join(dir, "none_test.yaml")}, exitTrouble, "", "none_test.yaml"},
		{"no cases there", []string{filepath.Dir(elsewhere)}, exitTrouble, "", "no files named *_test.yaml"},
		{"a wrong file", []string{"--config", config, wrong, failing}, exitTrouble, "", "unknown key"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(context.Background(), append([]string{"test"}, c.args...), &stdout, &stderr)
		if code != c.code || !strings.Contains(stdout.String(), c.stdout) || !strings.Contains(stderr.String(), c.stderr) || c.stdout == "" && stdout.Len() > 0 {
			t.Errorf("%s: exit %d, want %d\n%s\n%s", c.name, code, c.code, stdout.String(), stderr.String())
		}
	}
}
