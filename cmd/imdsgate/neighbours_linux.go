package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ofNeighbours looks at who shares the network of this host and is not root: he is not of
// those whom the redirect keeps from the service, or the hop limit.
func (d *diagnosis) ofNeighbours(all []process) {
	self := slices.IndexFunc(all, func(p process) bool { return p.pid == os.Getpid() })
	if os.Geteuid() != 0 || self < 0 {
		d.leave("who can send past the redirect (CAP_NET_RAW, packet sockets): only root can look")
		return
	}
	d.ofRawSockets(all, all[self])
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
		d.find("raw-sockets", doubtful, "programs that are no services of this host "+past+listed(others),
			"take CAP_NET_RAW from what does not need it: docker run --cap-drop NET_RAW, capabilities: {drop: [NET_RAW]} of a pod, setcap -r FILE; or give a container a network of its own")
	}
	if len(services) > 0 {
		d.find("raw-sockets", notable, "services that do not run as root "+past+listed(services),
			"CapabilityBoundingSet=~CAP_NET_RAW in a unit that does not need it: who breaks into the others gets past us")
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
