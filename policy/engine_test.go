package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/test/shared"
)

var classes = []string{"listing", "inventory", "operational", "token", "unknown", "user-data", "identity-proof", "credentials"}

const (
	oddClient = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a01"
	untrusted = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a02"
	imdsv1    = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a03"
	relayed   = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a04"
	evasive   = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a05"
	oddOther  = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a06"
	handTool  = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a07"
	riddle    = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a08"
	elsewhere = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a09"
	searched  = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a10"
	hoarded   = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a11"
)

func compile(t testing.TB, c Config) *Policy {
	t.Helper()
	p, err := Compile(c, classes)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var base = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// asking is a request for credentials by a root-owned program that a shell
// started a moment ago, with an IMDSv2 token and complete evidence. change may
// change anything.
func asking(executable string, change func(*event.Event, *event.Process)) *event.Event {
	p := &event.Process{
		EntityID: "entity-" + executable, PID: 4711, Start: base, Executable: executable, Name: filepath.Base(executable),
		Args: []string{executable}, CommandLine: executable, WorkingDir: "/home/app",
		UserID: "1000", RealUserID: "1000", SavedUserID: "1000", UserName: "app", Unit: "app.service",
		Known: true, HostVerified: true, RootOwned: true,
		Parent: &event.Process{EntityID: "parent", PID: 4710, Executable: "/usr/bin/bash", Name: "bash", Known: true},
	}
	ev := &event.Event{
		Host: &event.Host{ID: "host"}, Time: base.Add(50 * time.Millisecond),
		Connection: event.Connection{
			Source: netip.MustParseAddrPort("10.0.0.1:40000"), Destination: netip.MustParseAddrPort("169.254.169.254:80"),
			First: true, Accepted: base.Add(40 * time.Millisecond),
		},
		Attribution: event.Attribution{Level: "L0", Complete: true},
		Subjects:    []*event.Process{p},
		Request: event.Request{Method: "GET", Path: "/latest/meta-data/iam/security-credentials/role", Class: "credentials",
			Guarded: true, Token: true, HTTP: "1.1"},
	}
	if change != nil {
		change(ev, p)
	}
	return ev
}

func judge(e *Engine, ev *event.Event) *event.Event {
	e.Judge(ev)
	e.Observe(ev)
	return ev
}

// What has matched an event as it was written is in its record also when it is judged once more, and sequences see it once.
func TestObserveAgain(t *testing.T) {
	rule := write(t, "twice.toml", `[rule]
rule_id = "twice"
name = "asks twice"
type = "eql"
language = "eql"
severity = "high"
query = 'sequence by process.entity_id with maxspan=1m [network where true] [network where true]'
`)
	e := NewEngine(compile(t, Config{Mode: Enforce, Rules: RulesConfig{Paths: []string{rule}}}))
	ev := judge(e, asking("/usr/bin/curl", nil))
	if m, _ := matched(ev, oddClient); !m.Literal || !m.Alert {
		t.Fatalf("%+v", ev.Decision.Matches)
	}
	before := ev.Decision
	other := asking("/usr/sbin/cron", nil)
	ev.Subjects = other.Subjects
	e.Judge(ev)
	e.ObserveAgain(ev, before)
	if m, _ := matched(ev, oddClient); !m.Literal || !m.Alert {
		t.Errorf("the alert is lost: %+v", ev.Decision.Matches)
	}
	if m, ok := matched(ev, "twice"); ok && m.Literal {
		t.Error("one request counts twice")
	}
	if m, _ := matched(judge(e, asking("/usr/bin/curl", func(ev *event.Event, _ *event.Process) { ev.Time = ev.Time.Add(time.Second) })), "twice"); !m.Literal {
		t.Error("two requests do not count twice")
	}
}

func matched(ev *event.Event, id string) (m event.Match, ok bool) {
	for _, m := range ev.Decision.Matches {
		if m.Rule.ID == id {
			return m, true
		}
	}
	return event.Match{}, false
}

// The criteria of the rule for odd clients, which are those of the rule that
// Elastic published: both files say the same of each case.
func TestOddClient(t *testing.T) {
	type change = func(*event.Event, *event.Process)
	cases := []struct {
		name       string
		executable string
		change     change
		literal    bool // as the rule is written
		bound      bool // of the owner, at any age, without what he can choose
	}{
		{"curl in a shell", "/usr/bin/curl", nil, true, true},
		{"wget", "/usr/bin/wget", nil, true, true},
		{"any python", "/usr/bin/python3.11", nil, true, true},
		{"capital letters", "/usr/bin/CURL", nil, true, true},
		{"a name that only begins so", "/usr/bin/curlew", nil, false, false},
		{"an agent", "/usr/bin/amazon-ssm-agent", nil, false, false},
		{"dropped in /tmp", "/tmp/x", nil, true, true},
		{"below /var/www", "/var/www/html/uploads/a", nil, true, true},
		{"a cron script", "/etc/cron.daily/x", nil, true, true},
		{"in /run", "/run/x", nil, true, true},
		{"in /usr/local/bin", "/usr/local/bin/tool", nil, false, false},
		{"by a relative path", "/home/app/x", func(_ *event.Event, p *event.Process) { p.Args[0] = "./x" }, true, true},
		{"the address in argv", "/usr/local/bin/tool", func(_ *event.Event, p *event.Process) {
			p.CommandLine = "tool http://169.254.169.254/"
		}, true, true},
		{"exactly a second later", "/usr/bin/curl", func(ev *event.Event, _ *event.Process) {
			ev.Connection.Accepted = base.Add(time.Second)
		}, true, true},
		{"a millisecond after that", "/usr/bin/curl", func(ev *event.Event, _ *event.Process) {
			ev.Connection.Accepted = base.Add(1001 * time.Millisecond)
		}, false, true},
		{"an hour later", "/usr/bin/python3", func(ev *event.Event, _ *event.Process) {
			ev.Connection.Accepted = base.Add(time.Hour)
		}, false, true},
		{"an excused directory", "/usr/bin/curl", func(_ *event.Event, p *event.Process) {
			p.WorkingDir = "/var/log/amazon/ssm/x"
		}, false, true},
		{"an excused parent", "/usr/bin/curl", func(_ *event.Event, p *event.Process) {
			p.Parent.Executable = "/usr/share/ec2-instance-connect/eic_run_authorized_keys"
		}, false, true},
		{"an excused program", "/opt/rumble/bin/rumble-agent-1", func(_ *event.Event, p *event.Process) {
			p.Name = "python"
		}, false, true},
		{"a parent whose program is not known", "/usr/bin/curl", func(_ *event.Event, p *event.Process) {
			p.Parent.Executable = ""
		}, false, true},
		{"no parent", "/usr/bin/curl", func(_ *event.Event, p *event.Process) { p.Parent = nil }, false, true},
		{"no working directory", "/usr/bin/curl", func(_ *event.Event, p *event.Process) { p.WorkingDir = "" }, true, true},
		{"over IPv6", "/usr/bin/curl", func(ev *event.Event, _ *event.Process) {
			ev.Connection.Destination = netip.MustParseAddrPort("[fd00:ec2::254]:80")
		}, false, false},
	}
	ours := compile(t, Config{})
	check := func(t *testing.T, p *Policy, id string) {
		for _, c := range cases {
			ev := judge(NewEngine(p), asking(c.executable, c.change))
			m, ok := matched(ev, id)
			if ok != (c.literal || c.bound) || m.Literal != c.literal || m.Bound != c.bound {
				t.Errorf("%s: literal %v, bound %v; want %v, %v", c.name, m.Literal, m.Bound, c.literal, c.bound)
			}
			if m.Alert != c.literal {
				t.Errorf("%s: alert %v, literal %v", c.name, m.Alert, c.literal)
			}
			if denied := ev.Decision.WouldBe == event.Deny && ev.Decision.Rule != nil && ev.Decision.Rule.ID == id; denied && !c.bound {
				t.Errorf("%s: blocked", c.name)
			}
		}
	}
	t.Run("ours", func(t *testing.T) { check(t, ours, oddClient) })
	t.Run("Elastic's", func(t *testing.T) {
		file := filepath.Join(shared.Dir(t), "rules", "seed-2025-02-credential_access_unusual_instance_metadata_service_api_request.toml")
		check(t, compile(t, Config{Rules: RulesConfig{Paths: []string{file}, WithoutShipped: true}}), "ecc0cd54-608e-11ef-ab6d-f661ea17fbce")
	})
}

// What the rule alone misses.
func TestShippedRules(t *testing.T) {
	p := compile(t, Config{})
	for _, c := range []struct {
		name, executable string
		change           func(*event.Event, *event.Process)
		rule             string // that blocks, or raises an alert; "" for none
		verdict          event.Verdict
		alert            bool
	}{
		{"a legitimate program", "/opt/app/bin/app", nil, "", event.Allow, false},
		{"a copy of curl, by host name", "/home/app/x", func(_ *event.Event, p *event.Process) {
			p.HostVerified, p.RootOwned = true, false
			p.CommandLine = "x http://instance-data/"
		}, untrusted, event.Deny, true},
		{"the loader", "/usr/lib64/ld-linux-x86-64.so.2", func(_ *event.Event, p *event.Process) { p.Loader = true }, untrusted, event.Deny, true},
		{"a path of another mount namespace", "/opt/app/bin/app", func(_ *event.Event, p *event.Process) {
			p.HostVerified, p.RootOwned = false, false
		}, untrusted, event.Deny, true},
		{"a program that cannot be read", "", func(_ *event.Event, p *event.Process) {
			p.Executable, p.Name, p.Known, p.CommandLine = "", "", false, "app"
		}, untrusted, event.Deny, true},
		{"user data, by a program from a home", "/home/app/x", func(ev *event.Event, p *event.Process) {
			ev.Request.Class = "user-data"
			p.RootOwned = false
		}, untrusted, event.Deny, true},
		{"user data, over IMDSv1", "/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
			ev.Request.Class, ev.Request.Token = "user-data", false
		}, imdsv1, event.Deny, true},
		{"a shell that spells the address as a number", "/usr/bin/bash", func(_ *event.Event, p *event.Process) {
			p.CommandLine = "bash -c exec 3<>/dev/tcp/2852039166/80"
		}, handTool, event.Deny, true},
		{"netcat by the name of its package", "/usr/bin/nc.openbsd", nil, handTool, event.Deny, true},
		{"whois with a port", "/usr/bin/whois", nil, handTool, event.Deny, true},
		{"an editor with channels", "/usr/bin/vim.basic", nil, handTool, event.Deny, true},
		{"a key fetcher", "/usr/bin/dirmngr", nil, handTool, event.Deny, true},
		{"inventory, by a shell", "/usr/bin/bash", func(ev *event.Event, _ *event.Process) {
			ev.Request.Class, ev.Request.Guarded = "inventory", false
		}, "", event.Allow, false},
		{"IMDSv1", "/opt/app/bin/app", func(ev *event.Event, _ *event.Process) { ev.Request.Token = false }, imdsv1, event.Deny, true},
		{"X-Forwarded-For", "/usr/sbin/nginx", func(ev *event.Event, _ *event.Process) { ev.Request.Forwarded = true }, relayed, event.Allow, true},
		{"a public name", "/usr/lib/firefox/firefox", func(ev *event.Event, _ *event.Process) { ev.Request.HostIsOdd = true }, relayed, event.Allow, true},
		{"a disguised path", "/opt/app/bin/app", func(ev *event.Event, _ *event.Process) { ev.Request.Evasive = true }, evasive, event.Deny, true},
		{"a disguised path to inventory", "/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
			ev.Request.Class, ev.Request.Guarded, ev.Request.Evasive = "inventory", false, true
		}, elsewhere, event.Allow, true},
		{"an odd method on a path of no catalogue", "", func(ev *event.Event, _ *event.Process) {
			ev.Request.Method, ev.Request.Class, ev.Request.Guarded, ev.Request.Evasive = "FOO", "unknown", false, true
			ev.Subjects, ev.Attribution.Complete, ev.Attribution.Reason = nil, false, "no_holder"
		}, elsewhere, event.Allow, true},
		{"no request", "/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
			ev.Request = event.Request{Malformed: "two readings"}
		}, riddle, event.Deny, true},
		{"no request, of nobody known", "", func(ev *event.Event, _ *event.Process) {
			ev.Request = event.Request{Malformed: "two readings", Method: "GET", Target: "http://169.254.169.254/"}
			ev.Subjects, ev.Attribution.Complete, ev.Attribution.Reason = nil, false, "no_holder"
		}, riddle, event.Deny, true},
		{"curl over IPv6", "/usr/bin/curl", func(ev *event.Event, _ *event.Process) {
			ev.Connection.Destination = netip.MustParseAddrPort("[fd00:ec2::254]:80")
		}, oddOther, event.Deny, true},
		{"curl for a task's credentials", "/usr/bin/curl", atContainers, oddOther, event.Deny, true},
		{"a program for a task's credentials", "/opt/app/bin/app", atContainers, "", event.Allow, false},
		{"a program with a task's address in argv", "/usr/local/bin/tool", func(ev *event.Event, p *event.Process) {
			atContainers(ev, p)
			p.CommandLine = "tool http://169.254.170.2/"
		}, oddOther, event.Deny, true},
		{"inventory, by curl", "/usr/bin/curl", func(ev *event.Event, _ *event.Process) {
			ev.Request.Class, ev.Request.Guarded = "inventory", false
		}, oddClient, event.Allow, true},
		{"a token, by curl", "/usr/bin/curl", func(ev *event.Event, _ *event.Process) {
			ev.Request.Class, ev.Request.Guarded = "token", false
		}, oddClient, event.Allow, true},
	} {
		ev := judge(NewEngine(p), asking(c.executable, c.change))
		d := ev.Decision
		if d.WouldBe != c.verdict || d.Verdict != event.Allow {
			t.Errorf("%s: would be %v because %q, is %v in audit mode", c.name, d.WouldBe, d.Reason, d.Verdict)
		}
		m, ok := matched(ev, c.rule)
		if ok != (c.rule != "") || m.Alert != c.alert {
			t.Errorf("%s: matches %+v", c.name, d.Matches)
		}
	}
}

// atContainers makes it a task's request for its own credentials.
func atContainers(ev *event.Event, _ *event.Process) {
	ev.Connection.Destination = netip.MustParseAddrPort("169.254.170.2:80")
	ev.Request.Path, ev.Request.Token, ev.Request.Container = "/v2/credentials/0f0e", false, true
}

// Which of the rules that look at the request alone raise an alert, and no other.
func TestRequestRules(t *testing.T) {
	short := map[string]string{imdsv1: "v1", relayed: "relayed", evasive: "disguised", elsewhere: "evasive", riddle: "malformed"}
	e := NewEngine(compile(t, Config{}))
	for _, c := range []struct {
		name  string
		asked event.Request
		want  string
	}{
		{"a secret", event.Request{Guarded: true, Token: true}, ""},
		{"a secret over IMDSv1", event.Request{Guarded: true}, "v1"},
		{"a disguised secret", event.Request{Guarded: true, Token: true, Evasive: true}, "disguised"},
		{"a disguised secret over IMDSv1", event.Request{Guarded: true, Evasive: true}, "disguised v1"},
		{"a secret of a task, where there are no versions", event.Request{Guarded: true, Container: true}, ""},
		{"inventory over IMDSv1", event.Request{}, ""},
		{"disguised inventory", event.Request{Evasive: true}, "evasive"},
		{"disguised inventory, relayed", event.Request{Token: true, Evasive: true, Forwarded: true}, "evasive relayed"},
		{"no request", event.Request{Malformed: "no colon"}, "malformed"},
		{"no request, under a public name", event.Request{Malformed: "no colon", HostIsOdd: true}, "malformed relayed"},
	} {
		ev := judge(e, asking("/opt/app/bin/app", func(ev *event.Event, _ *event.Process) { ev.Request = c.asked }))
		var got []string
		for _, m := range ev.Decision.Matches {
			if m.Alert {
				got = append(got, short[m.Rule.ID])
			}
		}
		if slices.Sort(got); strings.Join(got, " ") != c.want {
			t.Errorf("%s: alerts %q, want %q", c.name, got, c.want)
		}
	}
}

func grantFor(executable string) Grant {
	return Grant{Name: "app", Who: Who{Executable: OneOrMore{executable}, Unit: "app.service"},
		What: What{Classes: []string{"credentials"}}, Owner: "platform", Reason: "it needs them"}
}

// inventory makes a request one that nothing guards.
func inventory(ev *event.Event, _ *event.Process) {
	ev.Request.Path, ev.Request.Class, ev.Request.Guarded = "/latest/meta-data/instance-id", "inventory", false
}

func TestOrderOfVerdict(t *testing.T) {
	granted := Config{Mode: Enforce, Grants: []Grant{grantFor("/usr/bin/python3")}}
	for _, c := range []struct {
		name   string
		config Config
		ev     *event.Event
		want   event.Verdict
		reason string
	}{
		{"malformed, though granted", granted, asking("/usr/bin/python3", func(ev *event.Event, _ *event.Process) { ev.Request.Malformed = "two readings" }), event.Deny, "two readings"},
		{"granted, though a rule matches", granted, asking("/usr/bin/python3", nil), event.Allow, "granted by app"},
		{"a grant of another unit", granted, asking("/usr/bin/python3", func(_ *event.Event, p *event.Process) { p.Unit = "evil.service" }), event.Deny, "rule"},
		{"one of two subjects without grant", granted, asking("/usr/bin/python3", func(ev *event.Event, p *event.Process) {
			ev.Subjects = append(ev.Subjects, &event.Process{EntityID: "other", PID: p.PID, Name: "app", Executable: "/opt/app/bin/app",
				UserID: p.UserID, Unit: p.Unit, Known: true, HostVerified: true, RootOwned: true, Parent: p.Parent})
		}), event.Deny, "rule"},
		{"a grant on incomplete evidence", granted, asking("/usr/bin/python3", func(ev *event.Event, _ *event.Process) {
			ev.Attribution.Complete, ev.Attribution.Reason = false, "late"
		}), event.Deny, "rule"},
		{"denied, though granted", Config{Mode: Enforce, Grants: granted.Grants, Denies: []Deny{{Name: "stop", Who: Who{User: "app"}, Reason: "left the company"}}},
			asking("/usr/bin/python3", nil), event.Deny, `denied by "stop": left the company`},
		{"malformed, though denied", Config{Mode: Enforce, Denies: []Deny{{Name: "stop", Who: Who{User: "app"}, Reason: "r"}}},
			asking("/usr/bin/python3", func(ev *event.Event, _ *event.Process) { ev.Request.Malformed = "two readings" }), event.Deny, "two readings"},
		{"denied, though only inventory", Config{Mode: Enforce, Denies: []Deny{{Name: "stop", Who: Who{User: "app"}, Reason: "r"}}},
			asking("/opt/app/bin/app", inventory), event.Deny, "denied by"},
		{"one of two subjects denied", Config{Mode: Enforce, Denies: []Deny{{Name: "stop", Who: Who{Executable: OneOrMore{"/bin/other"}}, Reason: "r"}}},
			asking("/opt/app/bin/app", func(ev *event.Event, p *event.Process) {
				ev.Subjects = append(ev.Subjects, &event.Process{EntityID: "other", PID: 4712, Executable: "/bin/other"})
			}), event.Deny, "denied by"},
		{"denied a class, and nobody known", Config{Mode: Enforce, Denies: []Deny{{Name: "stop", What: What{Classes: []string{"inventory"}}, Reason: "r"}}},
			asking("/opt/app/bin/app", func(ev *event.Event, p *event.Process) {
				inventory(ev, p)
				ev.Subjects, ev.Attribution.Complete = nil, false
			}), event.Deny, "denied by"},
		{"a class that is strict", Config{Mode: Enforce, Classes: map[string]Posture{"inventory": Strict}}, asking("/opt/app/bin/app", inventory), event.Deny, "strict"},
		{"a class that is strict, and nobody known", Config{Mode: Enforce, Classes: map[string]Posture{"inventory": Strict}},
			asking("/opt/app/bin/app", func(ev *event.Event, p *event.Process) {
				inventory(ev, p)
				ev.Subjects, ev.Attribution.Complete, ev.Attribution.Reason = nil, false, "no_holder"
			}), event.Deny, "unattributed: no_holder"},
		{"a class that is not strict, in a strict policy", Config{Mode: Enforce, Posture: Strict, Classes: map[string]Posture{"credentials": Default}},
			asking("/opt/app/bin/app", nil), event.Allow, ""},
		{"a class that is not strict, and nobody known", Config{Mode: Enforce, Posture: Strict, Classes: map[string]Posture{"credentials": Default}},
			asking("/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
				ev.Subjects, ev.Attribution.Complete, ev.Attribution.Reason = nil, false, "no_holder"
			}), event.Deny, "unattributed"},
		{"a rule that blocks", Config{Mode: Enforce}, asking("/usr/bin/curl", nil), event.Deny, "rule"},
		{"nobody known", Config{Mode: Enforce}, asking("/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
			ev.Subjects, ev.Attribution.Complete, ev.Attribution.Reason = nil, false, "no_holder"
		}), event.Deny, "unattributed: no_holder"},
		{"somebody else may hold it", Config{Mode: Enforce}, asking("/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
			ev.Attribution.Complete, ev.Attribution.Reason = false, "late"
		}), event.Deny, "somebody else"},
		{"nobody known, and inventory", Config{Mode: Enforce}, asking("/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
			ev.Subjects, ev.Attribution.Complete = nil, false
			ev.Request.Class, ev.Request.Guarded = "inventory", false
		}), event.Allow, ""},
		{"no rule", Config{Mode: Enforce}, asking("/opt/app/bin/app", nil), event.Allow, ""},
		{"no rule, strict", Config{Mode: Enforce, Posture: Strict}, asking("/opt/app/bin/app", nil), event.Deny, "strict"},
		{"strict, and granted", Config{Mode: Enforce, Posture: Strict, Grants: []Grant{grantFor("/opt/app/bin/app")}}, asking("/opt/app/bin/app", nil), event.Allow, "granted"},
		{"strict, and inventory", Config{Mode: Enforce, Posture: Strict}, asking("/opt/app/bin/app", func(ev *event.Event, _ *event.Process) {
			ev.Request.Class, ev.Request.Guarded = "inventory", false
		}), event.Allow, ""},
	} {
		ev := judge(NewEngine(compile(t, c.config)), c.ev)
		if d := ev.Decision; d.Verdict != c.want || d.WouldBe != c.want || !strings.Contains(d.Reason, c.reason) {
			t.Errorf("%s: %v because %q, want %v because of %q", c.name, d.Verdict, d.Reason, c.want, c.reason)
		}
	}
}

// Once a rule has blocked a process, nothing that the process does to itself
// undoes it; another process is not concerned.
func TestLatch(t *testing.T) {
	e := NewEngine(compile(t, Config{Mode: Enforce}))
	if ev := judge(e, asking("/usr/bin/curl", nil)); ev.Decision.Verdict != event.Deny {
		t.Fatal(ev.Decision)
	}
	same := asking("/opt/app/bin/app", func(_ *event.Event, p *event.Process) { p.EntityID = "entity-/usr/bin/curl" })
	if judge(e, same); same.Decision.Verdict != event.Deny {
		t.Errorf("the same process in another program: %+v", same.Decision)
	}
	if other := judge(e, asking("/opt/app/bin/app", nil)); other.Decision.Verdict != event.Allow {
		t.Errorf("another process: %+v", other.Decision)
	}
	log := Log
	e.SetPolicy(compile(t, Config{Mode: Enforce, Rules: RulesConfig{Actions: map[string]RuleAction{handTool: {Action: &log}}}}))
	again := func() *event.Event {
		return judge(e, asking("/opt/app/bin/app", func(_ *event.Event, p *event.Process) { p.EntityID = "entity-/usr/bin/curl" }))
	}
	if ev := again(); ev.Decision.Verdict != event.Deny || ev.Decision.Rule.ID != oddClient {
		t.Errorf("after a reload that has the rule as it was: %+v", ev.Decision)
	}
	e.SetPolicy(compile(t, Config{Mode: Enforce, Rules: RulesConfig{Actions: map[string]RuleAction{oddClient: {HonourExclusions: true}, handTool: {Action: &log}}}}))
	if ev := again(); ev.Decision.Verdict != event.Allow {
		t.Errorf("after a reload that has another action for the rule: %+v", ev.Decision)
	}
}

// What somebody else forged one request to say does not shut a program off.
func TestNoLatchForRequestRules(t *testing.T) {
	e := NewEngine(compile(t, Config{Mode: Enforce}))
	for name, change := range map[string]func(*event.Event, *event.Process){
		"over IMDSv1": func(ev *event.Event, _ *event.Process) { ev.Request.Token = false },
		"disguised":   func(ev *event.Event, _ *event.Process) { ev.Request.Evasive = true },
	} {
		if ev := judge(e, asking("/opt/app/bin/app", change)); ev.Decision.Verdict != event.Deny {
			t.Errorf("%s: %+v", name, ev.Decision)
		}
	}
	if ev := judge(e, asking("/opt/app/bin/app", nil)); ev.Decision.Verdict != event.Allow {
		t.Errorf("afterwards: %+v", ev.Decision)
	}
}

// A grant is not taken away by a judgement on evidence that was not complete
// yet, which the rule that the grant overrules decided.
func TestFinal(t *testing.T) {
	g := grantFor("/usr/bin/python3")
	e := NewEngine(compile(t, Config{Mode: Enforce, Grants: []Grant{g}}))
	hinted := asking("/usr/bin/python3", func(ev *event.Event, _ *event.Process) {
		ev.Attribution.Complete, ev.Attribution.Reason = false, "partial"
	})
	e.Judge(hinted)
	if hinted.Decision.Verdict != event.Deny || e.Final(hinted) {
		t.Errorf("on the likely owner alone: %+v, final %v", hinted.Decision, e.Final(hinted))
	}
	hinted.Attribution.Complete, hinted.Attribution.Reason = true, ""
	if judge(e, hinted); hinted.Decision.Verdict != event.Allow {
		t.Errorf("on complete evidence: %+v", hinted.Decision)
	}
	thief := asking("/usr/bin/curl", func(ev *event.Event, _ *event.Process) { ev.Attribution.Complete = false })
	if e.Judge(thief); !e.Final(thief) {
		t.Errorf("a search may save %+v", thief.Decision)
	}
}

// The policy may be replaced while requests are judged.
// A rule about the parent blocks whether the process that forked the caller is meant
// or the one that has adopted it: neither orphaning nor being adopted helps.
func TestAdopted(t *testing.T) {
	rule := filepath.Join(t.TempDir(), "parent.toml")
	if err := os.WriteFile(rule, []byte(`[rule]
rule_id = "parent"
name = "child of a web server"
type = "eql"
language = "eql"
severity = "high"
query = 'process where process.parent.name == "nginx"'
`), 0o644); err != nil {
		t.Fatal(err)
	}
	e := NewEngine(compile(t, Config{Mode: Enforce, Rules: RulesConfig{Paths: []string{rule}, WithoutShipped: true}}))
	for _, c := range []struct {
		birth, now string
		want       event.Verdict
	}{
		{"nginx", "", event.Deny}, {"nginx", "systemd", event.Deny}, {"bash", "nginx", event.Deny},
		{"bash", "systemd", event.Allow}, {"bash", "", event.Allow},
	} {
		ev := judge(e, asking("/usr/bin/client"+c.birth+c.now, func(_ *event.Event, p *event.Process) {
			p.Parent.Name = c.birth
			if c.now != "" {
				p.ParentNow = &event.Process{PID: 1, Name: c.now, Known: true}
			}
		}))
		if ev.Decision.Verdict != c.want {
			t.Errorf("forked by %s, now %q: %s (%s)", c.birth, c.now, ev.Decision.Verdict, ev.Decision.Reason)
		}
	}
}

// The start of a program reaches the rules before any request: a rule about processes
// alone raises its alert then, and a sequence that began with a process which never
// connects goes on with a sibling of it.
func TestStarts(t *testing.T) {
	dir := t.TempDir()
	for name, query := range map[string]string{
		"alone":    `process where process.name == "nc"`,
		"sequence": `sequence by host.id, process.parent.entity_id with maxspan=1s [process where process.name == "curl"] [network where destination.port == 80]`,
	} {
		text := "[rule]\nrule_id = \"" + name + "\"\nname = \"" + name + "\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"high\"\nquery = '" + query + "'\n"
		if err := os.WriteFile(filepath.Join(dir, name+".toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	e := NewEngine(compile(t, Config{Rules: RulesConfig{Paths: []string{dir}, WithoutShipped: true}}))
	started := func(name string) *event.Event {
		ev := asking("/usr/bin/"+name, nil)
		return &event.Event{Kind: event.Started, Host: ev.Host, Time: base, Subjects: ev.Subjects}
	}
	if ev := started("ls"); e.Concerns(ev) {
		t.Error("no rule is about ls")
	}
	ev := started("nc")
	if !e.Concerns(ev) || !e.ObserveStart(ev) || !slices.Equal(documents(ev), []event.Document{event.ProcessStart, event.Alert}) {
		t.Errorf("%+v in %v", ev.Decision, documents(ev))
	}
	if e.ObserveStart(started("nc")) {
		t.Error("the same start raised a second alert")
	}
	if ev := started("curl"); !e.Concerns(ev) || e.ObserveStart(ev) {
		t.Error("the first half of a sequence is no alert")
	}
	ev = judge(e, asking("/usr/bin/sibling", nil))
	if len(ev.Decision.Matches) != 1 || !ev.Decision.Matches[0].Literal {
		t.Errorf("a sibling of curl connected: %+v", ev.Decision.Matches)
	}
	// Both halves of the sequence are in the file, and once.
	if len(ev.Starts) != 2 || ev.Starts[0].Name != "sibling" || ev.Starts[1].Name != "curl" {
		t.Errorf("the event tells of the starts of %v", ev.Starts)
	}
	e.SetPolicy(e.Policy())
	for _, name := range []string{"sibling", "curl", "nc"} {
		if ev := judge(e, asking("/usr/bin/"+name, nil)); len(ev.Starts) != 0 {
			t.Errorf("the start of %s is told again", name)
		}
	}
	unknown := asking("/usr/bin/cat", nil)
	unknown.Subjects[0].Start, unknown.Subjects[0].Executed = time.Time{}, time.Time{}
	if ev := judge(e, unknown); len(ev.Starts) != 0 {
		t.Error("a start is told whose time is not known")
	}
}

func documents(ev *event.Event) (kinds []event.Document) {
	for _, v := range ev.Views() {
		kinds = append(kinds, v.Document)
	}
	return kinds
}

func TestReloadWhileJudging(t *testing.T) {
	few, many := compile(t, Config{Rules: RulesConfig{WithoutShipped: true}}), compile(t, Config{})
	e := NewEngine(many)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 2000 {
			e.SetPolicy([]*Policy{few, many}[i%2])
		}
	}()
	for reloading := true; reloading; {
		judge(e, asking("/usr/bin/curl", nil))
		select {
		case <-done:
			reloading = false
		default:
		}
	}
}

// A sequence alerts once for a process, as Elastic's engine would; a request
// that follows the first is blocked all the same.
func TestOneAlertForAProcess(t *testing.T) {
	e := NewEngine(compile(t, Config{}))
	if m, _ := matched(judge(e, asking("/usr/bin/curl", nil)), oddClient); !m.Literal || !m.Alert {
		t.Errorf("first: %+v", m)
	}
	if m, _ := matched(judge(e, asking("/usr/bin/curl", nil)), oddClient); m.Literal || m.Alert || !m.Bound {
		t.Errorf("second: %+v", m)
	}
}

func TestActions(t *testing.T) {
	action := func(a Action) *Action { return &a }
	odd := func(a RuleAction) Config {
		return Config{Mode: Enforce, Rules: RulesConfig{Actions: map[string]RuleAction{oddClient: a}}}
	}
	inventory := func(ev *event.Event, _ *event.Process) { ev.Request.Class, ev.Request.Guarded = "inventory", false }
	late := func(ev *event.Event, _ *event.Process) { ev.Connection.Accepted = base.Add(time.Hour) }
	ssm := func(_ *event.Event, p *event.Process) { p.WorkingDir = "/var/log/amazon/ssm/x" }
	for _, c := range []struct {
		name    string
		config  Config
		change  func(*event.Event, *event.Process)
		verdict event.Verdict
		alert   bool
	}{
		{"log", odd(RuleAction{Action: action(Log)}), nil, event.Allow, false},
		{"alert", odd(RuleAction{Action: action(Alert)}), nil, event.Allow, true},
		{"alert, bound only", odd(RuleAction{Action: action(Alert)}), late, event.Allow, false},
		{"alert on either", odd(RuleAction{Action: action(Alert), AlertOn: Either}), late, event.Allow, true},
		{"block", odd(RuleAction{Action: action(Block)}), late, event.Deny, true},
		{"block, inventory", odd(RuleAction{Action: action(Block)}), inventory, event.Allow, true},
		{"block inventory", odd(RuleAction{Classes: map[string]Action{"inventory": Block}}), inventory, event.Deny, true},
		{"log inventory", odd(RuleAction{Classes: map[string]Action{"inventory": Log}}), inventory, event.Allow, false},
		{"exclusions do not excuse", odd(RuleAction{}), ssm, event.Deny, true},
		{"exclusions honoured", odd(RuleAction{HonourExclusions: true}), ssm, event.Allow, false},
	} {
		e := NewEngine(compile(t, c.config))
		ev := asking("/usr/bin/curl", c.change)
		if c.name == "block inventory" && !e.Decisive(&ev.Request) {
			t.Error("a request that a rule may block is not decisive")
		}
		judge(e, ev)
		m, _ := matched(ev, oddClient)
		if ev.Decision.Verdict != c.verdict || m.Alert != c.alert {
			t.Errorf("%s: %v, %+v", c.name, ev.Decision.Verdict, m)
		}
	}
}

// What is much is only known by counting: the rules for it say nothing of the first
// requests, alert or log from the one that is too many, and block nobody.
func TestCounting(t *testing.T) {
	one := func(int) string { return "one" }
	for _, c := range []struct {
		name, rule string
		class      string
		requests   int
		every      time.Duration
		parent     func(i int) string // of the process that asks
		entity     func(i int) string
		first      int // that matches, from 1; 0 for none
		alert      bool
	}{
		{"a word list", searched, "unknown", 20, time.Second, one, one, 15, true},
		{"a word list, a process for each word", searched, "unknown", 20, time.Second, one, strconv.Itoa, 15, true},
		{"as many processes of others", searched, "unknown", 20, time.Second, strconv.Itoa, strconv.Itoa, 0, false},
		{"one word after the other", searched, "unknown", 40, 5 * time.Second, one, one, 0, false},
		{"who looks in which cloud he is", searched, "unknown", 14, time.Millisecond, one, one, 0, false},
		{"a crawler", searched, "inventory", 300, time.Millisecond, one, one, 0, false},
		{"a hoard of tokens", hoarded, "token", 40, time.Second, one, one, 30, false},
		{"a token for each process", hoarded, "token", 40, time.Millisecond, one, strconv.Itoa, 0, false},
		{"a refused client", hoarded, "token", 12, time.Millisecond, one, one, 0, false},
	} {
		e := NewEngine(compile(t, Config{Mode: Enforce}))
		for i := 1; i <= c.requests; i++ {
			ev := judge(e, asking("/opt/app/bin/app", func(ev *event.Event, p *event.Process) {
				ev.Request.Class, ev.Request.Guarded = c.class, false
				ev.Time, ev.Connection.Accepted = ev.Time.Add(time.Duration(i)*c.every), ev.Time.Add(time.Duration(i)*c.every)
				p.EntityID, p.Parent.EntityID = c.entity(i), c.parent(i)
			}))
			m, ok := matched(ev, c.rule)
			if ok != (c.first != 0 && i >= c.first) || m.Alert != (ok && c.alert) || ev.Decision.Verdict != event.Allow {
				t.Errorf("%s, request %d: %+v, %v", c.name, i, ev.Decision.Matches, ev.Decision.Verdict)
			}
		}
	}
	rules := NewEngine(compile(t, Config{})).Explain(asking("/opt/app/bin/app", nil)).Steps[StepRule].Of[0].Rules
	for _, r := range rules {
		if (r.ID == hoarded || r.ID == searched) && (r.Matches || len(r.Clauses) != 1 || r.Clauses[0].Excuse) {
			t.Errorf("explained: %+v", r)
		}
	}
	block := Block
	for _, a := range []RuleAction{{Action: &block}, {Classes: map[string]Action{"token": Block}}} {
		_, err := Compile(Config{Rules: RulesConfig{Actions: map[string]RuleAction{hoarded: a}}}, classes)
		if err == nil || !strings.Contains(err.Error(), "cannot block") {
			t.Errorf("%+v: %v", a, err)
		}
	}
}

// TestMissingEvents: a rule with missing events alerts and does not block; one that
// would be decided only later is refused.
func TestMissingEvents(t *testing.T) {
	dir := t.TempDir()
	rule := func(query string) {
		t.Helper()
		src := "[rule]\nrule_id = \"m\"\nname = \"m\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = '''\n" + query + "\n'''\n"
		if err := os.WriteFile(filepath.Join(dir, "m.toml"), []byte(src), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := Config{Mode: Enforce, Rules: RulesConfig{Paths: []string{dir}, WithoutShipped: true}}
	rule(`sequence by process.entity_id with maxspan=1m
  ![process where process.name == "curl"]
  [network where event.action == "connection_attempted"]`)
	e := NewEngine(compile(t, c))
	if ev := judge(e, asking("/usr/bin/curl", nil)); len(ev.Decision.Matches) != 0 {
		t.Errorf("curl: %+v", ev.Decision.Matches)
	}
	ev := judge(e, asking("/usr/bin/wget", nil))
	if m, ok := matched(ev, "m"); !ok || !m.Literal || !m.Alert || m.Bound || m.Action != "alert" || ev.Decision.Verdict != event.Allow {
		t.Errorf("wget: %+v, %v", ev.Decision.Matches, ev.Decision.Verdict)
	}
	block := Block
	for _, a := range []RuleAction{{Action: &block}, {Classes: map[string]Action{"credentials": Block}}} {
		c.Rules.Actions = map[string]RuleAction{"m": a}
		if _, err := Compile(c, classes); err == nil || !strings.Contains(err.Error(), "cannot block") {
			t.Errorf("%+v: %v", a, err)
		}
	}

	c.Rules.Actions = nil
	rule(`sequence by host.id with maxspan=1m
  [network where true]
  ![process where true]`)
	if _, err := Compile(c, classes); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "m.toml:10:3: ") {
		t.Errorf("late: %v", err)
	}
}

func TestRuleErrors(t *testing.T) {
	const good = `[rule]
rule_id = "x"
name = "X"
type = "eql"
language = "eql"
severity = "low"
query = '''
process where process.name == "curl"
'''
`
	if _, err := ParseRule("x.toml", []byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, old, new, err string }{
		{"query", `process.name`, `process.nam`, "x.toml:8:15"},
		{"caret", `process.name`, `process.nam`, "\n\tprocess where process.nam == \"curl\"\n\t              ^"},
		{"suggestion", `process.name`, `process.nam`, "process.name"},
		{"syntax", `== "curl"`, `= "curl"`, "x.toml:8:"},
		{"TOML", `severity = "low"`, `severity = low`, "x.toml:6"},
		{"another language", `language = "eql"`, `language = "kuery"`, "kuery"},
		{"another type", `type = "eql"`, `type = "new_terms"`, "new_terms"},
		{"severity", `"low"`, `"mild"`, "mild"},
		{"no query", `process where process.name == "curl"`, ``, "x.toml"},
		{"no rule", `[rule]`, `[other]`, "is this a rule file"},
	} {
		src := strings.Replace(good, c.old, c.new, 1)
		_, err := ParseRule("x.toml", []byte(src))
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v\nwant it to say %q", c.name, err, c.err)
		}
	}

	r, err := ParseRule("x.toml", []byte(strings.Replace(good, "process.name", "?process.nam", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if w := r.Query.Warnings(); len(w) != 1 || !strings.HasPrefix(w[0].Error(), "x.toml:8:15") {
		t.Errorf("warnings %v, want one about line 8 of the file", w)
	}
}

func TestRuleDirectory(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rule := func(id string) string {
		return "[rule]\nrule_id = \"" + id + "\"\nname = \"" + id + "\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = 'any where true'\n"
	}
	write("a.toml", rule("a"))
	write("b.toml", rule("b"))
	write("notes.md", "not a rule")
	p := compile(t, Config{Rules: RulesConfig{Paths: []string{dir}, WithoutShipped: true}})
	if got := len(p.Rules()); got != 2 {
		t.Errorf("%d rules, want 2", got)
	}
	write("c.toml", rule("a"))
	write("d.toml", "[rule]\n")
	_, err := Compile(Config{Rules: RulesConfig{Paths: []string{dir, filepath.Join(dir, "none")}, Actions: map[string]RuleAction{"zzz": {}}}}, classes)
	for _, want := range []string{"c.toml", "d.toml", "none", "zzz"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nwant it to name %s", err, want)
		}
	}
	p, err = Compile(Config{Rules: RulesConfig{Paths: []string{dir}, WithoutShipped: true, SkipRefused: true}}, classes)
	if err != nil || len(p.Rules()) != 2 || len(p.Skipped) != 2 || !strings.Contains(p.Skipped[0].Error(), "c.toml") {
		t.Errorf("%v, %d rules, skipped %v", err, len(p.Rules()), p.Skipped)
	}
	if _, err = Compile(Config{Rules: RulesConfig{Paths: []string{filepath.Join(dir, "none")}, SkipRefused: true}}, classes); err == nil {
		t.Error("a path that is not there is no error")
	}
}

func FuzzParseRule(f *testing.F) {
	files, err := shipped.ReadDir("rules")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		b, err := shipped.ReadFile("rules/" + file.Name())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRule("fuzz.toml", b)
		if (r == nil) == (err == nil) {
			t.Errorf("rule %v and error %v", r, err)
		}
	})
}

// write makes a file in a directory of its own.
func write(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// What a sequence gives up is counted, and goes on being counted after a reload.
func TestEvicted(t *testing.T) {
	e := NewEngine(compile(t, Config{}))
	at := time.Unix(1e9, 0)
	start := func(i int) {
		p := &event.Process{EntityID: fmt.Sprint("child", i), PID: int64(i), Start: at, Executed: at, Executable: "/usr/bin/curl", Name: "curl",
			Args: []string{"curl", "http://169.254.169.254/"}, CommandLine: "curl http://169.254.169.254/", Known: true,
			Parent: &event.Process{EntityID: fmt.Sprint("parent", i), PID: int64(i) + 1, Executable: "/usr/bin/bash", Name: "bash", Known: true}}
		e.ObserveStart(&event.Event{Kind: event.Started, Host: &event.Host{ID: "h"}, Time: at, Subjects: []*event.Process{p}})
	}
	for i := range maxChains {
		start(i)
	}
	if n := e.Evicted(); n != 0 {
		t.Fatalf("%d are gone, and there was room", n)
	}
	e.SetPolicy(compile(t, Config{}))
	for i := range 10 {
		start(maxChains + i)
	}
	if n := e.Evicted(); n < 10 {
		t.Errorf("%d are gone", n)
	}
}
