package witness

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// openCgroup opens the root of cgroup2 as it is mounted here, or, on a host that has
// only cgroup v1, of a mount that nobody else sees: every process is in cgroup2, also
// where it is not mounted.
func openCgroup(dir string) (*os.File, error) {
	dirs := []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}
	if dir != "" {
		dirs = []string{dir}
	}
	for _, dir := range dirs {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return os.Open(dir)
		}
	}
	if dir != "" {
		return nil, fmt.Errorf("%s is not in cgroup2", dir)
	}
	fd, err := mountCgroup()
	if err != nil {
		return nil, fmt.Errorf("no cgroup2 at %v; mount it, or give us CAP_SYS_ADMIN to do so privately: %w", dirs, err)
	}
	return os.NewFile(uintptr(fd), "cgroup2"), nil
}

func mountCgroup() (int, error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return 0, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return 0, os.NewSyscallError("fsconfig", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("fsmount", err)
	}
	// The descriptor of a mount is an O_PATH one, which the kernel does not attach to.
	defer unix.Close(fd)
	root, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return root, os.NewSyscallError("open", err)
}
