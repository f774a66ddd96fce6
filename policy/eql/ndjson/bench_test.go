package ndjson_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

var roles = ndjson.Roles{Category: "event.category", Timestamp: "@timestamp", Tiebreaker: "event.sequence"}

// input is an input in memory, which can be read again.
func input(name string, text []byte) ndjson.Input {
	return ndjson.Input{Name: name, Size: int64(len(text)), Open: func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(text)), nil
	}}
}

// recorded appends the documents of one process that starts and asks, as our encoder
// writes them.
func recorded(b []byte, i int, at time.Time, name string, destination netip.AddrPort) []byte {
	host := &event.Host{ID: "ec2f0a1b2c3d4e5f60718293a4b5c6d7", Name: "ip-172-31-0-10", BootID: "0e0c9c1c-5c7c-4e1e-9b0e-6f1f2a3b4c5d",
		Architecture: "x86_64", Kernel: "6.1.112-122.189.amzn2023.x86_64", OSName: "Amazon Linux", OSVersion: "2023", OSPlatform: "amzn", Version: "1"}
	parent := &event.Process{EntityID: fmt.Sprintf("parent-%d", i), PID: 4700, Start: at.Add(-time.Hour), Executable: "/usr/bin/bash", Name: "bash",
		Args: []string{"bash"}, CommandLine: "bash", WorkingDir: "/var/www", UserID: "48", RealUserID: "48", SavedUserID: "48", Known: true}
	p := &event.Process{EntityID: fmt.Sprintf("process-%d", i), PID: 4711, Start: at, Executed: at, Executable: "/usr/bin/" + name, Name: name,
		Args: []string{name, "-s", "http://169.254.169.254/latest/"}, CommandLine: name + " -s http://169.254.169.254/latest/",
		WorkingDir: "/var/www", UserID: "48", RealUserID: "48", SavedUserID: "48", UserName: "apache", Unit: "httpd.service",
		Cgroup: "/system.slice/httpd.service", Known: true, Ancestry: "birth", Parent: parent}
	if name != "curl" { // nothing for the rules
		p.Args, p.CommandLine = []string{name, "--daemon"}, name+" --daemon"
	}
	e := &event.Event{Host: host, Time: at.Add(2 * time.Millisecond), Subjects: []*event.Process{p}, Roles: []string{"connector"},
		Connection: event.Connection{Source: netip.MustParseAddrPort("172.31.0.10:49152"),
			Destination: destination, First: true, Accepted: at.Add(time.Millisecond)}}
	for n, document := range []event.Document{event.ProcessStart, event.ConnectionAttempt} {
		v := event.View{Event: e, Document: document, Subject: p, ID: fmt.Sprintf("01JDHZ-%d-%d", i, n), Sequence: uint64(2*i + n + 1), Created: at}
		b = append(v.AppendJSON(b), '\n')
	}
	return b
}

// seed is the rule of 2025-02-04 as we ship it.
func seed(t testing.TB) *syntax.Query {
	return shipped(t, "../../rules/odd-client.toml")
}

// BenchmarkSearch runs the seed rule over programs that start and connect. Every
// connection to the service matters to the rule, and has to be kept.
func BenchmarkSearch(b *testing.B) {
	for _, c := range []struct {
		name        string
		destination string
	}{{"half of the lines matter", "169.254.169.254:80"}, {"one of a hundred matters", "10.0.0.5:443"}} {
		b.Run(c.name, func(b *testing.B) { benchmarkSearch(b, netip.MustParseAddrPort(c.destination)) })
	}
}

func benchmarkSearch(b *testing.B, destination netip.AddrPort) {
	var text []byte
	const lines = 20_000
	matches := uint64(0)
	at := time.Date(2026, 11, 25, 16, 0, 0, 0, time.UTC)
	for i := range lines / 2 {
		name, to := "httpd", destination
		if i%100 == 0 {
			name, to = "curl", netip.MustParseAddrPort("169.254.169.254:80")
			matches++
		}
		text = recorded(text, i, at.Add(time.Duration(i)*10*time.Millisecond), name, to)
	}
	tree := seed(b)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		search := ndjson.Search{Query: tree, Schema: policy.Schema(), Roles: roles, Inputs: []ndjson.Input{input("events", text)}}
		plan, err := search.Plan(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		sum, err := plan.Run(context.Background())
		if err != nil || sum.Events != lines || sum.Matches != matches {
			b.Fatalf("%+v, %v", sum, err)
		}
	}
	b.ReportMetric(lines*float64(b.N)/b.Elapsed().Seconds(), "lines/s")
	b.ReportMetric(float64(len(text))/lines, "B/line")
}

func shipped(t testing.TB, path string) *syntax.Query {
	src, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var f struct{ Rule struct{ Query string } }
	if err := toml.Unmarshal(src, &f); err != nil {
		t.Fatal(err)
	}
	tree, err := syntax.Parse(path, f.Rule.Query)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// BenchmarkDecode is one line by itself.
func BenchmarkDecode(b *testing.B) {
	line := recorded(nil, 0, time.Date(2026, 11, 25, 16, 0, 0, 0, time.UTC), "httpd", netip.MustParseAddrPort("10.0.0.5:443"))
	line, _, _ = bytes.Cut(line, []byte("\n"))
	decode := ndjson.NewDecode(seed(b), policy.Schema(), roles)
	b.SetBytes(int64(len(line)))
	b.ReportAllocs()
	for b.Loop() {
		if err := decode(line); err != nil {
			b.Fatal(err)
		}
	}
}
