package attribution

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// Real directories of cgroup2 with a process in them: only what belongs to root, and to
// nobody else, names it.
func TestCgroupOfProcess(t *testing.T) {
	labtest.RequireRoot(t)
	mounts, err := ReadCgroupMounts("/proc")
	if err != nil {
		t.Fatal(err)
	}
	if mounts[""] == "" {
		t.Fatal("no cgroup2 is mounted; as root one can be")
	}
	const user = 4321
	own := fmt.Sprintf("imdsgate-test-%d", os.Getpid())
	for _, test := range []struct {
		name, path string
		change     func(dir string) error // of the directory that ends in "!"
		want       Cgroup
	}{
		{"all root's", "kubepods/burstable/pod" + podID + "/" + inner, nil, Cgroup{Container: inner, Pod: podID}},
		{"all root's, systemd's driver", "kubepods-" + slice + "/cri-containerd-" + inner + ".scope", nil,
			Cgroup{Container: inner, Pod: podID, Runtime: "containerd"}},
		{"a user's container", "kubepods/burstable/pod" + podID + "/" + inner + "!",
			func(dir string) error { return os.Chown(dir, user, 0) }, Cgroup{Pod: podID}},
		{"a user's pod", "kubepods/burstable/pod" + podID + "!/" + inner,
			func(dir string) error { return os.Chown(dir, user, 0) }, Cgroup{}},
		{"all may write", "kubepods/burstable!/pod" + podID + "/" + inner,
			func(dir string) error { return os.Chmod(dir, 0o777) }, Cgroup{}},
		{"a group may write", "docker!/" + outer,
			func(dir string) error { return os.Chmod(dir, 0o775) }, Cgroup{}},
		{"a user's unit", "delegated!/nginx.service",
			func(dir string) error { return os.Chown(dir, user, user) }, Cgroup{UserUnit: "nginx.service"}},
		{"root's, in a user manager", "user@4321.service/docker-" + outer + ".scope", nil, Cgroup{UserUnit: "docker-" + outer + ".scope"}},
		{"below a container", "docker/" + outer + "/docker!/" + inner,
			func(dir string) error { return os.Chown(dir, user, user) }, Cgroup{Container: outer, Runtime: "docker"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join("/", own, strings.Replace(test.path, "!", "", 1))
			dir := filepath.Join(mounts[""], path)
			t.Cleanup(func() {
				for d := dir; d != mounts[""]; d = filepath.Dir(d) {
					if err := unix.Rmdir(d); err != nil {
						t.Errorf("remove %s: %v", d, err)
					}
				}
			})
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if before, _, ok := strings.Cut(test.path, "!"); ok {
				if err := test.change(filepath.Join(mounts[""], own, before)); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("sleep", "60")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0); err != nil {
				t.Fatal(err)
			}
			file, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			test.want.Path = path
			if diff := cmp.Diff(test.want, mounts.Of(file)); diff != "" {
				t.Errorf("%s(-want +got):\n%s", file, diff)
			}
		})
	}
}

// The hierarchies of a v1 host are directories like others to us.
func TestCgroupOfV1(t *testing.T) {
	labtest.RequireRoot(t)
	root := t.TempDir()
	mounts := CgroupMounts{}
	for _, name := range []string{"", "name=systemd", "memory", "pids", "cpu"} {
		mounts[name] = filepath.Join(root, "at-"+name)
	}
	mkdir := func(h, path string, uid int) {
		t.Helper()
		dir := filepath.Join(mounts[h], path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, uid, 0); err != nil {
			t.Fatal(err)
		}
	}
	docker := "/docker/" + outer
	for _, h := range []string{"name=systemd", "memory", "pids", "cpu"} {
		mkdir(h, docker, 0)
	}
	mkdir("", "/system.slice/containerd.service", 0)
	mkdir("name=systemd", "/system.slice/web.service/workers", 4321)
	mkdir("name=systemd", docker+"/mine", 4321)

	controllers := "4:memory:" + docker + "\n3:pids:" + docker + "\n2:cpu,cpuacct:" + docker + "\n"
	container := Cgroup{Path: docker, Container: outer, Runtime: "docker"}
	for _, test := range []struct {
		name, file string
		want       Cgroup
	}{
		{"hybrid", controllers + "1:name=systemd:" + docker + "\n0::/system.slice/containerd.service\n", container},
		{"no systemd", controllers, container},
		{"controllers disagree", controllers + "9:freezer:/\n0::/system.slice/containerd.service\n",
			Cgroup{Path: "/system.slice/containerd.service", UserUnit: "containerd.service"}},
		{"unit", "1:name=systemd:/system.slice/web.service\n", Cgroup{Path: "/system.slice/web.service", Unit: "web.service"}},
		// A user may have come there from anywhere.
		{"delegated below a unit", "1:name=systemd:/system.slice/web.service/workers\n",
			Cgroup{Path: "/system.slice/web.service/workers", UserUnit: "web.service"}},
		{"delegated below a container", "1:name=systemd:" + docker + "/mine\n", Cgroup{Path: docker + "/mine"}},
		{"not mounted", "1:devices:" + docker + "\n", Cgroup{Path: docker}},
	} {
		if diff := cmp.Diff(test.want, mounts.Of([]byte(test.file))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

func TestParseCgroupMounts(t *testing.T) {
	got := parseCgroupMounts([]byte(`24 23 0:22 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
25 24 0:23 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
26 24 0:24 / /sys/fs/cgroup/systemd rw,relatime shared:10 - cgroup cgroup rw,xattr,name=systemd
27 24 0:25 /docker/x /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
28 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
29 24 0:23 / /mnt/again rw,relatime - cgroup2 cgroup2 rw
cut off
`))
	want := map[string]string{
		"": "/sys/fs/cgroup/unified", "name=systemd": "/sys/fs/cgroup/systemd",
		"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct", "pids": "",
	}
	for name, dir := range want {
		if got[name] != dir {
			t.Errorf("%q at %q, want %q", name, got[name], dir)
		}
	}
}

func BenchmarkCgroup(b *testing.B) {
	file := []byte("0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + slice + "/cri-containerd-" + inner + ".scope\n")
	mounts := CgroupMounts{"": b.TempDir()}
	if err := os.MkdirAll(filepath.Join(mounts[""], parseCgroup(file)), 0o755); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if os.Geteuid() == 0 && mounts.Of(file).Container != inner {
			b.Fatal("no container")
		}
	}
}
