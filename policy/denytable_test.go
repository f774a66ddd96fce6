package policy

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/imdsgate/imdsgate/event"
)

// TestDenyTable finds the same deny as who asks one after the other, of denies and
// processes of all kinds.
func TestDenyTable(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 6))
	of := func(all ...string) string { return all[r.IntN(len(all))] }
	file := func() string {
		return of("/usr/bin/curl", "/usr/bin/python3", "/opt/a/bin/app", "/opt/b/bin/app", "/opt/*/bin/app", "/opt/a/bin/*", "app", "")
	}
	unit := func() string { return of("", "web.service", "app@.service", "app@1.service", "run-u1.scope") }
	user := func() string { return of("", "0", "33", "www-data", "root") }
	container := func() string { return of("", "", "0123456789ab", "0123456789abcd", "0123456789ff", "feed") }
	seldom := func(text string) string {
		if r.IntN(2) == 0 {
			return ""
		}
		return text
	}
	process := func(parent, now *event.Process) *event.Process {
		return &event.Process{Executable: file(), Unit: unit(), UserUnit: seldom(unit()), UserID: user(), RealUserID: user(), SavedUserID: user(), UserName: user(),
			GroupID: user(), GroupName: user(), SupplementalGroups: []string{user(), user()}, Container: container(), Pod: of("", "p", "q"), Parent: parent, ParentNow: now}
	}
	found := map[bool]int{}
	for range 3000 {
		denies := make([]Deny, r.IntN(12))
		for i := range denies {
			d := &denies[i]
			d.Name = fmt.Sprint(i)
			d.Unit, d.User, d.Group, d.Parent, d.Container, d.Pod = seldom(unit()), seldom(user()), seldom(seldom(user())), seldom(seldom(file())), seldom(seldom(container())), seldom(seldom(of("p", "q")))
			for range r.IntN(3) {
				d.Executable = append(d.Executable, file())
			}
			if r.IntN(3) == 0 {
				d.Classes = []string{of("credentials", "inventory")}
			}
		}
		table := newDenyTable(denies)
		for range 10 {
			p := process(process(nil, nil), process(nil, nil))
			if r.IntN(8) == 0 {
				p = nil
			}
			ev := asking("/usr/bin/curl", nil)
			var want *Deny
			for i := range denies {
				if denies[i].covers(p, ev) {
					want = &denies[i]
					break
				}
			}
			if got := table.find(p, ev); got != want {
				t.Fatalf("%+v, want %+v, of %+v for %+v", got, want, denies, p)
			}
			found[want != nil]++
		}
	}
	if found[true] < 1000 || found[false] < 1000 {
		t.Errorf("%v", found)
	}
}
