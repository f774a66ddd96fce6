package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// A program that asks for the same again and again has one document for the first, and one
// for the others; what is new has its own, and so has what enforce mode would refuse.
func TestRepeats(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.startWith(gate.Settings{Config: "mode: audit\n", Spool: "aggregate: 1m"})
	const other = "/latest/meta-data/ami-id"
	script := fmt.Sprintf(`import urllib.request as u
for path in ["%s"] * 20 + ["%s", "%s"] + ["%s"] * 3:
    u.urlopen("http://169.254.169.254" + path).read()
`, instanceID, other, instanceID, role)
	if out, code := h.run(client{uid: ordinaryUser, args: []string{"/usr/bin/python3", "-c", script}}); code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
	h.decided(role, "")
	if out, code := h.imdsgate("status"); code != 0 || !strings.Contains(out, "requests that were like one that was written") {
		t.Errorf("%d, %s", code, out)
	}
	if code := h.Stop(); code != 0 {
		t.Fatalf("exit %d\n%s", code, h.Log())
	}
	docs, err := h.Documents()
	if err != nil {
		t.Fatal(err)
	}
	whole, counted, connections := map[any]int{}, map[any]float64{}, 0.0
	for _, d := range docs {
		if d.At("user.id") != fmt.Sprint(ordinaryUser) {
			continue
		}
		n, _ := d.At("imdsgate.repeats.requests").(float64)
		switch path := d.At("url.path"); d.At("data_stream.dataset") {
		case "imdsgate.network":
			connections++
		case "imdsgate.decision":
			if counted[path] += n; n == 0 {
				whole[path]++
			}
			c, _ := d.At("imdsgate.repeats.connections").(float64)
			connections += c
		}
	}
	for path, asked := range map[string]int{instanceID: 21, other: 1, role: 3} {
		if got := whole[path] + int(counted[path]); got != asked {
			t.Errorf("%s: %d written and %v counted, of %d", path, whole[path], counted[path], asked)
		}
	}
	// The first is a start of the program, the second the first of its kind. On a busy machine
	// some are of other kinds, such as what was answered before the client was known.
	if whole[instanceID] > 10 || whole[role] != 3 || connections != 25 {
		t.Errorf("written: %v, counted: %v, %v connections", whole, counted, connections)
	}
}
