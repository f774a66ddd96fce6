package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/attribution/witness"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/policy"
)

// recorder is a daemon that records events, and returns the file in which they are after
// it was closed.
func recorder(t *testing.T) (*daemon, func() string) {
	t.Helper()
	d := &daemon{engine: policy.NewEngine(new(policy.Policy))}
	d.host.Store(new(event.Host))
	path := filepath.Join(t.TempDir(), "events.ndjson")
	var err error
	if d.spool, err = sink.Open(sink.Options{Path: path}, d.host.Load); err != nil {
		t.Fatal(err)
	}
	return d, func() string {
		t.Helper()
		if err := d.spool.Close(); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
}

// What the kernel sees while the finder is opened is recorded with what it has told.
func TestSightedEarly(t *testing.T) {
	d, recorded := recorder(t)
	d.sighted(witness.Sighting{Kind: witness.Marked, Connector: attribution.Connector{
		Actor: attribution.Actor{PID: 4711, UID: 48, Start: 1}, Comm: "early",
		Tuple: diag.Tuple{Remote: netip.MustParseAddrPort("169.254.169.254:80")},
	}})
	if text := recorded(); !strings.Contains(text, "early (pid 4711, uid 48) connected to 169.254.169.254:80 with the mark of the daemon") {
		t.Error(text)
	}
}
