package event

import (
	"strconv"
	"strings"
	"testing"
	"time"
)

// chain makes a process and its parents, nearest first, all of one user and unit.
func chain(user, unit string, names ...string) *Process {
	p := &Process{EntityID: names[0], PID: int64(100 + len(names[0])), Executable: "/usr/bin/" + names[0], UserID: user, Unit: unit, Cgroup: "/" + unit, Known: true}
	if names[0] == "init" {
		p.PID = 1
	}
	if len(names) > 1 {
		p.Parent = chain(user, unit, names[1:]...)
	}
	return p
}

// Whose a token is, in each scope. The rows are what programs do, and what thieves
// do.
func TestToken(t *testing.T) {
	app := chain("1000", "app.service", "app", "init")
	for _, c := range []struct {
		name      string
		issuer, p *Process
		scope     string // in which it is the process's own
	}{
		{"the process itself", app, app, "process"},
		{"the process as another program", app, &Process{EntityID: "app", PID: 9, Executable: "/usr/bin/other", UserID: "1000"}, "process"},
		{"a worker that it forked", app, chain("1000", "app.service", "worker", "app", "init"), "parent"},
		{"a worker of another user, in a unit of its own", app, func() *Process {
			w := chain("33", "worker.scope", "worker", "helper")
			w.Parent.Parent = app
			return w
		}(), "parent"},
		{"two commands of a script", chain("1000", "", "curl1", "script", "init"), chain("1000", "", "curl2", "script", "init"), "parent"},
		{"a command in a pipe, and one without", chain("1000", "", "curl1", "subshell", "script", "init"), chain("1000", "", "curl2", "script", "init"), "parent"},
		{"a command, and one in a pipe", chain("1000", "", "curl1", "script", "init"), chain("1000", "", "curl2", "subshell", "script", "init"), "parent"},
		{"both in subshells", chain("1000", "", "curl1", "subshell1", "script", "init"), chain("1000", "", "curl2", "subshell2", "script", "init"), "parent"},
		{"a command, and one far below the script", chain("1000", "", "curl1", "script", "init"), chain("1000", "", "a", "b", "c", "d", "script", "init"), "parent"},
		{"a program whose child asked", chain("1000", "", "curl1", "script", "init"), chain("1000", "", "script", "init"), "parent"},
		{"a service and another process of its unit", app, chain("1000", "app.service", "timer", "init"), "unit"},
		{"another service", app, chain("1000", "other.service", "other", "init"), "none"},
		{"another service of the same name, in a delegated tree", app, func() *Process {
			p := chain("1000", "", "other", "manager", "init")
			p.UserUnit, p.Cgroup = "app.service", "/user.slice/user@1000.service/app.service"
			return p
		}(), "none"},
		{"a shell of another user below the same server", chain("1000", "", "shell1", "sshd", "init"), chain("1001", "", "shell2", "sshd", "init"), "none"},
		{"the server's own child of another user, asking itself", chain("1000", "", "shell1", "session", "sshd", "init"), chain("0", "", "session2", "sshd", "init"), "none"},
		{"a cousin far away", chain("1000", "", "a", "b", "c", "d", "init"), chain("1000", "", "e", "f", "d", "init"), "none"},
		{"in the root of cgroup2", func() *Process { p := chain("1", "", "a", "init"); p.Cgroup = "/"; return p }(),
			func() *Process { p := chain("1", "", "b", "init"); p.Cgroup = "/"; return p }(), "none"},
		{"a process of which no more is known than its program", app, &Process{Executable: "/usr/bin/app", PID: 9}, "none"},
	} {
		for _, scope := range scopeNames {
			var s TokenScope
			if err := s.UnmarshalText([]byte(scope)); err != nil {
				t.Fatal(err)
			}
			e := &Event{Host: testHost, Subjects: []*Process{c.p}, Request: Request{Token: true},
				Token: Token{Issuers: []*Issuer{NewIssuer(c.issuer)}, Issued: time.Unix(1, 0), Expires: time.Unix(2, 0), Scope: s}}
			doc := render(t, e)[0]
			want := "own"
			if c.scope == "none" || rank(t, c.scope) < s {
				want = "foreign"
			}
			if at(doc, "imdsgate.token.scope") != c.scope || at(doc, "imdsgate.token.state") != want || at(doc, "imdsgate.token.issuer.executable") != c.issuer.Executable {
				t.Errorf("%s, in the scope of the %s: %v, want %s, %s", c.name, scope, at(doc, "imdsgate.token"), c.scope, want)
			}
		}
	}
}

func rank(t *testing.T, scope string) (s TokenScope) {
	if err := s.UnmarshalText([]byte(scope)); err != nil {
		t.Fatal(err)
	}
	return s
}

// What is not known is said not to be, and is not foreign.
func TestTokenUnknown(t *testing.T) {
	p := chain("1000", "app.service", "app", "init")
	issued := Token{Issuers: []*Issuer{NewIssuer(chain("1", "x", "x", "init"))}}
	for _, c := range []struct {
		name     string
		carries  bool
		token    Token
		subjects []*Process
		want     any
	}{
		{"no token", false, Token{}, []*Process{p}, nil},
		{"a token that nobody saw issued", true, Token{}, []*Process{p}, "unknown"},
		{"nobody knows who uses it", true, issued, nil, "unknown"},
		{"of another", true, issued, []*Process{p}, "foreign"},
		{"of several, one of them this", true, Token{Issuers: append(issued.Issuers, NewIssuer(p))}, []*Process{p}, "own"},
	} {
		e := &Event{Host: testHost, Subjects: c.subjects, Request: Request{Token: c.carries}, Token: c.token}
		if got := at(render(t, e)[0], "imdsgate.token.state"); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	var s TokenScope
	if err := s.UnmarshalText([]byte("host")); err == nil || !strings.Contains(err.Error(), "unit, parent, process") {
		t.Error(err)
	}
}

// A process has no way to make us keep much.
func TestIssuerIsBounded(t *testing.T) {
	names := make([]string, 100)
	for i := range names {
		names[i] = "p" + strconv.Itoa(i)
	}
	p := chain("1", "", names...)
	p.Executable = strings.Repeat("/x", 2048)
	if i := NewIssuer(p); len(i.Executable) != maxIssuerPath || len(i.Lineage) != maxLineage {
		t.Errorf("%d bytes of name, %d parents", len(i.Executable), len(i.Lineage))
	}
}

func BenchmarkTokenForeign(b *testing.B) {
	token := Token{Issuers: []*Issuer{NewIssuer(chain("1", "x.service", "a", "b", "c", "d", "e", "init"))}}
	p := chain("1", "y.service", "f", "g", "h", "i", "j", "init")
	b.ReportAllocs()
	for b.Loop() {
		if !token.Foreign(p) {
			b.Fatal("own")
		}
	}
}
