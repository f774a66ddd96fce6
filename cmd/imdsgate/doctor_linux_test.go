package main

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
)

// No machine but EC2's has the counter, so the daemon that says so is one of the test's.
func TestDoctorOfTheThrottled(t *testing.T) {
	var exceeded *uint64
	ln, err := control.Listen(filepath.Join(t.TempDir(), "control.sock"), -1)
	if err != nil {
		t.Fatal(err)
	}
	s := control.Serve(ln, map[string]control.Route{"status": {Answer: func(context.Context, control.Question) (any, error) {
		return report.Status{Requests: report.Requests{LinkLocalExceeded: exceeded}}, nil
	}}})
	defer s.Close()
	client := control.NewClient(ln.Addr().String())
	message := func() string {
		var d diagnosis
		if _, running := d.ofStatus(t.Context(), client); !running {
			t.Fatalf("%+v", d)
		}
		for _, f := range d.Findings {
			if f.ID == "linklocal-throttled" {
				return f.Message
			}
		}
		return ""
	}
	for _, n := range []*uint64{nil, new(uint64(0))} {
		exceeded = n
		if m := message(); m != "" {
			t.Errorf("nothing was dropped: %s", m)
		}
	}
	exceeded = new(uint64(3))
	if m := message(); !strings.Contains(m, "dropped 3 packets") {
		t.Errorf("%q", m)
	}
}
