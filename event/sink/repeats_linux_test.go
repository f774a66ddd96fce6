package sink

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// counted is what a document says of repeats.
type counted struct {
	Event struct {
		ID, Dataset, Action string
		Start, End          string
	}
	URL      struct{ Path string }
	Imdsgate struct {
		Repeats struct {
			Requests, Connections int64
			Of                    string
		}
	}
}

func countedIn(t *testing.T, path string) (all []counted) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var c counted
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

// forms is what documents are, in short: "w" for a decision that is written, "c3" for one
// that tells of three, "n" for a connection, "a" for an alert, "s" for a start.
func forms(all []counted) string {
	var b strings.Builder
	for _, c := range all {
		switch n := c.Imdsgate.Repeats.Requests; {
		case strings.HasSuffix(c.Event.Dataset, "process"):
			b.WriteString("s")
		case strings.HasSuffix(c.Event.Dataset, "network"):
			b.WriteString("n")
		case c.Event.Dataset == "imdsgate.alert":
			b.WriteString("a")
		case n > 0:
			fmt.Fprintf(&b, "c%d", n)
		default:
			b.WriteString("w")
		}
	}
	return b.String()
}

// TestRepeats says which requests are counted, and which are written whatever was before.
func TestRepeats(t *testing.T) {
	host, start := asked().Host, time.Now()
	other := func(executable, unit string) []*event.Process {
		p := asked().Subjects[0]
		p.Executable, p.Unit, p.Start, p.Parent.Start = executable, unit, start, start
		return []*event.Process{p}
	}
	for _, c := range []struct {
		name   string
		change func(*event.Event) // of the later three of five
		want   string
	}{
		{"the same", func(e *event.Event) {
			e.Connection.Source, e.Duration = netip.AddrPortFrom(e.Connection.Source.Addr(), 4), time.Hour
		}, "wc4"},
		{"another path", func(e *event.Event) {
			e.Request.Path, e.Request.Target = "/latest/meta-data/ami-id", "/latest/meta-data/ami-id"
		}, "wwc1c2"},
		{"another class", func(e *event.Event) { e.Request.Class = "listing" }, "wwc1c2"},
		{"another method", func(e *event.Event) { e.Request.Method = "HEAD" }, "wwc1c2"},
		{"another status", func(e *event.Event) { e.Response.Status = 404 }, "wwc1c2"},
		{"another endpoint", func(e *event.Event) { e.Connection.Destination = e.Connection.Source }, "wwc1c2"},
		{"another program", func(e *event.Event) { e.Subjects = other("/usr/bin/wget", "") }, "wwc1c2"},
		{"another unit", func(e *event.Event) { e.Subjects = other("/usr/bin/curl", "other.service") }, "wwc1c2"},
		{"another grant", func(e *event.Event) { e.Decision.Grant = "g" }, "wwc1c2"},
		{"another key", func(e *event.Event) { e.Response.AccessKeyID = "ASIAEXAMPLE" }, "wwc1c2"},
		{"another holder", func(e *event.Event) {
			e.Subjects = append(e.Subjects, e.Subjects[0].Parent)
			e.Roles = []string{"connector", "holder"}
		}, "wwc1c2"},
		{"somebody else's token", func(e *event.Event) {
			e.Request.Token, e.Token.Issuers = true, []*event.Issuer{{EntityID: "thief", PID: 3}}
		}, "wwc1c2"},
		{"refused", func(e *event.Event) { e.Decision.Verdict, e.Decision.WouldBe = event.Deny, event.Deny }, "wwwwc1"},
		{"would be refused", func(e *event.Event) { e.Decision.WouldBe = event.Deny }, "wwwwc1"},
		{"malformed", func(e *event.Event) { e.Request.Malformed = "no request" }, "wwwwc1"},
		{"nobody known", func(e *event.Event) { e.Subjects, e.Roles = nil, nil }, "wwwwc1"},
		{"the start of a program", func(e *event.Event) { e.Starts = e.Subjects }, "wswswswc1"},
		{"an alert", func(e *event.Event) {
			e.Decision.Matches = []event.Match{{Rule: &event.Rule{ID: "r"}, Subject: e.Subjects[0], Alert: true}}
		}, "wwawawac1"},
		{"the end of a sequence", func(e *event.Event) {
			e.Decision.Matches = []event.Match{{Rule: &event.Rule{ID: "r"}, Subject: e.Subjects[0], Literal: true}}
		}, "wwwwc1"},
	} {
		path := filepath.Join(t.TempDir(), "events.ndjson")
		f := open(t, Options{Path: path, Aggregate: Window(time.Minute)})
		p := asked().Subjects
		for i := range 5 {
			e := asked()
			e.Host, e.Subjects = host, p
			if i > 1 {
				c.change(e)
			}
			f.Record(e)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if got := forms(countedIn(t, path)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// A window ends while nothing comes, and what comes then is written.
func TestWindow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, Aggregate: shortest})
	first := asked()
	first.Connection.First = true
	record := func(n int) {
		for i := range n {
			e := *first
			e.Time = first.Time.Add(time.Duration(i) * time.Second)
			f.Record(&e)
		}
	}
	record(4)
	deadline := time.Now().Add(10 * time.Second)
	for strings.Count(forms(countedIn(t, path)), "c") == 0 {
		if time.Now().After(deadline) {
			t.Fatalf("only %s", forms(countedIn(t, path)))
		}
		time.Sleep(20 * time.Millisecond)
	}
	record(2)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	all := countedIn(t, path)
	if got := forms(all); got != "nwc3nwc1" {
		t.Fatal(got)
	}
	clock := func(d time.Duration) string { return first.Time.Add(d).UTC().Format("2006-01-02T15:04:05.000Z") }
	if c := all[2]; c.Imdsgate.Repeats.Of != all[1].Event.ID || c.Imdsgate.Repeats.Connections != 3 || c.Event.Start != clock(time.Second) || c.Event.End != clock(3*time.Second) {
		t.Errorf("%+v after %+v", c, all[1])
	}
	if s := f.Stats(); s.Repeats != 4 || s.Written != 6 {
		t.Errorf("%+v", s)
	}
}

// Elastic's rules about its own agent get each connection.
func TestRepeatsForElastic(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, Aggregate: Window(time.Minute), Layout: event.Defend})
	e := asked()
	e.Host, e.Connection.First = &event.Host{ID: "h", Layout: event.Defend}, true
	for range 3 {
		again := *e
		f.Record(&again)
	}
	f.Close()
	if got := forms(countedIn(t, path)); got != "nwnnc2" {
		t.Error(got)
	}
}

// However many different requests there are, so many are remembered, and none is lost.
func TestRepeatsBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	f := open(t, Options{Path: path, Aggregate: Window(time.Hour), Queue: 1 << 14})
	e := asked()
	const different = maxAlike + 100
	for range 2 {
		for i := range different {
			one := *e
			one.Request.Path = fmt.Sprint("/latest/meta-data/", i)
			f.Record(&one)
			f.Record(&one)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	sum, whole := int64(0), 0
	for _, c := range countedIn(t, path) {
		if n := c.Imdsgate.Repeats.Requests; n > 0 {
			sum += n
		} else {
			whole++
		}
	}
	if sum+int64(whole) != 4*different || whole < different || len(f.repeats.known) != 0 || cap(f.repeats.order) > 4*maxAlike {
		t.Errorf("%d are counted and %d written, of %d; %d are remembered", sum, whole, 4*different, len(f.repeats.known))
	}
}

func TestWindowText(t *testing.T) {
	for text, want := range map[string]bool{"60s": true, "0s": true, "1h": true, "10ms": false, "2h": false, "-1s": false, "60": false, "soon": false} {
		var w Window
		if err := w.UnmarshalText([]byte(text)); (err == nil) != want {
			t.Errorf("%s: %v", text, err)
		}
	}
}
