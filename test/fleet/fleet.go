// Package fleet makes up the history of a fleet: what its hosts ask of the metadata
// service in some days, as the daemon would have seen and written it. Programs are those
// of real hosts, with their units, users and parents; documents are rendered by package
// event. The same seed makes the same history.
package fleet

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/oklog/ulid/v2"
)

// Fleet is one. The zero value of each field is 30 hosts, 7 days, as often as real
// programs ask.
type Fleet struct {
	Seed        uint64
	Hosts, Days int
	// Times multiplies how often programs ask that are there all the time.
	Times int
}

// Truth is what a request really was.
type Truth uint8

const (
	// Legitimate is what must go on working.
	Legitimate Truth = iota
	// Operators is legitimate, and done so that no grant can tell it from a theft.
	Operators
	// Theft is what must not get through.
	Theft
)

// Asked is a request, as it was observed.
type Asked struct {
	Event *event.Event
	Truth Truth
	Actor string // who has asked
}

// Begin is when histories begin: a Monday.
var Begin = time.Date(2026, 11, 2, 0, 0, 0, 0, time.UTC)

const (
	defaultHosts = 30
	defaultDays  = 7
)

func (f Fleet) size() (hosts, days int) {
	if hosts = f.Hosts; hosts == 0 {
		hosts = defaultHosts
	}
	if days = f.Days; days == 0 {
		days = defaultDays
	}
	return hosts, days
}

// host is one of the fleet.
type host struct {
	*event.Host
	n      int
	role   string
	ubuntu bool
	level  string
	random *rand.Rand
	pid    int64
	living map[string]*event.Process // by actor: what runs on
	init   *event.Process
	port   uint16
	asked  int
}

// roles are dealt to hosts in turn.
var roles = []string{"shop", "shop", "worker", "worker", "billing", "ci", "cluster", "shop", "worker", "backup"}

func (f Fleet) host(n int) *host {
	h := &host{n: n, role: roles[n%len(roles)], ubuntu: n%3 == 0, level: "L2", random: rand.New(rand.NewPCG(f.Seed, uint64(n))), pid: 400, living: map[string]*event.Process{}, port: 32768}
	if hosts, _ := f.size(); n == hosts-1 {
		h.level = "L0" // an old kernel
	}
	id := fmt.Sprintf("%032x", h.random.Uint64())
	h.Host = &event.Host{ID: id, Name: fmt.Sprintf("%s-%02d", h.role, n), BootID: fmt.Sprintf("boot-%d", n), Architecture: "x86_64", Kernel: "6.8.0",
		OSName: "Amazon Linux", OSVersion: "2023", OSPlatform: "amzn", AgentID: "agent-" + id[:8], Version: "1.0.0"}
	if h.ubuntu {
		h.OSName, h.OSVersion, h.OSPlatform = "Ubuntu", "24.04", "ubuntu"
	}
	h.boot(Begin)
	return h
}

func (h *host) boot(at time.Time) {
	clear(h.living)
	h.pid = 400
	h.init = &event.Process{EntityID: fmt.Sprintf("%s-1-%d", h.ID[:12], at.UnixMilli()), PID: 1, Start: at, Executable: "/usr/lib/systemd/systemd", Name: "systemd",
		Args: []string{"/sbin/init"}, CommandLine: "/sbin/init", WorkingDir: "/", UserID: "0", RealUserID: "0", SavedUserID: "0", UserName: "root",
		Known: true, HostVerified: true, RootOwned: true}
}

// actor is a program that asks.
type actor struct {
	name       string
	executable string
	args       []string
	unit       string
	user       string
	uid        string
	parents    []string // executables above it, nearest first, up to the first process
	container  string
	writable   bool // others than root can change the file
	lives      bool // goes on running between requests
	targets    []string
	v1         bool
	tokenOf    string // the actor whose session token it uses
	truth      Truth
}

const (
	role     = "/latest/meta-data/iam/security-credentials/fleet-role"
	listing  = "/latest/meta-data/iam/security-credentials/"
	identity = "/latest/dynamic/instance-identity/document"
	proof    = "/latest/dynamic/instance-identity/pkcs7"
	userData = "/latest/user-data"
	number   = "/latest/meta-data/instance-id"
	zone     = "/latest/meta-data/placement/availability-zone"
)

// visit is an actor at a time.
type visit struct {
	at  time.Time
	who actor
}

// visits are all of a host, in order.
func (h *host) visits(f Fleet) []visit {
	_, days := f.size()
	end := Begin.AddDate(0, 0, days)
	var all []visit
	every := func(interval time.Duration, who func(time.Time) actor) {
		if f.Times > 1 {
			interval /= time.Duration(f.Times)
		}
		for at := Begin.Add(time.Duration(h.random.Int64N(int64(interval)))); at.Before(end); at = at.Add(interval - interval/20 + time.Duration(h.random.Int64N(int64(interval)/10))) {
			all = append(all, visit{at, who(at)})
		}
	}
	at := func(day int, clock time.Duration, who actor) {
		if t := Begin.AddDate(0, 0, day).Add(clock); t.Before(end) {
			all = append(all, visit{t, who})
		}
	}
	always := func(a actor) func(time.Time) actor { return func(time.Time) actor { return a } }
	python, shell, cron, cronUnit := "/usr/bin/python3.9", "/usr/bin/bash", "/usr/sbin/crond", "crond.service"
	if h.ubuntu {
		python, shell, cron, cronUnit = "/usr/bin/python3.12", "/usr/bin/dash", "/usr/sbin/cron", "cron.service"
	}

	// What comes with the platform.
	cloudInit := actor{name: "cloud-init", executable: python, args: []string{"/usr/bin/python3", "/usr/bin/cloud-init", "init", "--local"}, unit: "cloud-init-local.service",
		user: "root", uid: "0", targets: []string{number, zone, userData, proof, listing, role}}
	at(0, time.Minute+time.Duration(h.n)*time.Second, cloudInit)
	if h.n%2 == 0 { // patched in the week, and started again
		at(2+h.n%3, 3*time.Hour+time.Duration(h.n)*time.Minute, cloudInit)
	}
	every(time.Hour, always(actor{name: "ssm", executable: "/usr/bin/amazon-ssm-agent", unit: "amazon-ssm-agent.service", user: "root", uid: "0", lives: true,
		targets: []string{number, identity, listing, role}}))
	every(2*time.Hour, always(actor{name: "cloudwatch", executable: "/opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent", unit: "amazon-cloudwatch-agent.service",
		user: "cwagent", uid: "994", lives: true, targets: []string{number, zone, listing, role}}))
	every(time.Hour, always(actor{name: "puppet", executable: "/opt/puppetlabs/puppet/bin/ruby", args: []string{"puppet", "agent"}, unit: "puppet.service", user: "root", uid: "0",
		lives: true, targets: []string{number, identity, proof}}))
	every(24*time.Hour, always(actor{name: "inventory", executable: python, args: []string{"python3", "/usr/local/sbin/upload-inventory"}, unit: cronUnit, user: "root", uid: "0",
		parents: []string{shell, cron}, targets: []string{number, listing, role}}))

	switch h.role {
	case "shop":
		deployed := Begin.AddDate(0, 0, 3).Add(11 * time.Hour)
		every(30*time.Minute, func(t time.Time) actor {
			a := actor{name: "shop", executable: "/opt/node-v20.11.0/bin/node", args: []string{"node", "/srv/shop/server.js"}, unit: "shop.service", user: "shop", uid: "990", lives: true,
				targets: []string{zone, listing, role}}
			if t.After(deployed) {
				a.name, a.executable = "shop, deployed", "/opt/node-v20.18.1/bin/node"
			}
			return a
		})
	case "worker":
		every(time.Hour, always(actor{name: "reports", executable: python, args: []string{"python3", "/opt/reports/run.py"}, unit: "reports.service", user: "reports", uid: "989",
			targets: []string{listing, role}}))
	case "billing":
		every(40*time.Minute, always(actor{name: "billing", executable: "/opt/billing/bin/billing", unit: "billing.service", user: "billing", uid: "988", lives: true, v1: true,
			targets: []string{zone, role}}))
	case "ci":
		every(3*time.Hour, always(actor{name: "build", executable: python, args: []string{"python3", "/usr/bin/aws", "s3", "cp", "out.tgz", "s3://builds/"}, unit: "actions.runner.acme.service",
			user: "ci", uid: "987", parents: []string{"/usr/bin/bash", "/opt/actions-runner/bin/Runner.Worker", "/opt/actions-runner/bin/Runner.Listener"}, targets: []string{listing, role}, truth: Operators}))
	case "cluster":
		every(40*time.Minute, always(actor{name: "kubelet", executable: "/usr/bin/kubelet", unit: "kubelet.service", user: "root", uid: "0", lives: true, targets: []string{number, zone, identity}}))
		every(6*time.Hour, always(actor{name: "registry login", executable: "/usr/local/bin/ecr-credential-provider", unit: "kubelet.service", user: "root", uid: "0",
			parents: []string{"/usr/bin/kubelet"}, targets: []string{listing, role}}))
		every(4*time.Hour, func(t time.Time) actor {
			return actor{name: "exporter", executable: "/usr/local/bin/exporter", container: fmt.Sprintf("%016x%048x", h.random.Uint64(), t.UnixNano()), user: "", uid: "65534",
				parents: []string{"/usr/bin/containerd-shim-runc-v2"}, targets: []string{listing, role}, truth: Operators}
		})
	case "backup":
		every(2*time.Hour, always(actor{name: "backup", executable: "/opt/backup/bin/backup-agent", unit: "backup.service", user: "backup", uid: "986", lives: true, v1: true,
			targets: []string{role}}))
	}

	// People.
	login := []string{"/usr/bin/bash", "/usr/sbin/sshd"}
	for range 3 {
		at(h.random.IntN(days), time.Duration(9+h.random.IntN(8))*time.Hour+time.Duration(h.random.IntN(3600))*time.Second, actor{name: "debugging", executable: "/usr/bin/curl",
			args: []string{"curl", "-s", "http://169.254.169.254" + zone}, unit: fmt.Sprintf("session-%d.scope", 2+h.random.IntN(20)), user: "alice", uid: "1001", parents: login, targets: []string{number, zone}})
	}
	if h.n == 4 {
		at(1, 15*time.Hour, actor{name: "looking at the role", executable: "/usr/bin/curl", args: []string{"curl", "http://169.254.169.254" + role}, unit: "session-9.scope",
			user: "alice", uid: "1001", parents: login, targets: []string{role}, truth: Operators})
	}

	// Thieves.
	if h.role == "backup" { // who has found a way to have a granted program start another
		for _, day := range []int{2, 3, 5} {
			at(day, 2*time.Hour+13*time.Minute, actor{name: "child of a granted program", executable: "/usr/bin/curl", args: []string{"curl", "-sK", "-"}, unit: "backup.service", user: "backup", uid: "986",
				parents: []string{"/opt/backup/bin/backup-agent"}, targets: []string{listing, role}, truth: Theft})
		}
	}
	if h.role == "backup" { // and by a program that is none of those which do what they are told
		for _, day := range []int{1, 4} {
			at(day, 3*time.Hour+31*time.Minute, actor{name: "grandchild of a granted program", executable: python, args: []string{"python3", "-"}, unit: "backup.service", user: "backup", uid: "986",
				parents: []string{"/usr/bin/timeout", "/opt/backup/bin/backup-agent"}, targets: []string{listing, role}, truth: Theft})
		}
	}
	if h.n == 1 { // who has broken into the web server
		for _, day := range []int{3, 4} {
			at(day, 4*time.Hour, actor{name: "web shell", executable: python, args: []string{"python3", "-c", "import urllib.request"}, unit: "nginx.service", user: "www-data", uid: "33",
				parents: []string{shell, "/usr/sbin/nginx"}, targets: []string{listing, role}, truth: Theft})
		}
	}
	if h.n == 7 { // who has brought a program along, under the name of an agent
		for _, day := range []int{3, 4} {
			at(day, 5*time.Hour, actor{name: "renamed", executable: "/tmp/.cache/amazon-ssm-agent", unit: "shop.service", user: "shop", uid: "990", writable: true,
				parents: []string{"/opt/node-v20.11.0/bin/node"}, targets: []string{listing, role}, truth: Theft})
		}
	}
	if h.n == 2 { // who has the script of a job run, with a token that he has brought
		for _, day := range []int{4, 5, 6} {
			at(day, 6*time.Hour, actor{name: "foreign token", executable: python, args: []string{"python3", "/opt/reports/run.py"}, unit: "reports.service", user: "reports", uid: "989",
				targets: []string{role}, tokenOf: "ssm", truth: Theft})
		}
	}
	slices.SortStableFunc(all, func(a, b visit) int { return a.at.Compare(b.at) })
	return all
}

// process is what an actor runs as: what it is already, or a new one.
func (h *host) process(a actor, at time.Time) *event.Process {
	if p := h.living[a.name]; p != nil && a.lives {
		return p
	}
	parent := h.init
	for _, file := range slices.Backward(a.parents) {
		parent = h.start(actor{executable: file, unit: a.unit, container: a.container, user: a.user, uid: a.uid}, parent, at)
	}
	p := h.start(a, parent, at)
	h.living[a.name] = p
	return p
}

func (h *host) start(a actor, parent *event.Process, at time.Time) *event.Process {
	h.pid += 1 + h.random.Int64N(40)
	args := a.args
	if args == nil {
		args = []string{a.executable}
	}
	p := &event.Process{
		EntityID: fmt.Sprintf("%s-%d-%d", h.ID[:12], h.pid, at.UnixMilli()), PID: h.pid, Start: at.Add(-40 * time.Millisecond), Executable: a.executable, Name: path.Base(a.executable),
		Args: args, CommandLine: strings.Join(args, " "), WorkingDir: "/", UserID: a.uid, RealUserID: a.uid, SavedUserID: a.uid, UserName: a.user,
		GroupID: a.uid, RealGroupID: a.uid, SavedGroupID: a.uid, GroupName: a.user, Unit: a.unit, Cgroup: "/system.slice/" + a.unit,
		Known: true, HostVerified: !a.writable, RootOwned: !a.writable, Parent: parent, Ancestry: "birth",
	}
	p.Executed = p.Start
	if strings.HasPrefix(a.unit, "session-") {
		p.Cgroup, p.TTY = "/user.slice/user-1001.slice/"+a.unit, true
	}
	if a.container != "" {
		p.Container, p.Runtime, p.HostVerified, p.RootOwned, p.Cgroup = a.container, "containerd", false, false, "/kubepods.slice/cri-containerd-"+a.container+".scope"
	}
	if h.level == "L0" {
		p.Ancestry = "present"
	}
	return p
}

// Host is what one host was asked for, in order.
func (f Fleet) Host(n int) iter.Seq[Asked] {
	return func(yield func(Asked) bool) {
		h := f.host(n)
		for _, v := range h.visits(f) {
			if v.who.name == "cloud-init" && v.at.After(Begin.Add(time.Hour)) {
				h.boot(v.at.Add(-time.Minute))
			}
			for _, a := range h.visit(v) {
				if !yield(a) {
					return
				}
			}
		}
	}
}

// visit is the requests of one: the one for a token first, where it uses one.
func (h *host) visit(v visit) []Asked {
	at := v.at.Truncate(time.Millisecond)
	p := h.process(v.who, at)
	token := event.Token{Issued: at, Expires: at.Add(6 * time.Hour), Issuers: []*event.Issuer{event.NewIssuer(p)}}
	targets := v.who.targets
	switch {
	case v.who.tokenOf != "":
		token.Issuers = []*event.Issuer{event.NewIssuer(h.living[v.who.tokenOf])}
	case !v.who.v1:
		targets = slices.Concat([]string{"/latest/api/token"}, targets)
	}
	h.port = max(h.port+1, 32768)
	connection := event.Connection{Source: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(h.n), 5}), h.port), Destination: endpoint, First: true, Accepted: at}
	var all []Asked
	for i, target := range targets {
		t, err := imds.Classify(endpoint.Addr(), target)
		if err != nil {
			panic(err) // a target of ours
		}
		connection.First = i == 0
		ev := &event.Event{
			Host: h.Host, Time: at.Add(time.Duration(1+2*i) * time.Millisecond), Connection: connection, Duration: time.Millisecond,
			Attribution: event.Attribution{Level: h.level, Confidence: "high", Via: "exact", Complete: true, Cookie: uint64(h.asked + 1), Took: 200 * time.Microsecond},
			Subjects:    []*event.Process{p}, Roles: []string{"connector"},
			Request: event.Request{Method: "GET", Target: target, Path: t.Path, Class: t.Class.String(), Guarded: t.Guarded(), Version: t.Version, HTTP: "1.1", Host: "169.254.169.254",
				UserAgent: "aws-sdk", Bytes: 150, Token: !v.who.v1, Evasive: t.Evasive},
			Response: event.Response{Status: 200, Bytes: 300},
		}
		if t.Class == imds.Token {
			ev.Request.Method, ev.Request.Token = "PUT", false
		} else if !v.who.v1 {
			ev.Token = token
		}
		h.asked++
		truth := v.who.truth
		if truth == Theft && !ev.Request.Guarded {
			truth = Operators // which it may have
		}
		all = append(all, Asked{ev, truth, v.who.name})
	}
	return all
}

var endpoint = netip.MustParseAddrPort("169.254.169.254:80")

// Write judges all requests as a daemon on each host would have, and writes what it would
// have written: a file for each host. It returns how many requests there were.
func (f Fleet) Write(dir string, p *policy.Policy) (requests int, err error) {
	hosts, _ := f.size()
	for n := range hosts {
		count, err := f.write(filepath.Join(dir, fmt.Sprintf("host-%02d.ndjson", n)), n, p)
		if err != nil {
			return requests, fmt.Errorf("write the history of a host: %w", err)
		}
		requests += count
	}
	return requests, nil
}

func (f Fleet) write(file string, n int, p *policy.Policy) (requests int, err error) {
	to, err := os.Create(file)
	if err != nil {
		return 0, err
	}
	defer to.Close()
	out := bufio.NewWriterSize(to, 1<<20)
	w := writer{out: out, n: n}
	engine := policy.NewEngine(p)
	var last *event.Event
	for a := range f.Host(n) {
		engine.Judge(a.Event)
		engine.Observe(a.Event)
		w.event(a.Event)
		last = a.Event
		requests++
	}
	if hosts, _ := f.size(); n == hosts-2 && last != nil { // which was short of disk
		w.event(&event.Event{Kind: event.Lifecycle, Host: last.Host, Time: last.Time, State: event.State{Action: "events-suppressed", Type: "info", Message: "20 events are missing"}})
	}
	if err := out.Flush(); err != nil {
		return requests, err
	}
	return requests, to.Close()
}

// writer writes documents as the sink does.
type writer struct {
	out  *bufio.Writer
	n    int
	seq  uint64
	line []byte
}

func (w *writer) event(ev *event.Event) {
	for _, v := range ev.Views() {
		w.seq++
		var random [10]byte
		random[0] = byte(w.n)
		binary.BigEndian.PutUint64(random[2:], w.seq)
		var id ulid.ULID
		_ = id.SetTime(ulid.Timestamp(ev.Time)) // fails after the year 10889
		_ = id.SetEntropy(random[:])            // fails for other lengths
		v.ID, v.Sequence, v.Created = id.String(), w.seq, ev.Time
		w.line = append(v.AppendJSON(w.line[:0]), '\n')
		w.out.Write(w.line) // an error comes again at the flush
	}
}
