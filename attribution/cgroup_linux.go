package attribution

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CgroupMounts says where each hierarchy of cgroups is mounted: "" is cgroup2, the
// others are v1's, by "name=systemd" or a controller. It is not changed once read.
type CgroupMounts map[string]string

// ReadCgroupMounts reads those that this process sees, by a mount of /proc. In a cgroup namespace of its own
// (systemd.exec(5), ProtectControlGroups=private) it sees paths that are relative to
// its own, "/../x", and finds no directory for them: nothing is trusted then.
func ReadCgroupMounts(proc string) (CgroupMounts, error) {
	b, err := os.ReadFile(filepath.Join(proc, "self/mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("see where cgroups are mounted: %w", err)
	}
	return parseCgroupMounts(b), nil
}

// parseCgroupMounts reads a mountinfo (proc_pid_mountinfo(5)). Of what is mounted
// twice the first counts, and what shows only a part of a hierarchy does not.
func parseCgroupMounts(b []byte) CgroupMounts {
	m := CgroupMounts{}
	add := func(name, dir string) {
		if m[name] == "" {
			m[name] = dir
		}
	}
	for line := range bytes.Lines(b) {
		before, after, ok := strings.Cut(string(line), " - ")
		mount, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(mount) < 5 || len(super) < 3 || mount[3] != "/" {
			continue
		}
		switch super[0] {
		case "cgroup2":
			add("", mount[4])
		case "cgroup":
			for option := range strings.SplitSeq(super[2], ",") {
				add(option, mount[4])
			}
		}
	}
	return m
}

// Of reads a /proc/PID/cgroup (cgroups(7)).
func (m CgroupMounts) Of(file []byte) Cgroup {
	h, agreed := pickHierarchy(parseHierarchies(file))
	if !agreed {
		return cgroupOf(h.path, 0)
	}
	owned := m.rootOwned(h)
	// In v1 anybody may move a process of his own into a directory of his, from
	// wherever it is; in cgroup2 he must be allowed to write in the common ancestor
	// (cgroups(7), "Cgroups delegation containment"). So the part that is root's says
	// nothing where the rest is not.
	if h.name != "" && owned < strings.Count(strings.Trim(h.path, "/"), "/")+1 {
		owned = 0
	}
	return cgroupOf(h.path, owned)
}

// rootOwned counts the leading directories of a cgroup path that belong to root,
// and in which nobody else can make one.
func (m CgroupMounts) rootOwned(h hierarchy) int {
	dir := m[h.name]
	if dir == "" {
		return 0
	}
	n := 0
	for name := range strings.SplitSeq(strings.Trim(h.path, "/"), "/") {
		dir = filepath.Join(dir, name)
		var st unix.Stat_t
		if name == ".." || unix.Lstat(dir, &st) != nil || st.Uid != 0 || st.Mode&0o022 != 0 {
			break
		}
		n++
	}
	return n
}
