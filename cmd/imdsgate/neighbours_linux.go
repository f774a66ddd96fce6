package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ofNeighbours looks at who shares the network of this host: what keeps others from the
// service may not keep him.
func (d *diagnosis) ofNeighbours(all []process) {
	self := slices.IndexFunc(all, func(p process) bool { return p.pid == os.Getpid() })
	if os.Geteuid() != 0 || self < 0 {
		d.leave("who can send past the redirect (CAP_NET_RAW, packet sockets), and containers on the host's network: only root can look")
		return
	}
	d.ofRawSockets(all, all[self])
	d.ofHostNetwork(all, all[self])
}

// ofRawSockets looks for who can send from this network namespace past netfilter: who may
// open a packet socket in it (packet(7)), and who has one, wherever he is.
func (d *diagnosis) ofRawSockets(all []process, host process) {
	open, err := packetSockets()
	if err != nil {
		d.leave("packet sockets: " + err.Error())
	}
	var services, others []string
	for _, p := range all {
		contained := p.contained(host)
		if p.uid == 0 && !contained || p.in.Unit == filepath.Base(daemonUnit) { // which has it for iptables-legacy
			continue
		}
		var how string
		switch {
		case p.raw && p.net == host.net && p.user == host.user:
			how = "CAP_NET_RAW"
		case len(open) > 0 && p.holds(open):
			how = "a packet socket"
		default:
			continue
		}
		one := fmt.Sprintf("%s (%s, uid %d): %s", p.name(), p.where(), p.uid, how)
		if !contained && strings.HasSuffix(p.in.Unit, ".service") {
			services = append(services, one)
		} else {
			others = append(others, one)
		}
	}
	const past = "can send packets past every firewall of this host, our rules among them, to the metadata service, too: "
	if len(others) > 0 {
		d.find("raw-sockets", doubtful, "programs that are no services of this host "+past+listed(others, "; "),
			"take CAP_NET_RAW from what does not need it: docker run --cap-drop NET_RAW, capabilities: {drop: [NET_RAW]} of a pod, setcap -r FILE; or give a container a network of its own")
	}
	if len(services) > 0 {
		d.find("raw-sockets", notable, "services that do not run as root "+past+listed(services, "; "),
			"CapabilityBoundingSet=~CAP_NET_RAW in a unit that does not need it: who breaks into the others gets past us")
	}
}

// ofHostNetwork looks for containers in this network namespace. They are taken for the host
// by all that goes by addresses and hops.
func (d *diagnosis) ofHostNetwork(all []process, host process) {
	programs := map[string][]string{} // by container, pod or PID namespace
	first := map[string]process{}
	for _, p := range all {
		if p.net != host.net || !p.contained(host) {
			continue
		}
		key := cmp.Or(p.in.Pod, p.in.Container, p.pids)
		if _, known := first[key]; !known {
			first[key] = p
		}
		programs[key] = append(programs[key], p.name())
	}
	var containers []string
	for key, p := range first {
		containers = append(containers, p.where()+": "+listed(programs[key], ", "))
	}
	if len(containers) > 0 {
		d.find("host-network-containers", notable, "containers are on the network of this host: their requests come through the redirect as the host's own do, and a hop limit of 1 keeps no session token from them: "+listed(containers, "; "),
			"docker run without --network host, hostNetwork: false, or VirtualEthernet= of systemd.nspawn; what needs the host's network is held by grants with container or pod, and posture: strict for all others")
	}
}

// packetSockets are those of this network namespace, as they are called in /proc/PID/fd.
func packetSockets() (map[string]bool, error) {
	b, err := os.ReadFile("/proc/self/net/packet")
	if err != nil {
		return nil, err
	}
	all := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 9 && f[8] != "Inode" {
			all["socket:["+f[8]+"]"] = true
		}
	}
	return all, nil
}

// holds reports whether the process has one of these open.
func (p *process) holds(sockets map[string]bool) bool {
	dir := filepath.Join("/proc", strconv.Itoa(p.pid), "fd")
	entries, err := os.ReadDir(dir)
	return err == nil && slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		return err == nil && sockets[to]
	})
}
