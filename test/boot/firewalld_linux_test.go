package boot

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// stolen is what only a thief asks for: the same as role, by another name.
const stolen = "/2021-03-23/meta-data/iam/security-credentials/imdsgate-lab-role"

const granted = `mode: enforce
posture: strict
grants:
  - {name: granted, executable: /usr/bin/amazon-ssm-agent, user: root, classes: [token, listing, credentials], owner: x, reason: x}
`

// The real firewalld takes our rules away, with either of its back ends, when it starts,
// reloads and stops. They come back, whom a grant names goes on, and a thief gets something
// only while an event tells that the rules were not there.
func TestFirewalld(t *testing.T) {
	t.Run("nftables", func(t *testing.T) {
		t.Parallel()
		// A rule of its own would refuse what is redirected by IPv6.
		reloads(t, "FirewallBackend=nftables\n", "nft list chain inet firewalld filter_OUTPUT", true)
	})
	t.Run("iptables", func(t *testing.T) {
		t.Parallel()
		reloads(t, "FirewallBackend=iptables\nRFC3964_IPv4=no\n", "iptables -S IN_public", false)
	})
}

// reloads has firewalld do all that under load. loaded succeeds once its rules are there,
// and open is that it leaves IPv6 open.
func reloads(t *testing.T, conf, loaded string, open bool) {
	var mu sync.Mutex
	var thefts []time.Time
	m := boot(t, settings{config: granted, files: map[string]string{
		"/etc/systemd/system/multi-user.target.d/firewalld.conf": "[Unit]\nWants=firewalld.service\n",
		"/etc/firewalld/firewalld.conf":                          conf,
	}, lab: netlab.Options{IMDS: &imdstest.Config{Fault: func(r *imdstest.Request) imdstest.Fault {
		if r.Target == stolen {
			mu.Lock()
			defer mu.Unlock()
			thefts = append(thefts, time.Now())
		}
		return imdstest.Fault{}
	}}}})
	t.Logf("booted in %v; ready %v after firewalld said so", time.Since(m.Began).Round(time.Millisecond),
		m.monotonic("imdsgated.service", "ActiveEnterTimestamp")-m.monotonic("firewalld.service", "ActiveEnterTimestamp"))
	both := func() bool {
		_, code := m.Try("sh", "-c", loaded)
		return code == 0 && m.redirected()
	}
	m.Await("the rules of both", both)
	const lasts = 17 * time.Second
	load, thief := m.load(lasts, "-path", "/latest/meta-data/iam/security-credentials/", "-rate", "20"), m.loadOf("nobody", lasts, "-path", stolen, "-rate", "20")
	time.Sleep(time.Second)
	for _, command := range []string{"firewall-cmd --reload", "firewall-cmd --complete-reload", "systemctl restart firewalld"} {
		begin := time.Now()
		m.Do(strings.Fields(command)...)
		took := time.Since(begin)
		t.Logf("%s took %v; the rules were there %v after it", command, took.Round(time.Millisecond), m.Await("the rules of both", both).Round(time.Millisecond))
		time.Sleep(alone)
	}
	o, d := load(), thief()
	// What is under way when table nat goes is cut off, and at level 0 a busy host may have
	// no time to find out who asks.
	if o.Requests < 250 || o.Failed > o.Requests/50 {
		t.Errorf("who is granted: %+v", o)
	}
	if d.Requests < 250 || d.Requests-d.Failed > len(thefts) || len(thefts) > d.Requests/8 {
		t.Errorf("a thief: %+v, and %d requests reached the service", d, len(thefts))
	}
	told := m.windows()
	var together time.Duration
	for _, w := range told {
		together += w.end.Sub(w.begin)
	}
	if together > lasts/2 {
		t.Errorf("events tell that the rules were not there for %v in all: %v", together, told)
	}
	for _, at := range thefts {
		if !slices.ContainsFunc(told, func(w window) bool { return at.After(w.begin.Add(-heard)) && at.Before(w.end.Add(heard)) }) {
			t.Errorf("at %v a request reached the service; the rules were not there %v", at.UTC(), told)
		}
	}
	t.Logf("%d requests, %d failed (%s), the slowest took %v; of a thief's %d, %d reached the service, while the rules were not there %v",
		o.Requests, o.Failed, o.Error, o.Slowest.Round(time.Millisecond), d.Requests, len(thefts), told)
	m.truthful(open)
}

// alone is how long after a repair the next is not one of a contest, in which looks are
// farther apart.
const alone = 5 * time.Second

// heard is how late a busy host's daemon may hear of a change, and abort a connection of
// meanwhile after the repair.
const heard = 250 * time.Millisecond

// A window is a time.
type window struct{ begin, end time.Time }

func (w window) String() string {
	return fmt.Sprintf("for %v until %v", w.end.Sub(w.begin).Round(time.Millisecond), w.end.UTC().Format("15:04:05.000"))
}

// windows are when the rules were not there, as events tell. A hook that was given back is
// another matter.
func (m *machine) windows() (all []window) {
	m.T.Helper()
	for _, d := range m.Documents() {
		switch message, _ := d.At("message").(string); d.At("event.action") {
		case "redirect-rule-changed", "redirect-contested":
			if strings.Contains(message, "not in the plan") {
				continue
			}
			at, err := time.Parse(time.RFC3339Nano, d.At("@timestamp").(string))
			if err != nil || lasted(d) <= 0 {
				m.T.Errorf("%v: %v", err, d)
			}
			all = append(all, window{at.Add(-lasted(d)), at})
		}
	}
	return all
}

// truthful looks at what status and doctor say of a host with firewalld, once it is left
// alone: a hook is given back after some seconds, and until then doctor says so. open is
// that clients of this host get past by IPv6.
func (m *machine) truthful(open bool) {
	m.T.Helper()
	for end := time.Now().Add(m.Patience); ; {
		status, code := m.Try("imdsgate", "status")
		doctor, _ := m.Try("imdsgate", "doctor")
		if strings.HasPrefix(status, "protected") == !open && (code == 0) == !open && strings.Contains(status, "IPv4 host, IPv4 forwarded") &&
			strings.Contains(status, "IPv6 requests of this host's own processes do not come here") == open &&
			strings.Contains(doctor, "redirect-lock: ") == open && strings.Contains(doctor, "got-past: requests to fd00:ec2::254") == open &&
			!strings.Contains(doctor, "got-past: requests to 169.254.169.254") && !strings.Contains(doctor, "redirect-changed: ") {
			return
		}
		if time.Now().After(end) {
			m.T.Errorf("open by IPv6: %v; status, with exit %d, and doctor:\n%s\n%s", open, code, status, doctor)
			return
		}
	}
}
