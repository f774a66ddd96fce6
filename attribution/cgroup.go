package attribution

import (
	"bytes"
	"strings"
)

// Cgroup is where a process runs, read from its cgroup path. Unit and
// Container are filled only when every directory of the path belongs to root:
// whoever owns a cgroup directory can make directories in it with any name,
// and move his processes there (cgroups(7), "Delegation").
type Cgroup struct {
	Path      string // in the cgroup2 hierarchy, or in systemd's own one on a v1 host
	Unit      string // system unit: "nginx.service"
	UserUnit  string // unit of a user manager or below a delegated directory; its owner chose the name
	Container string // 64 hexadecimal digits
	Runtime   string // docker, containerd, cri-o, podman; "" when the path does not tell
}

// parseCgroup picks the path out of /proc/PID/cgroup: the cgroup2 line, unless
// that is the root and systemd's own hierarchy knows better (hybrid hosts,
// cgroups(7)).
func parseCgroup(b []byte) string {
	v2, systemd := "", ""
	for line := range bytes.Lines(b) {
		parts := bytes.SplitN(bytes.TrimSuffix(line, []byte("\n")), []byte(":"), 3)
		if len(parts) != 3 {
			continue
		}
		switch {
		case len(parts[1]) == 0:
			v2 = string(parts[2])
		case string(parts[1]) == "name=systemd":
			systemd = string(parts[2])
		}
	}
	if v2 == "" || v2 == "/" && systemd != "" {
		return systemd
	}
	return v2
}

// cgroupOf names unit and container of a cgroup path. rootOwned is how many
// leading directories of the path belong to root; it may be more than the path
// has. Only the first unit below slices counts, and the first container: a
// systemd inside a container names its cgroups as it likes.
func cgroupOf(cgroupPath string, rootOwned int) Cgroup {
	c := Cgroup{Path: cgroupPath}
	slices := true // only slices so far
	userManager := false
	for i, dir := range strings.Split(strings.Trim(cgroupPath, "/"), "/") {
		trusted := i < rootOwned && !userManager
		isUnit := strings.HasSuffix(dir, ".service") || strings.HasSuffix(dir, ".scope")
		if c.Container == "" && trusted {
			c.Container, c.Runtime = container(dir)
		}
		switch {
		case isUnit && !trusted:
			c.UserUnit = dir
		case isUnit && slices:
			c.Unit = dir
		}
		userManager = userManager || slices && strings.HasPrefix(dir, "user@") && isUnit
		slices = slices && strings.HasSuffix(dir, ".slice")
	}
	if c.UserUnit != "" {
		c.Unit = ""
	}
	return c
}

// container reads the directory names that runtimes give: the bare ID with
// their own cgroup driver, and with systemd's docker-ID.scope,
// cri-containerd-ID.scope, crio-ID.scope and libpod-ID.scope.
func container(dir string) (id, runtime string) {
	if isContainerID(dir) {
		return dir, ""
	}
	name, ok := strings.CutSuffix(dir, ".scope")
	if !ok || len(name) <= 64 || !isContainerID(name[len(name)-64:]) {
		return "", ""
	}
	switch id = name[len(name)-64:]; name[:len(name)-64] {
	case "docker-":
		return id, "docker"
	case "cri-containerd-":
		return id, "containerd"
	case "crio-":
		return id, "cri-o"
	case "libpod-":
		return id, "podman"
	}
	return "", ""
}

func isContainerID(s string) bool {
	if len(s) != 64 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
