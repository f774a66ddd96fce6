package main

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/imdsgate/imdsgate/attribution"
	"golang.org/x/sys/unix"
)

// process is what doctor reads of one. What it may not read is empty.
type process struct {
	pid             int
	exe             string // without the mark of a deleted file
	comm            string
	uid             int  // effective; -1 if it is not known
	raw             bool // has CAP_NET_RAW, or may have it
	net, user, pids string
	in              attribution.Cgroup
}

// processes are all that this process sees.
func processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	mounts, err := attribution.ReadCgroupMounts("/proc")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, readProcess(pid, mounts))
		}
	}
	return all, nil
}

func readProcess(pid int, mounts attribution.CgroupMounts) process {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	link := func(name string) string {
		to, _ := os.Readlink(filepath.Join(dir, name))
		return to
	}
	p := process{
		pid: pid, uid: -1, net: link("ns/net"), user: link("ns/user"), pids: link("ns/pid"),
		exe: strings.TrimSuffix(link("exe"), " (deleted)"), // it was upgraded since
	}
	status, _ := os.ReadFile(filepath.Join(dir, "status"))
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		switch key {
		case "Name":
			p.comm = value
		case "Uid": // real, effective, saved, of file systems
			if f := strings.Fields(value); len(f) == 4 {
				if uid, err := strconv.ParseUint(f[1], 10, 32); err == nil {
					p.uid = int(uid)
				}
			}
		case "CapPrm": // which has all that is effective
			set, err := strconv.ParseUint(value, 16, 64)
			p.raw = err == nil && set>>unix.CAP_NET_RAW&1 != 0
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "cgroup")); err == nil {
		p.in = mounts.Of(b)
	}
	return p
}

func (p *process) name() string {
	if p.exe == "" {
		return p.comm
	}
	return filepath.Base(p.exe)
}

// contained reports whether it runs in a container, seen from the host.
func (p *process) contained(host process) bool {
	return p.in.Container != "" || p.in.Pod != "" || p.pids != host.pids
}

// where is what an operator knows it by.
func (p *process) where() string {
	switch in := p.in; {
	case in.Pod != "":
		return "pod " + in.Pod
	case in.Container != "":
		return "container " + in.Container[:12]
	case in.UserUnit != "":
		return "user unit " + in.UserUnit
	case in.Unit != "":
		return in.Unit
	}
	return "no unit"
}

// maxNamed bounds how many programs or containers a finding names.
const maxNamed = 8

// listed names each once.
func listed(all []string, between string) string {
	all = slices.Compact(slices.Sorted(slices.Values(all)))
	if more := len(all) - maxNamed; more > 0 {
		all = append(all[:maxNamed:maxNamed], strconv.Itoa(more)+" more")
	}
	return strings.Join(all, between)
}
