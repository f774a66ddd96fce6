package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// Every level says what it is, what the next one lacks, and by which evidence a
// client was found, also with a /proc that hides the processes of others, and with the
// system calls that the unit leaves the daemon.
func TestLevels(t *testing.T) {
	t.Parallel()
	syscalls, err := gate.UnitSyscalls("../../packaging/systemd/imdsgated.service")
	if err != nil {
		t.Fatal(err)
	}
	for level, want := range map[attribution.Level]struct{ lacks, confidence, via, role string }{
		attribution.Level0: {"CAP_SYS_ADMIN", "low", "sock_diag", "holder"},
		attribution.Level1: {"CAP_BPF", "medium", "sock_diag", "holder"},
		attribution.Level2: {"CAP_PERFMON", "high", "witness", "connector"},
		attribution.Level3: {"", "high", "references", "connector"},
	} {
		t.Run(level.String(), func(t *testing.T) {
			t.Parallel()
			h := prepare(t, netlab.Options{})
			granted := h.install(h.attacker)
			lacks := level + 1
			if level == attribution.Level3 {
				lacks = 0
			}
			h.startWith(gate.Settings{Config: "mode: enforce\n" + grant(granted, ordinaryUser), Lacks: lacks, HideProcesses: true, Syscalls: syscalls})
			var out string
			for range 20 { // below level 3 the host is searched, for which a busy machine has no time
				out, _ = h.run(client{uid: ordinaryUser, args: []string{granted, "ask", h.token()}})
				if strings.Contains(out, "200 OK") || h.decided(credentials, "attacker").At("imdsgate.attribution.reason") != attribution.Late.String() {
					break
				}
			}
			if !strings.Contains(out, "200 OK") {
				t.Fatalf("the granted client got %s", out)
			}
			d, err := h.Await("the granted client", func(d gate.Document) bool {
				return d.At("data_stream.dataset") == "imdsgate.decision" && d.At("url.path") == credentials && d.At("http.response.status_code") == 200.0
			})
			if err != nil {
				t.Fatal(err)
			}
			if d.At("imdsgate.attribution.level") != level.String() || d.At("imdsgate.attribution.confidence") != want.confidence ||
				d.At("imdsgate.attribution.complete") != true || !strings.Contains(d.At("imdsgate.attribution.via").(string), want.via) {
				t.Errorf("attribution %v", d.At("imdsgate.attribution"))
			}
			if role := d.At("imdsgate.subjects.role").([]any)[0]; role != want.role {
				t.Errorf("role %v", role)
			}
			s, err := h.Status()
			if err != nil {
				t.Fatal(err)
			}
			missing := ""
			for _, m := range s.Attribution.Missing {
				if m.Level == lacks.String() {
					missing = m.Reason
				}
			}
			if s.Attribution.Level != level.String() || !strings.Contains(missing, want.lacks) || (missing == "") != (lacks == 0) {
				t.Errorf("status: level %s, missing %+v", s.Attribution.Level, s.Attribution.Missing)
			}
			// Loading programs has taken CAP_PERFMON; asking them takes CAP_BPF, on older kernels.
			threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", h.PID()))
			if err != nil || len(threads) < 2 {
				t.Fatalf("threads of the daemon: %v, %v", threads, err)
			}
			for _, thread := range threads {
				text, err := os.ReadFile(thread)
				if err != nil {
					continue // it has ended
				}
				_, permitted, _ := strings.Cut(string(text), "\nCapPrm:\t")
				permitted, _, _ = strings.Cut(permitted, "\n")
				set, err := strconv.ParseUint(permitted, 16, 64)
				if err != nil || set>>unix.CAP_PERFMON&1 != 0 || set>>unix.CAP_BPF&1 != 0 != (level >= attribution.Level2) || set>>unix.CAP_NET_ADMIN&1 == 0 {
					t.Errorf("%s: %s may have %q", level, thread, permitted)
				}
			}
			t.Logf("%s: %v", level, d.At("imdsgate.attribution"))
		})
	}
}

// A level that is required and not there keeps enforce mode from starting, and audit
// mode from looking like protection.
func TestRequiredLevel(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	const required = "attribution: {require_level: L2}\n"
	d, err := gate.Start(h.Lab, h.gate, gate.Settings{Config: "mode: enforce\n" + required, Lacks: attribution.Level2})
	if d != nil {
		defer d.Close()
	}
	if err == nil {
		t.Fatal("it started in enforce mode")
	}
	if code, log := d.Wait(), d.Log(); code != 78 || !strings.Contains(log, "require_level is L2 and this host has L1") || !strings.Contains(log, "CAP_BPF") {
		t.Errorf("exit %d\n%s", code, log)
	}
	h.startWith(gate.Settings{Config: required, Lacks: attribution.Level2})
	if out, code := h.imdsgate("status"); code != 1 || !strings.Contains(out, "! level L2 is required for enforce mode") {
		t.Errorf("%d\n%s", code, out)
	}
}

// A person asks who has a connection.
func TestWhois(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	cmd := exec.Command(h.attacker, "hold")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryUser, Gid: ordinaryUser}, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Instance.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("it said nothing")
	}
	text, code := h.imdsgate("whois", lines.Text())
	for _, want := range []string{lines.Text() + " -> 169.254.169.254:80", "nobody else has it", "connector: " + h.attacker, "forked by"} {
		if !strings.Contains(text, want) {
			t.Errorf("exit %d, without %q:\n%s", code, want, text)
		}
	}
	asJSON, _ := h.imdsgate("--json", "whois", lines.Text())
	var w report.Whois
	if err := json.Unmarshal([]byte(asJSON), &w); err != nil || !w.Complete || w.Subjects[0].PID != int64(cmd.Process.Pid) || w.Confidence != "high" {
		t.Errorf("%v\n%s", err, asJSON)
	}
	// ss shows ours for it, too, which nobody was seen to make.
	var ours string
	for line := range strings.Lines(h.output("ss", "-Htn", "dst", "169.254.169.254")) {
		if from := strings.Fields(line)[3]; from != lines.Text() {
			ours = from
		}
	}
	if text, code := h.imdsgate("whois", ours); code != 2 || !strings.Contains(text, "our own connection to the service, for the client "+lines.Text()) {
		t.Errorf("%s: exit %d\n%s", ours, code, text)
	}
	if s, err := h.Status(); err != nil || s.Attribution.Witness.Missing != 0 {
		t.Errorf("%+v, %v", s.Attribution.Witness, err)
	}
	if text, code := h.imdsgate("whois", "172.31.0.10:1"); code != 2 || !strings.Contains(text, "no connection") {
		t.Errorf("exit %d\n%s", code, text)
	}
	if text, code := h.imdsgate("whois", "nonsense"); code != 2 || !strings.Contains(text, "nonsense") {
		t.Errorf("exit %d\n%s", code, text)
	}
}

// A rule about processes is asked when a program is started, and raises its alert
// whether that connects or not.
func TestStartedProgram(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	rule := filepath.Join(t.TempDir(), "sleep.toml")
	if err := os.WriteFile(rule, []byte(`[rule]
rule_id = "sleep"
name = "sleep was started"
type = "eql"
language = "eql"
severity = "high"
risk_score = 73
query = 'process where event.type == "start" and process.name == "sleep" and process.args == "0.3"'
`), 0o644); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(rule); dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.start("rules: {paths: [" + rule + "]}\n")
	h.run(client{uid: ordinaryUser, args: []string{"/bin/sleep", "0.3", "0.0"}})
	d, err := h.Await("the start of sleep", func(d gate.Document) bool {
		return d.At("event.action") == "process-start-detected" && d.At("process.name") == "sleep" // others play in labs beside this one
	})
	if err != nil {
		t.Fatal(err)
	}
	if d.At("event.kind") != "alert" || d.At("rule.id") != "sleep" || d.At("process.name") != "sleep" || d.At("process.parent.name") == nil ||
		d.At("source") != nil || d.At("url") != nil || d.At("event.severity") != 73.0 {
		t.Errorf("%v", d)
	}
}

// A network namespace with a way of its own to the service: the first connection is
// reported, and in enforce mode the next ones are refused.
func TestUncoveredNamespace(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		config string
		second bool // connection is refused
	}{{"mode: enforce\n", true}, {"mode: enforce\nattribution: {uncovered: report}\n", false}, {"", false}} {
		h := start(t, netlab.Options{}, c.config)
		sleeper := exec.Command("unshare", "--net", "sleep", "60")
		sleeper.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := h.Instance.Start(sleeper); err != nil {
			t.Fatal(err)
		}
		pid := fmt.Sprint(sleeper.Process.Pid)
		defer sleeper.Wait()
		defer sleeper.Process.Kill()
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			name, _ := os.ReadFile("/proc/" + pid + "/comm") // unshare until it is there
			if string(name) == "sleep\n" {
				break
			}
			if time.Now().After(end) {
				t.Fatal("no namespace")
			}
		}
		wire := "ip link add own type veth peer name eth0 netns " + pid + `
			ip addr add 10.99.0.1/24 dev own; ip link set own up
			nsenter --target=` + pid + ` --net sh -ec 'ip addr add 10.99.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.99.0.1'`
		if err := h.Metadata.Run(exec.Command("sh", "-ec", wire)); err != nil {
			t.Fatal(err)
		}
		ask := func() string {
			out, _ := h.run(client{args: []string{"nsenter", "--target=" + pid, "--net", h.attacker, "ask", h.token()}})
			return out
		}
		if out := ask(); !strings.Contains(out, "200 OK") {
			t.Fatalf("the way of its own does not lead there: %s", out)
		}
		d, err := h.Await("the namespace", func(d gate.Document) bool { return d.At("event.action") == "uncovered-imds-connection" })
		if err != nil {
			t.Fatal(err)
		}
		if d.At("event.kind") != "alert" || !strings.Contains(d.At("message").(string), "attacker") || d.At("imdsgate.actor.pid") == nil {
			t.Errorf("%v", d)
		}
		if out := ask(); strings.Contains(out, "operation not permitted") != c.second {
			t.Errorf("%q: the second connection: %s", c.config, out)
		}
	}
}

// A container that only looks whether the port is open, and is gone before anybody can
// see who it was, does not lose its way to the service.
func TestProbingContainer(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{Containers: true}, "mode: enforce\n")
	for _, ns := range []*netlab.Namespace{h.Bridged, h.Routed} {
		out, _ := h.run(client{in: ns, args: []string{"/usr/bin/python3", "-c", `
import socket, struct
for i in range(30):
    s = socket.create_connection(("169.254.169.254", 80))
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
print("probed")
`}})
		if out != "probed" {
			t.Fatalf("%s: %s", ns, out)
		}
		time.Sleep(500 * time.Millisecond) // more than a connection may take to arrive
		if got := h.curl(client{in: ns, uid: ordinaryUser}, instanceID); got != "200" {
			t.Errorf("%s: %s", ns, got)
		}
	}
	docs, err := h.Documents()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range docs {
		if d.At("event.action") == "uncovered-imds-connection" {
			t.Errorf("%v", d.At("message"))
		}
	}
}
