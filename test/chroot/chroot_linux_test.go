// Package chroot tries packages and what is for images in a Debian of their own (tree.sh),
// a fresh one for each test: installed, upgraded and removed they leave nothing, and the
// programs that they are written for accept them. 'make test-packages' runs it, and 'make
// test' what takes no more than the tree of test/boot: to install, upgrade and remove.
package chroot

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	tree     = flag.String("tree", "", "the `directory` that tree.sh has made")
	packages = flag.String("packages", "", "the `directory` that packages.sh has made")
)

// TestMain moves to mount, network and process namespaces of its own, so that nothing is
// left mounted or running, and no script reaches this host.
func TestMain(m *testing.M) {
	flag.Parse()
	if *tree == "" || *packages == "" {
		fmt.Fprintln(os.Stderr, "test/chroot: make test-packages gives it -tree and -packages")
		os.Exit(2)
	}
	const inside = "IMDSGATE_TEST_CHROOT"
	if os.Getenv(inside) == "" {
		runtime.LockOSThread() // Pdeathsig is about the thread
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inside+"=yes")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "test/chroot:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// system is a copy of the tree that lasts as long as the test.
type system struct {
	t    *testing.T
	root string
}

// open lays a copy over the tree, with the packages in /packages and the source in /source.
func open(t *testing.T) *system {
	t.Helper()
	base := t.TempDir()
	mount := func(source, target, kind string, flags uintptr, data string) {
		t.Helper()
		if err := os.MkdirAll(target, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			t.Fatalf("mount %s on %s: %v", source, target, err)
		}
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}
	mount("tmpfs", base, "tmpfs", 0, "mode=755") // overlayfs does not lie on itself
	s := &system{t, filepath.Join(base, "root")}
	for _, dir := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(base, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount("overlay", s.root, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", *tree, base, base))
	mount("proc", filepath.Join(s.root, "proc"), "proc", 0, "")
	mount("tmpfs", filepath.Join(s.root, "dev"), "tmpfs", 0, "mode=755")
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "random": 8, "urandom": 9} {
		if err := unix.Mknod(filepath.Join(s.root, "dev", name), unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(s.root, "dev", name), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	source, err := filepath.Abs("../../packaging")
	if err != nil {
		t.Fatal(err)
	}
	mount("tmpfs", filepath.Join(s.root, "dev/shm"), "tmpfs", 0, "mode=1777")
	mount(*packages, filepath.Join(s.root, "packages"), "", unix.MS_BIND, "")
	mount(source, filepath.Join(s.root, "source"), "", unix.MS_BIND, "")
	return s
}

// try runs a script of the shell there.
func (s *system) try(script string) (string, error) {
	cmd := exec.Command("/bin/bash", "-euc", script)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "CHECKPOINT_DISABLE=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: s.root}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (s *system) run(script string) string {
	s.t.Helper()
	out, err := s.try(script)
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

func (s *system) write(path, text string) {
	s.t.Helper()
	to := filepath.Join(s.root, path)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(to, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// files are all files and links there, with type, mode, owner and what they hold, but for
// what package managers and the machine note for themselves.
func (s *system) files() map[string]string {
	s.t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(s.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, s.root)
		switch rel {
		case "/proc", "/dev", "/packages", "/source", "/run/systemd", "/var/lib/dpkg", "/var/lib/rpm", "/var/cache", "/var/log/dpkg.log", "/tmp",
			"/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/.pwd.lock", "/var/log/alternatives.log", "/root/.rpmdb":
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		owner := info.Sys().(*syscall.Stat_t)
		what := fmt.Sprintf("%s %d:%d", info.Mode(), owner.Uid, owner.Gid)
		switch {
		case d.Type() == fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " -> " + to
		case d.Type().IsRegular() && info.Size() < 1<<16:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += " " + string(b)
		case d.Type().IsRegular():
			what += fmt.Sprintf(" %d %s", info.Size(), info.ModTime())
		}
		all[rel] = what
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return all
}

// same complains of every path that was not so before, but for those that are left on purpose.
func same(t *testing.T, before, after map[string]string, left ...string) {
	t.Helper()
	paths := map[string]bool{}
	maps.Copy(paths, present(before))
	maps.Copy(paths, present(after))
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		if before[path] != after[path] && !slices.Contains(left, path) {
			t.Errorf("%s: before %.60q, now %.60q", path, before[path], after[path])
		}
	}
	for _, path := range left {
		if _, ok := after[path]; !ok {
			t.Errorf("%s is not left", path)
		}
	}
}

func present(files map[string]string) map[string]bool {
	all := map[string]bool{}
	for path := range files {
		all[path] = true
	}
	return all
}

// only is the one package of this machine's architecture whose name ends so, as it is called there.
func only(t *testing.T, suffix string) string {
	t.Helper()
	arch := runtime.GOARCH
	if suffix == ".rpm" {
		arch = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]
	}
	found, err := filepath.Glob(filepath.Join(*packages, "*"+arch+suffix))
	if err != nil || len(found) != 1 {
		t.Fatalf("*%s%s: %v, %v", arch, suffix, found, err)
	}
	return "/packages/" + filepath.Base(found[0])
}

// version is that of the packages.
func version(t *testing.T) string {
	t.Helper()
	name, _, _ := strings.Cut(strings.TrimPrefix(only(t, ".deb"), "/packages/imdsgate_"), "_")
	return name
}
