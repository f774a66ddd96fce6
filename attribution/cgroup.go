package attribution

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
)

// Cgroup is where a process runs, read from its cgroup path. Unit, Container and
// Pod are filled only from directories that belong to root: whoever owns a
// cgroup directory can make directories in it with any name, and move his
// processes there (cgroups(7), "Delegation").
type Cgroup struct {
	Path      string // in the hierarchy that tells most: cgroup2, on a v1 host systemd's own or a controller's
	Unit      string // system unit: "nginx.service"
	UserUnit  string // unit of a user manager or below a delegated directory; its owner chose the name
	Container string // 64 hexadecimal digits
	Runtime   string // docker, containerd, cri-o, podman; "" when the path does not tell
	Pod       string // UID of the Kubernetes pod: 8-4-4-4-12 hexadecimal digits
}

// hierarchy is one line of /proc/PID/cgroup: the path of the process in cgroup2, whose
// name is "", or in a v1 hierarchy, "name=systemd" or its first controller.
type hierarchy struct{ name, path string }

// v1Controllers are those in which every runtime puts its containers, in the order
// in which they are believed. In others (files, hugetlb, rdma, misc) a container may
// be in the root (opencontainers/runc#4620).
var v1Controllers = []string{"memory", "pids", "cpu", "cpuacct", "devices", "freezer", "blkio", "cpuset"}

// parseHierarchies reads /proc/PID/cgroup, and leaves out what no runtime fills. The
// kernel lets no directory have a newline in its name (cgroup_mkdir).
func parseHierarchies(b []byte) []hierarchy {
	var all []hierarchy
	for line := range bytes.Lines(b) {
		parts := bytes.SplitN(bytes.TrimSuffix(line, []byte("\n")), []byte(":"), 3)
		if len(parts) != 3 {
			continue
		}
		name, _, _ := strings.Cut(string(parts[1]), ",")
		if name == "" || name == "name=systemd" || slices.Contains(v1Controllers, name) {
			all = append(all, hierarchy{name, string(parts[2])})
		}
	}
	rank := func(h hierarchy) int {
		switch h.name {
		case "":
			return 0
		case "name=systemd":
			return 1
		}
		return 2 + slices.Index(v1Controllers, h.name)
	}
	slices.SortStableFunc(all, func(a, b hierarchy) int { return cmp.Compare(rank(a), rank(b)) })
	return all
}

// pickHierarchy chooses the line that tells most. It is false when the lines
// contradict each other, so that none can be believed.
//
// A cgroup2 host has one line. On a hybrid host (systemd.io/CGROUP_DELEGATION,
// "hybrid") a container's processes may be in the unit of its runtime in cgroup2,
// "0::/system.slice/containerd.service", and in "/docker/ID" everywhere else: the
// line that names a container is believed. Without systemd the controllers name it,
// each for itself, and all of them must. Where no line names one, a process whose
// unit is not the same in cgroup2 and in systemd's own hierarchy was put elsewhere in
// one of them, and is in neither.
func pickHierarchy(all []hierarchy) (hierarchy, bool) {
	if len(all) == 1 {
		return all[0], true
	}
	var first hierarchy // that is not the root, in an order of belief
	var named hierarchy // that names a container
	id, controllers, naming := "", 0, 0
	for _, h := range all {
		controller := h.name != "" && h.name != "name=systemd"
		if controller {
			controllers++
		}
		if first.path == "" || first.path == "/" && !controller && h.path != "" {
			first = h
		}
		is := cgroupOf(h.path, len(h.path)).Container
		switch {
		case is == "":
			continue
		case id == "":
			id, named = is, h
		case id != is:
			return first, false
		}
		if controller {
			naming++
		}
	}
	switch {
	case id == "":
		return first, len(all) < 2 || all[1].name != "name=systemd" || all[1].path == "/" || all[1].path == first.path
	case named.name != "" && named.name != "name=systemd" && naming != controllers:
		return first, false
	}
	return named, true
}

// parseCgroup picks the path out of /proc/PID/cgroup.
func parseCgroup(b []byte) string {
	h, _ := pickHierarchy(parseHierarchies(b))
	return h.path
}

// cgroupOf names unit, container and pod of a cgroup path. rootOwned is how many
// leading directories of the path belong to root; it may be more than the path
// has. Only the first unit below slices counts, and the outermost container: a
// systemd, a Docker or a kubelet inside a container names its cgroups as it likes,
// and as root.
func cgroupOf(cgroupPath string, rootOwned int) Cgroup {
	c := Cgroup{Path: cgroupPath}
	dirs := strings.Split(strings.Trim(cgroupPath, "/"), "/")
	trusted := true    // this directory and those above are named by the host's root
	inside := false    // a container, or the monitor of one
	onlySlices := true // so far
	for i, dir := range dirs {
		unit := strings.HasSuffix(dir, ".service") || strings.HasSuffix(dir, ".scope")
		trusted = trusted && i < rootOwned && !strings.HasPrefix(dir, "user@")
		switch {
		case !trusted:
			if unit {
				c.UserUnit = dir
			}
			continue
		case inside:
			continue
		case unit && onlySlices:
			c.Unit = dir
		}
		onlySlices = onlySlices && strings.HasSuffix(dir, ".slice")
		if uid := pod(dirs[:i+1]); uid != "" {
			c.Pod = uid
		}
		id, runtime := container(dirs[:i+1])
		switch {
		case id != "":
			c.Container, c.Runtime, inside = id, runtime, true
			if c.Unit != dir && !strings.HasPrefix(dir, split) {
				c.Unit = "" // that of the runtime, which is not what runs here
			}
		case guest(dirs[:i+1]):
			inside = true
		case monitor(dirs[:i+1]):
			c.Pod, inside = "", true
		}
	}
	if c.UserUnit != "" {
		c.Unit = ""
	}
	return c
}

// split is podman's, for a container inside the unit that is for it
// (podman-run(1), --cgroups=split; all of podman-systemd.unit(5)).
const split = "libpod-payload-"

// scopes are the names that runtimes give to their cgroups, before the ID. With
// systemd's driver ".scope" follows, and some do the same without.
var scopes = []struct {
	prefix, runtime string
	bare            bool // also without ".scope"
}{
	{"docker-", "docker", false},
	{"cri-containerd-", "containerd", false},
	{"nerdctl-", "containerd", false},
	{"crio-", "cri-o", true},
	{"libpod-", "podman", true},
	{split, "podman", true},
}

// container reads the last directory of a path, if it is that of a container.
func container(dirs []string) (id, runtime string) {
	dir := dirs[len(dirs)-1]
	if len(dir) < 64 {
		return "", ""
	}
	if isContainerID(dir) {
		return bareContainer(dirs)
	}
	name, scope := strings.CutSuffix(dir, ".scope")
	if len(name) <= 64 || !isContainerID(name[len(name)-64:]) {
		return "", ""
	}
	id, prefix := name[len(name)-64:], name[:len(name)-64]
	// A runtime that is told a systemd path and does not use systemd takes
	// "SLICE:cri-containerd:ID" for a name (containerd/containerd#4900).
	if slice, kind, ok := strings.Cut(prefix, ":"); ok && !scope && strings.HasSuffix(slice, ".slice") && strings.HasSuffix(kind, ":") {
		prefix, scope = strings.TrimSuffix(kind, ":")+"-", true
	}
	for _, s := range scopes {
		if prefix == s.prefix && (scope || s.bare) {
			return id, s.runtime
		}
	}
	return "", ""
}

// bareContainer reads a directory that is an ID and nothing else, as Docker and
// containerd name theirs without systemd. Who did is told by the one above.
func bareContainer(dirs []string) (id, runtime string) {
	above := func(n int) string {
		if i := len(dirs) - 1 - n; i >= 0 {
			return dirs[i]
		}
		return ""
	}
	id = above(0)
	switch above(1) {
	case "docker", "actions_job": // the latter on GitHub's runners
		return id, "docker"
	case "default", "k8s.io": // namespaces of containerd
		return id, "containerd"
	case "libpod_parent":
		return "", "" // a pod of podman, with its containers below
	}
	if above(2) == "ecs" { // "/ecs/TASK/ID" (aws/amazon-ecs-agent#1119), whose agent knows no other runtime
		return id, "docker"
	}
	return id, ""
}

// guest reports whether the last directory of a path is that of a container or
// virtual machine without an ID: LXC's (lxc.container.conf(5), "cgroup.dir") and what
// systemd-machined registers. What is below is named by the root inside.
func guest(dirs []string) bool {
	dir := dirs[len(dirs)-1]
	return strings.HasPrefix(dir, "lxc.payload") || len(dirs) > 1 && dirs[len(dirs)-2] == "lxc" ||
		strings.HasPrefix(dir, "machine-") && strings.HasSuffix(dir, ".scope") || strings.HasPrefix(dir, "systemd-nspawn@")
}

// monitor reports whether the last directory of a path is that of conmon, which
// podman and cri-o run outside a container for each, under the container's ID.
func monitor(dirs []string) bool {
	dir := dirs[len(dirs)-1]
	return strings.HasPrefix(dir, "crio-conmon-") || strings.HasPrefix(dir, "libpod-conmon-") ||
		dir == "conmon" && len(dirs) > 1 && dirs[len(dirs)-2] == "libpod_parent"
}

// pod reads the last directory of a path, if it is the kubelet's for a pod: in
// cgroupfs "kubepods/burstable/podUID", and "kubepods/podUID" for the guaranteed
// class; with systemd's driver "kubepods-burstable-podUID.slice" with "_" for "-"
// (pkg/kubelet/cm/cgroup_manager_linux.go), behind the name of a slice in which
// everything is, if there is one: "kubelet-kubepods-podUID.slice"
// (kubernetes-sigs/kind#3947). A runtime that does not use systemd may have it before
// its own name: see container.
func pod(dirs []string) string {
	dir := dirs[len(dirs)-1]
	if uid, ok := strings.CutPrefix(dir, "pod"); ok {
		above := dirs[:len(dirs)-1]
		if n := len(above); n > 0 && (above[n-1] == "burstable" || above[n-1] == "besteffort") {
			above = above[:n-1]
		}
		if n := len(above); n > 0 && above[n-1] == "kubepods" {
			return podUID(uid)
		}
		return ""
	}
	name, below, ok := strings.Cut(dir, ".slice")
	if !ok || below != "" && below[0] != ':' {
		return ""
	}
	i := strings.LastIndex(name, "-pod")
	if i < 0 {
		return ""
	}
	class, uid := name[:i], name[i+len("-pod"):]
	class = strings.TrimSuffix(strings.TrimSuffix(class, "-burstable"), "-besteffort")
	if class != "kubepods" && !strings.HasSuffix(class, "-kubepods") {
		return ""
	}
	return podUID(strings.ReplaceAll(uid, "_", "-"))
}

// podUID gives a pod's UID in the form of the Kubernetes API. That of a static pod,
// which the kubelet knows from a file, is a hash without dashes.
func podUID(s string) string {
	digits := s
	if len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' {
		digits = s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]
	}
	if len(digits) != 32 || !isHex(digits) {
		return ""
	}
	return digits[:8] + "-" + digits[8:12] + "-" + digits[12:16] + "-" + digits[16:20] + "-" + digits[20:]
}

func isContainerID(s string) bool { return len(s) == 64 && isHex(s) }

func isHex(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
