package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/policy/replay"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// What the daemon has recorded in audit mode says what enforce mode would do: with the
// same policy, and with one that lacks the grant of the program that needs it. Then
// enforce mode does that.
func TestReplay(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	sdk := h.install(h.sdk)
	strict, granted := "posture: strict\n", grant(sdk, ordinaryUser)
	h.start("mode: audit\n" + strict + granted)
	if out, code := h.run(client{uid: ordinaryUser, args: []string{sdk}}); code != 0 {
		t.Fatalf("%d, %s", code, out)
	}
	if got := h.curl(client{uid: ordinaryUser}, role, "-H", "X-aws-ec2-metadata-token: "+h.token()); got != "200" {
		t.Fatalf("curl got %s", got)
	}
	ran := h.decided(role, "sdkclient")
	stolen := h.decided(role, "curl")

	without := filepath.Join(t.TempDir(), "without.yaml")
	if err := os.WriteFile(without, []byte("mode: enforce\n"+strict), 0o644); err != nil {
		t.Fatal(err)
	}
	try := func(want int, args ...string) (d replay.Diff) {
		t.Helper()
		out, code := h.run(client{args: append([]string{h.gate.Command, "replay", "--json"}, append(args, h.Events)...)})
		if err := json.Unmarshal([]byte(out), &d); err != nil || code != want {
			t.Fatalf("%v: %d, %v\n%s", args, code, err, out)
		}
		return d
	}
	if d := try(0, "--config", h.Config); d.Opened.Requests+d.Undecided.Requests != 0 || d.Still.Requests == 0 || d.Requests < 4 {
		t.Errorf("the same policy: %+v", d)
	}
	if d := try(1, "--config", h.Config, "--actual"); len(d.New.Groups) != 1 || d.New.Groups[0].Executable != "/usr/bin/curl" {
		t.Errorf("enforced: %+v", d.New)
	}
	d := try(1, "--policy", without)
	if d.Opened.Requests+d.Undecided.Requests != 0 {
		t.Errorf("without the grant: %+v", d)
	}
	for _, g := range d.New.Groups {
		if g.Executable != sdk || g.Class != "credentials" || g.Before.Name != "app" || g.Passed != true {
			t.Errorf("without the grant: %+v", g)
		}
	}
	if len(d.New.Groups) == 0 {
		t.Error("without the grant nothing breaks")
	}

	id := func(d gate.Document) string { s, _ := d.At("event.id").(string); return s }
	out, code := h.run(client{args: []string{h.gate.Command, "explain", "--config", without, "--event", id(ran), h.Events}})
	if code != 0 || !strings.Contains(out, "DENY in enforce mode by this policy: posture strict") || !strings.Contains(out, "granted by app") {
		t.Errorf("%d\n%s", code, out)
	}
	if out, code := h.imdsgate("explain", "--exit-code", "--event", id(stolen), h.Events); code != 1 || !strings.Contains(out, "DECIDES") {
		t.Errorf("%d\n%s", code, out)
	}

	if err := h.Write("mode: enforce\n" + strict); err != nil {
		t.Fatal(err)
	}
	if out, code := h.imdsgate("reload"); code != 0 {
		t.Fatalf("%d, %s", code, out)
	}
	if out, code := h.run(client{uid: ordinaryUser, args: []string{sdk}}); code == 0 {
		t.Errorf("replay said that it would be refused: %s", out)
	}
}
