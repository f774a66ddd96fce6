package proxy

import (
	"testing"

	"github.com/imdsgate/imdsgate/attribution"
)

// What the cgroup says of a process is what its event says.
func TestProcessCgroup(t *testing.T) {
	c := attribution.Cgroup{Path: "/path", Unit: "unit", UserUnit: "user unit", Container: "container", Runtime: "runtime", Pod: "pod"}
	p := Process(&attribution.Process{Cgroup: c})
	if got := (attribution.Cgroup{Path: p.Cgroup, Unit: p.Unit, UserUnit: p.UserUnit, Container: p.Container, Runtime: p.Runtime, Pod: p.Pod}); got != c {
		t.Errorf("got  %+v\nwant %+v", got, c)
	}
}
