package witness_test

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution/witness"
)

// Without CAP_PERFMON there is level 2 all the same. The verifier is stricter then.
func TestWithoutPerfmon(t *testing.T) {
	requireRoot(t)
	runtime.LockOSThread() // which ends with the test, and its capabilities with it
	var caps [2]unix.CapUserData
	for _, c := range []int{unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH} {
		caps[c/32].Effective |= 1 << (c % 32)
		caps[c/32].Permitted |= 1 << (c % 32)
	}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
		t.Fatal(err)
	}
	w, err := witness.Open(witness.Options{Cgroup: os.Getenv(inCgroup), Endpoints: endpoints, Mark: 0x1d5, Deny: true, DenyUncovered: true})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}
