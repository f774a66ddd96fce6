package tune

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

var classes = []string{"listing", "inventory", "operational", "token", "unknown", "user-data", "identity-proof", "credentials"}

var monday = time.Date(2026, 11, 2, 8, 0, 0, 0, time.UTC)

// history is what is read of a host.
type history struct {
	t      testing.TB
	tuner  *Tuner
	engine *policy.Engine
	n      int
	lines  [][]byte
}

func read(t testing.TB, c policy.Config, o Options) *history {
	t.Helper()
	p, err := policy.Compile(c, classes)
	if err != nil {
		t.Fatal(err)
	}
	o.Policy, o.Classes = p, classes
	return &history{t: t, tuner: New(o), engine: policy.NewEngine(p)}
}

// asked adds a request for credentials, which python in reports.service makes as reports.
// change may change anything.
func (h *history) asked(at time.Time, change func(*event.Event, *event.Process)) {
	h.t.Helper()
	h.n++
	systemd := &event.Process{EntityID: "init", PID: 1, Executable: "/usr/lib/systemd/systemd", Name: "systemd", Known: true, HostVerified: true, RootOwned: true}
	p := &event.Process{
		EntityID: fmt.Sprint("entity-", h.n), PID: int64(1000 + h.n), Start: at.Add(-time.Second), Executable: "/usr/bin/python3.11",
		Args: []string{"python3", "/opt/reports/run.py"}, UserID: "989", RealUserID: "989", SavedUserID: "989", UserName: "reports",
		Unit: "reports.service", Cgroup: "/system.slice/reports.service", Known: true, HostVerified: true, RootOwned: true, Ancestry: "birth", Parent: systemd,
	}
	ev := &event.Event{
		Host: &event.Host{ID: "host", Name: "worker-1", Version: "1"}, Time: at,
		Connection:  event.Connection{Source: netip.MustParseAddrPort("10.0.0.1:40000"), Destination: netip.MustParseAddrPort("169.254.169.254:80"), First: true, Accepted: at},
		Attribution: event.Attribution{Level: "L2", Complete: true}, Subjects: []*event.Process{p}, Roles: []string{"connector"},
		Request: event.Request{Method: "GET", Path: "/latest/meta-data/iam/security-credentials/role", Class: "credentials", Version: "latest", Guarded: true, Token: true, HTTP: "1.1"},
	}
	if change != nil {
		change(ev, p)
	}
	for _, p := range ev.Subjects {
		p.Name, p.CommandLine = path.Base(p.Executable), strings.Join(p.Args, " ")
	}
	ev.Request.Target = ev.Request.Path
	h.engine.Judge(ev)
	h.engine.Observe(ev)
	for _, v := range ev.Views() {
		v.ID, v.Sequence, v.Created = fmt.Sprintf("%026d", h.n), uint64(h.n), at
		line := v.AppendJSON(nil)
		if err := h.tuner.Line(line); err != nil {
			h.t.Fatal(err)
		}
		h.lines = append(h.lines, line)
	}
}

// days adds the same on three days.
func (h *history) days(change func(*event.Event, *event.Process)) {
	for day := range 3 {
		h.asked(monday.AddDate(0, 0, day), change)
	}
}

func parents(p *event.Process, files ...string) {
	for i, file := range files {
		p.Parent = &event.Process{EntityID: fmt.Sprint("above-", i), PID: int64(500 - i), Executable: file, Name: path.Base(file), Known: true, HostVerified: true, RootOwned: true, Parent: p.Parent}
		p = p.Parent
	}
	p.Parent = &event.Process{EntityID: "init", PID: 1, Executable: "/usr/lib/systemd/systemd", Name: "systemd", Known: true}
}

// TestWhat is what becomes of each kind of history: a proposal with its risk, a refusal,
// or neither.
func TestWhat(t *testing.T) {
	curl := func(p *event.Process) { p.Executable, p.Args = "/usr/bin/curl", []string{"curl", "-s"} }
	app := func(p *event.Process) { p.Executable, p.Args = "/opt/app/bin/app", []string{"app"} }
	for _, test := range []struct {
		name   string
		change func(*event.Event, *event.Process)
		want   string // how what is said begins: "medium: ...", "refused: ...", "unexplained: ..."
	}{
		{"an interpreter in its unit", nil, "medium: python runs any script: whoever gets hold of reports.service"},
		{"a program in its unit", func(ev *event.Event, p *event.Process) { app(p) }, "low: a program that only root can change and that does one thing, in reports.service"},
		{"over IMDSv1", func(ev *event.Event, p *event.Process) { app(p); ev.Request.Token = false }, "medium: it asks over IMDSv1"},
		{"a program in no unit", func(ev *event.Event, p *event.Process) { app(p); p.Unit = "" }, "medium: it runs in no unit: whoever is reports"},
		{"a program in a login", func(ev *event.Event, p *event.Process) { app(p); p.Unit = "session-3.scope" }, "high: it runs in a login or a unit of a user's own"},
		{"a program in a user's unit", func(ev *event.Event, p *event.Process) {
			app(p)
			p.Unit, p.UserUnit = "user@1000.service", "x.service"
		}, "high: it runs in a login or a unit of a user's own"},
		{"a program that an application starts", func(ev *event.Event, p *event.Process) { app(p); parents(p, "/usr/bin/dash", "/usr/bin/node") }, "medium: /usr/bin/node starts it"},
		{"the same as root", func(ev *event.Event, p *event.Process) {
			app(p)
			p.UserID, p.RealUserID, p.SavedUserID, p.UserName = "0", "0", "0", "root"
			parents(p, "/usr/bin/kubelet")
		}, "low: "},
		{"an interpreter that an application starts", func(ev *event.Event, p *event.Process) { parents(p, "/opt/billing/bin/billing") }, "high: /opt/billing/bin/billing starts it"},
		{"an interpreter that a unit starts with a time limit", func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/timeout") }, "medium: python runs any script"},
		{"a downloader in a unit", func(ev *event.Event, p *event.Process) { curl(p) }, "high: curl fetches or runs whatever it is told"},
		{"root's cron", func(ev *event.Event, p *event.Process) {
			p.Unit, p.UserID, p.RealUserID, p.SavedUserID, p.UserName = "cron.service", "0", "0", "0", "root"
			parents(p, "/usr/bin/dash", "/usr/sbin/cron")
		}, "medium: python in cron.service: all jobs of this user's crontab"},
		{"somebody's cron", func(ev *event.Event, p *event.Process) {
			p.Unit = "cron.service"
			parents(p, "/usr/bin/dash", "/usr/sbin/cron")
		}, "high: python in cron.service"},
		{"a script that a unit starts", func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/bash") }, "medium: "},
		{"workers of a server in Python", func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/python3.11") }, "medium: "},
		{"one container", func(ev *event.Event, p *event.Process) {
			app(p)
			p.Container, p.HostVerified, p.RootOwned = strings.Repeat("a", 64), false, false
		}, "medium: whoever can write in the container"},

		{"the shell of a container's start", func(ev *event.Event, p *event.Process) {
			app(p)
			p.Container, p.HostVerified, p.RootOwned = strings.Repeat("a", 64), false, false
			parents(p, "/bin/sh", "/usr/bin/containerd-shim-runc-v2")
		}, "medium: whoever can write in the container"},
		{"brought into a container", func(ev *event.Event, p *event.Process) {
			app(p)
			p.Container, p.HostVerified, p.RootOwned = strings.Repeat("a", 64), false, false
			parents(p, "/bin/sh", "/usr/bin/node", "/usr/bin/containerd-shim-runc-v2")
		}, "unexplained: app was started by /bin/sh"},
		{"deleted in a container", func(ev *event.Event, p *event.Process) {
			app(p)
			p.Container, p.HostVerified, p.RootOwned, p.Deleted = strings.Repeat("a", 64), false, false, true
		}, "refused: its file was replaced"},

		{"a task's role", func(ev *event.Event, p *event.Process) {
			app(p)
			ev.Connection.Destination, ev.Request.Container, ev.Request.Token = netip.MustParseAddrPort("169.254.170.2:80"), true, false
			ev.Request.Path, ev.Request.Version = "/v2/credentials/3a1b", "v2"
		}, "low: "},

		{"an interpreter in a session", func(ev *event.Event, p *event.Process) { p.Unit = "session-3.scope" }, "refused: python does whatever it is told"},
		{"an interpreter in a user's unit", func(ev *event.Event, p *event.Process) { p.Unit, p.UserUnit = "", "x.service" }, "refused: python does whatever it is told"},
		{"in a home", func(ev *event.Event, p *event.Process) { p.Executable, p.RootOwned = "/home/app/x", false }, `refused: "/home/app/x" is below /home`},
		{"in shared memory", func(ev *event.Event, p *event.Process) { p.Executable, p.RootOwned = "/dev/shm/x", false }, `refused: "/dev/shm/x" is below /dev/shm`},
		{"a file of others", func(ev *event.Event, p *event.Process) { app(p); p.RootOwned = false }, "refused: others than root can change the file"},
		{"a file of another namespace", func(ev *event.Event, p *event.Process) { app(p); p.HostVerified = false }, "refused: it is not the file that the host has"},
		{"replaced while it ran", func(ev *event.Event, p *event.Process) { p.Deleted, p.HostVerified = true, false }, "refused: its file was replaced"},
		{"a name to overlook", func(ev *event.Event, p *event.Process) { app(p); p.Executable = "/opt/app\ngrants: []/x" }, "refused: its name, or that"},
		{"an asterisk in a path", func(ev *event.Event, p *event.Process) { p.Executable, p.Args = "/opt/*/bin/app", nil }, "refused: its name, or that of its unit or parent, means more"},
		{"a template", func(ev *event.Event, p *event.Process) { app(p); p.Unit = "app@.service" }, "refused: its name, or that of its unit or parent, means more"},
		{"an ID of no container", func(ev *event.Event, p *event.Process) {
			app(p)
			p.Container, p.HostVerified, p.RootOwned = "no-container", false, false
		}, "refused: there can be no grant for it: container:"},
		{"an interpreter of a setuid program", func(ev *event.Event, p *event.Process) { p.UserID, p.SavedUserID, p.UserName = "0", "0", "root" }, "refused: python does whatever it is told, and has more than one user"},
		{"a build", func(ev *event.Event, p *event.Process) {
			p.Unit = "gitlab-runner.service"
			parents(p, "/usr/bin/bash", "/usr/bin/gitlab-runner")
		}, "refused: it runs in gitlab-runner.service, where whoever may start a build"},

		{"a web server's shell", func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/dash", "/usr/sbin/nginx") }, "unexplained: python was started by /usr/bin/dash"},
		{"PHP's shell", func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/dash", "/usr/sbin/php-fpm8.2") }, "unexplained: python was started by /usr/bin/dash"},
		{"a web server's child", func(ev *event.Event, p *event.Process) { app(p); parents(p, "/usr/sbin/apache2") }, "unexplained: it was started below a web server"},
		{"somebody who has logged in", func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/bash", "/usr/sbin/sshd") }, "unexplained: python was started by /usr/bin/bash"},
		{"an application's shell", func(ev *event.Event, p *event.Process) { curl(p); parents(p, "/usr/bin/sh", "/usr/bin/java") }, "unexplained: curl was started by /usr/bin/sh"},
		{"nobody known to have started it", func(ev *event.Event, p *event.Process) { p.Parent, p.Ancestry = nil, "" }, "unexplained: it does whatever it is told, and who has started it"},
		{"a granted program's child", func(ev *event.Event, p *event.Process) { curl(p); parents(p, "/opt/granted") }, "unexplained: it was started by /opt/granted, which has a grant"},
		{"and what that starts by another", func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/timeout", "/opt/granted") }, "unexplained: it was started below /opt/granted, which has a grant"},
		{"a granted program in somebody's shell", func(ev *event.Event, p *event.Process) {
			p.Executable, p.Unit = "/opt/granted", "shop.service"
			parents(p, "/usr/bin/dash", "/usr/bin/node")
		}, "unexplained: granted was started by /usr/bin/dash, and that by /usr/bin/node"},
		{"more parents than are recorded", func(ev *event.Event, p *event.Process) {
			parents(p, "/usr/bin/timeout")
			p.Parent.Parent = nil
		}, "unexplained: it does whatever it is told, and who has started /usr/bin/timeout"},
		{"incomplete", func(ev *event.Event, p *event.Process) {
			ev.Attribution = event.Attribution{Level: "L2", Reason: "scan_timeout"}
		}, "unexplained: somebody else may have had a part in the connection: scan_timeout"},
		{"nobody", func(ev *event.Event, p *event.Process) {
			ev.Subjects, ev.Roles, ev.Attribution.Complete = nil, nil, false
		}, "unexplained: nobody is known"},
		{"disguised", func(ev *event.Event, p *event.Process) { ev.Request.Evasive = true }, "unexplained: it is spelled as no client"},
		{"forwarded", func(ev *event.Event, p *event.Process) { ev.Request.Forwarded = true }, "unexplained: it came through a proxy"},
		{"a public name", func(ev *event.Event, p *event.Process) { ev.Request.HostIsOdd = true }, "unexplained: it is for a public name"},
		{"malformed", func(ev *event.Event, p *event.Process) { ev.Request.Malformed = "two lengths" }, "unexplained: it cannot be read one way only"},
		{"a loader", func(ev *event.Event, p *event.Process) { p.Loader = true }, "unexplained: a dynamic loader"},
		{"exchanged", func(ev *event.Event, p *event.Process) { p.Swapped = true }, "unexplained: the process shows another file"},
		{"a token of somebody else", func(ev *event.Event, p *event.Process) {
			ev.Token.Issuers = []*event.Issuer{{EntityID: "other", Executable: "/usr/bin/agent", UserID: "0", Unit: "agent.service"}}
		}, "unexplained: its session token was issued to somebody else"},
		{"root's own token", func(ev *event.Event, p *event.Process) {
			p.UserID, p.RealUserID, p.SavedUserID, p.UserName = "0", "0", "0", "root"
			ev.Token.Issuers = []*event.Issuer{{EntityID: "other", Executable: "/usr/bin/agent", UserID: "0", Unit: "agent.service"}}
		}, "medium: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := read(t, policy.Config{Posture: policy.Strict, Grants: []policy.Grant{{Name: "g", Who: policy.Who{Executable: policy.OneOrMore{"/opt/granted"}, Unit: "g.service"}, Owner: "o", Reason: "r"}}}, Options{})
			h.days(test.change)
			r := h.tuner.Report()
			var got []string
			for _, p := range r.Proposals {
				got = append(got, p.Risk.String()+": "+strings.Join(p.Because, "; "))
				compiles(t, p)
			}
			for _, f := range r.Refused {
				got = append(got, "refused: "+f.Why)
				if f.Instead == "" || f.Suspect {
					t.Errorf("nothing to do instead: %+v", f)
				}
			}
			for _, f := range r.Unexplained {
				got = append(got, "unexplained: "+f.Why)
			}
			if len(got) != 1 || !strings.HasPrefix(got[0], test.want) {
				t.Errorf("%q, want %q", got, test.want)
			}
			if r.Readiness.Left != 3 || r.Readiness.Covered != 0 {
				t.Errorf("%+v", r.Readiness)
			}
			r.Take(r.Proposals)
			if want := uint64(3 * len(r.Proposals)); r.Readiness.Covered != want {
				t.Errorf("%d covered, want %d", r.Readiness.Covered, want)
			}
		})
	}
}

// compiles checks that a grant is one that the policy takes.
func compiles(t *testing.T, p *Proposal) {
	t.Helper()
	if _, err := policy.Compile(policy.Config{Grants: []policy.Grant{p.Grant}}, classes); err != nil {
		t.Errorf("proposed, and refused: %v", err)
	}
}

// TestSeldom is about what was seen too seldom, also of one that has long been known.
func TestSeldom(t *testing.T) {
	h := read(t, policy.Config{}, Options{})
	userData := func(ev *event.Event, p *event.Process) {
		ev.Request.Path, ev.Request.Class = "/latest/user-data", "user-data"
	}
	h.days(userData)
	h.asked(monday.Add(time.Hour), nil) // credentials, once
	for range 5 {                       // and another, on one day
		h.asked(monday, func(ev *event.Event, p *event.Process) { p.Unit = "other.service" })
	}
	r := h.tuner.Report()
	if len(r.Proposals) != 1 || !slices.Equal(r.Proposals[0].Grant.Classes, []string{"user-data"}) {
		t.Fatalf("%+v", r.Proposals)
	}
	if len(r.Refused) != 2 || !strings.Contains(r.Refused[0].Why, "on 1 day, and 2 are wanted") || !strings.Contains(r.Refused[1].Why, "seen once") {
		t.Errorf("%+v", r.Refused)
	}
	if also := r.Proposals[0].Also; len(also) > 0 {
		t.Errorf("a grant for user data would let through %+v", also)
	}

	stray := read(t, policy.Config{}, Options{})
	stray.days(nil)
	stray.asked(monday, func(ev *event.Event, p *event.Process) { parents(p, "/usr/bin/timeout", "/opt/reports/server") })
	r = stray.tuner.Report()
	if len(r.Proposals) != 1 || r.Proposals[0].Grant.Parent != "/usr/lib/systemd/systemd" || r.Proposals[0].Risk != Medium || len(r.Proposals[0].Also) > 0 {
		t.Errorf("what somebody else has started once is in %+v", r.Proposals)
	}
	if len(r.Refused) != 1 || !strings.Contains(r.Refused[0].Why, "/usr/bin/timeout started it once") {
		t.Errorf("%+v", r.Refused)
	}

	one := read(t, policy.Config{}, Options{MinCount: 1, MinDays: 1})
	one.asked(monday, nil)
	if r := one.tuner.Report(); len(r.Proposals) != 1 {
		t.Errorf("%+v", r)
	}
}

// TestNarrow is about what grants name beyond the program and its unit.
func TestNarrow(t *testing.T) {
	h := read(t, policy.Config{}, Options{Lifetime: 10 * 24 * time.Hour, Owner: "me"})
	h.days(nil)
	want := policy.Grant{
		Name: "python in reports.service as reports",
		Who:  policy.Who{Executable: policy.OneOrMore{"/usr/bin/python3.11"}, Unit: "reports.service", User: "reports", Parent: "/usr/lib/systemd/systemd"},
		What: policy.What{Classes: []string{"credentials"}, Paths: []string{"/latest/meta-data/iam/**"}, API: policy.V2}, OwnToken: true, Owner: "me",
		Expires: policy.Date{Time: time.Date(2026, 11, 14, 0, 0, 0, 0, time.UTC)},
	}
	got := h.tuner.Report().Proposals[0].Grant
	if !strings.HasPrefix(got.Reason, "seen 3 times on worker-1 from 2026-11-02 to 2026-11-04 (credentials 3); risk medium: python runs any script") ||
		!strings.HasSuffix(got.Reason, "such as event 00000000000000000000000001") {
		t.Error(got.Reason)
	}
	got.Reason = ""
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	h.days(func(ev *event.Event, p *event.Process) { p.Start = p.Start.Add(-time.Hour) }) // older than a daemon may be
	h.days(func(ev *event.Event, p *event.Process) { ev.Request.Token = false })
	h.days(func(ev *event.Event, p *event.Process) { p.Executable = "/usr/bin/python3.12" })
	all := h.tuner.Report().Proposals
	if len(all) != 1 || all[0].Grant.Parent != "" || all[0].Grant.API != policy.AnyAPI || len(all[0].Grant.Executable) != 2 || all[0].Count != 12 {
		t.Errorf("%+v", all[0])
	}
}

// TestFewest is about what is one grant, and what must not be.
func TestFewest(t *testing.T) {
	strict := policy.Config{Posture: policy.Strict}
	app := func(p *event.Process) { p.Executable, p.Args = "/opt/app/bin/app", []string{"app"} }
	as := func(p *event.Process, id, name string) {
		p.UserID, p.RealUserID, p.SavedUserID, p.UserName = id, id, id, name
	}
	users := read(t, strict, Options{})
	users.days(func(ev *event.Event, p *event.Process) { app(p); as(p, "0", "root") })
	users.days(func(ev *event.Event, p *event.Process) { app(p); as(p, "33", "www") })
	if all := users.tuner.Report().Proposals; len(all) != 1 || all[0].Grant.User != "" || all[0].Grant.Name != "app in reports.service" {
		t.Errorf("%+v", all)
	}
	tools := read(t, strict, Options{})
	tools.days(func(ev *event.Event, p *event.Process) { as(p, "0", "root") })
	tools.days(func(ev *event.Event, p *event.Process) { as(p, "33", "www") })
	if all := tools.tuner.Report().Proposals; len(all) != 2 {
		t.Errorf("an interpreter for several users in one grant: %+v", all)
	}
	// Root's asks for user data, too, which the other must not get by what they have in common.
	wider := read(t, strict, Options{})
	wider.days(func(ev *event.Event, p *event.Process) { app(p); as(p, "0", "root") })
	wider.days(func(ev *event.Event, p *event.Process) {
		app(p)
		as(p, "0", "root")
		ev.Request.Path, ev.Request.Class = "/latest/user-data", "user-data"
	})
	wider.days(func(ev *event.Event, p *event.Process) { app(p); as(p, "33", "www") })
	for _, p := range wider.tuner.Report().Proposals {
		if p.Grant.User == "" || p.Grant.User == "www" && len(p.Grant.Classes) != 1 {
			t.Errorf("%+v", p.Grant)
		}
	}
	deployed := read(t, strict, Options{})
	for _, dir := range []string{"/opt/app-1.9.2", "/opt/app-1.10.0"} {
		deployed.days(func(ev *event.Event, p *event.Process) { app(p); p.Executable = dir + "/bin/app" })
	}
	if all := deployed.tuner.Report().Proposals; len(all) != 1 || !slices.Equal(all[0].Grant.Executable, []string{"/opt/app-*/bin/app"}) {
		t.Errorf("%+v", all)
	} else {
		compiles(t, all[0])
	}
	instances := read(t, strict, Options{})
	for _, unit := range []string{"app@one.service", "app@two.service"} {
		instances.days(func(ev *event.Event, p *event.Process) { app(p); p.Unit = unit })
	}
	if all := instances.tuner.Report().Proposals; len(all) != 1 || all[0].Grant.Unit != "app@.service" {
		t.Errorf("%+v", all)
	} else {
		compiles(t, all[0])
	}
	containers := read(t, strict, Options{})
	for i := range 3 {
		containers.asked(monday.AddDate(0, 0, i), func(ev *event.Event, p *event.Process) {
			app(p)
			p.Container, p.HostVerified = strings.Repeat(fmt.Sprint(i), 64), false
		})
	}
	if r := containers.tuner.Report(); len(r.Proposals) != 0 || len(r.Refused) != 1 || !strings.Contains(r.Refused[0].Why, "3 containers") || len(r.Refused[0].Containers) != 3 {
		t.Errorf("%+v", r.Refused)
	}
}

func TestVersions(t *testing.T) {
	for _, test := range []struct{ files, want []string }{
		{[]string{"/a/b"}, []string{"/a/b"}},
		{[]string{"/opt/node-v20.11.0/bin/node", "/opt/node-v20.18.1/bin/node"}, []string{"/opt/node-v*/bin/node"}},
		{[]string{"/opt/releases/20261102/bin/x", "/opt/releases/20261103/bin/x"}, []string{"/opt/releases/*/bin/x"}},
		{[]string{"/usr/bin/python3.9", "/usr/bin/python3.12"}, nil},
		{[]string{"/opt/app-1/bin-1/x", "/opt/app-2/bin-2/x"}, nil},
		{[]string{"/opt/blue/bin/x", "/opt/green/bin/x"}, nil},
		{[]string{"/v1/bin/x", "/v2/bin/x"}, nil},
		{[]string{"/opt/a-1/x", "/opt/a-1/lib/x"}, nil},
	} {
		if test.want == nil {
			test.want = test.files
		}
		if got := versions(test.files); !slices.Equal(got, test.want) {
			t.Errorf("%q: %q, want %q", test.files, got, test.want)
		}
	}
}

// TestCounterfactual is about a theft that a grant would let through: it is shown, and
// the grant is not for taking in batch.
func TestCounterfactual(t *testing.T) {
	h := read(t, policy.Config{}, Options{})
	old := func(ev *event.Event, p *event.Process) { p.Start = p.Start.Add(-time.Hour) } // so that its parent is not in the grant
	h.days(old)
	h.asked(monday, func(ev *event.Event, p *event.Process) {
		p.Args = []string{"python3", "-c", "import os"}
		parents(p, "/usr/bin/bash", "/opt/reports/server")
	})
	r := h.tuner.Report()
	if len(r.Proposals) != 1 || r.Proposals[0].Risk != High || len(r.Proposals[0].Also) != 1 || !strings.Contains(r.Proposals[0].Because[0], "what looks like a theft") {
		t.Fatalf("%+v", r.Proposals[0])
	}
	if also := r.Proposals[0].Also[0]; !also.Suspect || also.Count != 1 || !slices.Equal(also.CommandLines, []string{"python3 -c import os"}) {
		t.Errorf("%+v", also)
	}
}

// TestTogether is about requests in which two have a part, each of whom needs a grant.
func TestTogether(t *testing.T) {
	h := read(t, policy.Config{Posture: policy.Strict}, Options{})
	helper := func(p *event.Process, unit string) *event.Process {
		return &event.Process{EntityID: p.EntityID + "-helper", PID: p.PID + 5000, Executable: "/opt/app/bin/helper", Args: []string{"helper"}, UserID: "1", RealUserID: "1", SavedUserID: "1", UserName: "u",
			Unit: unit, Known: true, HostVerified: true, RootOwned: true, Ancestry: "birth", Parent: p.Parent}
	}
	h.days(func(ev *event.Event, p *event.Process) {
		ev.Subjects, ev.Roles = append(ev.Subjects, helper(p, "helper.service")), append(ev.Roles, "holder")
	})
	r := h.tuner.Report()
	if len(r.Proposals) != 2 || r.Readiness.Blocked != 3 {
		t.Fatalf("%+v", r)
	}
	r.Take(r.Proposals[:1])
	if r.Readiness.Left != 3 {
		t.Errorf("one grant of two lets %d through", 3-r.Readiness.Left)
	}
	r.Take(r.Proposals)
	if r.Readiness.Left != 0 {
		t.Errorf("%d left with both", r.Readiness.Left)
	}
}

// TestReadiness is what is said of classes and hosts.
func TestReadiness(t *testing.T) {
	h := read(t, policy.Config{Denies: []policy.Deny{{Name: "no", Who: policy.Who{Unit: "no.service"}, Reason: "r"}}}, Options{})
	for day := range 7 {
		h.asked(monday.AddDate(0, 0, day), nil)
		h.asked(monday.AddDate(0, 0, day), func(ev *event.Event, p *event.Process) { p.Unit = "no.service" })
		h.asked(monday.AddDate(0, 0, day), func(ev *event.Event, p *event.Process) {
			ev.Request.Path, ev.Request.Class, ev.Request.Guarded = "/latest/meta-data/instance-id", "inventory", false
		})
	}
	r := h.tuner.Report()
	a := r.Readiness
	if a.Days != 7 || a.Blocked != 14 || a.Denied != 7 || a.Left != 7 || len(a.Classes) != 2 || a.Classes[0].Class != "credentials" || a.Classes[0].Safe || !a.Classes[1].Safe {
		t.Errorf("%+v", a)
	}
	r.Take(r.Proposals)
	if a := r.Readiness; a.Left != 0 || a.Covered != 7 || !a.Classes[0].Safe || !r.Proposals[0].Taken {
		t.Errorf("%+v", a)
	}
	short := read(t, policy.Config{}, Options{})
	short.days(nil)
	r = short.tuner.Report()
	r.Take(r.Proposals)
	if c := r.Readiness.Classes[0]; c.Safe || !strings.Contains(c.Keeps[0], "seen for 3 days") {
		t.Errorf("%+v", c)
	}
}

// TestSpan is about --since and --until, and what is not a request.
func TestSpan(t *testing.T) {
	h := read(t, policy.Config{}, Options{Since: monday.AddDate(0, 0, 1), Until: monday.AddDate(0, 0, 2)})
	h.days(nil)
	if s := h.tuner.Sum(); s.Requests != 1 || !s.First.Equal(monday.AddDate(0, 0, 1)) {
		t.Errorf("%+v", s)
	}
	if err := h.tuner.Line([]byte(`{"data_stream":{"dataset":"nginx.access"}}`)); err != event.ErrForeign {
		t.Error(err)
	}
}

// TestBounded gives it more groups than it keeps: what is beyond stands in the way of
// every verdict that all is well.
func TestBounded(t *testing.T) {
	h := read(t, policy.Config{}, Options{})
	for i := range maxGroups + 10 {
		h.asked(monday, func(ev *event.Event, p *event.Process) { p.Unit = fmt.Sprintf("u%d.service", i) })
	}
	r := h.tuner.Report()
	r.Take(r.Proposals)
	if h.tuner.Sum().Beyond != 10 || len(h.tuner.groups) != maxGroups || r.Readiness.Left != maxGroups+10 || r.Readiness.Classes[0].Safe {
		t.Errorf("%+v", r.Readiness)
	}
}
