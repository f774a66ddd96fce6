package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const firstSeenClient = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a0d"

// A program that asks for the first time raises an alert, once, and not again after a
// restart; nor does a file that is damaged keep the daemon from its work.
func TestFirstSeen(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.start("")
	path := h.FirstSeen()
	ask := func(path string, alert bool) {
		t.Helper()
		if got := h.curl(client{uid: ordinaryUser}, path); got != "200" {
			t.Errorf("%s: %s", path, got)
		}
		matched, _ := h.decided(path, "curl").At("imdsgate.matched").([]any)
		found := false
		for _, id := range matched {
			found = found || id == firstSeenClient
		}
		if found != alert {
			t.Errorf("%s: seen for the first time: %v", path, found)
		}
	}
	ask("/latest/meta-data/instance-id", true)
	ask("/latest/meta-data/ami-id", false)
	if s, err := h.Status(); err != nil || s.FirstSeen.Path != path || s.FirstSeen.Terms != 1 || s.FirstSeen.Error != "" {
		t.Errorf("%v, %+v", err, s.FirstSeen)
	}
	stop := func() {
		t.Helper()
		if code := h.Stop(); code != 0 {
			t.Fatalf("exit %d\n%s", code, h.Log())
		}
	}
	stop()
	h.startWith(gate.Settings{Dir: h.Dir})
	ask("/latest/meta-data/hostname", false)
	stop()
	if err := os.WriteFile(path, []byte(strings.Repeat("damage", 10_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	h.startWith(gate.Settings{Dir: h.Dir})
	ask("/latest/meta-data/local-ipv4", true)
	if out, _ := h.imdsgate("status"); !strings.Contains(out, "first seen") || !strings.Contains(h.Log(), "is not kept beyond a restart") {
		t.Errorf("%s\n%s", out, h.Log())
	}
}
