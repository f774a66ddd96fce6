package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

const (
	containerID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	podID       = "01234567-89ab-cdef-0123-456789abcdef"
)

// granting judges in a strict policy with one grant, so that nothing else lets a
// request pass.
func granting(t *testing.T, g Grant, change func(*event.Event, *event.Process)) *event.Event {
	t.Helper()
	g.Name, g.Owner, g.Reason = "app", "o", "r"
	c := Config{Mode: Enforce, Posture: Strict, Grants: []Grant{g}}
	return judge(NewEngine(compile(t, c)), asking("/opt/app/bin/app", change))
}

// What a grant covers, and each way in which an ordinary user may try to be who he is
// not.
func TestGrants(t *testing.T) {
	app := OneOrMore{"/opt/app/bin/app"}
	unit := Grant{Who: Who{Executable: app, Unit: "app.service"}}
	byUser := Grant{Who: Who{Executable: app, User: "app"}}
	byGroup := Grant{Who: Who{Executable: app, Group: "imds"}}
	byGroupID := Grant{Who: Who{Executable: app, Group: "990"}}
	contained := Grant{Who: Who{Executable: app, Container: containerID[:12]}}
	inPod := Grant{Who: Who{Executable: app, Pod: podID}}
	parent := Grant{Who: Who{Executable: app, Unit: "app.service", Parent: "/usr/sbin/cron"}}
	paths := Grant{Who: Who{Executable: app, Unit: "app.service"}, What: What{Paths: []string{"/latest/meta-data/iam/security-credentials/*", "/latest/dynamic/**"}}}
	taskPaths := Grant{Who: Who{Executable: app, Unit: "app.service"}, What: What{Paths: []string{"/v2/credentials/*"}}}
	v2 := Grant{Who: Who{Executable: app, Unit: "app.service"}, What: What{API: V2}}

	type change = func(*event.Event, *event.Process)
	path := func(p string) change {
		return func(ev *event.Event, _ *event.Process) {
			ev.Request.Path = p
			if rest, ok := strings.CutPrefix(p, "/"); ok && (strings.HasPrefix(rest, "2") || strings.HasPrefix(rest, "1.0") || strings.HasPrefix(rest, "latest")) {
				ev.Request.Version, _, _ = strings.Cut(rest, "/")
			}
		}
	}
	// As attribution shows a process in a container.
	inside := func(ev *event.Event, p *event.Process) {
		p.Container, p.Runtime, p.Pod, p.Unit = containerID, "docker", podID, ""
		p.HostVerified, p.RootOwned = false, false
	}
	born := func(ev *event.Event, p *event.Process) {
		p.Ancestry = "birth"
		p.Parent = &event.Process{EntityID: "cron", PID: 900, Executable: "/usr/sbin/cron", Known: true, HostVerified: true, RootOwned: true}
	}
	groups := func(effective, real, saved, name string, more ...string) change {
		return func(_ *event.Event, p *event.Process) {
			p.GroupID, p.RealGroupID, p.SavedGroupID, p.GroupName, p.SupplementalGroups = effective, real, saved, name, more
		}
	}
	and := func(changes ...change) change {
		return func(ev *event.Event, p *event.Process) {
			for _, c := range changes {
				c(ev, p)
			}
		}
	}

	for _, c := range []struct {
		name   string
		grant  Grant
		change change
		ok     bool
	}{
		{"unit", unit, nil, true},
		{"one of several executables", Grant{Who: Who{Executable: OneOrMore{"/opt/app/bin/other", app[0]}, Unit: "app.service"}}, nil, true},
		{"none of several executables", Grant{Who: Who{Executable: OneOrMore{"/opt/app/bin/other", "/opt/app/bin/third"}, Unit: "app.service"}}, nil, false},
		{"a directory of some version", Grant{Who: Who{Executable: OneOrMore{"/opt/a*/bin/app"}, Unit: "app.service"}}, nil, true},
		{"a directory of some version, and another program", Grant{Who: Who{Executable: OneOrMore{"/opt/a*/bin/app2"}, Unit: "app.service"}}, nil, false},
		{"a directory of some version that others can write", Grant{Who: Who{Executable: OneOrMore{"/opt/*/bin/app"}, Unit: "app.service"}}, func(_ *event.Event, p *event.Process) { p.RootOwned = false }, false},
		{"a directory below one of some version", Grant{Who: Who{Executable: OneOrMore{"/opt/*/app"}, Unit: "app.service"}}, nil, false},
		{"an instance of a template", Grant{Who: Who{Executable: app, Unit: "app@.service"}}, func(_ *event.Event, p *event.Process) { p.Unit = "app@one.two.service" }, true},
		{"an instance of another template", Grant{Who: Who{Executable: app, Unit: "app@.service"}}, func(_ *event.Event, p *event.Process) { p.Unit = "app2@one.service" }, false},
		{"no instance of the template", Grant{Who: Who{Executable: app, Unit: "app@.service"}}, nil, false},
		{"an instance in a user manager", Grant{Who: Who{Executable: app, Unit: "app@.service"}}, func(_ *event.Event, p *event.Process) { p.Unit, p.UserUnit = "", "app@one.service" }, false},
		{"another instance", Grant{Who: Who{Executable: app, Unit: "app@two.service"}}, func(_ *event.Event, p *event.Process) { p.Unit = "app@one.service" }, false},
		{"a unit of a user manager", unit, func(_ *event.Event, p *event.Process) { p.Unit, p.UserUnit = "", "app.service" }, false},
		{"another unit", unit, func(_ *event.Event, p *event.Process) { p.Unit = "app2.service" }, false},
		{"no unit", unit, func(_ *event.Event, p *event.Process) { p.Unit = "" }, false},
		{"a file that is not the host's", unit, func(_ *event.Event, p *event.Process) { p.HostVerified = false }, false},
		{"a file that others may change", unit, func(_ *event.Event, p *event.Process) { p.RootOwned = false }, false},
		{"an earlier image", unit, func(_ *event.Event, p *event.Process) { p.Earlier = true }, false},
		{"one that has ended", unit, func(_ *event.Event, p *event.Process) { p.Ended = true }, false},
		{"the loader", unit, func(_ *event.Event, p *event.Process) { p.Loader = true }, false},
		{"another executable that says it is this one", unit, func(_ *event.Event, p *event.Process) {
			p.Executable, p.Name, p.Thread = "/tmp/app", "app", "app"
			p.Args = app
		}, false},

		{"user by name", byUser, nil, true},
		{"user by number", Grant{Who: Who{Executable: app, User: "1000"}}, nil, true},
		{"another user", byUser, func(_ *event.Event, p *event.Process) {
			p.UserName, p.UserID, p.RealUserID, p.SavedUserID = "evil", "1001", "1001", "1001"
		}, false},
		{"only the effective user, as of a set-user-ID program", byUser, func(_ *event.Event, p *event.Process) { p.RealUserID = "1001" }, false},
		{"only the effective and the saved user", byUser, func(_ *event.Event, p *event.Process) { p.RealUserID = "1001" }, false},
		{"a user whose name is another's number", Grant{Who: Who{Executable: app, User: "0"}}, func(_ *event.Event, p *event.Process) { p.UserName = "0" }, true}, // root makes users
		{"no user is known", Grant{Who: Who{Executable: app, User: "0"}}, func(_ *event.Event, p *event.Process) {
			p.UserID, p.RealUserID, p.SavedUserID, p.UserName = "", "", "", ""
		}, false},

		{"group by name", byGroup, groups("990", "990", "990", "imds"), true},
		{"group by number", byGroupID, groups("990", "990", "990", "imds"), true},
		{"supplementary group by number", byGroupID, groups("1000", "1000", "1000", "app", "27", "990"), true},
		{"another group", byGroupID, groups("1000", "1000", "1000", "app", "27"), false},
		{"only the effective group, as of a set-group-ID program", byGroup, groups("990", "1000", "990", "imds"), false},
		{"only the effective and the real group", byGroupID, groups("990", "990", "1000", "imds"), false},
		{"no group is known", byGroup, groups("", "", "", "imds"), false},

		{"container, by the first digits of its ID", contained, inside, true},
		{"container, by its ID", Grant{Who: Who{Executable: app, Container: containerID}}, inside, true},
		{"another container", contained, and(inside, func(_ *event.Event, p *event.Process) { p.Container = strings.Replace(containerID, "0", "1", 1) }), false},
		{"no container", contained, nil, false},
		{"a container, and another executable", contained, and(inside, func(_ *event.Event, p *event.Process) { p.Executable = "/bin/sh" }), false},
		{"a container, and a file without a name", contained, and(inside, func(_ *event.Event, p *event.Process) { p.Deleted = true }), false},
		{"a container, and a file that was exchanged", contained, and(inside, func(_ *event.Event, p *event.Process) { p.Swapped = true }), false},
		{"a container, and a file that cannot be read", contained, and(inside, func(_ *event.Event, p *event.Process) { p.Known = false }), false},
		{"a container, and the loader", contained, and(inside, func(_ *event.Event, p *event.Process) { p.Loader = true }), false},
		{"pod", inPod, inside, true},
		{"another pod", inPod, and(inside, func(_ *event.Event, p *event.Process) { p.Pod = strings.Replace(podID, "0", "1", 1) }), false},
		{"in the cgroup of a pod, and in no container of it", inPod, func(_ *event.Event, p *event.Process) { p.Pod = podID }, false},
		{"the host's own file, mounted into a container", byUser, func(_ *event.Event, p *event.Process) { p.Container = containerID }, false},
		{"the host's own file in a container that runs in the unit", unit, func(_ *event.Event, p *event.Process) { p.Container = containerID }, false},
		{"a user by number in a container", Grant{Who: Who{Executable: app, Container: containerID, User: "1000"}}, inside, true},
		{"another user in the container", Grant{Who: Who{Executable: app, Container: containerID, User: "1001"}}, inside, false},

		{"parent", parent, born, true},
		{"a parent in a directory of some version", Grant{Who: Who{Executable: app, Unit: "app.service", Parent: "/usr/s*/cron"}}, born, true},
		{"another parent", parent, and(born, func(_ *event.Event, p *event.Process) {
			p.Parent = &event.Process{PID: 901, Executable: "/usr/bin/bash", HostVerified: true, RootOwned: true}
		}), false},
		{"a parent that adopted it", parent, and(born, func(_ *event.Event, p *event.Process) {
			p.ParentNow, p.Parent = p.Parent, &event.Process{PID: 901, Executable: "/usr/bin/bash", HostVerified: true, RootOwned: true}
		}), false},
		{"a parent that /proc shows", parent, and(born, func(_ *event.Event, p *event.Process) { p.Ancestry = "present" }), false},
		{"a parent from before the daemon", parent, and(born, func(_ *event.Event, p *event.Process) { p.Ancestry = "snapshot" }), false},
		{"no parent", parent, and(born, func(_ *event.Event, p *event.Process) { p.Parent = nil }), false},
		{"a parent whose file others can change", parent, and(born, func(_ *event.Event, p *event.Process) { p.Parent.RootOwned = false }), false},
		{"a parent in another mount namespace", parent, and(born, func(_ *event.Event, p *event.Process) { p.Parent.HostVerified = false }), false},
		{"a parent that has ended", parent, and(born, func(_ *event.Event, p *event.Process) {
			p.Parent.HostVerified, p.Parent.RootOwned, p.Parent.Unproven = false, false, true
		}), true},
		{"a grandparent", parent, and(born, func(_ *event.Event, p *event.Process) {
			p.Parent = &event.Process{PID: 901, Executable: "/usr/bin/bash", HostVerified: true, RootOwned: true, Parent: p.Parent}
		}), false},

		{"path", paths, path("/latest/meta-data/iam/security-credentials/role"), true},
		{"path of another version", paths, path("/2021-03-23/meta-data/iam/security-credentials/role"), true},
		{"path of the first version", paths, path("/1.0/meta-data/iam/security-credentials/role"), true},
		{"listing of the path", paths, path("/latest/meta-data/iam/security-credentials/"), true},
		{"above the path", paths, path("/latest/meta-data/iam/security-credentials"), false},
		{"below the path", paths, path("/latest/meta-data/iam/security-credentials/role/more"), false},
		{"beside the path", paths, path("/latest/meta-data/iam/info"), false},
		{"far below the path", paths, path("/latest/dynamic/instance-identity/document"), true},
		{"without a version", paths, path("/meta-data/iam/security-credentials/role"), false},
		{"with two versions", paths, path("/2021-03-23/latest/meta-data/iam/security-credentials/role"), false},
		{"in capital letters", paths, path("/latest/META-DATA/iam/security-credentials/role"), false},
		{"behind something else", paths, path("/x/latest/meta-data/iam/security-credentials/role"), false},
		{"spelled evasively", paths, and(path("/latest/meta-data/iam/security-credentials/role"), func(ev *event.Event, _ *event.Process) { ev.Request.Evasive = true }), false},
		{"the same path at the endpoint for tasks", paths, and(path("/latest/meta-data/iam/security-credentials/role"), func(ev *event.Event, _ *event.Process) { ev.Request.Container = true }), false},
		{"path of a task", taskPaths, func(ev *event.Event, _ *event.Process) {
			ev.Request.Path, ev.Request.Container = "/v2/credentials/0a1b", true
		}, true},
		{"path of a task at the other endpoint", taskPaths, func(ev *event.Event, _ *event.Process) { ev.Request.Path = "/v2/credentials/0a1b" }, false},

		{"IMDSv2", v2, nil, true},
		{"IMDSv1", v2, func(ev *event.Event, _ *event.Process) { ev.Request.Token = false }, false},

		{"expired", Grant{Who: unit.Who, Expires: Date{base.AddDate(0, 0, -1)}}, nil, false},
		{"on its last day", Grant{Who: unit.Who, Expires: Date{time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)}}, nil, true},
		{"class", Grant{Who: unit.Who, What: What{Classes: []string{"user-data", "credentials"}}}, nil, true},
		{"another class", Grant{Who: unit.Who, What: What{Classes: []string{"user-data"}}}, nil, false},
	} {
		ev := granting(t, c.grant, c.change)
		if got := ev.Decision.Verdict == event.Allow; got != c.ok || got != (ev.Decision.Grant == "app") {
			t.Errorf("%s: %v because %q", c.name, ev.Decision.Verdict, ev.Decision.Reason)
		}
	}
}

// What a grant must not rest on is refused, with the key that is wrong and what to
// write instead.
func TestRefusedGrants(t *testing.T) {
	who := func(change func(*Grant)) Grant {
		g := Grant{Name: "g", Who: Who{Executable: OneOrMore{"/opt/x"}, Unit: "x.service"}, Owner: "o", Reason: "r"}
		change(&g)
		return g
	}
	executable := func(path string) Grant { return who(func(g *Grant) { g.Executable = OneOrMore{path} }) }
	unit := func(unit string) Grant { return who(func(g *Grant) { g.Unit = unit }) }
	path := func(path string) Grant { return who(func(g *Grant) { g.Paths = []string{path} }) }
	for _, c := range []struct {
		name     string
		grant    Grant
		key, err string
	}{
		{"executable alone", who(func(g *Grant) { g.Unit = "" }), "executable", "LD_PRELOAD"},
		{"executable and parent", who(func(g *Grant) { g.Unit, g.Parent = "", "/usr/sbin/cron" }), "executable", "parent"},
		{"unit alone", who(func(g *Grant) { g.Executable = nil }), "executable", "needs an executable"},
		{"relative", executable("x"), "executable[0]", "absolute"},
		{"not clean", executable("/bin/../tmp/x"), "executable[0]", "clean"},
		{"a wildcard", executable("/usr/bin/app*"), "executable[0]", "list each"},
		{"any directory", executable("/*/bin/app"), "executable[0]", "/opt/app-*/bin/app"},
		{"a part of the first directory", executable("/t*/bin/app"), "executable[0]", "below the first"},
		{"directories in each other", executable("/opt/**/app"), "executable[0]", "/opt/app-*/bin/app"},
		{"an interpreter in a directory of some version", who(func(g *Grant) { g.Executable, g.Unit, g.User = OneOrMore{"/opt/py-*/bin/python3"}, "", "app" }), "executable[0]", "whatever it is told"},
		{"the second of two", who(func(g *Grant) { g.Executable = OneOrMore{"/opt/x", "/tmp/x"} }), "executable[1]", "/tmp"},
		{"/tmp", executable("/tmp/x"), "executable[0]", "every user can put files"},
		{"/var/tmp", executable("/var/tmp/a/b"), "executable[0]", "every user"},
		{"/dev/shm", executable("/dev/shm/x"), "executable[0]", "every user"},
		{"/home", executable("/home/app/bin/x"), "executable[0]", "his own files"},
		{"/run/user", executable("/run/user/1000/x"), "executable[0]", "his own files"},
		{"a file in memory", executable("/memfd:x"), "executable[0]", "memory"},
		{"/proc", executable("/proc/self/exe"), "executable[0]", "for itself"},
		{"a dynamic loader", executable("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"), "executable[0]", "whatever file it is given"},
		{"musl's", executable("/lib/ld-musl-x86_64.so.1"), "executable[0]", "whatever file it is given"},
		{"a static busybox", executable("/bin/busybox.static"), "executable[0]", "whatever it is told"},
		{"what git fetches with", who(func(g *Grant) {
			g.Executable, g.Unit, g.User = OneOrMore{"/usr/lib/git-core/git-remote-http"}, "", "app"
		}), "executable[0]", "whatever it is told"},
		{"a parent in /tmp", who(func(g *Grant) { g.Parent = "/tmp/cron" }), "parent", "/tmp"},
		{"no owner", who(func(g *Grant) { g.Owner = "" }), "owner", "asked"},
		{"no reason", who(func(g *Grant) { g.Reason = "" }), "reason", "why"},
		{"no name", who(func(g *Grant) { g.Name = "" }), "name", "name"},
		{"unknown class", who(func(g *Grant) { g.Classes = []string{"credentials", "creds"} }), "classes[1]", "creds"},
		{"both", who(func(g *Grant) { g.ExecutableOnly = true }), "executable_only", "contradicts"},

		{"an interpreter by user", who(func(g *Grant) { g.Executable, g.Unit, g.User = OneOrMore{"/usr/bin/python3.11"}, "", "app" }), "executable[0]", "whatever it is told"},
		{"an interpreter by group", who(func(g *Grant) { g.Executable, g.Unit, g.Group = OneOrMore{"/usr/bin/perl5.36.0"}, "", "app" }), "executable[0]", "whatever it is told"},
		{"an interpreter alone", who(func(g *Grant) { g.Executable, g.Unit, g.ExecutableOnly = OneOrMore{"/bin/bash"}, "", true }), "executable[0]", "whatever it is told"},
		{"an interpreter in a unit, for everything", executable("/usr/bin/python3"), "executable[0]", "classes, paths"},
		{"an interpreter in a container, for everything", who(func(g *Grant) { g.Executable, g.Unit, g.Container = OneOrMore{"/usr/local/bin/node"}, "", containerID }), "executable[0]", "classes, paths"},

		{"a user's manager", unit("user@1000.service"), "unit", "own manager"},
		{"a login", unit("session-3.scope"), "unit", "login"},
		{"a slice", unit("system.slice"), "unit", "slice"},
		{"a cgroup", unit("/system.slice/x.service"), "unit", "path of a cgroup"},
		{"a unit with a wildcard", unit("x@*.service"), "unit", "app@.service"},
		{"half a unit", unit("x"), "unit", "x.service"},
		{"a container as a unit", unit("docker-" + containerID + ".scope"), "unit", "container: " + containerID},

		{"a container's name", who(func(g *Grant) { g.Unit, g.Container = "", "web" }), "container", "not a container's ID"},
		{"a short ID", who(func(g *Grant) { g.Unit, g.Container = "", containerID[:11] }), "container", "12"},
		{"a long ID", who(func(g *Grant) { g.Unit, g.Container = "", containerID+"0" }), "container", "64"},
		{"a pod's name", who(func(g *Grant) { g.Unit, g.Pod = "", "web-6f7d8" }), "pod", "UID"},
		{"a user of the host in a container", who(func(g *Grant) { g.Unit, g.Container, g.User = "", containerID, "app" }), "user", "number"},
		{"a group of the host in a pod", who(func(g *Grant) { g.Unit, g.Pod, g.Group = "", podID, "app" }), "group", "number"},

		{"a path of one version", path("/2021-03-23/meta-data/iam/*"), "paths[0]", "/latest/meta-data/iam/*"},
		{"a path without version", path("/meta-data/iam/*"), "paths[0]", "/latest/"},
		{"no path", path("latest"), "paths[0]", "slash"},
		{"any version", path("/*/meta-data/iam/info"), "paths[0]", "/latest/"},
		{"everything below, in the middle", path("/latest/**/security-credentials/*"), "paths[0]", "at the end"},
		{"an encoded path", path("/latest/user%2ddata"), "paths[0]", "decoded"},
		{"a path that is not clean", path("/latest/meta-data/../user-data"), "paths[0]", "clean"},
		{"IMDSv1 alone", who(func(g *Grant) { g.API = V1 }), "api", "v2"},
	} {
		_, err := Compile(Config{Grants: []Grant{grantFor("/opt/app"), c.grant}}, classes)
		complaint := (*KeyError)(nil)
		if !errors.As(err, &complaint) || complaint.Key != "grants[1]."+c.key || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, want %s with %q", c.name, err, c.key, c.err)
		}
	}
	_, err := Compile(Config{Grants: []Grant{grantFor("/opt/a"), grantFor("/opt/b")}}, classes)
	complaint := (*KeyError)(nil)
	if !errors.As(err, &complaint) || complaint.Key != "grants[1].name" || complaint.Other != "grants[0].name" {
		t.Errorf("the same name twice: %v", err)
	}
}

// Programs that do what they are told are known by whatever version they have, and
// others are not taken for them.
func TestTool(t *testing.T) {
	for _, file := range []string{"/usr/bin/python3", "/usr/bin/python3.11", "/usr/bin/python", "/usr/bin/python3.12d", "/bin/sh", "/bin/bash", "/usr/bin/perl5.36-x86_64-linux-gnu",
		"/usr/bin/node18", "/usr/bin/php8.2", "/usr/sbin/php-fpm8.2", "/usr/lib/jvm/java-17/bin/java", "/usr/bin/curl", "/usr/bin/wget2", "/usr/bin/nc.openbsd", "/usr/bin/ruby3.1",
		"/usr/bin/lua5.4", "/usr/bin/gawk-5.2", "/bin/busybox", "/usr/bin/pypy3", "/opt/CURL", "/usr/bin/aria2c", "/usr/bin/ssh"} {
		if name, ok := Tool(file); !ok {
			t.Errorf("%s is %q, which is not in the list", file, name)
		}
	}
	for _, file := range []string{"/usr/bin/curlew", "/usr/bin/shasum", "/opt/app/bin/app", "/usr/bin/amazon-ssm-agent", "/usr/sbin/nginx", "/usr/bin/bzip2", "/usr/sbin/sshd", "/usr/bin/s3", "/2", "/opt/pythonic"} {
		if name, ok := Tool(file); ok {
			t.Errorf("%s is taken for %s", file, name)
		}
	}
}

func TestGlob(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"/latest/a", "/latest/a", true},
		{"/latest/a", "/latest/a/", false},
		{"/latest/a/", "/latest/a/", true},
		{"/latest/*", "/latest/", true},
		{"/latest/*", "/latest/a/b", false},
		{"/latest/a*c", "/latest/abbc", true},
		{"/latest/a*c", "/latest/ac", true},
		{"/latest/a*c", "/latest/a/c", false},
		{"/latest/*b*b", "/latest/abab", true},
		{"/latest/*b*b", "/latest/ab", false},
		{"/latest/a*a", "/latest/a", false},
		{"/latest/*/info", "/latest/iam/info", true},
		{"/latest/*/info", "/latest//info", true},
		{"/latest/**", "/latest/a/b/c", true},
		{"/latest/**", "/latest/", true},
		{"/latest/**", "/latest", false},
		{"/latest/**", "/latestx/a", false},
		{"", "/", false},
	} {
		if got := glob(c.pattern, c.path); got != c.want {
			t.Errorf("%s on %s: %v", c.pattern, c.path, got)
		}
	}
}

// A deny takes away whatever resembles what it names.
func TestDenies(t *testing.T) {
	path := func(p string) func(*event.Event, *event.Process) {
		return func(ev *event.Event, _ *event.Process) { ev.Request.Path = p }
	}
	userData := Deny{What: What{Paths: []string{"/latest/user-data"}}}
	for _, c := range []struct {
		name   string
		deny   Deny
		change func(*event.Event, *event.Process)
		denied bool
	}{
		{"executable", Deny{Who: Who{Executable: OneOrMore{"/opt/app/bin/app"}}}, nil, true},
		{"executable that is not the host's own", Deny{Who: Who{Executable: OneOrMore{"/opt/app/bin/app"}}}, func(_ *event.Event, p *event.Process) { p.HostVerified = false }, true},
		{"another executable", Deny{Who: Who{Executable: OneOrMore{"/opt/app/bin/b"}}}, nil, false},
		{"the effective user alone", Deny{Who: Who{User: "app"}}, func(_ *event.Event, p *event.Process) { p.RealUserID, p.SavedUserID = "0", "0" }, true},
		{"the real user alone", Deny{Who: Who{User: "1000"}}, func(_ *event.Event, p *event.Process) { p.UserID, p.SavedUserID = "0", "0" }, true},
		{"a supplementary group", Deny{Who: Who{Group: "27"}}, func(_ *event.Event, p *event.Process) { p.SupplementalGroups = []string{"27"} }, true},
		{"a unit of a user", Deny{Who: Who{Unit: "x.service"}}, func(_ *event.Event, p *event.Process) { p.Unit, p.UserUnit = "", "x.service" }, true},
		{"a parent that adopted it", Deny{Who: Who{Parent: "/sbin/init"}}, func(_ *event.Event, p *event.Process) { p.ParentNow = &event.Process{Executable: "/sbin/init"} }, true},
		{"a container", Deny{Who: Who{Container: containerID[:12]}}, func(_ *event.Event, p *event.Process) { p.Container = containerID }, true},
		{"a pod", Deny{Who: Who{Pod: podID}}, nil, false},
		{"a class", Deny{What: What{Classes: []string{"credentials"}}}, nil, true},
		{"another class", Deny{Who: Who{User: "app"}, What: What{Classes: []string{"user-data"}}}, nil, false},
		{"IMDSv1, in version 2", Deny{What: What{API: V1}}, nil, false},
		{"IMDSv1", Deny{What: What{API: V1}}, func(ev *event.Event, _ *event.Process) { ev.Request.Token = false }, true},
		{"path", userData, path("/latest/user-data"), true},
		{"path of another version", userData, path("/2021-03-23/user-data"), true},
		{"path behind two versions", userData, path("/latest/2021-03-23/user-data"), true},
		{"path behind something", userData, path("/x/latest/user-data"), true},
		{"path without version", userData, path("/user-data"), true},
		{"path in capital letters", userData, path("/latest/User-Data"), true},
		{"path with a slash at the end", userData, path("/latest/user-data/"), true},
		{"path that is spelled evasively", userData, func(ev *event.Event, _ *event.Process) { ev.Request.Path, ev.Request.Evasive = "/latest/x", true }, true},
		{"another path", userData, path("/latest/meta-data/instance-id"), false},
		{"expired", Deny{Who: Who{User: "app"}, Expires: Date{base.AddDate(0, 0, -1)}}, nil, false},
	} {
		c.deny.Name, c.deny.Reason = "d", "r"
		ev := asking("/opt/app/bin/app", c.change)
		e := NewEngine(compile(t, Config{Mode: Enforce, Rules: RulesConfig{WithoutShipped: true}, Denies: []Deny{c.deny}}))
		if judge(e, ev); (ev.Decision.Verdict == event.Deny) != c.denied || (ev.Decision.Deny == "d") != c.denied {
			t.Errorf("%s: %v because %q", c.name, ev.Decision.Verdict, ev.Decision.Reason)
		}
		if c.denied && (!e.Final(ev) || !e.Decisive(&ev.Request)) {
			t.Errorf("%s: final %v, decisive %v", c.name, e.Final(ev), e.Decisive(&ev.Request))
		}
	}
	for key, d := range map[string]Deny{"": {Name: "d", Reason: "r"}, ".reason": {Name: "d", Who: Who{User: "a"}}, ".name": {Who: Who{User: "a"}, Reason: "r"}, ".container": {Name: "d", Who: Who{Container: "web"}, Reason: "r"}} {
		_, err := Compile(Config{Denies: []Deny{d}}, classes)
		if complaint := (*KeyError)(nil); !errors.As(err, &complaint) || complaint.Key != "denies[0]"+key {
			t.Errorf("%+v: %v, want denies[0]%s", d, err, key)
		}
	}
}

// Whichever grant of many it is, it is found.
func TestGrantsByProgram(t *testing.T) {
	c := Config{Mode: Enforce, Posture: Strict}
	for i := range 300 {
		g := Grant{Name: fmt.Sprint("g", i), Who: Who{Executable: OneOrMore{fmt.Sprintf("/opt/%d", i%100), "/opt/shared"}}, Owner: "o", Reason: "r"}
		if g.User = "app"; i%3 == 0 {
			g.Unit = fmt.Sprintf("u%d.service", i)
		}
		c.Grants = append(c.Grants, g)
	}
	e := NewEngine(compile(t, c))
	for i := range 100 {
		unit := fmt.Sprintf("u%d.service", i)
		want := fmt.Sprint("g", i)
		if i%3 != 0 {
			unit = "other.service"
		}
		ev := judge(e, asking(fmt.Sprintf("/opt/%d", i), func(_ *event.Event, p *event.Process) { p.Unit = unit }))
		if ev.Decision.Grant != want {
			t.Errorf("%d: %+v", i, ev.Decision)
		}
	}
	if ev := judge(e, asking("/opt/shared", nil)); ev.Decision.Grant != "g1" { // the first without a unit
		t.Errorf("%+v", ev.Decision)
	}
}
