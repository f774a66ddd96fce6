// Package install tests what packaging/install.sh brings, and that packaging/uninstall.sh
// takes it away again.
package install

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// tree is a copy of what install.sh reads, with binaries of its own.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	repository, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(repository, "packaging"), filepath.Join(dir, "packaging")); err != nil {
		t.Fatal(err)
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

func TestInstallAndUninstall(t *testing.T) {
	dir, dest := tree(t), t.TempDir()
	script(t, dir, "install.sh", dest)
	installed := files(t, dest)
	for _, want := range []string{
		"/usr/sbin/imdsgated", "/usr/bin/imdsgate", "/etc/imdsgate/config.yaml",
		"/usr/lib/systemd/system/imdsgated.service", "/usr/lib/systemd/system/imdsgated.socket", "/usr/lib/systemd/system/imdsgated-failed.service", "/usr/lib/tmpfiles.d/imdsgate.conf",
		"/usr/lib/imdsgate/profiles/amazon-ssm-agent.yaml", "/usr/lib/imdsgate/profiles/cloud-init.yaml", "/usr/lib/imdsgate/profiles/cloud-init_test.yaml",
		"/usr/share/bash-completion/completions/imdsgate", "/usr/share/zsh/site-functions/_imdsgate", "/usr/share/fish/vendor_completions.d/imdsgate.fish",
		"/usr/share/man/man1/imdsgate.1", "/usr/share/man/man1/imdsgate-test.1", "/usr/share/man/man1/imdsgate-profiles-list.1",
		"/usr/share/man/man5/imdsgate-config.5", "/usr/share/man/man8/imdsgated.8",
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
	script(t, dir, "install.sh", dest) // over itself
	if again := files(t, dest); !slices.Equal(again, installed) {
		t.Errorf("a second time there are %d files, and not %d", len(again), len(installed))
	}
	for range 2 {
		script(t, dir, "uninstall.sh", dest)
		if left := files(t, dest); !slices.Equal(left, []string{"/etc/imdsgate/config.yaml"}) {
			t.Errorf("left: %v", left)
		}
		if _, err := os.Stat(filepath.Join(dest, "usr/lib/imdsgate")); err == nil {
			t.Error("/usr/lib/imdsgate is left, and empty")
		}
	}
}
