package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Cgroup is the cgroup2 directory in which the processes of a lab run, so that programs attached to it see nothing
// of other labs. Its parent directories are the machine's.
type Cgroup struct {
	hierarchy int // the root of cgroup2, attached to no path
	dir       int
	name      string
}

var cgroups atomic.Uint64

func newCgroup() (*Cgroup, error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open cgroup2: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("open cgroup2: %w", err)
	}
	c := &Cgroup{dir: -1, name: fmt.Sprintf("imdsgate-lab-%d-%d", os.Getpid(), cgroups.Add(1))}
	if c.hierarchy, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open cgroup2: %w", err)
	}
	c.sweep()
	if err := unix.Mkdirat(c.hierarchy, c.name, 0o755); err != nil {
		unix.Close(c.hierarchy)
		return nil, fmt.Errorf("make cgroup %s: %w", c.name, err)
	}
	if c.dir, err = unix.Openat(c.hierarchy, c.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("open cgroup %s: %w", c.name, err), c.close())
	}
	return c, nil
}

// Path returns a path of the directory, for programs of ours that attach to it. It is valid until the lab is closed.
func (c *Cgroup) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), c.dir) }

// sweep removes the cgroups of programs that were killed before they could. One that
// has processes stays.
func (c *Cgroup) sweep() {
	all, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d", c.hierarchy))
	if err != nil {
		return
	}
	for _, dir := range all {
		var pid, n int
		if _, err := fmt.Sscanf(dir.Name(), "imdsgate-lab-%d-%d", &pid, &n); err != nil {
			continue
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); os.IsNotExist(err) {
			c.remove(dir.Name())
		}
	}
}

// remove removes a cgroup and those below it, such as a test has made for units. One that
// has processes is EBUSY.
func (c *Cgroup) remove(name string) error {
	var all []string
	err := filepath.WalkDir(fmt.Sprintf("/proc/self/fd/%d/%s", c.hierarchy, name), func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			all = append(all, path)
		}
		return err
	})
	for _, dir := range slices.Backward(all) {
		if err := unix.Rmdir(dir); err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
	}
	return err
}

// put makes a process begin in the cgroup (clone(2), CLONE_INTO_CGROUP).
func (c *Cgroup) put(attr *syscall.SysProcAttr) *syscall.SysProcAttr {
	if attr == nil {
		attr = new(syscall.SysProcAttr)
	}
	attr.UseCgroupFD, attr.CgroupFD = true, c.dir
	return attr
}

// Enter moves this process into the cgroup, with all its threads. Leave moves it to the root of cgroup2, and must be
// called before the lab is closed.
func (c *Cgroup) Enter() error { return move(c.dir) }

// Leave undoes Enter.
func (c *Cgroup) Leave() error { return move(c.hierarchy) }

func move(dir int) error {
	fd, err := unix.Openat(dir, "cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open cgroup.procs: %w", err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, strconv.AppendInt(nil, int64(os.Getpid()), 10)); err != nil {
		return fmt.Errorf("change cgroup: %w", err)
	}
	return nil
}

// close removes the cgroup and those below it, whose processes must have been killed; they leave it a moment after that.
func (c *Cgroup) close() error {
	defer unix.Close(c.hierarchy)
	if c.dir >= 0 {
		unix.Close(c.dir)
	}
	var err error
	for end := time.Now().Add(evictTimeout); ; time.Sleep(time.Millisecond) {
		if err = c.remove(c.name); err == nil || !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", c.name, err)
	}
	return nil
}
