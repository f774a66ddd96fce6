package sink

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
)

// asked is a request as ordinary hosts have it, from a process of which documents were
// written before.
func asked() *event.Event {
	parent := &event.Process{EntityID: "parent", PID: 4710, Start: time.Now(), Name: "bash", Executable: "/usr/bin/bash", Known: true}
	p := &event.Process{EntityID: "subject", PID: 4711, Start: time.Now(), Name: "curl", Executable: "/usr/bin/curl",
		Args: []string{"curl", "-s", "http://169.254.169.254/latest/meta-data/instance-id"}, UserID: "48", UserName: "apache", Known: true, Parent: parent}
	p.CommandLine = strings.Join(p.Args, " ")
	return &event.Event{Host: &event.Host{ID: "host", Name: "ip-10-0-0-1"}, Time: time.Now(), Subjects: []*event.Process{p}, Roles: []string{"connector"},
		Connection: event.Connection{Source: netip.MustParseAddrPort("10.0.3.17:49812"), Destination: netip.MustParseAddrPort("169.254.169.254:80"), Accepted: time.Now()},
		Request:    event.Request{Method: "GET", Target: "/latest/meta-data/instance-id", Path: "/latest/meta-data/instance-id", Class: "inventory", HTTP: "1.1"},
		Response:   event.Response{Status: 200, Bytes: 19},
		Decision:   event.Decision{Mode: "audit"},
	}
}

// BenchmarkFile is what a request costs beside the client: the documents, with what the
// disk takes of them. First is of a connection that is new, Start of a process that is.
func BenchmarkFile(b *testing.B) {
	for _, c := range []struct {
		name   string
		change func(*event.Event)
	}{
		{"Kept", func(*event.Event) {}},
		{"First", func(e *event.Event) { e.Connection.First = true }},
		{"Start", func(e *event.Event) { e.Connection.First, e.Starts = true, e.Subjects }},
	} {
		b.Run(c.name, func(b *testing.B) {
			f := &File{enc: newEncoder()}
			w := &writer{path: filepath.Join(b.TempDir(), "events.ndjson"), maxSize: 100 << 20, keep: 1, counts: &f.counts}
			if err := w.open(); err != nil {
				b.Fatal(err)
			}
			e := asked()
			c.change(e)
			b.ReportAllocs()
			for b.Loop() {
				f.add(e)
				f.write(w)
			}
			if err := w.close(); err != nil || f.failed.Load() > 0 {
				b.Fatal(fmt.Errorf("%w, %d documents failed", err, f.failed.Load()))
			}
		})
	}
}

// BenchmarkRepeats is what a request costs that is counted, and not written.
func BenchmarkRepeats(b *testing.B) {
	f := &File{enc: newEncoder(), repeats: newRepeats(longest)}
	e := asked()
	b.ReportAllocs()
	for b.Loop() {
		f.take(e)
	}
	if len(f.rendered.ends) != 1 {
		b.Fatalf("%d documents", len(f.rendered.ends))
	}
}
