package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// examined is what `imdsgate doctor --json` says.
type examined struct {
	Findings []struct{ ID, Severity, Message, Fix string }
	Probes   []struct{ Way, As, From, Result, Detail string }
	Left     []string `json:"not_looked_at"`
	code     int
	text     string
}

// doctor runs it where it sees no processes but its own: it tries from the network
// namespaces of all that it sees, and the machine's own is none of the lab's business.
func (h *host) doctor(args ...string) examined {
	h.t.Helper()
	return h.doctorWith(h.Config, "", args...)
}

// doctorWith runs it with a configuration after a script, in a mount namespace that only
// the two see, and with the lab's cgroup for the root of all.
func (h *host) doctorWith(config, script string, args ...string) examined {
	h.t.Helper()
	var e examined
	// A process of each container, which it sees.
	script += "\n" + `exec "$@"`
	cmd := exec.Command("unshare", "--fork", "--pid", "--mount-proc", "--cgroup", "--kill-child", "--", "sh", "-ec")
	for _, n := range []*netlab.Namespace{h.Bridged, h.Routed} {
		if n == nil {
			continue
		}
		f, err := os.Open(n.Path())
		if err != nil {
			h.t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		script = fmt.Sprintf("nsenter --net=/proc/self/fd/%d -- sleep 60 >/dev/null 2>&1 & sleep 0.3; ", 2+len(cmd.ExtraFiles)) + script
	}
	cmd.Args = append(cmd.Args, script, "sh", h.gate.Command, "--config", config, "doctor", "--json")
	cmd.Args = append(cmd.Args, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	h.Instance.Run(cmd)
	e.text, e.code = out.String(), cmd.ProcessState.ExitCode()
	if err := json.Unmarshal([]byte(e.text), &e); err != nil {
		h.t.Fatalf("%d, %v\n%s", e.code, err, e.text)
	}
	for _, f := range e.Findings {
		if f.ID == "" || f.Message == "" || f.Fix == "" {
			h.t.Errorf("a finding without what to do: %+v", f)
		}
	}
	return e
}

func (e examined) has(id string) bool { return e.message(id) != "" }

// message is what the findings of an ID say.
func (e examined) message(id string) (all string) {
	for _, f := range e.Findings {
		if f.ID == id {
			all += f.Message + "\n"
		}
	}
	return all
}

// past are the ways that got past the daemon.
func (e examined) past() (all []string) {
	for _, p := range e.Probes {
		if p.Result == "past" {
			all = append(all, p.Way+", as "+p.As+", from "+p.From)
		}
	}
	return all
}

func (e examined) count(result string) (n int) {
	for _, p := range e.Probes {
		if p.Result == result {
			n++
		}
	}
	return n
}

// The redirect is whole: whatever doctor tries is recorded, or has no answer.
func TestDoctor(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"enforce", "audit"} {
		t.Run(mode, func(t *testing.T) {
			h := start(t, netlab.Options{Containers: true}, "mode: "+mode+"\n")
			h.t = t
			e := h.doctor()
			if past := e.past(); len(past) > 0 || e.has("got-past") || e.has("daemon-not-running") || e.has("imds-silent") {
				t.Errorf("got past: %v\n%s", past, e.text)
			}
			if e.count("recorded") < 33 {
				t.Errorf("%d recorded, %d without an answer\n%s", e.count("recorded"), e.count("none"), e.text)
			}
			for _, f := range e.Findings {
				if f.Severity == "error" && f.ID != "config-writable" { // it is below /tmp
					t.Errorf("%+v", f)
				}
			}
			tried := map[string]bool{}
			for _, p := range e.Probes {
				if strings.Contains(p.From, "sleep") || p.As == "root" && p.From == "this host" {
					tried[strings.SplitN(p.From, " (", 2)[0]+p.Way] = true
					if !strings.Contains(p.Way, "straight") && !strings.Contains(p.Way, "mark") && p.Result != "recorded" {
						t.Errorf("a container, or root: %+v", p)
					}
				}
				if strings.Contains(p.Way, "straight") {
					tried[p.As+" "+p.Way] = true
					if p.Result != "none" {
						t.Errorf("where the daemon listens: %+v", p)
					}
				}
				if p.As == "root of a user namespace" && (strings.HasSuffix(p.Way, "plainly") && p.Result != "recorded" || strings.Contains(p.Way, "mark") && !strings.Contains(p.Detail, "SO_MARK")) {
					t.Errorf("a user namespace: %+v", p)
				}
			}
			if e.has("clock-wrong") {
				t.Errorf("about the service: %s", e.text)
			}
			for _, from := range []string{"the network namespace of sleep", "this host"} {
				for _, way := range []string{"169.254.169.254:80 in an IPv6 socket (::ffff:)", "169.254.169.254:80 host spelled 2852039166", "169.254.169.254:80 path with a dot", "[fd00:ec2::254]:80 path with an escape", "169.254.213.80:253 straight", "[fd69:6d64:7367::80]:253 straight"} {
					if !tried[from+way] {
						t.Errorf("%s was not tried from %s", way, from)
					}
				}
			}
			for _, as := range []string{"an ordinary user", "root"} {
				for _, way := range []string{"127.0.0.1:254 straight", "127.0.0.1:254 straight in an IPv6 socket (::ffff:)", "[::1]:254 straight", "169.254.213.80:253 straight", "[fd69:6d64:7367::80]:253 straight"} {
					if !tried[as+" "+way] {
						t.Errorf("%s was not tried as %s", way, as)
					}
				}
			}
			for _, want := range []string{"ordinary user", "root", "mark of the daemon", "bound to eth0", "root of a user namespace", "::ffff:", "2852039166", "0251.0376", "new network namespace", "[fd00:ec2::254]:80", "escape"} {
				if !strings.Contains(e.text, want) {
					t.Errorf("nothing was tried with %s", want)
				}
			}
		})
	}
}

// The hop limit is measured, over whatever family answers, where the mode lets nobody else
// past the daemon, and where the redirect is removed.
func TestDoctorHopLimit(t *testing.T) {
	t.Parallel()
	var answers atomic.Int32
	const all = 1 << 20
	answers.Store(all)
	h := start(t, netlab.Options{IMDS: &imdstest.Config{TokensRequired: true, Fault: func(r *imdstest.Request) (f imdstest.Fault) {
		if r.Method == "PUT" && answers.Add(-1) < 0 {
			f.Outcome = imdstest.Silence
		}
		return f
	}}}, "mode: enforce\n")
	finds := func(want bool, left string) {
		t.Helper()
		e := h.doctor()
		if e.has("hop-limit") != want {
			t.Errorf("%s", e.text)
		}
		if at := slices.IndexFunc(e.Left, func(l string) bool { return strings.HasPrefix(l, "the hop limit") }); (at >= 0) != (left != "") || at >= 0 && !strings.Contains(e.Left[at], left) {
			t.Errorf("not looked at: %q", e.Left)
		}
	}
	finds(false, "")
	h.IMDS.SetHopLimit(2)
	finds(true, "")
	h.Instance.Do(func() error { return exec.Command("ip", "route", "replace", "unreachable", "169.254.169.254").Run() })
	finds(true, "")
	h.setMode("off", "--for", "5m")
	finds(true, "")
	h.IMDS.SetHopLimit(1)
	finds(false, "")
	answers.Store(0)
	finds(false, "no answer")
	answers.Store(1) // so that it could be the hop limit
	finds(false, "no answer")
	h.Stop()
	finds(false, "a daemon that runs")
	// Where systemd holds the ports, who asks starts a daemon.
	for _, p := range h.doctor().Probes {
		if strings.Contains(p.Way, "straight") {
			t.Errorf("without a daemon its ports are tried: %+v", p)
		}
	}
}

// Whether the service answers without a token is found out in every mode, also where policy would refuse doctor's own
// question; without a daemon by what is tried.
func TestDoctorIMDSv1(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	finds := func(when string) {
		t.Helper()
		for _, required := range []bool{true, false} {
			h.IMDS.SetTokens(required)
			e := h.doctor()
			if strings.Count(e.message("imds-v1"), "\n") != map[bool]int{true: 0, false: 1}[required] {
				t.Errorf("%s, tokens required: %v\n%s", when, required, e.text)
			}
			if slices.ContainsFunc(e.Left, func(l string) bool { return strings.Contains(l, "requires session tokens") }) {
				t.Errorf("%s: %q", when, e.Left)
			}
		}
	}
	finds("audit")
	h.setMode("off", "--for", "5m")
	finds("off")
	h.setMode("enforce", "--for", "5m")
	finds("enforce")
	h.IMDS.Update(func(c *imdstest.Config) {
		c.Fault = func(*imdstest.Request) imdstest.Fault { return imdstest.Fault{Outcome: imdstest.Silence} }
	})
	if e := h.doctor(); e.has("imds-v1") || !slices.ContainsFunc(e.Left, func(l string) bool {
		return strings.HasPrefix(l, "whether the service requires session tokens") && strings.Contains(l, "no answer")
	}) {
		t.Errorf("not looked at: %q\n%s", e.Left, e.text)
	}
	h.IMDS.Update(func(c *imdstest.Config) { c.Fault = nil })
	h.setMode("audit")
	h.Stop()
	finds("no daemon")
}

// Each hole that somebody makes is found, by what gets through it.
func TestDoctorFindsHoles(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, h *host, script string) {
		t.Helper()
		if err := h.Instance.Do(func() error { return exec.Command("sh", "-ec", script).Run() }); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, config, script string
		ids                  []string
		past                 string // among the ways
		not                  string // and this is not
	}{
		{"a rule is deleted", "redirect: {backend: legacy}\n", "iptables-legacy -t nat -F OUTPUT", []string{"redirect-changed"}, "", ""}, // and repaired before it is tried
		{"IPv6 is left out", "redirect: {endpoints: ['169.254.169.254:80']}\n", "", []string{"got-past"}, "[fd00:ec2::254]:80 plainly", "169.254.169.254:80 plainly"},
		{"a rule keeps one user's packets from the connection tracker", "", "iptables -t raw -I OUTPUT -d 169.254.169.254 -m owner --uid-owner 4322 -j NOTRACK", []string{"redirect-evaded"}, "", "169.254.169.254:80 plainly"},
		{"a rule keeps packets from the connection tracker", "", "iptables -t raw -I OUTPUT -d 169.254.169.254 -j NOTRACK", []string{"got-past"}, "169.254.169.254:80 plainly", "[fd00:ec2::254]:80 plainly"},
		{"a rule keeps root's packets from it", "", "iptables -t raw -I OUTPUT -d 169.254.169.254 -m owner --uid-owner 0 -j NOTRACK", []string{"got-past"}, "169.254.169.254:80 in an IPv6 socket (::ffff:), as root, from this host", "169.254.169.254:80 in an IPv6 socket (::ffff:), as an ordinary user"},
		{"a rule keeps root's packets of IPv6 from it", "", "ip6tables -t raw -I OUTPUT -d fd00:ec2::254 -m owner --uid-owner 0 -j NOTRACK", []string{"got-past"}, "[fd00:ec2::254]:80 path with an escape, as root, from this host", "169.254.169.254:80"},
		{"a rule keeps containers' packets of IPv6 from it", "", "ip6tables -t raw -I PREROUTING -d fd00:ec2::254 -i br-lab -j NOTRACK", []string{"got-past"}, "[fd00:ec2::254]:80 path with capitals, as root, from the network namespace of sleep", "169.254.169.254:80"},
		{"a container has a network interface of the instance", "", `ip link add own type veth peer name ec2b
			ip link set own netns BRIDGED; ip link set ec2b netns METADATA
			nsenter --net=METADATA sh -ec 'ip link set ec2b up; ip route add 172.31.0.99 dev ec2b'
			nsenter --net=BRIDGED sh -ec 'ip link set own up; ip addr add 172.31.0.99/32 dev own; ip route add 169.254.169.254 dev own src 172.31.0.99'`,
			[]string{"got-past"}, "169.254.169.254:80 host spelled 0xa9fea9fe, as root, from the network namespace of sleep", "[fd00:ec2::254]:80"},
		{"a rule leads containers from the daemon's port to the service", "", "iptables -t nat -A PREROUTING -d 169.254.213.80 -p tcp --dport 253 -j DNAT --to-destination 169.254.169.254:80", []string{"got-past"}, "169.254.213.80:253 straight, as root, from the network namespace of sleep", "169.254.169.254:80"},
		{"a rule leads from the daemon's port to the service", "", `sysctl -qw net.ipv4.conf.all.route_localnet=1
			iptables -t nat -A OUTPUT -d 127.0.0.1 -p tcp --dport 254 -j DNAT --to-destination 169.254.169.254:80
			iptables -t nat -A POSTROUTING -d 169.254.169.254 -j MASQUERADE`, []string{"got-past"}, "127.0.0.1:254 straight in an IPv6 socket (::ffff:), as an ordinary user, from this host", "169.254.169.254:80"},
		{"somebody answers in the daemon's place", "", "ip6tables -t nat -A OUTPUT -d ::1 -p tcp --dport 254 -j REDIRECT --to-ports 9254", []string{"got-past"}, "[::1]:254 straight, as an ordinary user, from this host", "[fd00:ec2::254]:80"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, netlab.Options{Containers: strings.Contains(c.name, "container")}, c.config)
			h.t = t
			h.logged("serving")
			impostor, err := h.Instance.Listen(t.Context(), nil, "tcp", "[::1]:9254")
			if err != nil {
				t.Fatal(err)
			}
			defer imdstest.Serve(imdstest.Config{}, impostor).Close()
			if h.Bridged != nil {
				c.script = strings.NewReplacer("BRIDGED", h.Bridged.Path(), "METADATA", h.Metadata.Path()).Replace(c.script)
			}
			var e examined
			for range 20 { // until the first look is over, which would repair it
				if c.script != "" {
					run(t, h, c.script)
				}
				if e = h.doctor(); e.has(c.ids[0]) {
					break
				}
			}
			for _, id := range c.ids {
				if !e.has(id) {
					t.Errorf("no %s\n%s", id, e.text)
				}
			}
			past := e.past()
			if c.past != "" && !slices.ContainsFunc(past, func(w string) bool { return strings.HasPrefix(w, c.past) }) || c.not != "" && slices.ContainsFunc(past, func(w string) bool { return strings.HasPrefix(w, c.not) }) {
				t.Errorf("got past: %v", past)
			}
			if e.code != 1 {
				t.Errorf("exit status %d", e.code)
			}
		})
	}
}

// However many namespaces there are, and however silent what they are connected to, it ends.
func TestDoctorIsBounded(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	h.t = t
	began := time.Now()
	e := h.doctorWith(h.Config, `for i in $(seq 40); do
	unshare -n sh -ec 'ip link set lo up; ip link add void type bridge; ip link set void up; ip addr add 10.0.0.1/24 dev void; ip addr add fd00::1/64 dev void nodad; ip route add default dev void; ip -6 route add default dev void; exec sleep 300' >/dev/null 2>&1 &
done; sleep 3`)
	if took := time.Since(began); took > 40*time.Second { // one after the other they take 80
		t.Errorf("it took %v", took)
	}
	if len(e.Probes) < 32*8 || !strings.Contains(e.text, "tried from the first 32") || !strings.Contains(e.text, "tried from the first 8") {
		t.Errorf("%d tries\n%s", len(e.Probes), e.text)
	}
}

// Rules in both back ends are told of, and rules in one are not.
func TestDoctorTwoBackends(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "redirect: {backend: nft}\n")
	h.t = t
	if e := h.doctor("--preflight"); e.has("two-backends") {
		t.Errorf("before there are any: %s", e.text)
	}
	if err := h.Instance.Do(func() error {
		return exec.Command("iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "ACCEPT").Run()
	}); err != nil {
		t.Fatal(err)
	}
	if e := h.doctor("--preflight"); !e.has("two-backends") {
		t.Errorf("%s", e.text)
	}
}

// Without a daemon it says so, and with --preflight it tries nothing.
func TestDoctorWithoutDaemon(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	h.Stop()
	if e := h.doctor(); !e.has("daemon-not-running") || !e.has("got-past") || e.code != 1 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
	if e := h.doctor("--preflight"); e.has("daemon-not-running") || len(e.Probes) != 0 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
	h.Instance.Do(func() error {
		return exec.Command("iptables", "-A", "OUTPUT", "-d", "169.254.169.254", "-j", "REJECT").Run()
	})
	if e := h.doctor("--preflight"); !e.has("redirect-lock") || e.code != 1 {
		t.Errorf("a lock: %d\n%s", e.code, e.text)
	}
}

// It changes nothing: not the rules, routes and settings of the host, nor what the daemon keeps but for events and first-seen. The
// same with a daemon and without.
func TestDoctorReadsOnly(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	state := func() string {
		out, code := h.run(client{args: []string{"sh", "-ec", `iptables-save | grep -v '^#' | sed 's/\[[0-9:]*\]//'; ip6tables-save | grep -v '^#' | sed 's/\[[0-9:]*\]//'
			ip rule; ip route show table all; ip -6 route show table all; ip -o link | cut -d' ' -f2-9; ip -o addr
			sysctl -a 2>/dev/null | grep '^net' | grep -v -e nf_conntrack_count -e conntrack_.*_entries
			find "$0" -type f ! -path '*/log/*' ! -name 'first-seen.db*' -printf '%p %m %u %s %T@\n' | sort`, h.Dir}})
		if code != 0 || len(out) < 1000 || !strings.Contains(out, "IMDSGATE") && !strings.Contains(out, "imdsgate") {
			t.Fatalf("%d\n%s", code, out)
		}
		return out
	}
	before := state()
	if e := h.doctor(); len(e.Probes) < 10 {
		t.Errorf("it has tried little: %s", e.text)
	}
	if after := state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	h.Stop() // the redirect stays, in enforce mode
	before = state()
	h.doctor()
	h.doctor("--preflight")
	if after := state(); after != before {
		t.Errorf("without the daemon, before:\n%s\nafter:\n%s", before, after)
	}
}

// What can be wrong with a host, a configuration or a daemon, one thing at a time.
func TestDoctorFinds(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	h.Stop()
	dir := t.TempDir()
	profiles, err := filepath.Abs("../../packaging/profiles")
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), mode), os.Chmod(name, mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("readable.ndjson", "", 0o644)
	write("rules/x.toml", "", 0o666)
	in := strings.NewReplacer("DIR", dir, "PROFILES", profiles)
	find := func(config, script string) examined {
		write("config.yaml", "mode: audit\n"+in.Replace(config), 0o644)
		return h.doctorWith(filepath.Join(dir, "config.yaml"), in.Replace(script), "--preflight")
	}
	for range 5 {
		ln, err := h.Instance.Listen(t.Context(), nil, "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
	}
	clean := find("profile_paths: [PROFILES]\n", "")
	const expired = "grants:\n- {name: old, executable: /usr/sbin/cron, user: root, owner: x, reason: x, expires: 2020-01-01}\n"
	for _, c := range []struct{ id, config, script, says string }{
		{"config-refused", "grants: [{name: x}]\n", "", "executable"},
		{"config-refused", "mod: audit\n", "", "mod: audit"},
		{"config-refused", "redirect: {host_port: 2254}\n", "", "1024"},
		{"rules-writable", "rules: {paths: [DIR/rules/x.toml], skip_refused: true}\n", "", "x.toml is writable by others"},
		{"grant-expired", expired, "", "grant old"},
		{"defend-twice", "events: {layout: defend}\n", "mount -t tmpfs tmpfs /opt; mkdir -p /opt/Elastic/Endpoint", "twice"},
		{"events-readable", "events: {path: DIR/readable.ndjson}\n", "", "readable.ndjson"},
		{"spool-space", "events: {path: DIR/rules/events.ndjson}\n", "mount -t tmpfs -o size=1m tmpfs DIR/rules", "1 MB free"},
		{"spool-read-only", "events: {path: DIR/rules/events.ndjson}\n", "mount -t tmpfs -o ro tmpfs DIR/rules", "read-only"},
		{"machine-id", "", "[ ! -e /etc/machine-id ] || mount --bind /dev/null /etc/machine-id", "machine-id"},
		{"hidepid", "", "mount -t proc -o hidepid=2 proc /proc", "hidepid="},
		{"selinux-denied", "", "mount -t tmpfs tmpfs /sys/fs; mkdir /sys/fs/selinux; echo 1 >/sys/fs/selinux/enforce; mount -t tmpfs tmpfs /var/log; mkdir /var/log/audit\n" +
			`{ echo 'type=AVC msg=audit(1.1:1): avc:  denied  { old } for pid=1 comm="imdsgated" scontext=x permissive=0'
			echo "type=AVC msg=audit($(date +%s).1:1): avc:  denied  { let } for pid=1 comm=\"imdsgated\" scontext=x permissive=1"
			echo "type=AVC msg=audit($(date +%s).1:1): avc:  denied  { bpf } for pid=1 comm=\"imdsgated\" scontext=x permissive=0"; } >/var/log/audit/audit.log`, "{ bpf }"},
		{"profile-missing", "profile_paths: [PROFILES]\n", "mount -t tmpfs tmpfs /opt; mkdir -p /opt/datadog-agent/bin/agent; cp /bin/sleep /opt/datadog-agent/bin/agent/agent; /opt/datadog-agent/bin/agent/agent 60 >/dev/null 2>&1 & sleep 0.3", "datadog-agent runs"},
		// By a pattern, and its file is not there any more.
		{"profile-missing", "profile_paths: [PROFILES]\n", "mount -t tmpfs tmpfs /opt; a=/opt/Elastic/Agent/data/elastic-agent-9.1.0-abc; mkdir -p $a/components; cp /bin/sleep $a/components/agentbeat; $a/components/agentbeat 60 >/dev/null 2>&1 & sleep 0.3; rm $a/components/agentbeat", "elastic-agent-aws runs"},
		// On an image that is being made, where nothing of it runs.
		{"profile-missing", "profile_paths: [PROFILES]\n", "mount -t tmpfs tmpfs /opt; mkdir -p /opt/datadog-agent/bin/agent; touch /opt/datadog-agent/bin/agent/agent", "datadog-agent is installed"},
		{"profile-missing", "profile_paths: [PROFILES]\n", units("cloud-init-local.service"), "cloud-init is installed (cloud-init-local.service)"},
		{"profile-missing", "profile_paths: [PROFILES]\n", units("ec2-instance-connect-harvest-hostkeys.service"), "ec2-instance-connect is installed"},
		{"profile-missing", "profile_paths: [PROFILES]\nclasses: {inventory: strict}\n", units("policy-routes@.service"), "amazon-ec2-net-utils is installed"},
		{"container-endpoint", "profile_paths: [PROFILES]\n", "mount -t tmpfs tmpfs /usr/libexec; cp /bin/sleep /usr/libexec/amazon-ecs-init; /usr/libexec/amazon-ecs-init 60 >/dev/null 2>&1 & sleep 0.3", "169.254.170.2:80"},
		{"container-endpoint", "profile_paths: [PROFILES]\n", "ip -6 addr add fd00:ec2::23/128 dev lo", "[fd00:ec2::23]:80"},
		{"capability-missing", "", `set -- setpriv --bounding-set=-bpf "$@"`, "CAP_BPF"},
		{"iptables-missing", "", "mount -t tmpfs tmpfs /usr/sbin", "iptables"},
		{"rules-unreadable", "", refuse("DIR", "*save"), "no rules today"},
		{"rules-doubtful", "redirect: {endpoints: ['169.254.169.254:80']}\n", "", "[fd00:ec2::254]:80 is not among redirect.endpoints"},
		{"conntrack-full", "", "echo 8 >DIR/eight; mount --bind DIR/eight /proc/sys/net/netfilter/nf_conntrack_max", "connection tracking has room for 8"},
		{"family-skipped", "", "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$f; done\n" + refuse("DIR", "*ip6*"), "IPv6: IPv6 is off on every interface"}, // and stays so
	} {
		e := find(c.config, c.script)
		if m := e.message(c.id); !strings.Contains(m, c.says) {
			t.Errorf("after %q, with %q: %s: %q\n%s", c.script, c.config, c.id, m, e.text)
		}
		if c.id != "machine-id" && strings.Contains(clean.message(c.id), c.says) { // the machine that this runs on may have none
			t.Errorf("%s is always there: %s", c.id, clean.text)
		}
	}
	// No profile is missing of what is masked, granted, refused to nobody or somebody else's.
	for _, c := range []struct{ config, script string }{
		{"", units("cloud-init.service") + "; ln -s /dev/null /run/systemd/system/cloud-init.service"},
		{"grants: [{name: own, executable: /usr/bin/python3.11, unit: cloud-init.service, classes: [user-data], owner: x, reason: x}]\n", units("cloud-init.service")},
		{"profiles: [cloud-init]\n", units("cloud-init.service")},
		{"", units("policy-routes@.service")},
		{"", units("sshd.service")},
	} {
		if e := find("profile_paths: [PROFILES]\n"+c.config, c.script); e.has("profile-missing") || e.has("config-refused") {
			t.Errorf("after %q, with %q:\n%s", c.script, c.config, e.text)
		}
	}
	var clock unix.Timex
	if _, err := unix.Adjtimex(&clock); err != nil || clean.has("clock-unsynchronised") != (clock.Status&unix.STA_UNSYNC != 0) {
		t.Errorf("the clock's status is %#x, %v\n%s", clock.Status, err, clean.text)
	}
}

// Who shares the network of the host, and is not root: named are those who can send past the redirect, and containers that the hop limit does not hold, and no others.
func TestDoctorOfNeighbours(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	h.Stop()
	const script = `
mount -t tmpfs tmpfs /opt; chmod 755 /opt
for name in ambient elsewhere mapped boxed podded rooted served guest sidecar; do cp /bin/sleep /opt/$name; done
mkdir /opt/cgroups; mount -t cgroup2 cgroup2 /opt/cgroups; cd /opt/cgroups
within() { mkdir -p $1; echo $$ >$1/cgroup.procs; shift; "$@" >/dev/null 2>&1 & echo $$ >cgroup.procs; }
raw='setpriv --reuid=4321 --regid=4321 --clear-groups --inh-caps=+net_raw --ambient-caps=+net_raw'
usual='setpriv --bounding-set=-all,+net_raw,+chown --inh-caps=-all'
/opt/rooted 60 >/dev/null 2>&1 &
$raw /opt/ambient 60 >/dev/null 2>&1 &
unshare -n $raw /opt/elsewhere 60 >/dev/null 2>&1 &
setpriv --reuid=4321 --regid=4321 --clear-groups unshare -Ur /opt/mapped 60 >/dev/null 2>&1 &
within system.slice/served.service $raw /opt/served 60
within docker/BOXED $usual /opt/boxed 60
within docker/ELSEWHERE unshare -n /opt/elsewhere 60
within kubepods/burstable/podPOD/ELSEWHERE setpriv --bounding-set=-net_raw /opt/podded 60
within kubepods/burstable/podPOD/BOXED setpriv --bounding-set=-net_raw /opt/sidecar 60
unshare --pid --fork --kill-child /opt/guest 60 >/dev/null 2>&1 &
python3 -c 'import os, socket, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
os.setgid(4322); os.setuid(4322); time.sleep(60)' >/dev/null 2>&1 &
sleep 1
`
	boxed, elsewhere, pod := strings.Repeat("b0", 32), strings.Repeat("e1", 32), "12345678-1234-1234-1234-123456789abc"
	e := h.doctorWith(h.Config, strings.NewReplacer("BOXED", boxed, "ELSEWHERE", elsewhere, "POD", pod).Replace(script), "--preflight")
	const past = " can send packets past every firewall of this host, our rules among them, to the metadata service, too: "
	python, err := exec.Command("python3", "-c", "import os; print(os.path.basename(os.readlink('/proc/self/exe')), end='')").Output()
	if err != nil {
		t.Fatal(err)
	}
	others := []string{
		"ambient (no unit, uid 4321): CAP_NET_RAW", "boxed (container " + boxed[:12] + ", uid 0): CAP_NET_RAW", "guest (no unit, uid 0): CAP_NET_RAW",
		string(python) + " (no unit, uid 4322): a packet socket",
	}
	for severity, want := range map[string]string{
		"warning": "programs that are no services of this host" + past + strings.Join(others, "; "),
		"info":    "services that do not run as root" + past + "served (served.service, uid 4321): CAP_NET_RAW",
	} {
		var got []string
		for _, f := range e.Findings {
			if f.ID == "raw-sockets" && f.Severity == severity {
				got = append(got, f.Message)
			}
		}
		if !slices.Equal(got, []string{want}) {
			t.Errorf("%s: %q, want %q\n%s", severity, got, want, e.text)
		}
	}
	contained := []string{"container " + boxed[:12] + ": boxed", "no unit: guest", "pod " + pod + ": podded, sidecar"}
	if m := e.message("host-network-containers"); !strings.HasSuffix(m, " from them: "+strings.Join(contained, "; ")+"\n") {
		t.Errorf("%q, want %q\n%s", m, contained, e.text)
	}
	if e := h.doctor("--preflight"); e.has("raw-sockets") || e.has("host-network-containers") {
		t.Errorf("without them: %s", e.text)
	}
}

// units has a host that has these units of systemd, and no other agent.
func units(names string) string {
	return "for d in /opt /run/systemd /usr/lib/systemd /etc/systemd; do mkdir -p $d; mount -t tmpfs tmpfs $d; done; mkdir /run/systemd/system /usr/lib/systemd/system; " +
		"for u in " + names + "; do echo [Unit] >/usr/lib/systemd/system/$u; done"
}

// refuse puts a script into the place of iptables, under all of its names, that fails for some of them.
func refuse(dir, names string) string {
	return strings.NewReplacer("AT", dir, "NAMES", names).Replace(`real=$(readlink -f "$(command -v iptables-nft)"); cp "$real" AT/real; cat >AT/half <<'END'
#!/bin/sh
case $0 in NAMES) echo "no rules today" >&2; exit 1;; esac
exec AT/real "${0##*/}" "$@"
END
chmod 755 AT/half; mount --bind AT/half "$real"`)
}

// What the daemon knows to be wrong, doctor says; and what the service knows of the clock.
func TestDoctorAsksOthers(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{IMDS: &imdstest.Config{Now: func() time.Time { return time.Now().Add(-time.Hour) }}})
	ln, err := h.Instance.Listen(t.Context(), nil, "tcp", "127.0.0.1:9254")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	rule := filepath.Join(t.TempDir(), "no.toml")
	if err := os.WriteFile(rule, []byte("[rule]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	h.start("metrics: {listen: '127.0.0.1:9254'}\nrules: {paths: [" + rule + "], skip_refused: true}\nattribution: {uncovered: report}\n" +
		"grants:\n- {name: soon, executable: /usr/sbin/cron, user: root, owner: x, reason: x, expires: " + time.Now().AddDate(0, 0, 3).Format(time.DateOnly) + "}\n")
	e := h.doctor()
	for id, says := range map[string]string{
		"mode-audit": "audit", "metrics-not-served": "address already in use", "rules-skipped": "left out", "grant-expiring": "grant soon",
		"not-covered": "namespaces", "clock-wrong": "the clock is 1h0m", "imds-v1": "",
	} {
		if m := e.message(id); m == "" || !strings.Contains(m, says) {
			t.Errorf("%s: %q\n%s", id, m, e.text)
		}
	}
	if m := e.message("clock-wrong"); !strings.Contains(m, "ahead of that of the service") {
		t.Error(m)
	}
	h.setMode("off", "--for", "5m")
	if e := h.doctor(); !strings.Contains(e.message("mode-off"), "is off") || e.has("got-past") || e.code != 1 {
		t.Errorf("mode off: %d\n%s", e.code, e.text)
	}
}

// A daemon whose files have suffered: another's mode, and a disk that is full.
func TestDoctorOfTheSpoiled(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	h.Stop()
	if err := os.WriteFile(filepath.Join(h.State(), "mode.json"), []byte(`{"mode": "off", "un`), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(h.Events)
	defer small(t, dir)()
	h.startWith(gate.Settings{Config: "mode: enforce\n", Dir: h.Dir})
	var e examined
	for range 20 {
		if e = h.doctor(); e.has("events-missing") {
			break
		}
	}
	for id, says := range map[string]string{"mode-wrong": "which mode was set before is not known", "events-missing": "events are missing since the daemon started"} {
		if m := e.message(id); !strings.Contains(m, says) {
			t.Errorf("%s: %q\n%s", id, m, e.text)
		}
	}
	if e.has("mode-off") || e.code != 1 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
}

// A daemon that somebody's rule keeps clients from, and then one who cannot write rules any more.
func TestDoctorOfTheObstructed(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.output("iptables", "-t", "raw", "-I", "OUTPUT", "-d", "169.254.169.254", "-j", "NOTRACK")
	h.start("redirect: {backend: nft}\n")
	finds := func(id, says string, known func(report.Status) bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if s, err := h.Status(); err == nil && known(s) {
				break
			}
		}
		if e := h.doctor(); !strings.Contains(e.message(id), says) || e.code != 1 {
			t.Errorf("%s: %q\n%s", id, e.message(id), e.text)
		}
	}
	finds("self-test", "did not come to the daemon", func(s report.Status) bool { return s.SelfTest.Error != "" })
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h.output("nsenter", "-t", strconv.Itoa(h.PID()), "-m", "--", "sh", "-ec", refuse(dir, "*restore*"))
	h.output("iptables-nft", "-t", "nat", "-F", "OUTPUT")
	finds("redirect-failed", "no rules today", func(s report.Status) bool { return s.Redirect.Error != "" })
	if !strings.Contains(h.Log(), `"repaired":0`) || !strings.Contains(h.Log(), "no rules today") {
		t.Errorf("the log: %s", h.Log())
	}
}

// A daemon that has less than is asked for, no way to the service, and then no answer.
func TestDoctorOfTheWeak(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.Instance.Do(func() error {
		return exec.Command("sh", "-ec", "ip route replace unreachable 169.254.169.254; ip -6 route replace unreachable fd00:ec2::254").Run()
	})
	h.startWith(gate.Settings{Config: "attribution: {require_level: L3}\n", Lacks: attribution.Level1})
	var e examined
	for end := time.Now().Add(20 * time.Second); !e.has("no-route") && time.Now().Before(end); {
		e = h.doctor()
	}
	for id, says := range map[string]string{"no-route": "route", "attribution-level": "requires L3", "not-covered": "no L1", "imds-silent": "answers nobody"} {
		if m := e.message(id); !strings.Contains(m, says) {
			t.Errorf("%s: %q\n%s", id, m, e.text)
		}
	}
	if e.has("self-test") {
		t.Errorf("without a route: %s", e.text)
	}
	h.Signal(syscall.SIGSTOP)
	defer h.Signal(syscall.SIGCONT)
	if e := h.doctor(); !e.has("daemon-silent") || e.has("daemon-not-running") || e.code != 1 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
}

// Somebody has so many descriptors that the daemon, without eBPF, does not get through
// them while a request waits. Not in parallel until they are gone: the others' searches
// would go through them, too.
func TestDoctorOfTheSlow(t *testing.T) {
	h := prepare(t, netlab.Options{})
	sdk := h.install(h.sdk)
	h.startWith(gate.Settings{Config: "mode: enforce\n" + grant(sdk, ordinaryUser), Lacks: attribution.Level1})
	cmd := exec.Command("python3", "-c", `
import os, resource, sys
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
if os.fork(): os.fork()
for i in range(15000): os.dup(0)
sys.stdin.read()
`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	over := sync.OnceFunc(func() { in.Close(); cmd.Wait() })
	defer over()
	for end := time.Now().Add(20 * time.Second); ; {
		h.run(client{uid: ordinaryUser, args: []string{sdk}}) // who has a grant is searched for everywhere
		s, err := h.Status()
		if err == nil && s.Attribution.Slow() {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%+v, %v", s.Attribution, err)
		}
	}
	over()
	t.Parallel()
	if e := h.doctor(); !regexp.MustCompile(`process \d+ had \d{4,} of`).MatchString(e.message("attribution-slow")) {
		t.Errorf("%q\n%s", e.message("attribution-slow"), e.text)
	}
}
