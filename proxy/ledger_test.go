package proxy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

func got(key string, to *event.Process, d event.Decision) *event.Event {
	ev := &event.Event{Connection: event.Connection{Source: netip.MustParseAddrPort("172.17.0.2:40000")}, Decision: d,
		Response: event.Response{AccessKeyID: key, Expiration: fixedStart.Add(time.Hour)}}
	if to != nil {
		ev.Subjects, ev.Roles = []*event.Process{to}, []string{"connector"}
	}
	return ev
}

// One line for each program and key, and for what policy said of it.
func TestLedger(t *testing.T) {
	p := &Proxy{ledger: newLedger()}
	me := owner{known: true, uid: 1000}
	one := &event.Process{EntityID: "one", PID: 1, Executable: "/opt/app", UserID: "1000", UserName: "app", Unit: "app.service", Cgroup: "/system.slice/app.service"}
	again := &event.Process{EntityID: "one", PID: 1, Executable: "/usr/bin/curl", UserID: "1000", Cgroup: "/"}
	rule := &event.Rule{ID: "rule", Name: "A rule"}
	now := fixedStart
	add := func(ev *event.Event) {
		now = now.Add(time.Second)
		p.ledger.add(me, ev, now)
	}
	for range 3 {
		add(got("ASIA1", one, event.Decision{Grant: "app", Reason: strings.Repeat("x", 1000)}))
	}
	add(got("ASIA1", again, event.Decision{WouldBe: event.Deny, Rule: rule, Matches: make([]event.Match, 3)}))
	add(got("ASIA2", nil, event.Decision{}))
	add(got("", one, event.Decision{})) // a part
	all, forgotten := p.Issued("")
	if len(all) != 4 || forgotten != 0 || all[0].AccessKeyID != "" || all[1].AccessKeyID != "ASIA2" || len(all[1].To) != 0 || all[1].Source.String() != "172.17.0.2" {
		t.Fatalf("%d lines, %d forgotten: %+v", len(all), forgotten, all)
	}
	lines, _ := p.Issued("ASIA1")
	if len(lines) != 2 {
		t.Fatalf("%+v", lines)
	}
	if l := lines[0]; l.To[0].Executable != "/usr/bin/curl" || l.To[0].User != "1000" || l.To[0].Unit != "/" || l.Decision.Rule != rule || l.Decision.Matches != nil {
		t.Errorf("%+v", l)
	}
	if l := lines[1]; l.Count != 3 || !l.First.Equal(fixedStart.Add(time.Second)) || !l.Last.Equal(fixedStart.Add(3*time.Second)) ||
		l.To[0] != (Recipient{"connector", "one", 1, "/opt/app", "app", "app.service"}) || len(l.Decision.Reason) != maxLedgerText {
		t.Errorf("%+v", l)
	}
	if lines, _ := p.Issued("ASIA"); len(lines) != 0 {
		t.Errorf("of a part of an id: %+v", lines)
	}
}

// Who asks again and again does not push out his own line; and who starts many
// programs pushes out none of another user's.
func TestLedgerFlood(t *testing.T) {
	p := &Proxy{ledger: newLedger()}
	victim := &event.Process{EntityID: "victim", Executable: "/opt/app"}
	p.ledger.add(owner{known: true, uid: 33}, got("ASIA1", victim, event.Decision{}), fixedStart)
	thief := &event.Process{EntityID: "thief", Executable: "/tmp/x"}
	for range 2 * maxIssuances {
		p.ledger.add(owner{known: true, uid: 4321}, got("ASIA1", thief, event.Decision{}), fixedStart)
	}
	if lines, forgotten := p.Issued(""); len(lines) != 2 || forgotten != 0 {
		t.Errorf("%d lines, %d forgotten", len(lines), forgotten)
	}
	for n := range 2 * maxIssuances {
		thief := &event.Process{EntityID: fmt.Sprint(n), Executable: "/" + strings.Repeat("x", 4096)}
		p.ledger.add(owner{known: true, uid: 4321}, got("ASIA1", thief, event.Decision{}), fixedStart)
	}
	lines, forgotten := p.Issued("")
	if len(lines) != maxIssuances-maxIssuances/4 || forgotten == 0 {
		t.Errorf("%d lines, %d forgotten", len(lines), forgotten)
	}
	kept := false
	for _, l := range lines {
		kept = kept || l.To[0].EntityID == "victim"
		if len(l.To[0].Executable) > maxLedgerText {
			t.Fatalf("a name of %d bytes", len(l.To[0].Executable))
		}
	}
	if !kept {
		t.Error("another user's line was forgotten")
	}
}
