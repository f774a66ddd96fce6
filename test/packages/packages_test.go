// Package packages tests what packaging/packages.sh makes: that it makes the same bytes
// anywhere, that deb, rpm and tarball bring the same files, and that those for another
// machine are for that one.
package packages

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const version = "1.2.3~rc.1+4.gabcdef0"

// machine is one of those that there are packages for.
type machine struct {
	arch, rpm, qemu string // as Go, rpm and qemu call it
	elf             elf.Machine
}

var machines = []machine{{"amd64", "x86_64", "x86_64", elf.EM_X86_64}, {"arm64", "aarch64", "aarch64", elf.EM_AARCH64}}

// build copies the source to a directory of its own, and makes the packages there.
func build(t *testing.T, dir string) string {
	t.Helper()
	list := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = "../.."
	names, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		b, err := os.ReadFile(filepath.Join("../..", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed, and not yet committed
		}
		info, statErr := os.Stat(filepath.Join("../..", name))
		to := filepath.Join(dir, name)
		if err := errors.Join(err, statErr, os.MkdirAll(filepath.Dir(to), 0o755)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, info.Mode()); err != nil {
			t.Fatal(err)
		}
	}
	run(t, dir, []string{"VERSION=" + version, "SOURCE_DATE_EPOCH=1700000000"}, filepath.Join(dir, "packaging/packages.sh"))
	return filepath.Join(dir, "bin/packages")
}

func run(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", cmd, err, out, stderr.Bytes())
	}
	return string(out)
}

func TestPackages(t *testing.T) {
	out := build(t, filepath.Join(t.TempDir(), "here"))
	t.Run("reproducible", func(t *testing.T) {
		again := build(t, filepath.Join(t.TempDir(), "a longer way", "to there"))
		if diff := cmp.Diff(sums(t, out), sums(t, again)); diff != "" {
			t.Errorf("a second build from another directory (-here +there):\n%s", diff)
		}
	})
	t.Run("sums", func(t *testing.T) {
		checked := run(t, out, nil, "sha256sum", "--check", "--strict", "SHA256SUMS")
		if n := strings.Count(checked, ": OK\n"); n != len(sums(t, out))-1 {
			t.Errorf("%d files have a sum, of %d", n, len(sums(t, out))-1)
		}
	})
	var files []map[string]file
	for _, m := range machines {
		t.Run(m.arch, func(t *testing.T) {
			root := t.TempDir()
			run(t, "", nil, "dpkg-deb", "--extract", m.only(t, out, ".deb"), root)
			t.Run("contents", func(t *testing.T) { files = append(files, m.contents(t, out)) })
			t.Run("programs", func(t *testing.T) { m.programs(t, root) })
			t.Run("run", func(t *testing.T) { m.run(t, root) })
			t.Run("bill of materials", func(t *testing.T) { m.bill(t, out, root) })
			t.Run("scripts", func(t *testing.T) { m.scripts(t, out) })
		})
	}
	t.Run("same", func(t *testing.T) {
		if len(files) != len(machines) {
			t.Fatal("not all could be read")
		}
		for _, program := range programs {
			if files[0][program].sum == files[1][program].sum {
				t.Errorf("%s is the same for both", program)
			}
			delete(files[0], program)
			delete(files[1], program)
		}
		if diff := cmp.Diff(files[0], files[1], cmp.AllowUnexported(file{})); diff != "" {
			t.Errorf("besides the programs (-%s +%s):\n%s", machines[0].arch, machines[1].arch, diff)
		}
	})
}

// programs are those that are for one machine.
var programs = []string{"usr/sbin/imdsgated", "usr/bin/imdsgate"}

// only is the package of a machine whose name ends so.
func (m machine) only(t *testing.T, dir, suffix string) string {
	t.Helper()
	arch := m.arch
	if suffix == ".rpm" {
		arch = m.rpm
	}
	found, err := filepath.Glob(filepath.Join(dir, "*"+arch+suffix))
	if err != nil || len(found) != 1 {
		t.Fatalf("*%s%s: %v, %v", arch, suffix, found, err)
	}
	return found[0]
}

// programs need nothing but the machine's kernel: no loader, no library.
func (m machine) programs(t *testing.T, root string) {
	for _, program := range programs {
		f, err := elf.Open(filepath.Join(root, program))
		if err != nil {
			t.Fatal(err)
		}
		if f.Machine != m.elf || f.Type != elf.ET_EXEC {
			t.Errorf("%s is of %v, %v", program, f.Machine, f.Type)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%s has %v", program, p.Type)
			}
		}
		f.Close()
	}
}

// run has the programs do what needs no host. Where the machine is another one than this,
// qemu takes its place.
func (m machine) run(t *testing.T, root string) {
	var emulator []string
	if m.arch != runtime.GOARCH {
		emulator = []string{"qemu-" + m.qemu}
		if _, err := exec.LookPath(emulator[0]); err != nil && os.Getenv("CI") == "" {
			t.Skipf("needs %s, which test/deps.sh installs", emulator[0])
		}
	}
	profiles, err := filepath.Abs("../../packaging/profiles")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ program, args, says string }{
		{"usr/sbin/imdsgated", "-version", "imdsgated " + version + "\n"},
		{"usr/bin/imdsgate", "version", "imdsgate " + version + " (" + runtime.Version() + ", linux/" + m.arch + ")\n"},
		{"usr/bin/imdsgate", "test " + profiles, " passed, 0 failed, in "},
	} {
		args := slices.Concat(emulator, []string{filepath.Join(root, c.program)}, strings.Fields(c.args))
		if out := run(t, "", nil, args[0], args[1:]...); !strings.Contains(out, c.says) {
			t.Errorf("%v says\n%s", args, out)
		}
	}
}

func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = fmt.Sprintf("%x", sha256.Sum256(b))
	}
	return all
}

// file is what packages say of one.
type file struct{ mode, group, sum string }

func (m machine) contents(t *testing.T, out string) map[string]file {
	deb := fromTar(t, strings.NewReader(run(t, "", nil, "dpkg-deb", "--fsys-tarfile", m.only(t, out, ".deb"))), "./")
	for _, path := range []string{"usr/share/doc/imdsgate/changelog.gz", "usr/share/lintian/overrides/imdsgate"} {
		if _, ok := deb[path]; !ok {
			t.Errorf("the deb has no %s", path)
		}
		delete(deb, path) // Debian's own
	}
	rpm := map[string]file{}
	listing := run(t, "", nil, "rpm", "--query", "--package", "--queryformat", `[%{FILENAMES} %{FILEMODES:perms} %{FILEGROUPNAME} %{FILEDIGESTS}\n]`, m.only(t, out, ".rpm"))
	for line := range strings.Lines(listing) {
		if f := strings.Fields(line); strings.HasPrefix(f[1], "-") {
			rpm[strings.TrimPrefix(f[0], "/")] = file{perms(t, f[1]), f[2], f[3]}
		}
	}
	if diff := cmp.Diff(deb, rpm, cmp.AllowUnexported(file{})); diff != "" {
		t.Errorf("deb and rpm (-deb +rpm):\n%s", diff)
	}
	packed, err := os.Open(m.only(t, out, ".tar.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	unpacked, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	tarball := map[string]file{}
	for path, f := range fromTar(t, unpacked, fmt.Sprintf("imdsgate-%s-linux-%s/", version, m.arch)) {
		if path, staged := strings.CutPrefix(path, "root/"); staged {
			f.group = deb[path].group // install.sh gives it
			tarball[path] = f
		}
	}
	if diff := cmp.Diff(deb, tarball, cmp.AllowUnexported(file{})); diff != "" {
		t.Errorf("deb and tarball (-deb +tarball):\n%s", diff)
	}

	if f := deb["etc/imdsgate/config.yaml"]; f.mode != "0640" || f.group != "imdsgate" {
		t.Errorf("the configuration is %s, of the group %s", f.mode, f.group)
	}
	for path, f := range deb {
		if !strings.HasPrefix(path, "etc/") && f.group != "root" {
			t.Errorf("%s is of the group %s", path, f.group)
		}
		if program := strings.HasPrefix(path, "usr/bin/") || strings.HasPrefix(path, "usr/sbin/") || path == "usr/lib/imdsgate/seal-image"; program && f.mode != "0755" || !program && strings.HasPrefix(path, "usr/") && f.mode != "0644" {
			t.Errorf("%s is %s", path, f.mode)
		}
	}
	if conf := run(t, "", nil, "rpm", "--query", "--package", "--queryformat", `[%{FILENAMES} %{FILEFLAGS:fflags}\n]`, m.only(t, out, ".rpm")); !strings.Contains(conf, "/etc/imdsgate/config.yaml cn\n") {
		t.Errorf("for rpm the configuration is not config(noreplace):\n%s", conf)
	}
	if conf := run(t, "", nil, "dpkg-deb", "--info", m.only(t, out, ".deb"), "conffiles"); conf != "/etc/imdsgate/config.yaml\n" {
		t.Errorf("dpkg's configuration files: %q", conf)
	}
	// What is installed says which version it is.
	if got := run(t, "", nil, "dpkg-deb", "--field", m.only(t, out, ".deb"), "Version", "Architecture"); got != "Version: "+version+"\nArchitecture: "+m.arch+"\n" {
		t.Errorf("for dpkg it is %q", got)
	}
	if got := run(t, "", nil, "rpm", "--query", "--package", "--queryformat", "%{ARCH}", m.only(t, out, ".rpm")); got != m.rpm {
		t.Errorf("for rpm it is of %q", got)
	}
	return deb
}

func fromTar(t *testing.T, r io.Reader, prefix string) map[string]file {
	t.Helper()
	all := map[string]file{}
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, archive); err != nil {
			t.Fatal(err)
		}
		group := h.Gname
		if group == "" && h.Gid == 0 {
			group = "root"
		}
		all[strings.TrimPrefix(h.Name, prefix)] = file{fmt.Sprintf("%04o", h.Mode&0o7777), group, fmt.Sprintf("%x", sum.Sum(nil))}
	}
}

// perms is the mode that ls writes as -rw-r-----.
func perms(t *testing.T, s string) string {
	t.Helper()
	var mode int
	for i, c := range s[1:] {
		if c != '-' {
			mode |= 1 << (8 - i)
		}
		if !strings.ContainsRune("rwx-", c) {
			t.Errorf("%s: a bit that no file of ours has", s)
		}
	}
	return fmt.Sprintf("%04o", mode)
}

// bill compares the modules of the CycloneDX document with those that go version -m reads in
// the program. The license of each is there, too.
func (m machine) bill(t *testing.T, out, root string) {
	licenses := run(t, "", nil, "gzip", "--decompress", "--stdout", filepath.Join(root, "usr/share/doc/imdsgate/third-party-licenses.gz"))
	for _, program := range programs {
		want := map[string]bool{}
		for line := range strings.Lines(run(t, "", nil, "go", "version", "-m", filepath.Join(root, program))) {
			if f := strings.Fields(line); len(f) == 4 && f[0] == "dep" {
				want[f[1]+" "+f[2]] = true
				if !strings.Contains(licenses, "==== "+f[1]+" "+f[2]+": ") {
					t.Errorf("%s is linked into %s, and comes without a license", f[1], program)
				}
			}
		}
		b, err := os.ReadFile(filepath.Join(out, fmt.Sprintf("%s-%s-linux-%s.cdx.json", filepath.Base(program), version, m.arch)))
		if err != nil {
			t.Fatal(err)
		}
		var doc struct {
			BOMFormat, SpecVersion string
			Components             []struct{ Name, Version, PURL string }
		}
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
		got := map[string]bool{}
		for _, c := range doc.Components {
			if c.Name != "std" {
				got[c.Name+" "+c.Version] = true
			}
			if !strings.HasPrefix(c.PURL, "pkg:golang/") {
				t.Errorf("%s: %s has the package URL %q", program, c.Name, c.PURL)
			}
		}
		if doc.BOMFormat != "CycloneDX" || doc.SpecVersion != "1.6" || len(want) < 10 {
			t.Errorf("%s %s, %d modules", doc.BOMFormat, doc.SpecVersion, len(want))
		}
		if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got))); diff != "" {
			t.Errorf("%s (-program +document):\n%s", program, diff)
		}
	}
}

// scripts: deb and rpm have the same, and the user that they make is that of sysusers.d.
func (m machine) scripts(t *testing.T, out string) {
	control := t.TempDir()
	run(t, "", nil, "dpkg-deb", "--control", m.only(t, out, ".deb"), control)
	for deb, rpm := range map[string]string{"preinst": "PREIN", "postinst": "POSTIN", "prerm": "PREUN", "postrm": "POSTUN"} {
		b, err := os.ReadFile(filepath.Join(control, deb))
		if err != nil {
			t.Fatal(err)
		}
		if in := run(t, "", nil, "rpm", "--query", "--package", "--queryformat", "%{"+rpm+"}", m.only(t, out, ".rpm")); strings.TrimSpace(in) != strings.TrimSpace(string(b)) {
			t.Errorf("%s of rpm is not %s of dpkg: %q", rpm, deb, in)
		}
	}
	preinst, err := os.ReadFile(filepath.Join(control, "preinst"))
	if err != nil {
		t.Fatal(err)
	}
	sysusers, err := os.ReadFile("../../packaging/systemd/imdsgate.sysusers")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(preinst), "\t"+string(sysusers)) {
		t.Errorf("before-install.sh makes another user than sysusers.d:\n%s", sysusers)
	}
}

// Versions are ordered by dpkg and rpm as they follow on each other.
func TestVersion(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "packaging"), os.DirFS("../../packaging")); err != nil {
		t.Fatal(err)
	}
	git := func(args ...string) {
		t.Helper()
		run(t, dir, []string{"GIT_CONFIG_GLOBAL=/dev/null"}, "git", append([]string{"-c", "user.name=x", "-c", "user.email=x@example.com"}, args...)...)
	}
	get := func() string {
		t.Helper()
		return strings.TrimSpace(run(t, dir, nil, filepath.Join(dir, "packaging/version.sh")))
	}
	commit := func() { t.Helper(); git("commit", "--quiet", "--allow-empty", "--message", "x") }
	git("init", "--quiet")
	git("add", ".")
	commit()
	versions := []string{get()}
	commit()
	versions = append(versions, get())
	for _, tag := range []string{"v0.9.0", "v1.0.0-rc.1", "v1.0.0-rc.2", "v1.0.0", "v1.0.1"} {
		commit()
		git("tag", tag)
		versions = append(versions, get())
		commit()
		versions = append(versions, get())
	}
	for i, want := range map[int]string{2: "0.9.0", 4: "1.0.0~rc.1", 8: "1.0.0", 10: "1.0.1"} {
		if versions[i] != want {
			t.Errorf("%s, and not %s", versions[i], want)
		}
	}
	for i := 1; i < len(versions); i++ {
		a, b := versions[i-1], versions[i]
		run(t, "", nil, "dpkg", "--compare-versions", a, "lt", b)
		if got := run(t, "", nil, "rpm", "--eval", fmt.Sprintf("%%{lua: print(rpm.vercmp(%q, %q))}", a, b)); strings.TrimSpace(got) != "-1" {
			t.Errorf("rpm has %s before %s: %s", a, b, got)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "packaging/config.yaml"), []byte("# changed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := get(); !strings.HasSuffix(got, ".dirty") {
		t.Errorf("%s, of a tree that was changed", got)
	}
}
