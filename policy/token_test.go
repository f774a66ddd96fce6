package policy

import (
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/event"
)

const foreignToken = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a0a"

// What follows when somebody asks with a token that was issued to another process of
// another service, by the setting.
func TestForeignToken(t *testing.T) {
	victim := event.NewIssuer(&event.Process{EntityID: "victim", PID: 80, Executable: "/opt/victim", UserID: "33", Unit: "victim.service"})
	set := func(a TokenAction) TokensConfig { return TokensConfig{Action: &a} }
	grants := func(own bool) []Grant {
		return []Grant{{Name: "app", Who: Who{Executable: OneOrMore{"/usr/bin/agent"}, Unit: "app.service"}, OwnToken: own, Owner: "x", Reason: "y"}}
	}
	inventory := func(ev *event.Event, _ *event.Process) {
		ev.Request.Class, ev.Request.Guarded = "inventory", false
	}
	for _, c := range []struct {
		name   string
		config Config
		change func(*event.Event, *event.Process)
		action string // of the match; "" without one
		denied bool
	}{
		{"nothing is set", Config{}, nil, "alert", false},
		{"off", Config{Tokens: set(TokenOff)}, nil, "", false},
		{"alert", Config{Tokens: set(TokenAlert)}, nil, "alert", false},
		{"block", Config{Tokens: set(TokenBlock)}, nil, "block", true},
		{"block, inventory", Config{Tokens: set(TokenBlock)}, inventory, "alert", false},
		{"block, nothing else built in", Config{Tokens: set(TokenBlock), Rules: RulesConfig{WithoutShipped: true}}, nil, "block", true},
		{"nothing is built in", Config{Rules: RulesConfig{WithoutShipped: true}}, nil, "", false},
		{"off, nothing built in", Config{Tokens: set(TokenOff), Rules: RulesConfig{WithoutShipped: true}}, nil, "", false},
		{"block, and the rule by itself only logs", Config{Tokens: set(TokenBlock), Rules: RulesConfig{Actions: map[string]RuleAction{
			foreignToken: {Classes: map[string]Action{"credentials": Log}}}}}, nil, "log", false},
		{"block, its own", Config{Tokens: set(TokenBlock)}, func(ev *event.Event, p *event.Process) {
			ev.Token.Issuers = []*event.Issuer{event.NewIssuer(p)}
		}, "", false},
		{"block, of its unit", Config{Tokens: set(TokenBlock)}, func(_ *event.Event, p *event.Process) { p.Unit = "victim.service" }, "", false},
		{"block, of its unit, in the scope of the process", Config{Tokens: func() TokensConfig {
			c := set(TokenBlock)
			c.Scope = event.ScopeProcess
			return c
		}()}, func(_ *event.Event, p *event.Process) { p.Unit = "victim.service" }, "block", true},
		{"block, of which nothing is known", Config{Tokens: set(TokenBlock)}, func(ev *event.Event, _ *event.Process) { ev.Token = event.Token{} }, "", false},
		{"block, no token", Config{Tokens: set(TokenBlock)}, func(ev *event.Event, _ *event.Process) {
			ev.Request.Token, ev.Request.Class, ev.Request.Guarded = false, "inventory", false
		}, "", false},
		{"block, root and root", Config{Tokens: set(TokenBlock)}, func(ev *event.Event, p *event.Process) {
			other := *victim
			other.UserID, p.UserID = "0", "0"
			ev.Token.Issuers = []*event.Issuer{&other}
		}, "", false},
		{"block, root in a container", Config{Tokens: set(TokenBlock)}, func(ev *event.Event, p *event.Process) {
			other := *victim
			other.UserID, p.UserID, p.Container = "0", "0", "c"
			ev.Token.Issuers = []*event.Issuer{&other}
		}, "block", true},
		{"block, granted", Config{Tokens: set(TokenBlock), Grants: grants(false)}, nil, "block", false},
		{"block, granted with its own token", Config{Tokens: set(TokenBlock), Grants: grants(true)}, nil, "block", true},
		{"alert, strict, granted with its own token", Config{Posture: Strict, Grants: grants(true)}, nil, "alert", true},
		{"strict, granted with its own token, which it is", Config{Posture: Strict, Grants: grants(true)}, func(ev *event.Event, p *event.Process) {
			ev.Token.Issuers = []*event.Issuer{event.NewIssuer(p)}
		}, "", false},
	} {
		for _, mode := range []Mode{Audit, Enforce} {
			c.config.Mode = mode
			ev := judge(NewEngine(compile(t, c.config)), asking("/usr/bin/agent", func(ev *event.Event, p *event.Process) {
				ev.Token.Issuers = []*event.Issuer{victim}
				if c.change != nil {
					c.change(ev, p)
				}
			}))
			m, _ := matched(ev, foreignToken)
			if m.Action != c.action || m.Alert != (c.action == "alert" || c.action == "block") {
				t.Errorf("%s: %v: match %+v, want %q", c.name, mode, m, c.action)
			}
			if denied := ev.Decision.WouldBe == event.Deny; denied != c.denied || mode == Enforce && ev.Decision.Verdict != ev.Decision.WouldBe {
				t.Errorf("%s: %v: %+v", c.name, mode, ev.Decision)
			}
		}
	}
}

// A foreign token says nothing of the process that a later request of its own would
// have to pay for.
func TestForeignTokenDoesNotLatch(t *testing.T) {
	block := TokenBlock
	e := NewEngine(compile(t, Config{Mode: Enforce, Tokens: TokensConfig{Action: &block}}))
	stolen := asking("/usr/bin/agent", func(ev *event.Event, _ *event.Process) {
		ev.Token.Issuers = []*event.Issuer{{EntityID: "victim", UserID: "33"}}
	})
	if judge(e, stolen); stolen.Decision.Verdict != event.Deny {
		t.Fatalf("%+v", stolen.Decision)
	}
	if own := judge(e, asking("/usr/bin/agent", nil)); own.Decision.Verdict != event.Allow {
		t.Errorf("%+v", own.Decision)
	}
}

// A host with another setting has another digest.
func TestTokensInDigest(t *testing.T) {
	alert, block := TokenAlert, TokenBlock
	var digests []string
	for _, c := range []TokensConfig{{}, {Action: &alert}, {Action: &block}, {Scope: event.ScopeParent}} {
		digests = append(digests, compile(t, Config{Tokens: c}).Digest)
	}
	slices.Sort(digests)
	if len(slices.Compact(digests)) != 4 {
		t.Error(strings.Join(digests, "\n"))
	}
}
