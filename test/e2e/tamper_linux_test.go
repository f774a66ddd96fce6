package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// found waits for what the daemon says is not as it should be.
func (h *host) found(action string, ok func(gate.Document) bool) gate.Document {
	h.t.Helper()
	d, err := h.Await(action, func(d gate.Document) bool {
		return d.At("event.action") == action && d.At("event.kind") == "alert" && ok(d)
	})
	if err != nil {
		h.t.Fatal(err)
	}
	threat := [][2]any{{"threat.framework", nil}, {"threat.tactic.id", nil}, {"threat.tactic.name", nil}, {"threat.technique.id", nil}, {"threat.technique.name", nil}}
	if t := techniques[action]; t != [2]string{} {
		threat = [][2]any{{"threat.framework", "MITRE ATT&CK"}, {"threat.tactic.id", []any{"TA0112"}}, {"threat.tactic.name", []any{"Defense Impairment"}},
			{"threat.technique.id", []any{t[0]}}, {"threat.technique.name", []any{t[1]}}}
	}
	for _, field := range threat {
		if got := d.At(field[0].(string)); !reflect.DeepEqual(got, field[1]) {
			h.t.Errorf("%s: %s is %v, want %v", action, field[0], got, field[1])
		}
	}
	return d
}

// techniques are what somebody does of whom an event tells, by ATT&CK v19 (attack.mitre.org/tactics/TA0112). Of the others it may be
// an operator, or nobody.
var techniques = map[string][2]string{
	"redirect-rule-changed": {"T1686", "Disable or Modify System Firewall"},
	"redirect-contested":    {"T1686", "Disable or Modify System Firewall"},
	"redirect-evaded":       {"T1686", "Disable or Modify System Firewall"},
	"bpf-program-detached":  {"T1685", "Disable or Modify Tools"},
	"attribution-broken":    {"T1685", "Disable or Modify Tools"},
	"imds-mark-forged":      {"T1685", "Disable or Modify Tools"},
}

func says(text string) func(gate.Document) bool {
	return func(d gate.Document) bool { m, _ := d.At("message").(string); return strings.Contains(m, text) }
}

// Who flushes the rules is named: by the kernel, and by what was read of him while he
// lived.
func TestFlushedBy(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	// It holds the rules still open after the flush, as an interactive nft does.
	cmd := exec.Command("sh", "-c", `(echo flush table ip nat; sleep 2) | nft -i >/dev/null`)
	if err := h.Instance.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	d := h.found("redirect-rule-changed", says("IPv4 nat"))
	if d.At("imdsgate.actor.name") != "nft" || d.At("imdsgate.actor.user.id") != "0" ||
		!strings.HasSuffix(fmt.Sprint(d.At("imdsgate.actor.executable")), "/nft") || d.At("imdsgate.actor.command_line") != "nft -i" ||
		!strings.Contains(fmt.Sprint(d.At("message")), "/nft (pid ") || d.At("threat.technique.id") == nil {
		t.Errorf("%v", d)
	}
	t.Logf("%v", d.At("message"))

	// One that has ended by then.
	named := 0
	const flushes = 5
	for range flushes {
		s, err := h.Status()
		if err != nil {
			t.Fatal(err)
		}
		h.Instance.Do(func() error { return exec.Command("iptables", "-t", "raw", "-F").Run() })
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			if now, err := h.Status(); err == nil && now.Redirect.Repairs > s.Redirect.Repairs {
				break
			}
			if time.Now().After(end) {
				t.Fatal("not repaired")
			}
		}
	}
	time.Sleep(200 * time.Millisecond) // events are written
	all, err := h.Documents()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
		if m, _ := d.At("message").(string); strings.Contains(m, "IPv4 raw") {
			if d.At("imdsgate.actor.name") != "iptables" {
				t.Errorf("%v", d)
			}
			if d.At("imdsgate.actor.executable") != nil {
				named++
			}
		}
	}
	t.Logf("of %d who had ended, the program of %d was read", flushes, named)
}

// Another program removes the redirect as often as it is there. The daemon neither gives
// in, nor fills its file, and says so.
func TestContested(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	cmd := exec.Command("sh", "-c", `while :; do iptables -t nat -F; sleep 0.2; done`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := h.Instance.Start(cmd); err != nil {
		t.Fatal(err)
	}
	kill := func() { cmd.Process.Kill(); cmd.Wait() }
	defer kill()
	await := func(what string, ok func(report.Status) bool) (s report.Status) {
		t.Helper()
		for end := time.Now().Add(60 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			s, err := h.Status()
			if err == nil && ok(s) {
				return s
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %+v, %v", what, s.Redirect, err)
			}
		}
	}
	s := await("contested", func(s report.Status) bool { return strings.Contains(s.Redirect.Contested, "changed again and again") })
	d := h.found("redirect-contested", says("again and again"))
	t.Logf("%v", d.At("message"))
	out, code := h.imdsgate("status")
	if code != 1 || !strings.HasPrefix(out, "NOT protected") || !strings.Contains(out, "! changed again and again") {
		t.Errorf("%d\n%s", code, out)
	}
	const rounds = 3
	began, repairs := time.Now(), s.Redirect.Repairs
	s = await("it goes on", func(s report.Status) bool { return s.Redirect.Repairs >= repairs+rounds })
	// Looks come ever more seldom: half a second, one, two, four. The first may have been due.
	if took := time.Since(began); took < 1500*time.Millisecond {
		t.Errorf("%d repairs in %v", rounds, took)
	}
	if e := h.doctor(); !strings.Contains(e.message("redirect-contested"), "again and again") || e.code != 1 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
	kill()
	s = await("it is over", func(s report.Status) bool { return s.Redirect.Installed && s.Redirect.Contested == "" })
	t.Logf("%d repairs", s.Redirect.Repairs)
}

// Somebody's rule keeps this host's clients from us, and goes: they come here from then on, and the way is tested.
func TestHookTakenLater(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	rule := []string{"OUTPUT", "-d", "169.254.169.254", "-j", "REJECT"}
	h.output("iptables", append([]string{"-A"}, rule...)...)
	h.start("redirect: {endpoints: ['169.254.169.254:80']}\n")
	until := func(what string, ok func(report.Status) bool) {
		t.Helper()
		for end := time.Now().Add(45 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			s, err := h.Status()
			if err == nil && ok(s) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("not %s: %+v, %+v, %v", what, s.Redirect, s.SelfTest, err)
			}
		}
	}
	locked := time.Now()
	until("locked", func(s report.Status) bool { return len(s.Redirect.Locks) > 0 && s.SelfTest.NoRoute != "" })
	h.output("iptables", append([]string{"-D"}, rule...)...)
	until("tested", func(s report.Status) bool {
		return len(s.Redirect.Locks) == 0 && s.SelfTest.NoRoute == "" && s.SelfTest.Passed != nil
	})
	closed, err := h.Await("an event that it is taken again", func(d gate.Document) bool { return d.At("event.action") == "redirect-restored" })
	if err != nil {
		t.Fatal(err)
	}
	if lasted, _ := closed.At("event.duration").(float64); time.Duration(lasted) < time.Since(locked)-5*time.Second || time.Duration(lasted) > time.Since(locked)+5*time.Second {
		t.Errorf("it lasted %v, and was there %v ago", time.Duration(lasted), time.Since(locked))
	}
	if reason, _ := closed.At("message").(string); !strings.Contains(reason, "REJECT") {
		t.Errorf("of what it is the end is not said: %q", reason)
	}
}

// The programs in the kernel are detached, and attached again.
func TestDetachedPrograms(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	s, err := h.Status()
	if err != nil {
		t.Fatal(err)
	}
	if s.Attribution.Level < "L2" {
		missing := "needs level 2, and this host has " + s.Attribution.Level + ": there are no such programs"
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	info, err := os.Stat(h.Cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	detach := func() {
		t.Helper()
		links, n := new(link.Iterator), 0
		defer links.Close()
		for links.Next() {
			l, err := links.Link.Info()
			if err != nil || l.Type != link.CgroupType || l.Cgroup() == nil || l.Cgroup().CgroupId != info.Sys().(*syscall.Stat_t).Ino {
				continue
			}
			if err := links.Link.Detach(); err != nil {
				t.Fatal(err)
			}
			n++
		}
		if n == 0 {
			t.Fatal("there are no links")
		}
	}
	detach()
	began := time.Now()
	h.curl(client{uid: ordinaryUser}, role) // who has no witness, so that it is looked at once
	d := h.found("bpf-program-detached", says("cgroup/connect4"))
	t.Logf("after %v: %v", time.Since(began).Round(time.Millisecond), d.At("message"))
	if n, _ := d.At("event.duration").(float64); n <= 0 || time.Duration(n) > time.Minute {
		t.Errorf("for %v", d.At("event.duration"))
	}
	if s, err := h.Status(); err != nil || s.Attribution.Broken != "" {
		t.Errorf("%+v, %v", s.Attribution, err)
	}

	// The daemon itself is moved to where they do not see it, so that it cannot know whether they see others.
	err = os.WriteFile(h.Cgroup.Path()+"/../cgroup.procs", []byte(strconv.Itoa(h.PID())), 0)
	if err != nil {
		t.Fatal(err)
	}
	detach()
	h.curl(client{uid: ordinaryUser}, role)
	d = h.found("attribution-broken", says("no longer tells"))
	broke, err := time.Parse(time.RFC3339Nano, fmt.Sprint(d.At("@timestamp")))
	if err != nil {
		t.Fatal(err)
	}
	broke = broke.Add(-10 * time.Millisecond) // the event is made a moment later
	if e := h.doctor(); !strings.Contains(e.message("attribution-broken"), "connect4") || e.code != 1 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
	if out, code := h.imdsgate("status"); code != 1 || !strings.HasPrefix(out, "NOT protected") {
		t.Errorf("%d\n%s", code, out)
	}

	// It is moved back.
	moved := time.Now()
	if err := os.WriteFile(h.Cgroup.Path()+"/cgroup.procs", []byte(strconv.Itoa(h.PID())), 0); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) { // it looks every 30 s
		if s, err := h.Status(); err == nil && s.Attribution.Broken == "" {
			break
		}
	}
	d = h.found("attribution-restored", says("works again"))
	if n, _ := d.At("event.duration").(float64); time.Duration(n) < moved.Sub(broke) || time.Duration(n) > time.Since(broke) {
		t.Errorf("it was broken for %v, and that began %v ago", d.At("event.duration"), time.Since(broke))
	}
	if s, err := h.Status(); err != nil || s.Attribution.Broken != "" {
		t.Errorf("%+v, %v", s.Attribution, err)
	}
	if e := h.doctor(); e.has("attribution-broken") || len(e.past()) > 0 {
		t.Errorf("afterwards: %s", e.text)
	}
}

// unforced starts a program for which SO_RCVBUFFORCE is not permitted, as in a container with a user namespace of its
// own, however many capabilities it has there (sk_setsockopt in net/core/sock.c).
const unforced = `#!/usr/bin/env python3
import ctypes, os, platform, struct, sys
setsockopt = {'x86_64': 54, 'aarch64': 208}[platform.machine()]
code = b''.join(struct.pack('HBBI', *i) for i in [
	(0x20, 0, 0, 0), (0x15, 0, 5, setsockopt),
	(0x20, 0, 0, 24), (0x15, 0, 3, 1), # SOL_SOCKET
	(0x20, 0, 0, 32), (0x15, 0, 1, 33), # SO_RCVBUFFORCE
	(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)])
class Program(ctypes.Structure): _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(Program(len(code)//8, code)), 0, 0): sys.exit(os.strerror(ctypes.get_errno()))
os.execv('DAEMON', ['DAEMON'] + sys.argv[1:])
`

// The kernel does not tell a daemon of changes. It serves, and says that nobody looks.
func TestNotWatched(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	dir, err := os.MkdirTemp("/opt", "imdsgate-e2e")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	daemon := filepath.Join(dir, "imdsgated")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(daemon, []byte(strings.ReplaceAll(unforced, "DAEMON", h.gate.Daemon)), 0o755), os.Chmod(daemon, 0o755)); err != nil {
		t.Fatal(err)
	}
	h.gate.Daemon = daemon
	h.start("mode: enforce\nredirect: {backend: nft}\n")
	d := h.found("redirect-not-watched", says("not watched any more"))
	if reason, _ := d.At("event.reason").(string); !strings.Contains(reason, "subscribe to changes: operation not permitted") {
		t.Errorf("why is not said: %v", d)
	}
	if got := h.curl(client{uid: ordinaryUser}, instanceID); got != "200" {
		t.Errorf("a client: %s", got)
	}
	if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
		t.Errorf("a thief: %s", got)
	}
	if s, err := h.Status(); err != nil || !strings.Contains(s.Redirect.Error, "the redirect is not watched: subscribe") {
		t.Errorf("%v, %+v", err, s.Redirect)
	}
	if out, code := h.imdsgate("status"); code != 1 || !strings.Contains(out, "not watched") {
		t.Errorf("%d\n%s", code, out)
	}
	if e := h.doctor(); !strings.Contains(e.message("redirect-failed"), "not watched") || e.code != 1 {
		t.Errorf("%d\n%s", e.code, e.text)
	}
	h.output("iptables-nft", "-t", "nat", "-F", "IMDSGATE-OUTPUT")
	time.Sleep(time.Second) // in which a daemon that is told repairs it
	if out, intact := h.verified(); intact || !strings.Contains(out, "IPv4 nat IMDSGATE-OUTPUT") {
		t.Errorf("it is watched: %s", out)
	}
}

// Files of the daemon are changed under it. Nothing of them is in force, and each is told.
func TestFilesChanged(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.gate.Daemon = h.install(h.gate.Daemon)
	rules := t.TempDir()
	rule := filepath.Join(rules, "one.toml")
	write := func(path, text string) string {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(text))
		return hex.EncodeToString(sum[:])
	}
	const text = "[rule]\nrule_id = %q\nname = \"x\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = '''\nnetwork where process.name == \"nobody\"\n'''\n"
	loaded := write(rule, fmt.Sprintf(text, "one"))
	config := "mode: enforce\nrules: {paths: [" + rules + "]}\n"
	h.start(config)
	s, err := h.Status()
	if err != nil || len(s.Files.Loaded) < 2 || len(s.Files.Changed) > 0 {
		t.Fatalf("%+v, %v", s.Files, err)
	}
	digest := s.Policy.Digest
	if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
		t.Fatal(got)
	}

	now := write(rule, fmt.Sprintf(text, "two"))
	d := h.found("configuration-changed", says(rule+" has changed"))
	if d.At("imdsgate.file.path") != rule || d.At("imdsgate.file.sha256") != now || d.At("imdsgate.file.loaded_sha256") != loaded ||
		d.At("imdsgate.file.uid") != "0" || d.At("imdsgate.file.owner") != "root" || d.At("imdsgate.file.mode") != "0644" || d.At("imdsgate.file.modified") == nil {
		t.Errorf("%v", d)
	}
	added := filepath.Join(rules, "added.toml")
	write(added, fmt.Sprintf(text, "added"))
	h.found("configuration-changed", says(added+" is new"))
	if err := h.Write("mode: audit\n"); err != nil {
		t.Fatal(err)
	}
	h.found("configuration-changed", says(h.Config+" has changed"))
	if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
		t.Errorf("what is not loaded is in force: %s", got)
	}
	out, _ := h.imdsgate("status")
	for _, want := range []string{"! " + rule + " is not what is in force", "! " + added, "! " + h.Config} {
		if !strings.Contains(out, want) {
			t.Errorf("status does not say %q:\n%s", want, out)
		}
	}
	os.Remove(added)
	write(rule, fmt.Sprintf(text, "one"))
	h.found("configuration-changed", says(rule+" is on the disk again"))
	os.Remove(rule)
	h.found("configuration-changed", says(rule+" is gone"))

	// A package, or somebody, puts another program in its place.
	b, err := os.ReadFile(h.gate.Daemon)
	if err != nil {
		t.Fatal(err)
	}
	next := h.gate.Daemon + ".new"
	changed := write(next, string(b)+"x")
	if err := os.Rename(next, h.gate.Daemon); err != nil {
		t.Fatal(err)
	}
	d = h.found("program-changed", says("the program that runs is the old one"))
	sum := sha256.Sum256(b)
	if d.At("imdsgate.file.sha256") != changed || d.At("imdsgate.file.loaded_sha256") != hex.EncodeToString(sum[:]) {
		t.Errorf("%v", d)
	}

	// A reload takes up what is there.
	write(rule, fmt.Sprintf(text, "two"))
	if err := h.Write(config); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(rule, 0o666); err != nil {
		t.Fatal(err)
	}
	if out, code := h.imdsgate("reload"); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	s, err = h.Status()
	if err != nil || s.Policy.Digest == digest || !strings.Contains(strings.Join(s.Files.Exposed, "\n"), rule+" (uid 0, mode 0666) can be changed by others") {
		t.Errorf("%+v, %+v, %v", s.Files, s.Policy.Digest, err)
	}
	for _, f := range s.Files.Changed {
		if f.Path == rule || f.Path == h.Config {
			t.Errorf("after the reload %s is told", f.Path)
		}
	}
	activated, err := h.Await("the reload", func(d gate.Document) bool { return d.At("event.action") == "policy-activated" })
	if err != nil || activated.At("imdsgate.policy.digest") != s.Policy.Digest {
		t.Errorf("%v, %v", activated, err)
	}
}

// Somebody flushes table raw, and a client comes before it is repaired. The connection to
// the service that is made for it may get another port from the tracker and then lose it,
// all the more where there are few: the client has its answer all the same.
func TestRawFlushed(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	h.logged("serving")
	h.output("sysctl", "-q", "-w", "net.ipv4.ip_local_port_range=40000 40063")
	const lost = "a connection that has lost its port with the rules was aborted"
	for round := 0; strings.Count(h.Log(), lost) < 3; round++ {
		if round == 30 {
			t.Fatalf("in %d rounds not even three connections have lost their ports", round)
		}
		for range 10 {
			h.curl(client{}, "/latest/meta-data/instance-id")
		}
		h.output("iptables", "-t", "raw", "-F", "OUTPUT")
		var open []net.Conn
		for range 4 {
			c, err := h.dial("169.254.169.254:80")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			open = append(open, c)
		}
		for end := time.Now().Add(10 * time.Second); !strings.Contains(h.output("iptables-save", "-t", "raw"), "-A OUTPUT"); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("not repaired")
			}
		}
		time.Sleep(100 * time.Millisecond)
		for _, c := range open {
			c.SetDeadline(time.Now().Add(3 * time.Second))
			fmt.Fprintf(c, "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")
			b, err := io.ReadAll(c)
			if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 ") {
				t.Errorf("round %d: %v, %q", round, err, b)
			}
		}
	}
}
