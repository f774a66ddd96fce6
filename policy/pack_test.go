package policy

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// TestPack reads testdata/rules/NAME.truth for each rule that is built in: lines "yes"
// and "no" with who asks, and what is not as in asking. They say whether the rule, as it
// is written, matches the one event. See described for the words. docs/rules.md has them all.
func TestPack(t *testing.T) {
	p := compile(t, Config{})
	documented, err := os.ReadFile("../docs/rules.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range p.Rules() {
		if name := strings.TrimSuffix(filepath.Base(r.File), ".toml"); !regexp.MustCompile(`(?m)^\|.*\b` + name + `\b`).Match(documented) {
			t.Errorf("docs/rules.md does not have %s in its table", name)
		}
		file := filepath.Join("testdata", "rules", strings.TrimSuffix(filepath.Base(r.File), ".toml")+".truth")
		data, err := os.ReadFile(file)
		if err != nil {
			t.Errorf("%s has no truth table: %v", r.File, err)
			continue
		}
		seen := map[string]bool{}
		line := 0
		for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
			line++
			verdict, rest, _ := strings.Cut(lines.Text(), " ")
			if verdict == "#" {
				continue
			}
			seen[verdict] = true
			ev, times, err := described(rest)
			if err != nil || verdict != "yes" && verdict != "no" {
				t.Fatalf("%s:%d: %q: %v", file, line, verdict, err)
			}
			e := NewEngine(p)
			for range times - 1 {
				before := *ev
				before.Decision = event.Decision{}
				judge(e, &before)
			}
			judge(e, ev)
			if m, _ := matched(ev, r.ID); m.Literal != (verdict == "yes") {
				t.Errorf("%s:%d: %s is %v", file, line, rest, m.Literal)
			}
		}
		if !seen["yes"] || !seen["no"] {
			t.Errorf("%s does not have both yes and no", file)
		}
	}
}

// What follows from a match of each rule that is built in, on a request for credentials.
func TestPackActions(t *testing.T) {
	blocks := []string{"evasive-target", "imdsv1", "odd-client", "odd-client-elsewhere", "shell-or-tool", "untrusted-executable"}
	for _, r := range compile(t, Config{}).rules {
		name := strings.TrimSuffix(filepath.Base(r.File), ".toml")
		want := Alert
		if slices.Contains(blocks, name) {
			want = Block
		}
		if name == "many-tokens" {
			want = Log
		}
		if got := r.on(&event.Request{Class: "credentials", Guarded: true}); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		if len(r.Warnings)+len(r.Notes)+len(r.Missing) > 0 || r.Ruleset == "" || r.Version == "" || r.Reference == "" || len(r.Threat) == 0 {
			t.Errorf("%s is not as complete as the others", name)
		}
	}
}

// Agents that a host cannot do without get what they ask for, and raise no alert.
func TestPackLetsAgentsBe(t *testing.T) {
	e := NewEngine(compile(t, Config{Mode: Enforce}))
	for _, who := range []string{
		`/usr/bin/amazon-ssm-agent parent=/usr/lib/systemd/systemd ua=aws-sdk-go/1.55`,
		`/snap/amazon-ssm-agent/7993/amazon-ssm-agent parent=/usr/lib/systemd/systemd ua=aws-sdk-go/1.55`,
		`/opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent parent=/usr/lib/systemd/systemd ua=aws-sdk-go/1.48`,
		`/usr/bin/kubelet parent=/usr/lib/systemd/systemd ua=aws-sdk-go-v2/1.30`,
		`/usr/libexec/amazon-ecs-init parent=/usr/lib/systemd/systemd ua=aws-sdk-go/1.50`,
		`/usr/bin/ecr-credential-provider parent=/usr/bin/kubelet ua=aws-sdk-go-v2/1.30`,
		`/usr/bin/s3fs parent=/usr/bin/mount ua=s3fs/1.93`,
	} {
		for _, what := range []string{"", " class=token method=PUT path=/latest/api/token", " class=inventory path=/latest/meta-data/instance-id", " after=1h"} {
			ev, _, err := described(who + what)
			if err != nil {
				t.Fatal(err)
			}
			judge(e, ev)
			for _, m := range ev.Decision.Matches {
				t.Errorf("%s%s: matches %s", who, what, m.Rule.Name)
			}
			if ev.Decision.Verdict != event.Allow {
				t.Errorf("%s%s: %s", who, what, ev.Decision.Reason)
			}
		}
	}
}

// described is an event for a line of a truth table: who asks (an executable, or
// "nobody", or "unknown" for a program that cannot be read), and words. In a value in
// quotes blanks separate, and ^ is a blank inside of one argument.
func described(line string) (ev *event.Event, times int, err error) {
	who, rest, _ := strings.Cut(line, " ")
	ev, times = asking(who, nil), 1
	p := ev.Subjects[0]
	switch who {
	case "nobody":
		ev.Subjects, ev.Attribution.Complete, ev.Attribution.Reason = nil, false, "no_holder"
	case "unknown":
		p.Executable, p.Name, p.Known = "", "", false
	}
	for rest = strings.TrimSpace(rest); rest != ""; rest = strings.TrimSpace(rest) {
		var word, value string
		word, rest, _ = strings.Cut(rest, " ")
		word, value, _ = strings.Cut(word, "=")
		if strings.HasPrefix(value, `"`) {
			more, after, _ := strings.Cut(value[1:]+" "+rest, `"`)
			value, rest = more, after
		}
		if word == "times" {
			if times, err = strconv.Atoi(value); err != nil {
				return nil, 0, err
			}
			continue
		}
		set, ok := words[word]
		if !ok {
			return nil, 0, fmt.Errorf("unknown word %q", word)
		}
		set(ev, p, value)
	}
	return ev, times, nil
}

var words = map[string]func(*event.Event, *event.Process, string){
	"args": func(_ *event.Event, p *event.Process, v string) {
		p.Args = strings.Fields(v)
		for i := range p.Args {
			p.Args[i] = strings.ReplaceAll(p.Args[i], "^", " ")
		}
		p.CommandLine = strings.Join(p.Args, " ")
	},
	"cwd": func(_ *event.Event, p *event.Process, v string) { p.WorkingDir = v },
	"parent": func(_ *event.Event, p *event.Process, v string) {
		if p.Parent = nil; v != "" {
			p.Parent = &event.Process{EntityID: "parent", PID: 2, Executable: v, Name: filepath.Base(v), Known: true}
		}
	},
	"ancestors": func(_ *event.Event, p *event.Process, v string) { // above the parent
		last := p.Parent
		for i, executable := range strings.Fields(v) {
			last.Parent = &event.Process{EntityID: fmt.Sprint("ancestor", i), PID: 1, Executable: executable, Name: filepath.Base(executable), Known: true}
			last = last.Parent
		}
	},
	"user":          func(_ *event.Event, p *event.Process, v string) { p.UserID = v },
	"container":     func(_ *event.Event, p *event.Process, _ string) { p.Container = "c0ffee" },
	"root_owned":    func(_ *event.Event, p *event.Process, v string) { p.RootOwned = v == "true" },
	"host_verified": func(_ *event.Event, p *event.Process, v string) { p.HostVerified = v == "true" },
	"loader":        func(_ *event.Event, p *event.Process, _ string) { p.Loader = true },
	"after": func(ev *event.Event, _ *event.Process, v string) { // its start, and the connection
		d, err := time.ParseDuration(v)
		if err != nil {
			panic(err)
		}
		ev.Connection.Accepted, ev.Time = base.Add(d), base.Add(d)
	},
	"to": func(ev *event.Event, _ *event.Process, v string) {
		ev.Connection.Destination = netip.MustParseAddrPort(v)
	},
	"kept": func(ev *event.Event, _ *event.Process, _ string) { ev.Connection.First = false },
	"class": func(ev *event.Event, _ *event.Process, v string) {
		ev.Request.Class = v
		ev.Request.Guarded = v == "credentials" || v == "user-data" || v == "identity-proof"
	},
	"path":        func(ev *event.Event, _ *event.Process, v string) { ev.Request.Path = v },
	"method":      func(ev *event.Event, _ *event.Process, v string) { ev.Request.Method = v },
	"ua":          func(ev *event.Event, _ *event.Process, v string) { ev.Request.UserAgent = v },
	"api":         func(ev *event.Event, _ *event.Process, v string) { ev.Request.Token = v == "v2" },
	"evasive":     func(ev *event.Event, _ *event.Process, _ string) { ev.Request.Evasive = true },
	"forwarded":   func(ev *event.Event, _ *event.Process, _ string) { ev.Request.Forwarded = true },
	"public_host": func(ev *event.Event, _ *event.Process, _ string) { ev.Request.HostIsOdd = true },
	"malformed": func(ev *event.Event, _ *event.Process, _ string) {
		ev.Request = event.Request{Malformed: "two readings"}
	},
	"token": func(ev *event.Event, p *event.Process, v string) { // to whom it was issued
		issuer := &event.Issuer{EntityID: "other", UserID: "33", Unit: "other.service"}
		switch v {
		case "own":
			issuer = event.NewIssuer(p)
		case "root":
			issuer.UserID = "0"
		}
		ev.Token.Issuers = []*event.Issuer{issuer}
	},
}
