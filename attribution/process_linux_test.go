package attribution

import (
	"bytes"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const containerID = "3f4c0d2b9e1a7c6d5e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5"

func TestCgroup(t *testing.T) {
	const all = 99 // every directory belongs to root
	for _, test := range []struct {
		path  string
		owned int
		want  Cgroup
	}{
		{"/", all, Cgroup{}},
		{"/system.slice/nginx.service", all, Cgroup{Unit: "nginx.service"}},
		{"/system.slice/system-getty.slice/getty@tty1.service", all, Cgroup{Unit: "getty@tty1.service"}},
		{"/init.scope", all, Cgroup{Unit: "init.scope"}},
		{"/user.slice/user-1000.slice/session-3.scope", all, Cgroup{Unit: "session-3.scope"}},
		// A user manager names its units as it likes, root owned or not.
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service", all, Cgroup{UserUnit: "nginx.service"}},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service", 3, Cgroup{UserUnit: "nginx.service"}},
		// So does whoever owns a directory.
		{"/system.slice/nginx.service", 1, Cgroup{UserUnit: "nginx.service"}},
		{"/nginx.service", 0, Cgroup{UserUnit: "nginx.service"}},
		// Root inside a container, or a service below another one, adds nothing.
		{"/system.slice/docker-" + containerID + ".scope/system.slice/nginx.service", all,
			Cgroup{Unit: "docker-" + containerID + ".scope", Container: containerID, Runtime: "docker"}},
		{"/system.slice/evil.service/nginx.service", all, Cgroup{Unit: "evil.service"}},
		{"/evil/nginx.service", all, Cgroup{}},
		{"/docker/" + containerID, all, Cgroup{Container: containerID, Runtime: "docker"}},
		{"/docker/" + containerID, 0, Cgroup{}},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-" + containerID + ".scope", all,
			Cgroup{Unit: "cri-containerd-" + containerID + ".scope", Container: containerID, Runtime: "containerd"}},
		{"/kubepods/burstable/pod1234/" + containerID, all, Cgroup{Container: containerID}},
		{"/machine.slice/libpod-" + containerID + ".scope/container", all,
			Cgroup{Unit: "libpod-" + containerID + ".scope", Container: containerID, Runtime: "podman"}},
		{"/machine.slice/crio-" + containerID + ".scope", all,
			Cgroup{Unit: "crio-" + containerID + ".scope", Container: containerID, Runtime: "cri-o"}},
		{"/system.slice/docker-" + containerID[1:] + ".scope", all, Cgroup{Unit: "docker-" + containerID[1:] + ".scope"}},
	} {
		test.want.Path = test.path
		if diff := cmp.Diff(test.want, cgroupOf(test.path, test.owned)); diff != "" {
			t.Errorf("%s, %d owned by root (-want +got):\n%s", test.path, test.owned, diff)
		}
	}
}

func TestParseCgroup(t *testing.T) {
	for _, test := range []struct{ file, want string }{
		{"0::/system.slice/ssh.service\n", "/system.slice/ssh.service"},
		{"2:cpu:/a\n1:name=systemd:/system.slice/ssh.service\n0::/\n", "/system.slice/ssh.service"},
		{"1:name=systemd:/x\n0::/unified\n", "/unified"},
		{"3:memory:/a:b\n0::/with:colon\n", "/with:colon"},
		{"", ""},
		{"garbage", ""},
	} {
		if got := parseCgroup([]byte(test.file)); got != test.want {
			t.Errorf("%q: %q, want %q", test.file, got, test.want)
		}
	}
}

func TestParseStat(t *testing.T) {
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	s, err := parseStat(b)
	if err != nil {
		t.Fatal(err)
	}
	if s.ppid != os.Getppid() || s.start == 0 || s.image.startStack == 0 || s.between() {
		t.Errorf("%+v", s)
	}
	// comm may have anything in it.
	evil := strings.Replace(string(b), "("+s.comm+")", "(x) R 1 1 1 (y)", 1)
	if got, err := parseStat([]byte(evil)); err != nil || got.comm != "x) R 1 1 1 (y" || got.ppid != s.ppid || got.start != s.start {
		t.Errorf("%q: %+v, %v", evil, got, err)
	}
	for _, bad := range []string{"", "1 (x", "1 x) R", "1 (x) R 1 2 3", strings.Replace(string(b), " "+strconv.FormatUint(s.start, 10)+" ", " x ", 1)} {
		if s, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: accepted as %+v", bad, s)
		}
	}
}

func TestExeFile(t *testing.T) {
	for _, test := range []struct {
		link  string
		nlink uint64
		want  File
	}{
		{"/usr/bin/curl", 1, File{Path: "/usr/bin/curl"}},
		{"/usr/bin/curl (deleted)", 0, File{Path: "/usr/bin/curl", Deleted: true}},
		{"/tmp/x (deleted)", 1, File{Path: "/tmp/x (deleted)"}},
		{"/memfd:x (deleted)", 0, File{Path: "/memfd:x", Deleted: true}},
		{"/usr/lib64/ld-linux-x86-64.so.2", 1, File{Path: "/usr/lib64/ld-linux-x86-64.so.2", Loader: true}},
		{"/usr/lib/ld-linux-aarch64.so.1", 1, File{Path: "/usr/lib/ld-linux-aarch64.so.1", Loader: true}},
		{"/lib/x86_64-linux-gnu/ld-2.31.so", 1, File{Path: "/lib/x86_64-linux-gnu/ld-2.31.so", Loader: true}},
		{"/lib/ld-musl-x86_64.so.1", 1, File{Path: "/lib/ld-musl-x86_64.so.1", Loader: true}},
		{"/usr/bin/ld", 1, File{Path: "/usr/bin/ld"}},
		{"/usr/bin/x86_64-linux-gnu-ld.bfd", 1, File{Path: "/usr/bin/x86_64-linux-gnu-ld.bfd"}},
	} {
		if diff := cmp.Diff(test.want, exeFile(test.link, test.nlink)); diff != "" {
			t.Errorf("%s with %d links (-want +got):\n%s", test.link, test.nlink, diff)
		}
	}
}

func TestParseCmdline(t *testing.T) {
	for _, test := range []struct {
		file string
		want []string
	}{
		{"", nil},
		{"\x00", nil},
		{"curl\x00-s\x00\x00", []string{"curl", "-s", ""}},
		{"nginx: master process", []string{"nginx: master process"}},
	} {
		if diff := cmp.Diff(test.want, parseCmdline([]byte(test.file))); diff != "" {
			t.Errorf("%q (-want +got):\n%s", test.file, diff)
		}
	}
}

func TestEntityID(t *testing.T) {
	seen := map[string]string{}
	for _, id := range []struct {
		boot       string
		pid, start int
	}{{"a", 1, 1}, {"b", 1, 1}, {"a", 2, 1}, {"a", 1, 2}, {"a", 11, 1}} {
		got := entityID(id.boot, id.pid, uint64(id.start))
		if got != entityID(id.boot, id.pid, uint64(id.start)) || seen[got] != "" {
			t.Errorf("%+v: %s, as %s", id, got, seen[got])
		}
		seen[got] = id.boot
	}
}

func FuzzParseProc(f *testing.F) {
	for _, file := range []string{"stat", "status", "cgroup", "cmdline"} {
		b, err := os.ReadFile("/proc/self/" + file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		parseStat(b)
		parseStatus(b)
		parseCmdline(b)
		cgroupOf(parseCgroup(b), 3)
		for name := range direntNames(b) {
			if len(name) < 2 || name[len(name)-1] != 0 {
				t.Fatalf("name %q", name)
			}
		}
	})
}

// Command lines are cut when those that are still in use take too much memory, and
// are whole again when they do not.
func TestKeptArgsAreBounded(t *testing.T) {
	h := new(host)
	long := bytes.Repeat([]byte("x\x00"), maxCmdline/2)
	var held [][]string
	for range 2 * maxKept / len(long) {
		held = append(held, h.keepArgs(long))
	}
	whole := 0
	for _, args := range held {
		if len(args) == maxCmdline/2 {
			whole++
		} else if len(args) != shortCmdline/2 {
			t.Fatalf("%d arguments", len(args))
		}
	}
	if size := h.kept.Load(); whole == 0 || whole > maxKept/(2*len(long)) || size > maxKept {
		t.Errorf("%d of %d are whole, %d bytes", whole, len(held), size)
	}
	runtime.KeepAlive(held)
	held = nil
	for end := time.Now().Add(5 * time.Second); h.kept.Load() > 0; runtime.GC() {
		if time.Now().After(end) {
			t.Fatalf("%d bytes are still accounted for", h.kept.Load())
		}
	}
	if args := h.keepArgs(long); len(args) != maxCmdline/2 {
		t.Errorf("%d arguments", len(args))
	}
}
