package witness

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// A check that was interrupted leaves its connection in the backlog, and the next ones
// must not take it for their own.
func TestCheckAfterInterrupted(t *testing.T) {
	labtest.RequireRoot(t)
	// Of the tests alone: see main_linux_test.go.
	w, err := Open(Options{Endpoints: []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80")}, Cgroup: os.Getenv("WITNESS_TEST_CGROUP")})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, ln := range w.probe.listeners {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for range 2 {
		if err := w.Check(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
