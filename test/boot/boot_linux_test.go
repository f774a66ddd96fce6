package boot

import (
	"testing"
	"time"
)

const (
	instanceID = "/latest/meta-data/instance-id"
	role       = "/latest/meta-data/iam/security-credentials/imdsgate-lab-role"
)

func config(mode string) string {
	return "mode: " + mode + "\nprofiles: [cloud-init, amazon-ssm-agent]\n"
}

// At the first boot the gate is there before anybody can ask, and those that the boot
// needs get what they ask for, in both modes.
func TestFirstBoot(t *testing.T) {
	for _, mode := range []string{"audit", "enforce"} {
		m := boot(t, settings{config: config(mode)})
		begun, ready := m.monotonic("imdsgated.service", "ExecMainStartTimestamp"), m.monotonic("imdsgated.service", "ActiveEnterTimestamp")
		t.Logf("%s: booted in %v, of which the start of the daemon took %v", mode, time.Since(m.began).Round(time.Millisecond), ready-begun)
		if first := m.monotonic("cloud-init-local.service", "ExecMainStartTimestamp"); first < ready {
			t.Errorf("%s: cloud-init began %v before the daemon was ready", mode, ready-first)
		}
		if pre := m.monotonic("network-pre.target", "ActiveEnterTimestamp"); pre < ready {
			t.Errorf("%s: the network was made %v before the daemon was ready", mode, ready-pre)
		}
		for _, unit := range []string{"cloud-init-local.service", "amazon-ssm-agent.service"} {
			if got := m.property(unit, "Result"); got != "success" || m.property(unit, "ActiveState") != "active" {
				t.Errorf("%s: %s: %s\n%s", mode, unit, got, m.do("journalctl", "--no-pager", "-u", unit, "-u", "imdsgated"))
			}
		}
		if got := m.do("cat", "/run/user-data"); len(got) == 0 {
			t.Errorf("%s: cloud-init got no user data", mode)
		}
		m.event("self-test-passed")
		want := map[string]string{"audit": "200", "enforce": "403"}[mode]
		if got := m.curl("nobody", role); got != want {
			t.Errorf("%s: a thief got %s", mode, got)
		}
		t.Logf("%s", m.do("imdsgate", "status"))
	}
}
