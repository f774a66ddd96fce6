// Package install tests what packaging/install.sh brings from the source, and that
// packaging/uninstall.sh takes it away again.
package install

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// tree has what install.sh reads, as 'make build' leaves it.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	repository, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(dir, "packaging"), os.DirFS(filepath.Join(repository, "packaging"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"CHANGELOG.md", "bin/third-party-licenses"} {
		text := []byte("a license\n")
		if name == "CHANGELOG.md" {
			if text, err = os.ReadFile(filepath.Join(repository, name)); err != nil {
				t.Fatal(err)
			}
		}
		os.Mkdir(filepath.Join(dir, "bin"), 0o755)
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "bin")+"/", "./cmd/imdsgated", "./cmd/imdsgate")
	build.Dir = repository
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

func script(t *testing.T, dir, name, dest string) {
	t.Helper()
	cmd := exec.Command("sh", filepath.Join(dir, "packaging", name), dest, "/usr")
	cmd.Dir = "/"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

func files(t *testing.T, root string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all = append(all, strings.TrimPrefix(path, root))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestInstall(t *testing.T) {
	dir := tree(t)
	t.Run("and uninstall", func(t *testing.T) { installAndUninstall(t, dir) })
	t.Run("below another prefix", func(t *testing.T) { prefix(t, dir) })
}

func installAndUninstall(t *testing.T, dir string) {
	dest := t.TempDir()
	script(t, dir, "install.sh", dest)
	installed := files(t, dest)
	for _, want := range []string{
		"/usr/sbin/imdsgated", "/usr/bin/imdsgate", "/etc/imdsgate/config.yaml",
		"/usr/lib/systemd/system/imdsgated.service", "/usr/lib/systemd/system/imdsgated.socket", "/usr/lib/systemd/system/imdsgated-failed.service", "/usr/lib/tmpfiles.d/imdsgate.conf",
		"/usr/lib/imdsgate/profiles/amazon-ssm-agent.yaml", "/usr/lib/imdsgate/profiles/cloud-init.yaml", "/usr/lib/imdsgate/profiles/cloud-init_test.yaml",
		"/usr/share/bash-completion/completions/imdsgate", "/usr/share/zsh/site-functions/_imdsgate", "/usr/share/fish/vendor_completions.d/imdsgate.fish",
		"/usr/share/man/man1/imdsgate.1.gz", "/usr/share/man/man1/imdsgate-test.1.gz", "/usr/share/man/man1/imdsgate-profiles-list.1.gz",
		"/usr/share/man/man5/imdsgate-config.5.gz", "/usr/share/man/man8/imdsgated.8.gz",
		"/usr/share/imdsgate/grafana/imdsgate.json", "/usr/share/imdsgate/prometheus/imdsgate.rules.yaml",
	} {
		if !slices.Contains(installed, want) {
			t.Errorf("%s is not installed", want)
		}
		if info, err := os.Stat(filepath.Join(dest, want)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", want, err)
		}
	}
	// The cases that are installed pass beside the profiles.
	cases := exec.Command(filepath.Join(dest, "usr/bin/imdsgate"), "test", filepath.Join(dest, "usr/lib/imdsgate/profiles"))
	if out, err := cases.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	// Who enables it without a look refuses nobody.
	dump := exec.Command(filepath.Join(dest, "usr/bin/imdsgate"), "--config", filepath.Join(dest, "etc/imdsgate/config.yaml"), "config", "dump")
	if out, err := dump.CombinedOutput(); err != nil || !strings.Contains("\n"+string(out), "\nmode: audit\n") {
		t.Errorf("%v\n%s", err, out)
	}
	// What the version before had, and this one has not, goes.
	old, noted := filepath.Join(dest, "usr/share/man/man1/imdsgate-old.1.gz"), filepath.Join(dest, "usr/lib/imdsgate/installed")
	list, err := os.ReadFile(noted)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(old, nil, 0o644), os.WriteFile(noted, append(list, "/usr/share/man/man1/imdsgate-old.1.gz\n"...), 0o644)); err != nil {
		t.Fatal(err)
	}
	// The operator's configuration does not.
	config := filepath.Join(dest, "etc/imdsgate/config.yaml")
	dropIns := filepath.Join(dest, "etc/imdsgate/config.d") // which dpkg takes away, if it is empty
	if err := errors.Join(os.WriteFile(config, []byte("mode: enforce\n"), 0o640), os.Remove(dropIns)); err != nil {
		t.Fatal(err)
	}
	script(t, dir, "install.sh", dest)
	if b, err := os.ReadFile(config); err != nil || string(b) != "mode: enforce\n" {
		t.Errorf("the configuration: %q, %v", b, err)
	}
	if info, err := os.Stat(dropIns); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("%s: %v", dropIns, err)
	}
	if again := files(t, dest); !slices.Equal(again, installed) {
		t.Errorf("a second time there are %d files, and not %d", len(again), len(installed))
	}
	for range 2 {
		script(t, dir, "uninstall.sh", dest)
		if left := files(t, dest); !slices.Equal(left, []string{"/etc/imdsgate/config.yaml"}) {
			t.Errorf("left: %v", left)
		}
		for _, dir := range []string{"usr/lib/imdsgate", "usr/share/imdsgate", "usr/share/doc/imdsgate"} {
			if _, err := os.Stat(filepath.Join(dest, dir)); err == nil {
				t.Errorf("/%s is left, and empty", dir)
			}
		}
	}
}

// Below another prefix the units name the programs that are there.
func prefix(t *testing.T, dir string) {
	dest := t.TempDir()
	install := exec.Command("sh", filepath.Join(dir, "packaging/install.sh"), dest, "/usr/local")
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, file := range files(t, dest) {
		if strings.HasPrefix(file, "/usr/") && !strings.HasPrefix(file, "/usr/local/") {
			t.Errorf("%s is not below /usr/local", file)
		}
	}
	unit, err := os.ReadFile(filepath.Join(dest, "usr/local/lib/systemd/system/imdsgated.service"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(unit)) {
		if strings.HasPrefix(line, "Exec") && strings.Contains(strings.ReplaceAll(line, "/usr/local/", ""), "/usr/") {
			t.Errorf("%s", line)
		}
	}
}
