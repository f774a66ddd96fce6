package gate

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/attribution"
)

const unit = "../../packaging/systemd/imdsgated.service"

// exposure is ten times what systemd-analyze may find at most, with the capabilities of
// every level.
const exposure = "25"

func TestExposure(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		const missing = "needs systemd-analyze (package systemd)"
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	out, err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold="+exposure, unit).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// setting returns the words of a setting that the unit has once.
func setting(t *testing.T, name string) []string {
	t.Helper()
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	var values []string
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+"="); ok {
			values = append(values, value)
		}
	}
	if len(values) != 1 {
		t.Fatalf("%s is there %d times", name, len(values))
	}
	return strings.Fields(values[0])
}

// The tests of the daemon run it with what it has in the field.
func TestCapabilitiesAreTheUnits(t *testing.T) {
	ours := []string{}
	for level := attribution.Level0; level <= attribution.Level3; level++ {
		for name := range strings.SplitSeq(strings.Trim(capabilities[level], ","), ",") {
			if name != "" && name != "+net_bind_service" { // the socket unit opens the ports
				ours = append(ours, "CAP_"+strings.ToUpper(strings.TrimPrefix(name, "+")))
			}
		}
	}
	for _, name := range []string{"AmbientCapabilities", "CapabilityBoundingSet"} {
		if units := setting(t, name); !slices.Equal(ours, units) {
			t.Errorf("%s of the unit is %v, and the tests give %v", name, units, ours)
		}
	}
	for file, capability := range map[string]string{
		"../../packaging/apparmor/imdsgated":  `(?m)^  capability (\w+),$`,
		"../../packaging/selinux/imdsgate.te": `(?m)^allow imdsgated_t self:capability2? \{ (.*) \};$`,
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var theirs []string
		for _, m := range regexp.MustCompile(capability).FindAllStringSubmatch(string(text), -1) {
			for name := range strings.FieldsSeq(m[1]) {
				theirs = append(theirs, "CAP_"+strings.ToUpper(name))
			}
		}
		if !slices.Equal(slices.Sorted(slices.Values(ours)), slices.Sorted(slices.Values(theirs))) {
			t.Errorf("%s has %v, and the unit gives %v", file, theirs, ours)
		}
	}
}
