package e2e

import (
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// Somebody has left a mistake in the configuration: the daemon goes on, and can be asked and
// steered as before.
func TestSteeredBesideAWrongConfiguration(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.startWith(gate.Settings{Config: "mode: enforce\n", Installed: true})
	if err := h.Write("mdoe: audit\n"); err != nil {
		t.Fatal(err)
	}
	operator := func(args ...string) (string, int) {
		cmd := h.Operator(h.gate.Command, args...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"status"}, 0, "protected: enforce mode"},
		{[]string{"mode", "set", "audit", "--for", "30m", "--reason", "INC-123"}, 0, "then enforce, as configured"},
		{[]string{"mode", "set", "enforce", "--reason", "INC-123 is solved"}, 0, "as configured"},
		{[]string{"decisions", "add", "deny", "--user", "1", "--for", "12h", "--reason", "INC-124"}, 0, "deny uid 1"},
		{[]string{"events"}, 0, "started in enforce mode"},
		{[]string{"explain", "--pid", "1"}, 0, "in enforce mode"},
		{[]string{"reload"}, 1, "config.yaml:1:1: "},
	} {
		out, code := operator(c.args...)
		if code != c.code || !strings.Contains(out, c.says) || !strings.Contains(out, "the configuration is wrong, which leaves open where the daemon listens") {
			t.Errorf("%v: %d, %s", c.args, code, out)
		}
	}
}
