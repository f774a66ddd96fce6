package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// tool finds a program of the host, or skips: test/deps.sh brings it.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%s is not here, and CI skips nothing: make deps", name)
		}
		t.Skipf("%s is not here: make deps brings it", name)
	}
	return path
}

// Every command has a page, with its text as it is printed for --help, and so has the
// configuration, with every line that shows a key.
func TestManual(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man")
	if out, code := imdsgate("man", dir, "../../packaging/config.yaml"); code != 0 {
		t.Fatal(out)
	}
	pages := 0
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		for _, c := range cmd.Commands() {
			visit(c)
		}
		if !cmd.IsAvailableCommand() && cmd.HasParent() {
			return
		}
		pages++
		text := plain(t, filepath.Join(dir, strings.ReplaceAll(cmd.CommandPath(), " ", "-")+".1"))
		for _, line := range append(strings.Split(cmd.Long, "\n"), strings.Split(cmd.Example, "\n")...) {
			line = strings.Join(strings.Fields(line), " ")
			if !strings.Contains(text, line) {
				t.Errorf("the page of %s is without %q", cmd.CommandPath(), line)
			}
		}
	}
	visit(newRoot())
	if files, err := os.ReadDir(dir); err != nil || len(files) != pages+1 {
		t.Errorf("%d files for %d commands and the configuration: %v", len(files), pages, err)
	}
	config, err := os.ReadFile("../../packaging/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := plain(t, filepath.Join(dir, "imdsgate-config.5"))
	for line := range strings.Lines(string(config)) {
		line = strings.Join(strings.Fields(line), " ")
		if !strings.Contains(text, line) && !strings.Contains(text, strings.TrimPrefix(line, "# ")) {
			t.Errorf("the page of the configuration is without %q", line)
		}
	}
}

// plain is a page without what is for the typesetter, and one blank between words.
func plain(t *testing.T, file string) string {
	t.Helper()
	groff := tool(t, "groff")
	cmd := exec.Command(groff, "-man", "-ww", "-Tutf8", "-P-c", "-P-b", "-P-u", "-rLL=9999n", "-rHY=0", file)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil || stderr.Len() > 0 {
		t.Fatalf("%s: %v\n%s", file, err, stderr.String())
	}
	text := strings.NewReplacer("‐", "-", "−", "-", "’", "'", "‘", "`", "“", `"`, "”", `"`).Replace(stdout.String())
	return strings.Join(strings.Fields(text), " ")
}

func TestDaemonManual(t *testing.T) {
	text := plain(t, "../../packaging/imdsgated.8")
	main, err := os.ReadFile("../imdsgated/main.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(main), "\n") {
		for _, call := range []string{"flags.String(\"", "flags.Bool(\"", "flags.Func(\""} {
			if _, rest, ok := strings.Cut(line, call); ok {
				if name, _, _ := strings.Cut(rest, `"`); !strings.Contains(text, "-"+name) {
					t.Errorf("imdsgated(8) is without -%s", name)
				}
			}
		}
	}
}

// The completions are scripts that their shells can read.
func TestCompletions(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		t.Run(shell, func(t *testing.T) {
			script, code := imdsgate("completion", shell)
			if code != 0 || len(script) < 1000 {
				t.Fatal(code, script)
			}
			path := tool(t, shell)
			file := filepath.Join(t.TempDir(), "imdsgate")
			if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(path, "-n", file).CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	out, code := imdsgate("__complete", "test", "--format", "")
	if code != 0 || !strings.Contains(out, "junit") {
		t.Error(out)
	}
}
