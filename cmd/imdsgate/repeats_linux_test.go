package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/event/sink"
)

// written writes the same requests of a granted program as a daemon does that counts
// repeats, or does not, and returns the file: 100, in two minutes.
func written(t *testing.T, aggregate sink.Window) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f, err := sink.Open(sink.Options{Path: path, Aggregate: aggregate}, func() *event.Host { return &event.Host{ID: "h"} })
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	init := &event.Process{EntityID: "init", PID: 1, Start: at, Executable: "/usr/lib/systemd/systemd", Name: "systemd", UserID: "0", Known: true, HostVerified: true, RootOwned: true}
	p := &event.Process{EntityID: "backup", PID: 100, Start: at, Executable: "/usr/bin/python3", Name: "python3", Args: []string{"python3", "backup.py"}, CommandLine: "python3 backup.py",
		UserID: "0", RealUserID: "0", SavedUserID: "0", UserName: "root", Unit: "backup.service", Known: true, HostVerified: true, RootOwned: true, Ancestry: "birth", Parent: init}
	host := &event.Host{ID: "6f1c2b7a9d0e4c5f8a3b1d2e4f506172", Name: "ip-10-0-3-17"}
	for i := range 100 {
		ev := &event.Event{Host: host, Time: at.Add(time.Duration(i) * 1200 * time.Millisecond), Subjects: []*event.Process{p}, Roles: []string{"connector"},
			Connection: event.Connection{Source: netip.MustParseAddrPort("10.0.3.17:50000"), Destination: netip.MustParseAddrPort("169.254.169.254:80"), First: true, Accepted: at},
			Request: event.Request{Method: "GET", Target: "/latest/meta-data/iam/security-credentials/app", Path: "/latest/meta-data/iam/security-credentials/app",
				Class: "credentials", Guarded: true, HTTP: "1.1", Host: "169.254.169.254", Token: true, Version: "latest"},
			Attribution: event.Attribution{Level: "L2", Complete: true}, Response: event.Response{Status: 200, AccessKeyID: "ASIAEXAMPLE"},
			Decision: event.Decision{Mode: "audit", Grant: "backup", Reason: `grant "backup"`}}
		if i == 0 {
			ev.Starts = ev.Subjects
		}
		f.Record(ev)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestRepeats gets the same answers of events that were counted as of those that were
// written, and says of a document for how many it stands.
func TestRepeats(t *testing.T) {
	policies := files(t, map[string]string{"with.yaml": withGrant, "without.yaml": withoutGrant})
	without := filepath.Join(policies, "without.yaml")
	whole, counted := written(t, 0), written(t, sink.Window(time.Minute))
	command := func(args ...string) (string, int) {
		t.Helper()
		var out, errs bytes.Buffer
		code := run(context.Background(), args, &out, &errs)
		if errs.Len() > 0 {
			t.Errorf("%v: %s", args, &errs)
		}
		return out.String(), code
	}
	for _, args := range [][]string{
		{"replay", "--json", "--policy", without}, {"replay", "--json", "--policy", filepath.Join(policies, "with.yaml")},
		{"tune", "--json", "--config", without, "--min-days", "1"},
	} {
		var sums []any
		for _, file := range []string{whole, counted} {
			text, _ := command(append(args, file)...)
			var all map[string]any
			if err := json.Unmarshal([]byte(text), &all); err != nil {
				t.Fatalf("%v in %s", err, text)
			}
			delete(all, "other_documents")
			sums = append(sums, all)
		}
		a, b := withoutIDs(t, sums[0]), withoutIDs(t, sums[1])
		if a != b || !strings.Contains(a, "100") {
			t.Errorf("%v: of what was counted\n%s\nof what was written\n%s", args, b, a)
		}
	}
	found, _ := command("eql", "--json", `any where imdsgate.repeats.requests > 1`, counted)
	if n := strings.Count(found, `"repeats":{`); n != 1 {
		t.Fatalf("%d documents tell of repeats: %s", n, found)
	}
	var doc struct {
		Event    struct{ ID string }
		Imdsgate struct{ Repeats struct{ Requests int } }
	}
	if err := json.Unmarshal([]byte(found), &doc); err != nil || doc.Imdsgate.Repeats.Requests != 98 { // beside the start, and the first after it
		t.Fatalf("%v, %+v", err, doc)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"events", counted}, "allowed GET /latest/meta-data/iam/security-credentials/app for python3 (pid 100, uid 0), 98 times more"},
		{[]string{"explain", "--event", doc.Event.ID, counted, "--config", without}, "it stands for 98 requests from 2026-11-26T08:00:02.4Z on"},
	} {
		if out, _ := command(c.args...); !strings.Contains(out, c.want) {
			t.Errorf("%v: no %q in %s", c.args, c.want, out)
		}
	}
}

// withoutIDs is an answer without what names single documents.
func withoutIDs(t *testing.T, of any) string {
	t.Helper()
	var strip func(any)
	strip = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			delete(v, "event_ids")
			for _, one := range v {
				strip(one)
			}
		case []any:
			for _, one := range v {
				strip(one)
			}
		}
	}
	strip(of)
	text, err := json.Marshal(of)
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`\b01[0-9A-Z]{24}\b`).ReplaceAllString(string(text), "ID")
}
