package witness

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// The private mount is opened, and nothing attached to it: it is the root of the
// host's cgroup2.
func TestMountCgroup(t *testing.T) {
	fd, err := mountCgroup()
	if errors.Is(err, os.ErrPermission) {
		const missing = "needs CAP_SYS_ADMIN, to mount cgroup2 where nobody sees it"
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		t.Errorf("file system %#x, %v", fs.Type, err)
	}
	if err := unix.Faccessat(fd, "cgroup.procs", unix.R_OK, 0); err != nil {
		t.Error(err)
	}
}

func TestOpenCgroup(t *testing.T) {
	if _, err := openCgroup(t.TempDir()); err == nil {
		t.Error("a directory of another file system was taken for cgroup2")
	}
}

func TestStatDevice(t *testing.T) {
	for _, dev := range []struct{ major, minor uint32 }{{0, 5}, {8, 1}, {253, 300}, {259, 70000}} {
		if got, want := statDevice(uint64(dev.major)<<20|uint64(dev.minor)), unix.Mkdev(dev.major, dev.minor); got != want {
			t.Errorf("%v: %#x, want %#x", dev, got, want)
		}
	}
}
