package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// diagnose looks at everything that can be known on a host.
func (o *options) diagnose(ctx context.Context, d *diagnosis, preflight bool) error {
	c, err := o.load()
	if err == nil {
		_, err = c.Policy()
	} else {
		// The host can be looked at all the same, all the more if the daemon does not start.
		var without error
		if c, without = config.LoadFiles(); without != nil {
			return errors.Join(err, without)
		}
		d.leave("what the configuration asks for: defaults were taken, since it cannot be read")
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		d.leave("what the daemon was told: " + err.Error() + "; ask as root, or as a member of the group imdsgate")
	case err != nil:
		d.find("config-refused", failing, err.Error(), "imdsgate check shows the line; correct it there")
	}
	client := control.NewClient(cmp.Or(o.socket, c.Control.Socket))
	s, running := report.Status{}, false
	if !preflight {
		s, running = d.ofStatus(ctx, client)
	}
	rules := c.Redirect.WithDefaults()
	d.ofRules(ctx, rules, running)
	d.ofConfig(c)
	d.ofHost()
	all, err := processes()
	if err != nil {
		d.leave("processes: " + err.Error())
	}
	programs := map[string]bool{}
	for _, p := range all {
		programs[p.exe] = true
	}
	d.ofAgents(o, c, programs)
	d.ofContainers(rules, programs)
	d.ofNeighbours(all)
	switch {
	case preflight:
		d.leave("ways past the daemon: with --preflight none is expected")
	case s.Mode == "off":
		d.leave("ways past the daemon: its mode is off, and every request goes there")
	default:
		d.attack(ctx, client, rules, running, all)
	}
	if running {
		d.ofInstance(ctx, client)
	} else {
		d.leave("the hop limit of the instance: it takes a daemon that runs, or the EC2 API (aws ec2 describe-instances --query '…MetadataOptions')")
	}
	d.leave("whether other machines have the same machine-id: it takes the others")
	d.leave("containers with a network interface of the instance: from level 2 on their connections are seen when they are made")
	return nil
}

// ofRules asks the rules of the host themselves, which needs CAP_NET_ADMIN.
func (d *diagnosis) ofRules(ctx context.Context, rules iptables.Config, running bool) {
	if os.Geteuid() != 0 {
		d.leave("rules of iptables and nft: only root can read them")
		return
	}
	rules.UID = 1                // of nobody: it makes no difference to what others' rules do
	if rules.Validate() != nil { // which the finding about the configuration says
		rules = iptables.Config{UID: 1}.WithDefaults()
	}
	r, err := iptables.Open(ctx, rules)
	if err != nil {
		d.find("iptables-missing", failing, err.Error(), "apt-get install iptables, or dnf install iptables-nft")
		return
	}
	defer r.Close()
	found, err := r.Status(ctx)
	if err != nil {
		d.find("rules-unreadable", failing, err.Error(), "iptables-save, ip6tables-save and nft list ruleset must work for root")
		return
	}
	if !running { // which tells of them itself
		for _, l := range found.Locks {
			d.find("redirect-lock", failing, l.Message(), l.Fix())
		}
		for _, e := range found.Evasions {
			d.find("redirect-evaded", failing, e.Message(), e.Fix())
		}
	}
	for _, p := range found.Prohibitions {
		s := doubtful
		if p.Daemon != "" {
			s = failing
		}
		d.find("imds-locked", s, p.Message(), p.Fix())
	}
	for _, w := range found.Warnings {
		d.find("rules-doubtful", doubtful, w, "read the rule: can it concern packets to the metadata service, or to the daemon's ports?")
	}
	for _, other := range found.Others {
		d.find("two-backends", doubtful, fmt.Sprintf("rules are in iptables-%s, where ours are, and in iptables-%s: both are in force, and whoever lists or flushes the ones leaves out the others", found.Backend, other),
			"let every tool of the host write to one: update-alternatives --config iptables, redirect.backend, and for docker and firewalld their own setting")
	}
	for _, f := range found.Families {
		if f.Skipped != "" {
			d.find("family-skipped", notable, fmt.Sprintf("%s: %s", f.Family, f.Skipped), "none is needed for as long as nobody has the family")
		}
	}
	if t := found.Conntrack; t.Crowded() {
		s, fix := doubtful, fmt.Sprintf("net.netfilter.nf_conntrack_max = %d or more: when there is no room, the kernel drops new connections of the whole host", 2*t.Sockets)
		if t.First && !running && !rules.OverrideConntrack {
			s, fix = failing, fix+"; the daemon does not start a tracker that has no room, or set redirect.override_conntrack: true"
		}
		d.find("conntrack-full", s, fmt.Sprintf("%d sockets are open, and connection tracking has room for %d", t.Sockets, t.Max), fix)
	}
}

// ofConfig looks at who can change what the daemon believes, and at what it writes.
func (d *diagnosis) ofConfig(c config.Config) {
	for _, file := range c.Files() {
		file, err := filepath.Abs(file)
		if err != nil {
			continue
		}
		for _, err := range ownedByRoot("/", file, "so that he makes the policy") {
			d.find("config-writable", failing, err.Error(), "chown root, chmod go-w")
		}
	}
	for _, dir := range c.Rules.Paths {
		for _, err := range ownedByRoot("/", dir, "so that he makes the rules") {
			d.find("rules-writable", failing, err.Error(), "chown root, chmod go-w")
		}
	}
	for _, g := range c.Grants {
		if !g.Expires.IsZero() && time.Now().After(g.Expires.AddDate(0, 0, 1)) {
			d.find("grant-expired", doubtful, "grant "+g.Name+" has expired on "+g.Expires.Format(time.DateOnly), "take it out, or set expires: anew")
		}
	}
	if c.Events.Layout == event.Defend {
		if _, err := os.Stat("/opt/Elastic/Endpoint"); err == nil {
			d.find("defend-twice", doubtful, "events are written to the streams of Elastic's endpoint agent, which runs here itself: each alert comes twice", "events.layout: own")
		}
	}
	if info, err := os.Stat(c.Events.Path); err == nil && info.Mode().Perm()&0o007 != 0 {
		d.find("events-readable", doubtful, fmt.Sprintf("%s can be read by every user (%v): it names programs and keys", c.Events.Path, info.Mode()), "chmod 0640 "+c.Events.Path)
	}
	var fs unix.Statfs_t
	for dir := filepath.Dir(c.Events.Path); ; dir = filepath.Dir(dir) {
		err := unix.Statfs(dir, &fs)
		if errors.Is(err, syscall.ENOENT) && dir != "/" {
			continue
		}
		size := c.Events.MaxSize
		if size == 0 {
			size = 100 << 20
		}
		keep := int64(c.Events.Keep)
		if keep == 0 {
			keep = 4
		}
		if free := int64(fs.Bavail) * fs.Bsize; err == nil && free < size*(keep+1) {
			d.find("spool-space", doubtful, fmt.Sprintf("%s has %d MB free, and events may take %d MB", dir, free>>20, size*(keep+1)>>20), "events.max_size and events.keep, or a larger disk: on a full one the oldest events go")
		}
		if err == nil && fs.Flags&unix.ST_RDONLY != 0 {
			d.find("spool-read-only", failing, dir+" is mounted read-only, and events are to be written there", "events.path: a file on a disk that can be written")
		}
		break
	}
}

// ofHost looks at what identity, time and attribution rest on.
func (d *diagnosis) ofHost() {
	id, err := os.ReadFile("/etc/machine-id")
	if text := strings.TrimSpace(string(id)); err != nil || len(text) != 32 || strings.Trim(text, "0") == "" {
		d.find("machine-id", doubtful, "/etc/machine-id is missing or not one: host.id of events changes with each boot", "systemd-machine-id-setup; an image has an empty one, so that each instance makes its own")
	}
	d.ofCapabilities()
	var now unix.Timex
	if _, err := unix.Adjtimex(&now); err == nil && now.Status&unix.STA_UNSYNC != 0 {
		d.find("clock-unsynchronised", doubtful, "nobody keeps the clock: times of events, and ends of grants and decisions, are as wrong as it is", "chrony with 169.254.169.123")
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err == nil {
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 3 && f[1] == "/proc" && strings.Contains(f[3], "hidepid=") && !strings.Contains(f[3], "hidepid=0") {
				d.find("hidepid", notable, "/proc is mounted with "+f[3]+": the daemon sees others by CAP_SYS_PTRACE alone", "leave CAP_SYS_PTRACE in its unit")
			}
		}
	}
	if on, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil && strings.TrimSpace(string(on)) == "1" {
		d.ofSELinux()
	}
}

// ofSELinux looks for what was denied to the daemon since the boot. A permissive domain is
// denied nothing, as the module of the package has it.
func (d *diagnosis) ofSELinux() {
	log, err := tail("/var/log/audit/audit.log", 4<<20)
	if err != nil {
		d.leave("what SELinux has denied: /var/log/audit/audit.log cannot be read")
		return
	}
	var up unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &up)
	boot := time.Now().Add(-time.Duration(up.Nano())).Unix()
	for line := range strings.Lines(string(log)) {
		_, stamp, _ := strings.Cut(line, "msg=audit(")
		stamp, _, _ = strings.Cut(stamp, ".")
		at, err := strconv.ParseInt(stamp, 10, 64)
		if err == nil && at >= boot && strings.Contains(line, "avc:  denied") && strings.Contains(line, `comm="imdsgated"`) && !strings.Contains(line, "permissive=1") {
			d.find("selinux-denied", failing, strings.TrimSpace(line), "ausearch -c imdsgated | audit2allow, and tell the project")
			return
		}
	}
}

// ofCapabilities looks at what the first process may have at all, which is what systemd has
// to give: in a container some are missing.
func (d *diagnosis) ofCapabilities() {
	status, err := os.ReadFile("/proc/1/status")
	_, text, _ := strings.Cut(string(status), "\nCapBnd:")
	text, _, _ = strings.Cut(text, "\n")
	bounding, parseErr := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
	if err := errors.Join(err, parseErr); err != nil {
		d.leave("capabilities that systemd can give: " + err.Error())
		return
	}
	for _, c := range []struct {
		number   int
		name     string
		severity severity
		without  string
	}{
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", failing, "the daemon does not start"},
		{unix.CAP_NET_RAW, "CAP_NET_RAW", failing, "the daemon does not start"},
		{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", failing, "the daemon does not start"},
		{unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH", failing, "the daemon does not start"},
		{unix.CAP_BPF, "CAP_BPF", doubtful, "attribution stays at level 1"},
		{unix.CAP_PERFMON, "CAP_PERFMON", doubtful, "attribution stays at level 2"},
	} {
		if bounding>>c.number&1 == 0 {
			d.find("capability-missing", c.severity, "no process here can have "+c.name+" (CapBnd of process 1): "+c.without, "imdsgate belongs on the host, not into a container; SECURITY.md says what each capability is for")
		}
	}
}

// tail is the end of a file.
func tail(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(info.Size()-most, 0), most))
}

const (
	nobody = 65534
	// maxSkew is what AWS takes no offence at (it allows five minutes) and what is found in
	// records all the same.
	maxSkew = time.Minute
	// maxNamespaces bounds how many other network namespaces are tried from.
	maxNamespaces = 32
	// maxSpelled bounds from how many of them each spelling is tried.
	maxSpelled = 8
)

// attack tries to get past the daemon.
func (d *diagnosis) attack(ctx context.Context, client *control.Client, rules iptables.Config, judging bool, processes []process) {
	n := newNonces()
	var all []batch
	here := place{as: "uid " + strconv.Itoa(os.Geteuid()), from: "this host", uid: -1}
	root := os.Geteuid() == 0
	ordinary := here
	if root {
		here.as = "root"
		ordinary = place{as: "an ordinary user", from: "this host", uid: nobody}
	} else {
		d.leave("tries as root, with the daemon's mark and from other network namespaces: they take root")
	}
	// The instance's own, whether they are configured or not, and those that are.
	endpoints := iptables.Config{}.WithDefaults().Endpoints
	for _, e := range rules.Endpoints {
		if !slices.Contains(endpoints, e) {
			endpoints = append(endpoints, e)
		}
	}
	inside := place{as: "root of a user namespace", from: ordinary.from, uid: ordinary.uid, userns: true}
	for _, e := range endpoints {
		device := deviceTo(e.Addr())
		all = append(all, batch{place: ordinary, attempts: ways(e, device, 0, true, n)}, batch{place: inside, attempts: ways(e, device, rules.Mark, false, n)})
		if root {
			all = append(all, batch{place: here, attempts: ways(e, device, rules.Mark, true, n)})
		}
	}
	host, forwarded := listeners(rules)
	if !judging { // where imdsgated.socket listens, who asks starts the daemon
		d.leave("tries straight at where the daemon listens: none is at work")
		host, forwarded = nil, nil
	}
	from := func(p place, spelled bool, listeners ...netip.AddrPort) {
		b := batch{place: p}
		for _, l := range listeners {
			b.attempts = append(b.attempts, straight(l, n)...)
		}
		if p.netns != "" {
			for _, e := range endpoints {
				b.attempts = append(b.attempts, ways(e, "", rules.Mark, spelled, n)...)
			}
		}
		all = append(all, b)
	}
	from(ordinary, false, slices.Concat(host, forwarded)...)
	if root {
		from(here, false, slices.Concat(host, forwarded)...)
		others, err := otherNamespaces(processes)
		if err != nil || len(others) == maxNamespaces {
			d.leave(fmt.Sprintf("some network namespaces: tried from the first %d (%v)", len(others), err))
		}
		if len(others) > maxSpelled {
			d.leave(fmt.Sprintf("spellings from some network namespaces: tried from the first %d", maxSpelled))
		}
		for i, other := range others {
			from(other, i < maxSpelled, forwarded...)
		}
		from(place{as: "root", from: "a new network namespace", uid: -1, netns: newNamespace}, false, forwarded...)
	}
	tryAll(ctx, all)
	var answered []string
	for _, b := range all {
		if b.err != nil {
			d.leave(b.err.Error())
		}
		for k, one := range b.out {
			if one.Status != 0 {
				answered = append(answered, b.attempts[k].Nonce)
			}
		}
	}
	seen := map[string]bool{}
	if judging && len(answered) > 0 {
		seen = n.recorded(ctx, client, answered)
	}
	d.judge(judging, func(yield func(place, attempt, outcome, bool)) {
		for _, b := range all {
			for k, one := range b.out {
				yield(b.place, b.attempts[k], one, seen[b.attempts[k].Nonce])
			}
		}
	})
}

// judge makes findings of what came of the attempts.
func (d *diagnosis) judge(judging bool, each func(func(place, attempt, outcome, bool))) {
	answered, v1, past, direct, behind := 0, false, map[string][]string{}, map[string]bool{}, time.Duration(0)
	each(func(p place, a attempt, o outcome, seen bool) {
		t := probed{Way: a.Way, As: p.as, From: p.from, Result: noAnswer, Detail: o.Error}
		if o.Status != 0 {
			t.Detail = strconv.Itoa(o.Status)
			if !a.Direct {
				answered++
			}
			if !a.Direct && o.Status != http.StatusForbidden && o.Behind.Abs() > behind.Abs() { // that may be the daemon's, by this clock
				behind = o.Behind
			}
			if t.Result = wasSeen; !seen {
				t.Result = gotPast
				key := a.To.Addr().String() + " from " + p.from
				if a.Direct {
					key = a.To.String() + ", where the daemon listens, from " + p.from
					direct[key] = true
				}
				past[key] = append(past[key], fmt.Sprintf("%s, as %s", strings.TrimPrefix(a.Way, a.To.String()+" "), p.as))
			}
			if !judging && !a.Direct && o.Status == http.StatusNotFound && !v1 { // or else the daemon asks
				d.findV1()
				v1 = true
			}
		}
		d.Probes = append(d.Probes, t)
	})
	for _, key := range slices.Sorted(func(yield func(string) bool) {
		for k := range past {
			if !yield(k) {
				return
			}
		}
	}) {
		which := past[key]
		if len(which) > 4 {
			which = append(which[:4:4], fmt.Sprintf("and %d more", len(past[key])-4))
		}
		message := "requests to " + key + " are answered, and the daemon has recorded none of them: " + strings.Join(which, "; ")
		fix := "imdsgate redirect verify and iptables-save: a rule of ours is missing, or another one comes before it"
		switch {
		case direct[key]:
			fix = "ss -tlnp says who listens there, and iptables-save, ip6tables-save and nft list ruleset which rule leads packets elsewhere"
		case !judging:
			message, fix = "requests to "+key+" are answered, and no daemon judges them", "start imdsgated"
		}
		d.find("got-past", failing, message, fix)
	}
	if behind.Abs() > maxSkew {
		side := "behind"
		if behind < 0 {
			side = "ahead of"
		}
		d.find("clock-wrong", doubtful, fmt.Sprintf("the clock is %v %s that of the service: times of events, and ends of grants and decisions, are as wrong", behind.Abs().Round(time.Second), side), "chrony with 169.254.169.123")
	}
	if answered == 0 {
		d.find("imds-silent", doubtful, "the metadata service answers nobody: this is no instance, it is off, or something keeps everybody from it", "aws ec2 describe-instances: MetadataOptions.HttpEndpoint; ip route get 169.254.169.254")
	}
}

// deviceTo is the network interface that leads to an address; "" if there is none.
func deviceTo(to netip.Addr) string {
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil || len(routes) == 0 {
		return ""
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil || link.Attrs().Name == "lo" {
		return ""
	}
	return link.Attrs().Name
}

// otherNamespaces are the network namespaces in which processes of this host are, and
// doctor is not: so many of them.
func otherNamespaces(all []process) (others []place, err error) {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	known := map[string]bool{own: true, "": true} // what cannot be read
	for _, p := range all {
		if known[p.net] || len(others) == maxNamespaces {
			continue
		}
		known[p.net] = true
		others = append(others, place{as: "root", from: fmt.Sprintf("the network namespace of %s (pid %d)", p.comm, p.pid), uid: -1, netns: fmt.Sprintf("/proc/%d/ns/net", p.pid)})
	}
	return others, nil
}
