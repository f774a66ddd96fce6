// Package debian is for tests that boot a Debian with our package. It makes the image, and
// knows how to ask a machine that runs; what a machine is, and how a command gets into it,
// is the test's. The tests are in a directory that is two below the repository.
package debian

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// Image is what machines begin with: the tree with our package, enabled, and with asker as
// /usr/bin/amazon-ssm-agent, since a profile is about an agent of that name. It is made for
// the first machine, in a directory of its own beside the tree's root, in which layer is all
// that comes above root.
type Image struct {
	Tree   string                   // where tree.sh has put root, and recipe after it
	Needs  []string                 // further files without which there is no machine
	Target string                   // of make, which has all of them
	Files  map[string]string        // texts by their names, as Write takes them
	Add    func(layer string) error // adds more; may be nil
	Units  []string                 // that are enabled, too
	Then   string                   // for a shell in the image's directory, while merged is the whole image

	once sync.Once
	dir  string
	err  error
}

// Package is where the image has the package, too.
const Package = "/opt/imdsgate.deb"

// Sealed is a script that fails where something would be the same on all instances of an image,
// or our units would not be enabled, also where systemd applies presets at the first boot.
const Sealed = `test -e /etc/machine-id -a ! -s /etc/machine-id
test ! -e /var/lib/imdsgate -a ! -e /var/log/imdsgate -a ! -e /run/imdsgate
test -z "$(ls -A /var/log/journal 2>&-)"
! test -f /var/lib/dbus/machine-id || test -L /var/lib/dbus/machine-id
test "$(systemctl is-enabled imdsgated.socket imdsgated.service | uniq)" = enabled
systemctl preset imdsgated.socket imdsgated.service 2>/dev/null
test "$(systemctl is-enabled imdsgated.socket imdsgated.service | uniq)" = enabled
`

// Main runs the tests of a package. Before that it removes images that runs have left which
// were killed, and afterwards this one. It does not return.
func (i *Image) Main(m *testing.M) {
	for _, dir := range Left(i.Tree) {
		os.RemoveAll(dir)
	}
	code := m.Run()
	os.RemoveAll(i.dir)
	os.Exit(code)
}

// Name is one for what a run that is killed leaves behind, so that Left finds it.
func Name(of string) string { return fmt.Sprintf("imdsgate-machine-%d-%s", os.Getpid(), of) }

// Left is what has a Name in one of the directories, of runs that are over. Their machines
// have ended with them.
func Left(in ...string) (paths []string) {
	for _, dir := range in {
		named, _ := filepath.Glob(filepath.Join(dir, "imdsgate-machine-*"))
		for _, path := range named {
			var pid int
			if _, err := fmt.Sscanf(filepath.Base(path), "imdsgate-machine-%d-", &pid); err != nil {
				continue
			}
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); os.IsNotExist(err) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// Machine is a new one, which is off. Its test is skipped, or fails where the environment
// variable CI is set, unless it runs as root and has what the image needs.
func (i *Image) Machine(t testing.TB) *Machine {
	t.Helper()
	labtest.RequireRoot(t)
	for _, name := range append([]string{filepath.Join(i.Tree, "recipe")}, i.Needs...) {
		if _, err := os.Stat(name); err != nil {
			missing := fmt.Sprintf("needs %s, which make %s brings", name, i.Target)
			if os.Getenv("CI") != "" {
				t.Fatal(missing)
			}
			t.Skip(missing)
		}
	}
	i.once.Do(i.make)
	if i.err != nil {
		t.Fatal(i.err)
	}
	dir, err := os.MkdirTemp(i.dir, "machine-")
	if err != nil {
		t.Fatal(err)
	}
	m := &Machine{T: t, Image: i.dir, Dir: dir}
	t.Cleanup(func() {
		m.Off()
		if t.Failed() {
			t.Logf("the machine said:\n%s", m.Said.String())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return m
}

func (i *Image) make() {
	tree, err := filepath.Abs(i.Tree)
	if err == nil {
		i.dir, err = os.MkdirTemp(tree, Name(""))
	}
	if err == nil {
		err = i.fill()
	}
	i.err = err
}

// As whoever bakes an image does it, in a chroot.
const bake = `mount -t overlay overlay -o "lowerdir=../root,upperdir=layer,workdir=work" merged
cp "$1" merged` + Package + `
shift
chroot merged dpkg --force-confold --install ` + Package + `
chroot merged systemctl enable imdsgated.socket imdsgated.service "$@"
`

func (i *Image) fill() error {
	packed, _ := filepath.Glob("../../bin/packages/imdsgate_*_" + runtime.GOARCH + ".deb")
	if len(packed) != 1 {
		return fmt.Errorf("one package for this machine is wanted, and there are %d in bin/packages: make packages", len(packed))
	}
	deb, err := filepath.Abs(packed[0])
	if err != nil {
		return err
	}
	layer := filepath.Join(i.dir, "layer")
	if err := errors.Join(os.Mkdir(filepath.Join(i.dir, "work"), 0o755), os.Mkdir(filepath.Join(i.dir, "merged"), 0o755),
		Write(layer, i.Files), Go("build", "-o", layer+"/usr/bin/amazon-ssm-agent", "./test/debian/asker")); err != nil {
		return err
	}
	if i.Add != nil {
		if err := i.Add(layer); err != nil {
			return err
		}
	}
	cmd := exec.Command("unshare", append([]string{"--mount", "--propagation=private", "--", "sh", "-euc", bake + i.Then, "sh", deb}, i.Units...)...)
	cmd.Dir = i.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make the image: %w\n%s", err, out)
	}
	return nil
}

// Write writes texts below root, by their names. Scripts may be executed.
func Write(root string, files map[string]string) error {
	for name, text := range files {
		mode := os.FileMode(0o644)
		if strings.HasPrefix(text, "#!") {
			mode = 0o755
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(root+name), 0o755), os.WriteFile(root+name, []byte(text), mode)); err != nil {
			return err
		}
	}
	return nil
}

// Go runs go in the repository, for programs that run in the image.
func Go(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Dir, cmd.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %v: %w\n%s", args, err, out)
	}
	return nil
}
