package boot

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/debian"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const (
	instanceID = "/latest/meta-data/instance-id"
	role       = "/latest/meta-data/iam/security-credentials/imdsgate-lab-role"
)

func config(mode string) string {
	return "mode: " + mode + "\nprofiles: [cloud-init, amazon-ssm-agent]\n"
}

// ec2 has cloud-init take the machine for an instance of Xen's, since in a container it
// believes no DMI; in /sys itself nobody can make a file. Names are looked up at nobody, so
// that no look-up waits. It gives its lease up, and the distribution has another. asks is
// the unit in which it asks.
func ec2() (files map[string]string, asks string) {
	asks, stages := "cloud-init-local", "init --local"
	if _, err := os.Stat(filepath.Join(image.Tree, "root/usr/lib/systemd/system/cloud-init-main.service")); err == nil {
		asks, stages = "cloud-init-main", "--all-stages" // from 24.3 on
	}
	return map[string]string{
		"/etc/cloud/cloud.cfg.d/99_ec2.cfg": "datasource_list: [Ec2]\nnetwork: {config: disabled}\nlocale: false\nssh_genkeytypes: []\n",
		"/etc/resolv.conf":                  "nameserver 127.0.0.1\n",
		"/etc/xen/hypervisor/uuid":          "ec2a1b2c-0123-4567-89ab-0123456789ab\n",
		"/etc/systemd/system/" + asks + ".service.d/xen.conf": "[Service]\nExecStart=\n" +
			"ExecStart=unshare --mount -- sh -ec 'mount -t overlay overlay -o lowerdir=/etc/xen:/sys /sys; exec cloud-init " + stages + "'\n",
		"/etc/systemd/system/cloud-init-local.service.d/network.conf": `[Service]
ExecStartPost=ip link set eth0 up
ExecStartPost=ip address add 172.31.0.10/20 dev eth0
ExecStartPost=ip route add default via 172.31.0.1
`,
	}, asks
}

const userData = `#cloud-config
hostname: named-by-user-data
runcmd: [echo done >/run/user-data]
`

// At the first boot the gate is there before anybody can ask, and those that the boot
// needs get what they ask for, in both modes: cloud-init, before there is a network of the
// distribution's, and Systems Manager.
func TestFirstBoot(t *testing.T) {
	files, asks := ec2()
	files["/etc/systemd/system/plain.service"] = "[Service]\nType=oneshot\nExecStart=/bin/true\nRemainAfterExit=yes\n"
	files["/etc/systemd/system/multi-user.target.d/plain.conf"] = "[Unit]\nWants=plain.service\n"
	for _, mode := range []string{"audit", "enforce"} {
		m := boot(t, settings{config: config(mode), files: files, bare: true, lab: netlab.Options{IMDS: &imdstest.Config{UserData: []byte(userData)}}})
		begun, ready := m.monotonic("imdsgated.service", "ExecMainStartTimestamp"), m.monotonic("imdsgated.service", "ActiveEnterTimestamp")
		t.Logf("%s: booted in %v, of which the start of the daemon took %v", mode, time.Since(m.Began).Round(time.Millisecond), ready-begun)
		if first := m.monotonic("cloud-init-local.service", "ExecMainStartTimestamp"); first < ready {
			t.Errorf("%s: cloud-init began %v before the daemon was ready", mode, ready-first)
		}
		if pre := m.monotonic("network-pre.target", "ActiveEnterTimestamp"); pre < ready {
			t.Errorf("%s: the network was made %v before the daemon was ready", mode, ready-pre)
		}
		if first := m.monotonic("plain.service", "ExecMainStartTimestamp"); first < ready {
			t.Errorf("%s: an ordinary unit began %v before the daemon was ready", mode, ready-first)
		}
		if got := m.Property("imdsgated.service", "StatusText"); !strings.HasPrefix(got, mode+" mode, attribution L0, ") {
			t.Errorf("%s: systemctl status has %q", mode, got)
		}
		if got := m.Property("amazon-ssm-agent.service", "Result"); got != "success" || m.Property("amazon-ssm-agent.service", "ActiveState") != "active" {
			t.Errorf("%s: amazon-ssm-agent: %s\n%s", mode, got, m.Do("journalctl", "--no-pager", "-u", "amazon-ssm-agent", "-u", "imdsgated"))
		}
		m.cloudInit(mode, asks)
		if n := m.count("imds-way-changed"); n != 0 {
			t.Errorf("%s: %d events tell that the first way to the service is another", mode, n)
		}
		m.Event("self-test-passed")
		want := map[string]string{"audit": "200", "enforce": "403"}[mode]
		if got := m.Curl("nobody", role); got != want {
			t.Errorf("%s: a thief got %s", mode, got)
		}
		t.Logf("%s", m.Do("imdsgate", "status"))
		m.Await("an event with the host's name", func() bool {
			m.Curl("nobody", role)
			all := m.Documents()
			return all[len(all)-1].At("host.name") == "named-by-user-data"
		})
	}
}

// cloudInit looks at what cloud-init has done, and whether it came here for all of it.
func (m *machine) cloudInit(mode, asks string) {
	m.T.Helper()
	if out, code := m.Try("cloud-init", "status", "--wait", "--long"); code != 0 || !strings.Contains(out, "status: done") || !strings.Contains(out, "Ec2Local") {
		m.T.Errorf("%s: cloud-init: %d\n%s\n%s", mode, code, out, m.Do("cat", "/var/log/cloud-init.log"))
	}
	if got := m.Do("cat", "/run/user-data"); got != "done" {
		m.T.Errorf("%s: the user data has not run: %q", mode, got)
	}
	asked, granted := 0, 0
	for _, d := range m.Documents() {
		if program, _ := d.At("process.executable").(string); d.At("data_stream.dataset") != "imdsgate.decision" || !strings.HasPrefix(program, "/usr/bin/python3") {
			continue
		}
		asked++
		want := any(nil)
		switch d.At("imdsgate.request.class") {
		case "user-data", "identity-proof":
			want = asks
			granted++
		}
		if d.At("imdsgate.process.unit") != asks+".service" || d.At("imdsgate.grant") != want || d.At("imdsgate.verdict") != "allow" {
			m.T.Errorf("%s: %v: in %v, by the grant %v", mode, d.At("message"), d.At("imdsgate.process.unit"), d.At("imdsgate.grant"))
		}
	}
	answered := 0
	for _, c := range m.IMDS.Transcript().Connections {
		answered += strings.Count(string(c.Received()), "User-Agent: Cloud-Init/") + strings.Count(string(c.Received()), "User-Agent: python-requests/")
	}
	if granted < 4 || answered != asked {
		m.T.Errorf("%s: the service was asked %d times by cloud-init, and events tell of %d, %d of them granted", mode, answered, asked, granted)
	}
	m.T.Logf("%s: cloud-init asked %d times, %d by its grant; its first stage took %v", mode, asked, granted,
		m.monotonic("cloud-init-local.service", "ExecMainExitTimestamp")-m.monotonic("cloud-init-local.service", "ExecMainStartTimestamp"))
}

// At boot there is no route yet: the daemon is ready all the same, and tells when the
// first request of its own has come through.
func TestSelfTestAfterRoute(t *testing.T) {
	m := boot(t, settings{config: "mode: enforce\n", files: map[string]string{
		"/etc/systemd/system/no-route.service": "[Unit]\nDefaultDependencies=no\nBefore=imdsgated.service\n[Service]\nType=oneshot\n" +
			"ExecStart=ip route replace unreachable 169.254.169.254\nExecStart=ip -6 route replace unreachable fd00:ec2::254\nRemainAfterExit=yes\n",
		"/etc/systemd/system/imdsgated.service.d/route.conf":      "[Unit]\nWants=no-route.service\n",
		"/etc/systemd/system/amazon-ssm-agent.service.d/not.conf": "[Unit]\nConditionPathExists=/nowhere\n",
	}})
	m.Await("that it is told that there is no route", func() bool {
		return strings.Contains(m.Do("imdsgate", "status"), "not possible")
	})
	if n := m.count("self-test-passed") + m.count("self-test-failed"); n != 0 {
		t.Errorf("%d self-tests were told of without a route", n)
	}
	time.Sleep(2 * testFirst)
	m.Do("ip", "route", "del", "unreachable", "169.254.169.254")
	added := time.Now()
	m.Event("self-test-passed")
	t.Logf("told %v after the route was there", time.Since(added).Round(time.Millisecond))
	if m.count("self-test-failed") != 0 || m.daemon() == 0 || m.Property("imdsgated.service", "NRestarts") != "0" {
		t.Error("the daemon did not wait for the route")
	}
}

// testFirst is how often the daemon tries until it has worked once.
const testFirst = time.Second

// late is how long a client on a busy host may not be run between its connect and its
// request.
const late = "300ms"

// A restart under load refuses nobody, of either family and in no container, and nobody else
// gets the ports meanwhile.
func TestRestart(t *testing.T) {
	for _, mode := range []string{"audit", "enforce"} {
		m := boot(t, settings{config: config(mode), lab: withContainer})
		load := m.everywhere(7*time.Second, "-late", late)
		time.Sleep(time.Second)
		var windows []string
		for range 2 {
			m.Do("systemctl", "restart", "imdsgated.service")
			time.Sleep(2 * time.Second)
		}
		t.Log(mode)
		m.served(load())
		action := map[string]string{"audit": "requests-unguarded", "enforce": "requests-held"}[mode]
		for _, d := range m.Documents() {
			if d.At("event.action") == action {
				if d.At("data_stream.dataset") != "imdsgate.lifecycle" || lasted(d) <= 0 || lasted(d) > 5*time.Second {
					t.Errorf("%s: %v", mode, d)
				}
				windows = append(windows, lasted(d).Round(time.Millisecond).String())
			}
		}
		if len(windows) != 2 {
			t.Errorf("%s: the events of 2 restarts have the lengths %v", mode, windows)
		}
		if journal := m.Do("journalctl", "-u", "imdsgated.service", "--no-pager"); strings.Contains(journal, "could not be taken away") {
			t.Errorf("%s: the daemon was hindered:\n%s", mode, journal)
		}
		t.Logf("%s: %v", action, windows)
	}
}

// waited reports whether somebody failed who had waited for the next daemon. What one
// that is killed has in its hands is reset at once, by the kernel.
func (o outcome) waited(killed time.Time) bool { return o.Last.After(killed.Add(time.Second)) }

// replaced is what it means in each mode that a daemon has ended, which was old, as it should
// not: audit leads clients to the service itself, enforce has them wait, until the next one is
// there, which tells of it and says why.
func (m *machine) replaced(mode string, old int, ended time.Time, why string) {
	t := m.T
	t.Helper()
	var gone, took time.Duration
	if mode == "audit" {
		m.Await("the redirect to go", func() bool { return !m.redirected() })
		gone = time.Since(ended)
		o := m.load(0)()
		if took = o.Slowest; o.Failed != 0 || took > time.Second {
			t.Errorf("without a redirect: %+v", o)
		}
	} else if !m.redirected() {
		t.Error("in enforce mode the redirect is gone")
	}
	m.guarded(old)
	back := time.Since(ended)
	if !m.redirected() {
		t.Errorf("%s: the next daemon has no redirect", mode)
	}
	action := map[string]string{"audit": "requests-unguarded", "enforce": "requests-held"}[mode]
	d := m.Event(action)
	if window := lasted(d); window <= 0 || window > back || back-window > gone+3*time.Second {
		t.Errorf("%s: the event says %v, and there was no daemon for %v", mode, window, back)
	}
	if message, _ := d.At("message").(string); d.At("data_stream.dataset") != "imdsgate.integrity" || d.At("event.kind") != "alert" || !strings.Contains(message, why) {
		t.Errorf("%s: %v", mode, d)
	}
	t.Logf("%s: redirect gone after %v (a request then took %v), next daemon after %v, %s for %v",
		mode, gone.Round(time.Millisecond), took.Round(time.Millisecond), back.Round(time.Millisecond), action, lasted(d).Round(time.Millisecond))
}

// A daemon that is killed is replaced, and nobody fails who waits for it.
func TestKilled(t *testing.T) {
	for _, mode := range []string{"audit", "enforce"} {
		m := boot(t, settings{config: config(mode)})
		load := m.load(6*time.Second, "-bind")
		time.Sleep(time.Second)
		old := m.daemon()
		killed := time.Now()
		m.signal(syscall.SIGKILL)
		m.replaced(mode, old, killed, "KILL")
		o := load()
		if o.Requests < 200 || o.waited(killed) || o.Taken != 0 {
			t.Errorf("%s: %+v", mode, o)
		}
		t.Logf("%s: %d requests, %d failed, the slowest took %v", mode, o.Requests, o.Failed, o.Slowest.Round(time.Millisecond))
	}
}

// A daemon that crashes again and again is not started for ever. In enforce mode its
// ports are given up, so that clients are refused at once, until somebody starts it.
func TestCrashLoop(t *testing.T) {
	for _, mode := range []string{"audit", "enforce"} {
		m := boot(t, settings{config: config(mode)})
		// As on a host: systemd-nspawn has it read-only, and from systemd 257 on for the unit, too.
		m.Do("mount", "-o", "remount,bind,rw", "/proc/sys")
		m.Do("systemctl", "restart", "imdsgated.service")
		const timed = "/proc/sys/net/netfilter/nf_conntrack_timestamp"
		if got := m.Do("cat", timed); got != "1" {
			t.Errorf("%s: conntrack notes times: %s: the test tests nothing", mode, got)
		}
		began := time.Now()
		for m.Property("imdsgated.service", "ActiveState") != "failed" {
			if m.daemon() != 0 {
				m.signal(syscall.SIGKILL)
			}
			if time.Since(began) > 40*time.Second {
				t.Fatalf("%s: it is started for ever", mode)
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Logf("%s: given up after %v", mode, time.Since(began).Round(time.Millisecond))
		m.refusedOrOpen(mode)
		m.Await("conntrack to note no times", func() bool { return m.Do("cat", timed) == "0" })
		time.Sleep(time.Second)
		m.Do("systemctl", "reset-failed", "imdsgated.service", "imdsgated.socket")
		m.Do("systemctl", "start", "imdsgated.service")
		if got := m.Property("imdsgated.socket", "ActiveState"); got != "active" {
			t.Errorf("%s: the socket unit is %s", mode, got)
		}
		d := m.Event(map[string]string{"audit": "requests-unguarded", "enforce": "requests-refused"}[mode])
		if lasted(d) < time.Second || !strings.Contains(d.At("message").(string), "times in all") {
			t.Errorf("%s: %v", mode, d)
		}
		t.Logf("%s: %s", mode, d.At("message"))
		if o := m.load(0)(); o.Failed != 0 {
			t.Errorf("%s: afterwards: %+v", mode, o)
		}
	}
}

// refusedOrOpen is what a unit that has failed means in each mode.
func (m *machine) refusedOrOpen(mode string) {
	m.T.Helper()
	m.Await("the ports to be given up", func() bool { return m.Property("imdsgated.socket", "ActiveState") != "active" })
	m.Await("the redirect to lead nowhere", func() bool { return !m.redirected() })
	if mode == "audit" {
		m.Await("the rules to go", func() bool { return !strings.Contains(m.Do("iptables-save"), "IMDSGATE") })
	}
	o := m.load(0)()
	switch {
	case mode == "audit" && o.Failed != 0:
		m.T.Errorf("audit: %+v", o)
	case mode == "enforce" && (o.Failed != 1 || !strings.Contains(o.Error, "refused") || o.Slowest > time.Second):
		m.T.Errorf("enforce: %+v", o)
	}
	m.T.Logf("%s: with the unit failed a request took %v: %s", mode, o.Slowest.Round(time.Microsecond), o.Error)
}

// A daemon that cannot start is not tried again, and says why. What that means is the
// mode's, also in a boot that has had no redirect: that of the configuration, or if it is
// refused, of the last daemon.
func TestDoesNotStart(t *testing.T) {
	const unknown = "mod: enforce\n"
	const refused = "mode: enforce\nrules:\n  paths: [/etc/none]\n"
	for name, c := range map[string]struct {
		before string // of a boot in which the daemon starts; "" for none
		set    string // then
		config string
		dropIn string
		says   string
		mode   string
	}{
		"a level that is not there": {config: config("enforce") + "attribution:\n  require_level: L2\n",
			says: "attribution.require_level is L2 and this host has L0", mode: "enforce"},
		"a key that is unknown, at the first boot":              {config: unknown, says: "mod: enforce", mode: "audit"},
		"a key that is unknown in a drop-in, at the first boot": {config: config("enforce"), dropIn: unknown, says: "mod: enforce", mode: "enforce"},
		"a key that is unknown":                                 {before: "enforce", config: unknown, says: "mod: enforce", mode: "enforce"},
		"a key that is unknown, and audit set for a time":       {before: "enforce", set: "audit", config: unknown, says: "mod: enforce", mode: "audit"},
		"rules that are refused, and audit before":              {before: "audit", config: refused, says: "/etc/none", mode: "audit"},
		"rules that are refused":                                {config: refused, says: "/etc/none", mode: "enforce"},
		"rules that are refused, and off set for a time":        {before: "enforce", set: "off", config: refused, says: "/etc/none", mode: "audit"},
	} {
		t.Run(name, func(t *testing.T) {
			s := settings{config: c.config}
			if c.dropIn != "" {
				s.files = map[string]string{"/etc/imdsgate/config.d/10.yaml": c.dropIn}
			}
			if c.before != "" {
				s.config = config(c.before)
			}
			m := boot(t, s)
			if c.before != "" {
				if c.set != "" {
					m.Do("imdsgate", "mode", "set", c.set, "--for", "1h", "--reason", "before a reboot")
				}
				m.off()
				if err := debian.Write(filepath.Join(m.Dir, "own"), map[string]string{"/etc/imdsgate/config.yaml": c.config}); err != nil {
					t.Fatal(err)
				}
				m.on(s)
			}
			m.Await("the unit to fail", func() bool { return m.Property("imdsgated.service", "ActiveState") == "failed" })
			if got := m.Property("imdsgated.service", "ExecMainStatus"); got != "78" {
				t.Errorf("exit %s", got)
			}
			if n := m.Property("imdsgated.service", "NRestarts"); n != "0" {
				t.Errorf("it was started %s times more", n)
			}
			if log := m.Do("journalctl", "--no-pager", "-b", "-u", "imdsgated.service"); !strings.Contains(log, c.says) {
				t.Errorf("the journal says\n%s", log)
			}
			m.refusedOrOpen(c.mode)
			time.Sleep(time.Second)
			m.Do("sh", "-ec", "rm -f /etc/imdsgate/config.d/10.yaml; echo 'mode: enforce' >/etc/imdsgate/config.yaml")
			m.Do("systemctl", "reset-failed", "imdsgated.service", "imdsgated.socket")
			m.Do("systemctl", "start", "imdsgated.service")
			if c.set == "off" { // which nobody misses
				return
			}
			if d := m.Event(map[string]string{"audit": "requests-unguarded", "enforce": "requests-refused"}[c.mode]); lasted(d) < time.Second {
				t.Errorf("%v", d)
			}
		})
	}
}

// A journald that was stopped has the daemon's log again when there is one.
func TestJournaldStopped(t *testing.T) {
	m := boot(t, settings{config: config("enforce")})
	old := m.daemon()
	m.Do("sh", "-ec", "systemctl stop "+journald)
	m.Do("imdsgate", "reload") // which is logged
	m.Do("sh", "-ec", "systemctl start "+journald)
	m.Do("imdsgate", "mode", "set", "audit", "--for", "1h", "--reason", "of the log")
	m.Await("the daemon's line", func() bool {
		return strings.Contains(m.Do("journalctl", "--no-pager", "-u", "imdsgated.service"), "of the log")
	})
	if m.daemon() != old {
		t.Error("the daemon has ended")
	}
}

// A daemon that hangs is killed and replaced. Who waited for it is served, in audit mode, too,
// where clients reach the service itself as soon as it is killed.
func TestHung(t *testing.T) {
	for _, mode := range []string{"audit", "enforce"} {
		m := boot(t, settings{config: config(mode), files: map[string]string{
			"/etc/systemd/system/imdsgated.service.d/soon.conf": "[Service]\nWatchdogSec=4\nTimeoutAbortSec=1\n",
		}})
		m.Event("self-test-passed")
		time.Sleep(5 * time.Second)
		if m.Property("imdsgated.service", "NRestarts") != "0" {
			t.Errorf("%s: a daemon that works was replaced", mode)
		}
		old := m.daemon()
		hung := time.Now()
		m.signal(syscall.SIGSTOP)
		load := m.load(time.Second)
		// systemd sends SIGCONT with SIGABRT, so that a daemon
		// which was only stopped accepts again for some milliseconds.
		m.Await("the end of the daemon", func() bool { return m.daemon() != old })
		killed := time.Now()
		t.Logf("%s: killed %v after it had stopped (WatchdogSec=4)", mode, killed.Sub(hung).Round(time.Millisecond))
		m.replaced(mode, old, killed, "watchdog")
		o := load()
		if o.Requests < 30 || o.waited(killed) {
			t.Errorf("%s: %+v", mode, o)
		}
		t.Logf("%s: %d requests of while it hung, %d failed, the slowest took %v", mode, o.Requests, o.Failed, o.Slowest.Round(time.Millisecond))
	}
}

// What is under way when the daemon is stopped comes to its end, and a reload takes the
// new configuration or says what is wrong with it.
func TestDrainAndReload(t *testing.T) {
	slow := &imdstest.Config{Fault: func(r *imdstest.Request) imdstest.Fault {
		if strings.HasSuffix(r.Target, "/ami-id") {
			return imdstest.Fault{Delay: 2 * time.Second}
		}
		return imdstest.Fault{}
	}}
	m := boot(t, settings{config: config("enforce"), lab: netlab.Options{IMDS: slow}})
	pid := m.daemon()
	edit := func(text string) {
		if err := os.WriteFile(m.file("/etc/imdsgate/config.yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	edit(config("enforce") + "posture: strict\n")
	m.Do("systemctl", "reload", "imdsgated.service")
	if out := m.Do("imdsgate", "status"); !strings.Contains(out, "posture strict") {
		t.Errorf("after the reload:\n%s", out)
	}
	edit("mod: audit\n")
	if out, code := m.Try("systemctl", "reload", "imdsgated.service"); code == 0 {
		t.Errorf("a wrong configuration is taken: %s", out)
	}
	edit(config("enforce"))
	if out := m.Do("imdsgate", "status"); !strings.Contains(out, "enforce mode") || !strings.Contains(out, "posture strict") || m.daemon() != pid {
		t.Errorf("after a wrong one:\n%s", out)
	}
	m.Do("systemctl", "reload", "imdsgated.service")

	load := m.load(0, "-path", "/latest/meta-data/ami-id")
	m.Await("the request to reach the service", func() bool {
		return slices.ContainsFunc(m.IMDS.Transcript().Connections, func(c imdstest.Connection) bool {
			return strings.Contains(string(c.Received()), "/ami-id")
		})
	})
	begin := time.Now()
	m.Do("systemctl", "restart", "imdsgated.service")
	o := load()
	if o.Failed != 0 || o.Slowest < 2*time.Second {
		t.Errorf("%+v", o)
	}
	t.Logf("a restart during an answer took %v, and the answer came after %v", time.Since(begin).Round(time.Millisecond), o.Slowest.Round(time.Millisecond))
}

// A reboot begins guarded, in the mode that an operator has set for a time, and its
// first start is no absence.
func TestReboot(t *testing.T) {
	s := settings{config: config("audit")}
	m := boot(t, s)
	m.Do("imdsgate", "mode", "set", "enforce", "--for", "1h", "--reason", "before a reboot")
	m.Do("systemctl", "reboot", "--no-block")
	select {
	case <-m.Done:
	case <-time.After(30 * time.Second):
		t.Fatal("the machine does not go off")
	}
	m.off()
	for _, how := range []string{"reboot", "power cut"} {
		m.on(s)
		var now struct{ Mode, Configured string }
		if err := json.Unmarshal([]byte(m.Do("imdsgate", "mode", "--json")), &now); err != nil || now.Mode != "enforce" || now.Configured != "audit" {
			t.Errorf("after a %s: %+v, %v", how, now, err)
		}
		if !m.redirected() || m.Property("amazon-ssm-agent.service", "Result") != "success" {
			t.Errorf("after a %s: redirect %v, agent %s", how, m.redirected(), m.Property("amazon-ssm-agent.service", "Result"))
		}
		if got := m.Curl("nobody", role); got != "403" {
			t.Errorf("after a %s a thief got %s", how, got)
		}
		for _, action := range []string{"requests-unguarded", "requests-held", "requests-refused"} {
			if n := m.count(action); n != 0 {
				t.Errorf("after a %s: %d events %s", how, n, action)
			}
		}
		t.Logf("%s: ready %v after systemd's start of the daemon", how,
			m.monotonic("imdsgated.service", "ActiveEnterTimestamp")-m.monotonic("imdsgated.service", "ExecMainStartTimestamp"))
		m.off() // without a word
	}
}

// A disk that is full costs events, and no request.
func TestDiskFull(t *testing.T) {
	for mode, want := range map[string]string{"audit": "200", "enforce": "403"} {
		t.Run(mode, func(t *testing.T) {
			m := boot(t, settings{config: config(mode), files: map[string]string{
				"/etc/systemd/system/var-log-imdsgate.mount":        "[Unit]\nDefaultDependencies=no\nBefore=local-fs.target\n[Mount]\nWhat=tmpfs\nWhere=/var/log/imdsgate\nType=tmpfs\nOptions=size=512k\n",
				"/etc/systemd/system/imdsgated.service.d/disk.conf": "[Unit]\nRequires=var-log-imdsgate.mount\nAfter=var-log-imdsgate.mount\n",
			}})
			load := m.load(10*time.Second, "-rate", "100")
			o := load()
			if o.Requests < 700 || o.Failed != 0 {
				t.Errorf("%+v", o)
			}
			var status struct {
				Events struct{ Written, Dropped, Failed, Removed uint64 }
			}
			if err := json.Unmarshal([]byte(m.Do("imdsgate", "status", "--json")), &status); err != nil || status.Events.Removed+status.Events.Failed == 0 {
				t.Errorf("the disk was not full: %+v, %v", status, err)
			}
			if got := m.Curl("nobody", role); got != want {
				t.Errorf("a thief got %s", got)
			}
			if m.Property("imdsgated.service", "NRestarts") != "0" {
				t.Error("the daemon was restarted")
			}
			t.Logf("%d requests, %d failed; events: %+v", o.Requests, o.Failed, status.Events)
		})
	}
}

// The kernel kills a daemon that may have no more memory. That is a death like others.
func TestOutOfMemory(t *testing.T) {
	for _, mode := range []string{"audit", "enforce"} {
		m := boot(t, settings{config: config(mode)})
		old := m.daemon()
		m.limit(old)
		load := m.load(6 * time.Second) // it takes a request to want more
		m.Await("the end of the daemon", func() bool { return m.daemon() != old })
		killed := time.Now()
		m.replaced(mode, old, killed, "KILL")
		o := load()
		if o.Requests < 200 || o.waited(killed) {
			t.Errorf("%s: %+v", mode, o)
		}
		t.Logf("%s: %d requests, %d failed, the slowest took %v", mode, o.Requests, o.Failed, o.Slowest.Round(time.Millisecond))
	}
}

// memory is where the memory controller of cgroup v1 is.
const memory = "/sys/fs/cgroup/memory"

// limit takes the memory from the daemon: the next page that it wants has the kernel kill
// it. Where the host mounts cgroup v1, its cgroup of systemd's is left alone, since that
// has no memory controller.
func (m *machine) limit(pid int) {
	t := m.T
	t.Helper()
	if _, err := os.Stat(memory); err != nil {
		dir := hierarchies[0]
		for _, below := range strings.Split(filepath.Join(m.cgroup, "payload/system.slice/imdsgated.service"), "/") {
			if err := os.WriteFile(dir+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
				t.Fatal(err)
			}
			dir += "/" + below
		}
		if err := os.WriteFile(dir+"/memory.max", []byte("65536"), 0); err != nil {
			t.Fatal(err)
		}
		return
	}
	dir := filepath.Join(memory, m.cgroup)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // what the dead have left is the parent's
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if err := os.Remove(dir); err == nil || time.Now().After(end) {
				if err != nil {
					t.Error(err)
				}
				return
			}
		}
	})
	for _, w := range [][2]string{{"memory.limit_in_bytes", "65536"}, {"cgroup.procs", fmt.Sprint(pid)}} {
		if err := os.WriteFile(dir+"/"+w[0], []byte(w[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
}
