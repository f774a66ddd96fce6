package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// reread gives what is written of a judged event back to be judged again.
func reread(t testing.TB, r *event.Reader, ev *event.Event) *event.Record {
	t.Helper()
	for _, v := range ev.Views() {
		if v.Document != event.RequestDecision {
			continue
		}
		v.ID, v.Sequence, v.Created = "01KAT", 1, ev.Time
		line := v.AppendJSON(nil)
		rec := new(event.Record)
		if err := r.Read(line, rec); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		return rec
	}
	t.Fatal("no decision is written")
	return nil
}

// secrets are arguments that documents do not have as they are, or at least look so.
func (r random) secrets(p *event.Process) {
	switch r.IntN(14) {
	case 0:
		p.Args = append(p.Args, "--password", "hunter22 -c http://169.254.169.254/")
	case 1:
		p.Args = append(p.Args, "-H", "X-aws-ec2-metadata-token: AQAEAOsWxG-s", "http://169.254.169.254/")
	case 2:
		p.Args = append(p.Args, strings.Repeat("x", 5000), "http://169.254.169.254/")
	case 3:
		p.Args = append(p.Args, slices.Repeat([]string{"-s"}, 80)...)
	}
	p.CommandLine = strings.Join(p.Args, " ")
	if r.IntN(20) == 0 {
		p.WorkingDir, p.Thread = "/srv/token=AQAEAOsWxG-s", "\xff"
	}
	if r.IntN(60) == 0 {
		p.Executable = "/opt/" + strings.Repeat("y", 4200)
	}
}

// TestRejudge judges events, writes them, reads them back and judges them again: the
// verdict and what it rests on are the same, or are said to be in doubt.
func TestRejudge(t *testing.T) {
	var certain, rule, verdict, denied, granted, several int
	for seed := range uint64(60) {
		r := newRandom(seed)
		var queries []string
		for range 1 + r.IntN(20) {
			queries = append(queries, r.rule())
		}
		c := Config{Posture: Posture(r.IntN(2)), Rules: RulesConfig{Paths: []string{ruleFiles(t, queries)}, WithoutShipped: true, Actions: map[string]RuleAction{}}}
		c.Tokens.Scope = event.TokenScope(r.IntN(3))
		alerts, err := Compile(c, classes)
		if err != nil {
			t.Fatal(err)
		}
		for _, own := range alerts.rules {
			if action := Block; r.IntN(3) > 0 && !own.alertsOnly {
				c.Rules.Actions[own.ID] = RuleAction{Action: &action, Classes: map[string]Action{"inventory": Action(r.IntN(3))}}
			}
		}
		for i := range r.IntN(20) {
			g := Grant{Name: fmt.Sprint("g", i), Owner: "o", Reason: "r",
				Who: Who{Executable: OneOrMore{r.pick("/usr/bin/", "/opt/") + r.pick("cron", "agent", "systemd")}, User: r.pick("0", "1000")}}
			if r.IntN(3) == 0 {
				g.Parent = r.pick("/usr/bin/cron", "/usr/bin/systemd")
			}
			if r.IntN(4) == 0 {
				g.Paths = []string{"/latest/meta-data/iam/**"}
			}
			if r.IntN(2) == 0 {
				g.OwnToken = true
			}
			c.Grants = append(c.Grants, g)
		}
		for i := range r.IntN(3) {
			c.Denies = append(c.Denies, Deny{Name: fmt.Sprint("d", i), Who: Who{Executable: OneOrMore{"/tmp/" + r.pick("cron", "agent")}, Parent: r.pick("", "/opt/bash")}, Reason: "r"})
		}
		p, err := Compile(c, classes)
		if err != nil {
			t.Fatal(err)
		}
		first, second, reader := NewEngine(p), NewEngine(p), event.NewReader()
		host, who := &event.Host{ID: "h", Version: "1"}, r.processes()
		for _, p := range who {
			p.RealUserID, p.SavedUserID = p.UserID, p.UserID
			if r.IntN(3) > 0 {
				p.RootOwned, p.HostVerified, p.Ancestry = true, true, birth
			}
			r.secrets(p)
		}
		var issuers []*event.Issuer
		for i := range 150 {
			ev := r.request(host, who, base.Add(time.Duration(i)*300*time.Millisecond))
			ev.Request.Class, ev.Attribution.Reason = r.pick("inventory", "credentials"), r.pick("", "why")
			ev.Attribution.Complete, ev.Attribution.Unawaited = r.IntN(4) > 0, r.IntN(4) == 0
			if r.IntN(30) == 0 {
				ev.Request.Malformed = "two hosts"
			}
			for range r.IntN(3) {
				if p := who[r.IntN(len(who))]; !slices.Contains(ev.Subjects, p) {
					ev.Subjects = append(ev.Subjects, p)
				}
			}
			for range len(ev.Subjects) {
				ev.Roles = append(ev.Roles, r.pick("connector", "holder"))
			}
			if ev.Request.Token && len(ev.Subjects) > 0 && r.IntN(2) == 0 {
				issuers = append(issuers, event.NewIssuer(ev.Subjects[0]))
				ev.Token.Issuers = issuers[r.IntN(len(issuers)):]
			}
			judge(first, ev)
			rec := reread(t, reader, ev)
			doubt := second.Rejudge(rec, false)
			got, want := &rec.Event.Decision, &ev.Decision
			if rec.Decision.WouldBe != want.WouldBe || rec.Decision.Grant != want.Grant || rec.Decision.Deny != want.Deny || (rec.Decision.Rule == nil) != (want.Rule == nil) {
				t.Fatalf("seed %d, request %d: read %+v, want %+v", seed, i, rec.Decision, *want)
			}
			switch doubt.About {
			case Nothing:
				certain++
			case TheRule:
				rule++
			case TheVerdict:
				verdict++
				continue
			}
			if got.WouldBe != want.WouldBe || got.Grant != want.Grant || got.Deny != want.Deny {
				t.Fatalf("seed %d, request %d: %v by grant %q, want %v by %q (doubt %v)\n%s", seed, i, got.WouldBe, got.Grant, want.WouldBe, want.Grant, doubt, want.Reason)
			}
			if doubt.About == Nothing && (got.Rule != want.Rule || got.Reason != want.Reason && !strings.Contains(want.Reason, "yyy")) {
				t.Fatalf("seed %d, request %d:\n%q, want\n%q", seed, i, got.Reason, want.Reason)
			}
			if len(ev.Subjects) > 1 {
				several++
			}
			if got.WouldBe == event.Deny {
				denied++
			}
			if got.Grant != "" {
				granted++
			}
		}
	}
	t.Logf("%d certain, %d by a rule in doubt, %d undecidable; %d denied, %d granted, %d of several subjects", certain, rule, verdict, denied, granted, several)
	if certain < 5000 || rule < 10 || verdict < 100 || denied < 1000 || granted < 100 || several < 1000 {
		t.Error("these events say little")
	}
}
