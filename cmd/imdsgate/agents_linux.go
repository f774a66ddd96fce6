package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ofAgents looks for programs that ask the service for a living, and lack a grant: without
// its agent nobody gets at a host that enforces.
func (d *diagnosis) ofAgents(o *options, c config.Config, running map[string]bool) {
	dirs, used, err := o.profiles()
	if err != nil {
		return
	}
	names, err := policy.ProfileNames(dirs)
	if err != nil || len(names) == 0 {
		d.leave("agents of the platform: there are no profiles to know them by (/usr/lib/imdsgate/profiles)")
		return
	}
	a := agents{running: running, programs: map[string]bool{}, units: map[string]bool{}}
	for _, g := range c.Grants {
		a.units[g.Unit] = true
		for _, exe := range g.Executable {
			a.programs[exe] = true
		}
	}
	for _, name := range names {
		p, err := policy.LoadProfile(name, dirs)
		if err != nil || used[name] {
			continue
		}
		grants := slices.DeleteFunc(p.Grants, func(g policy.Grant) bool { return !refusable(c, &g) })
		if how := a.present(grants); how != "" {
			d.find("profile-missing", doubtful, fmt.Sprintf("%s %s and has no grant; without one, in enforce mode: %s", name, how, p.Without), "profiles: ["+name+"]")
		}
	}
}

// ofContainers looks for agents that give credentials to containers.
func (d *diagnosis) ofContainers(rules iptables.Config, running map[string]bool) {
	for exe, endpoint := range map[string]string{"/usr/libexec/amazon-ecs-init": "169.254.170.2:80", "/agent": "169.254.170.2:80"} {
		if running[exe] && !slices.Contains(rules.Endpoints, netip.MustParseAddrPort(endpoint)) {
			d.find("container-endpoint", doubtful, "the ECS agent gives credentials to tasks at "+endpoint+", which nobody judges", "add it to redirect.endpoints: docs/relay.md says what then holds")
			break
		}
	}
	addrs, err := netlink.AddrList(nil, unix.AF_UNSPEC)
	if err != nil {
		d.leave("the EKS Pod Identity agent: " + err.Error())
	}
	for _, endpoint := range []string{"169.254.170.23:80", "[fd00:ec2::23]:80"} {
		e := netip.MustParseAddrPort(endpoint)
		if slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(e.Addr().AsSlice()) }) && !slices.Contains(rules.Endpoints, e) {
			d.find("container-endpoint", doubtful, "the EKS Pod Identity agent gives credentials to pods at "+endpoint+", which nobody judges", "add it to redirect.endpoints: docs/relay.md says what then holds")
		}
	}
}

// agents is what is known of programs, by which those of a profile are found.
type agents struct {
	running         map[string]bool
	programs, units map[string]bool // that have grants
}

// present says how the agent of a profile with these grants shows that it is on this host
// and has no grant; "" if it does not. A program that runs counts by itself. What is only
// installed, as on an image that is being made, counts if nothing of the agent has one.
func (a *agents) present(grants []policy.Grant) string {
	var installed string
	granted := false
	for _, g := range grants {
		tool := false
		for _, exe := range g.Executable {
			if _, is := policy.Tool(exe); is { // others have it, too
				tool = true
				continue
			}
			if a.programs[exe] {
				granted = true
				continue
			}
			if runs(exe, a.running) {
				return "runs (" + exe + ")"
			}
			if files, _ := filepath.Glob(exe); len(files) > 0 && installed == "" {
				installed = "is installed (" + exe + ")"
			}
		}
		if !tool || g.Unit == "" {
			continue
		}
		if a.units[g.Unit] {
			granted = true
		} else if installed == "" && hasUser(g.User) && hasUnit(g.Unit) {
			installed = "is installed (" + g.Unit + ")"
		}
	}
	if granted {
		return ""
	}
	return installed
}

// refusable reports whether something that a grant is for is refused to those without one.
func refusable(c config.Config, g *policy.Grant) bool {
	var asked []imds.Target
	for _, name := range g.Classes {
		var t imds.Target
		if t.Class.UnmarshalText([]byte(name)) == nil {
			asked = append(asked, t)
		}
	}
	for _, pattern := range g.Paths {
		t, err := imds.Classify(imds.Endpoints[0].Addr(), strings.ReplaceAll(pattern, "*", "x"))
		if err != nil {
			return true
		}
		asked = append(asked, t)
	}
	return len(asked) == 0 || slices.ContainsFunc(asked, func(t imds.Target) bool {
		return t.Guarded() || c.Classes[t.Class.String()] == policy.Strict
	})
}

// unitDirs are where systemd finds units, those that hide others first (systemd.unit(5)).
var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// hasUnit reports whether a unit is installed and not masked.
func hasUnit(name string) bool {
	for _, dir := range unitDirs {
		if at, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return at.Mode().IsRegular() && at.Size() > 0
		}
	}
	return false
}

// hasUser reports whether a user of whom a grant is exists here.
func hasUser(name string) bool {
	_, byName := user.Lookup(name)
	_, byID := user.LookupId(name)
	return name == "" || byName == nil || byID == nil
}

// runs reports whether a program runs that a grant names, in which a star is one directory.
func runs(named string, running map[string]bool) bool {
	if !strings.Contains(named, "*") {
		return running[named]
	}
	for exe := range running {
		if is, err := path.Match(named, exe); err == nil && is {
			return true
		}
	}
	return false
}
