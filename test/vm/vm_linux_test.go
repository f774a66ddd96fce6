package vm

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/gate"
)

const role = "/latest/meta-data/iam/security-credentials/imdsgate-lab-role"

// guards checks what must be so after every start.
func (m *machine) guards() {
	m.T.Helper()
	m.Await("the daemon", func() bool { return m.Property("imdsgated.service", "ActiveState") == "active" })
	if n := m.Property("imdsgated.service", "NRestarts"); n != "0" {
		m.T.Errorf("the daemon was restarted %s times", n)
	}
	m.Event("self-test-passed")
	if out, code := m.Try("systemd-run", "--quiet", "--pipe", "--wait", "-p", "Restart=no", "amazon-ssm-agent", "-path", "/latest/meta-data/instance-id"); code != 0 {
		m.T.Errorf("an honest client: %s", out)
	}
	if got := m.Curl("nobody", role); got != "403" {
		m.T.Errorf("a thief got %s", got)
	}
}

// From the package, at boot, with the highest level there is.
func TestGuarded(t *testing.T) {
	m := boot(t)
	t.Log(m.Do("uname", "-srv"))
	m.guards()
	status := m.Do("imdsgate", "status")
	t.Log("\n" + status)
	if !strings.HasPrefix(status, "protected: enforce mode") || !strings.Contains(status, "attribution  level L3") {
		t.Error("it is not protected at level L3")
	}
	var doctor struct {
		Findings []struct{ ID, Severity string }
	}
	out, _ := m.Try("imdsgate", "doctor", "--json")
	if err := json.Unmarshal([]byte(out), &doctor); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for _, f := range doctor.Findings {
		if f.Severity != "warning" && f.Severity != "info" {
			t.Errorf("doctor: %s %s", f.Severity, f.ID)
		}
	}
}

// A restart and a kill under load, with all that level L3 has to attach again. A restart fails
// nobody; of a kill, those fail whom the daemon had in its hands.
func TestWindows(t *testing.T) {
	m := boot(t)
	m.guards()
	for _, c := range []struct{ mode, action string }{{"enforce", "requests-held"}, {"audit", "requests-unguarded"}} {
		if c.mode == "audit" {
			m.Do("imdsgate", "mode", "set", "audit", "--for", "1h", "--reason", "windows")
		}
		for _, how := range []string{"systemctl restart imdsgated.service", "systemctl kill --signal=KILL imdsgated.service"} {
			seen := func() (n int, last gate.Document) {
				for _, d := range m.Documents() {
					if d.At("event.action") == c.action {
						n, last = n+1, d
					}
				}
				return n, last
			}
			before, _ := seen()
			done := make(chan string, 1)
			go func() {
				out, _ := m.Run(5*time.Minute, "systemd-run", "--quiet", "--pipe", "--wait", "amazon-ssm-agent", "-for", "20s", "-rate", "10")
				done <- out
			}()
			time.Sleep(2 * time.Second)
			m.Do(strings.Fields(how)...)
			var d gate.Document
			m.Await("an event of "+how, func() bool {
				n, last := seen()
				d = last
				return n > before
			})
			var o struct {
				Requests, Failed int
				Error            string
				Slowest          time.Duration `json:"slowest_ns"`
			}
			out := <-done
			if err := json.Unmarshal([]byte(out), &o); err != nil || o.Requests < 100 || o.Failed > o.Requests/20 || o.Failed > 0 && strings.Contains(how, "restart") {
				t.Errorf("%s, %s: %v: %s", c.mode, how, err, out)
			}
			if status := m.Do("imdsgate", "status"); !strings.Contains(status, "attribution  level L3") {
				t.Errorf("%s, %s: it is not at level L3\n%s", c.mode, how, status)
			}
			lasted, _ := d.At("event.duration").(float64)
			t.Logf("%s, %s: %s for %v; %d requests, %d failed, the slowest took %v", c.mode, how, c.action, time.Duration(lasted).Round(time.Millisecond),
				o.Requests, o.Failed, o.Slowest.Round(time.Millisecond))
		}
	}
}

// The tests that are about the kernel, inside of it. They have names of networks and of cgroups of
// their own, and the machine to themselves.
func TestKernel(t *testing.T) {
	m := boot(t)
	m.Do("systemctl", "stop", "imdsgated.socket", "imdsgated.service")
	m.Do("imdsgate", "redirect", "remove")
	// Their daemons have another user, who may not give a socket to the group of the package.
	m.Do("sh", "-ec", "grep -v ^imdsgate: /etc/group >/run/group; mount --bind /run/group /etc/group")
	emulated, slow := "IMDSGATE_EMULATED=", "^$"
	if accelerator() != "kvm" {
		// TestFlood connects 20,000 times as fast as it can; the backlog is not served in time.
		emulated, slow = "IMDSGATE_EMULATED=1", "^TestFlood$"
	}
	for _, p := range packages {
		t.Run(p, func(t *testing.T) {
			begin := time.Now()
			out, code := m.Run(25*time.Minute, "env", "CI=true", emulated, "sh", "-ec", "cd "+filepath.Join(inside, p)+" && exec ./tests -test.v -test.count=1 -test.timeout=24m -test.skip '"+slow+"' 2>&1")
			said := filepath.Join(images, strings.ReplaceAll(p, "/", "-")+".log")
			if err := os.WriteFile(said, []byte(out), 0o644); err != nil {
				t.Error(err)
			}
			if code != 0 {
				t.Errorf("exit %d, in %s:\n%s", code, said, failures(out))
			}
			if _, table, ok := strings.Cut(out, "\n        | attack |"); ok {
				table, _, _ = strings.Cut(table, "\n---")
				t.Log("\n| attack |" + table)
			}
			t.Logf("%v", time.Since(begin).Round(time.Second))
		})
	}
}

// failures are the names of the tests that failed, with what they said.
func failures(out string) string {
	var b strings.Builder
	for line := range strings.Lines(out) {
		if strings.Contains(line, "--- FAIL") || strings.Contains(line, "_test.go:") && !strings.Contains(line, ": caught:") && !strings.Contains(line, ": served:") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// A power cut while everything is written: what was promised to be on the disk is there, and
// what is there is whole.
func TestPowerCut(t *testing.T) {
	m := boot(t)
	m.guards()
	policy := m.policy()
	// Who was told that it is decided may rely on it.
	m.Do("imdsgate", "decisions", "add", "deny", "--user", "games", "--for", "10h", "--reason", "before the cuts")
	for i := range 4 {
		m.Do("systemctl", "start", "churn.service")
		time.Sleep(10*time.Second + rand.N(10*time.Second))
		var synced string
		if i%2 == 1 { // at rest, the last thing that was told
			m.Do("systemctl", "stop", "churn.service")
			m.Do("imdsgate", "decisions", "add", "deny", "--user", "lp", "--for", "3h", "--reason", "before cut "+strconv.Itoa(i))
			m.Do("imdsgate", "mode", "set", "audit", "--for", "9h", "--reason", "before cut "+strconv.Itoa(i))
			time.Sleep(5 * time.Second)
			all := m.Documents()
			synced, _ = all[len(all)-1].At("event.id").(string)
		}
		m.cut()
		m.Await("the daemon", func() bool { return m.Property("imdsgated.service", "ActiveState") == "active" })
		if n := m.Property("imdsgated.service", "NRestarts"); n != "0" {
			t.Errorf("cut %d: the daemon was restarted %s times", i, n)
		}
		if now := m.policy(); now != policy {
			t.Errorf("cut %d: the policy was %s and is %s", i, policy, now)
		}
		var mode struct{ Mode, Configured, Reason string }
		if err := json.Unmarshal([]byte(m.Do("imdsgate", "mode", "--json")), &mode); err != nil || mode.Configured != "enforce" || mode.Mode != "enforce" && mode.Mode != "audit" {
			t.Errorf("cut %d: mode %+v, %v", i, mode, err)
		}
		if i%2 == 1 && mode.Mode != "audit" {
			t.Errorf("cut %d: the mode that was set is %+v", i, mode)
		}
		if out := m.Do("imdsgate", "decisions", "list"); !strings.Contains(out, "before the cuts") || i%2 == 1 && !strings.Contains(out, fmt.Sprint("before cut ", i)) {
			t.Errorf("cut %d: the decisions are\n%s", i, out)
		}
		m.Do("imdsgate", "mode", "set", "enforce", "--reason", "after the cut")
		m.guards()
		if got := m.Curl("games", "/latest/meta-data/instance-id"); got != "403" {
			t.Errorf("cut %d: who is denied got %s", i, got)
		}
		m.whole(i, synced)
		m.resumed(i)
		if out := m.Do("sh", "-c", "dmesg | grep -i 'ext4-fs error' || true"); out != "" {
			t.Errorf("cut %d: %s", i, out)
		}
		t.Logf("cut %d: mode %s, %d documents", i, mode.Mode, len(m.Documents()))
	}
	for _, d := range m.Documents() {
		switch action := d.At("event.action"); action {
		case "mode-lost", "decisions-lost":
			t.Errorf("%v: %v", action, d.At("message"))
		}
	}
	if out := m.Do("find", "/var/lib/imdsgate", "-name", "*.damaged"); out != "" {
		t.Errorf("put aside: %s", out)
	}
}

// policy is what the daemon says that it has loaded.
func (m *machine) policy() string {
	m.T.Helper()
	return regexp.MustCompile(`(?m)^ *policy .*$`).FindString(m.Do("imdsgate", "status"))
}

// whole checks the spool: whole lines, with numbers that go up in each boot, and what was
// there for longer than an interval of fsync.
func (m *machine) whole(cut int, synced string) {
	m.T.Helper()
	last, found := map[string]float64{}, synced == ""
	for line := range strings.Lines(m.Spool() + "\n") {
		var d gate.Document
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			m.T.Errorf("cut %d: %v in %q", cut, err, line)
			continue
		}
		boot, _ := d.At("host.boot.id").(string)
		n, _ := d.At("event.sequence").(float64)
		if boot == "" || n <= last[boot] {
			m.T.Errorf("cut %d: %v comes after %v of the same boot: %s", cut, n, last[boot], line)
		}
		last[boot] = n
		found = found || d.At("event.id") == synced
	}
	if !found {
		m.T.Errorf("cut %d: an event of five seconds before, with fsync: interval, is gone", cut)
	}
}

// resumed checks that somebody who reads with a cursor gets all that this boot has.
func (m *machine) resumed(cut int) {
	m.T.Helper()
	const ids = `imdsgate events --json --cursor /var/lib/cursor >/run/read; cat /run/read`
	read := map[any]bool{}
	for line := range strings.Lines(m.Do("sh", "-ec", ids)) {
		var d gate.Document
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			m.T.Errorf("cut %d: read from the cursor: %v in %q", cut, err, line)
		}
		read[d.At("event.id")] = true
	}
	boot := strings.ReplaceAll(m.Do("cat", "/proc/sys/kernel/random/boot_id"), "-", "")
	missing, all := 0, 0
	for _, d := range m.Documents() {
		if id, _ := d.At("host.boot.id").(string); strings.ReplaceAll(id, "-", "") != boot {
			continue
		}
		if all++; !read[d.At("event.id")] {
			missing++
		}
	}
	// Those of the question itself may come between.
	if all == 0 || missing > 3 {
		m.T.Errorf("cut %d: the cursor has missed %d of %d events of this boot", cut, missing, all)
	}
}

// step sets the clock of the machine by so much.
func (m *machine) step(by time.Duration) {
	m.T.Helper()
	m.Do("sh", "-ec", fmt.Sprintf("date -s @$(($(date +%%s) + (%d)))", int(by.Seconds())))
}

// The clock is set while requests are made, hours back and forth.
func TestClockSteps(t *testing.T) {
	m := boot(t)
	m.guards()
	m.Do("imdsgate", "decisions", "add", "deny", "--user", "games", "--for", "2h", "--reason", "clock")
	m.Do("imdsgate", "decisions", "add", "allow", "--exe", "/usr/bin/curl", "--user", "nobody", "--for", "2h", "--reason", "clock", "--accept-risk")
	pid := m.Property("imdsgated.service", "MainPID")
	done := make(chan string, 1)
	go func() {
		out, _ := m.Run(15*time.Minute, "sh", "-c", "touch /run/asking; while [ -e /run/asking ]; do out=$(amazon-ssm-agent) || { echo \"$out\"; exit 1; }; sleep 0.2; done; echo fine")
		done <- out
	}()
	mode := func() string {
		var now struct{ Mode string }
		if err := json.Unmarshal([]byte(m.Do("imdsgate", "mode", "--json")), &now); err != nil {
			t.Error(err)
		}
		return now.Mode
	}
	// As far as the daemon notices by itself, it does so within this.
	soon := func(what, want string, is func() string) {
		t.Helper()
		var got string
		for end := time.Now().Add(90 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
			if got = is(); got == want {
				return
			}
		}
		t.Errorf("%s: %s, want %s", what, got, want)
	}
	thief := func() string { return m.Curl("nobody", role) }
	denied := func() string { return m.Curl("games", "/latest/meta-data/instance-id") }
	check := func(what, wantMode, wantThief, wantDenied string) {
		t.Helper()
		soon(what+": the mode", wantMode, mode)
		soon(what+": curl by nobody", wantThief, thief)
		soon(what+": who is denied", wantDenied, denied)
		// The last event has the time that the clock has now.
		all := m.Documents()
		at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(all[len(all)-1].At("@timestamp")))
		now, _ := strconv.ParseInt(m.Do("date", "+%s"), 10, 64)
		if err != nil || time.Unix(now, 0).Sub(at).Abs() > time.Minute {
			t.Errorf("%s: the last event is of %v, and it is %v", what, at, time.Unix(now, 0).UTC())
		}
		t.Logf("%s: as expected", what)
	}
	check("before", "enforce", "200", "403")
	m.step(-5 * time.Hour) // before it was decided: nothing is allowed
	check("five hours back", "enforce", "403", "403")
	m.step(+5 * time.Hour)
	check("and forth again", "enforce", "200", "403")
	m.Do("imdsgate", "mode", "set", "audit", "--for", "2h", "--reason", "clock")
	m.step(-5 * time.Hour) // the daemon has seen it being set, and knows how long that is ago
	check("five hours back in audit mode", "audit", "200", "200")
	m.step(+8 * time.Hour) // all of it is over
	check("three hours on", "enforce", "403", "200")
	m.step(-3 * time.Hour) // and does not come back
	check("and back again", "enforce", "403", "200")
	m.Do("imdsgate", "decisions", "add", "allow", "--exe", "/usr/bin/curl", "--user", "nobody", "--for", "1h", "--reason", "after", "--accept-risk")
	check("decided anew", "enforce", "200", "200")
	m.Do("rm", "/run/asking")
	if out := <-done; out != "fine" {
		t.Errorf("a request failed: %s", out)
	}
	if now := m.Property("imdsgated.service", "MainPID"); now != pid {
		t.Error("the daemon was restarted")
	}
	m.whole(0, "")
}

// The machine is suspended to memory, and goes on.
func TestSuspend(t *testing.T) {
	m := boot(t)
	m.guards()
	pid := m.Property("imdsgated.service", "MainPID")
	if out := m.Do("cat", "/sys/power/state"); !strings.Contains(out, "mem") {
		t.Fatalf("this kernel has no suspend to memory: %s", out)
	}
	m.Do("imdsgate", "decisions", "add", "allow", "--exe", "/usr/bin/curl", "--user", "nobody", "--for", "1m", "--reason", "suspend", "--accept-risk")
	m.Do("systemd-run", "--quiet", "sh", "-c", "sleep 2; echo mem >/sys/power/state")
	m.Await("the suspend", func() bool { return strings.Contains(m.qmp("query-status"), "suspended") })
	time.Sleep(65 * time.Second)
	m.qmp("system_wakeup")
	m.Await("its end", func() bool { return strings.Contains(m.qmp("query-status"), "running") })
	// What lasted for a minute is over: the time in which it slept counts.
	m.Await("the end of a decision", func() bool { return m.Curl("nobody", role) == "403" })
	m.guards()
	if now := m.Property("imdsgated.service", "MainPID"); now != pid {
		t.Errorf("another daemon: %s\n%s", now, m.Do("journalctl", "--no-pager", "-u", "imdsgated", "-n", "30"))
	}
	t.Log("\n" + m.Do("imdsgate", "status"))
}

// qmp asks qemu.
func (m *machine) qmp(command string) string {
	m.T.Helper()
	c, err := net.Dial("unix", m.at("qmp"))
	if err != nil {
		m.T.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(m.Patience))
	in := bufio.NewReader(c)
	if _, err := in.ReadString('\n'); err != nil { // its greeting
		m.T.Fatal(err)
	}
	var answer string
	for _, each := range []string{"qmp_capabilities", command} {
		if _, err := fmt.Fprintf(c, "{%q: %q}\n", "execute", each); err != nil {
			m.T.Fatal(err)
		}
		for answer = ""; !strings.Contains(answer, `"return"`) && !strings.Contains(answer, `"error"`); {
			if answer, err = in.ReadString('\n'); err != nil && err != io.EOF {
				m.T.Fatal(err)
			}
		}
	}
	return answer
}
