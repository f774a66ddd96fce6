package attacks

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/attacks/ask"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const (
	user    = 4321 // has a grant for some programs
	another = 4322 // has none
	twin    = "172.31.0.11"
)

// emulated says that the processor is, as in test/vm: everything takes ten times as long, so
// that also level 3 is late now and then.
var emulated = os.Getenv("IMDSGATE_EMULATED") != ""

// patience bounds one attack.
var patience = map[bool]time.Duration{false: 10 * time.Second, true: time.Minute}[emulated]

// installed are the programs, below /opt where only root can change them.
type installed struct {
	dir      string
	gate     gate.Binaries
	attacker string // copied for each attack, under a name of its own

	granted  string // by user
	byUnit   string // by unit
	byRoot   string // by user root, and setuid root
	curl     string // by user; "" if there is none on this host
	ordinary string // not granted
	script   string // by user; run by the attacker
}

// build installs the programs once for all tests.
var build = sync.OnceValues(func() (p installed, err error) {
	if p.dir, err = os.MkdirTemp("/opt", "imdsgate-attacks"); err != nil {
		return p, err
	}
	if err := os.Chmod(p.dir, 0o755); err != nil {
		return p, err
	}
	if p.gate, err = gate.Build(p.dir); err != nil {
		return p, err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", p.dir+"/", "./attacker", "./granted")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	at := func(name string) string { return filepath.Join(p.dir, name) }
	p.attacker, p.granted, p.byUnit, p.byRoot, p.ordinary, p.script = at("attacker"), at("granted"), at("by-unit"), at("by-root"), at("ordinary"), at("script")
	err = errors.Join(duplicate(p.granted, p.byUnit, 0o755), duplicate(p.granted, p.byRoot, 0o755|os.ModeSetuid), duplicate(p.granted, p.ordinary, 0o755))
	if curl, missing := exec.LookPath("curl"); missing == nil {
		p.curl = at("fetch") // no rule is about that name
		err = errors.Join(err, duplicate(curl, p.curl, 0o755))
	}
	for _, r := range table {
		err = errors.Join(err, duplicate(p.attacker, p.evil(r.name), 0o755))
	}
	return p, errors.Join(err, os.WriteFile(p.script, []byte("#!"+p.evil("shebang")+" plain\n"), 0o755))
})

// evil is the attacker's own copy of its program for one row.
func (p *installed) evil(row string) string { return filepath.Join(p.dir, "evil-"+row) }

func duplicate(from, to string, mode os.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(to, b, 0o755), os.Chmod(to, mode))
}

func TestMain(m *testing.M) {
	code := m.Run()
	if p, _ := build(); p.dir != "" {
		os.RemoveAll(p.dir)
	}
	os.Exit(code)
}

// strict lets nobody but the programs with a grant have credentials.
func (p *installed) strict() string {
	text := "mode: enforce\nposture: strict\ngrants:\n"
	grant := func(executable, key, value string) {
		if executable != "" {
			text += fmt.Sprintf("- {name: %s, executable: %s, %s: %q, owner: tests, reason: it is the legitimate one}\n", filepath.Base(executable), executable, key, value)
		}
	}
	grant(p.granted, "user", fmt.Sprint(user))
	grant(p.byUnit, "unit", "granted.service")
	grant(p.byRoot, "user", "0")
	grant(p.curl, "user", fmt.Sprint(user))
	grant(p.script, "user", fmt.Sprint(user))
	return text
}

// lenient lets every program of root's have them unless an attacker is its
// parent.
func (p *installed) lenient() (string, error) {
	rule := filepath.Join(p.dir, "parent.toml")
	err := os.WriteFile(rule, []byte(`[metadata]
maturity = "production"

[rule]
rule_id = "attacks-parent"
name = "Started by an attacker"
description = "A block that rests on a parent."
type = "eql"
language = "eql"
severity = "high"
risk_score = 73
query = '''
network where imdsgate.request.guarded == true and process.parent.name : "evil-*"
'''
`), 0o644)
	return "mode: enforce\nrules:\n  paths: [" + rule + "]\n", err
}

// arena is a lab with a daemon of one level of attribution in it.
type arena struct {
	*netlab.Lab
	*gate.Daemon
	installed
	level attribution.Level
	token string
	dir   string // of the ordinary user

	ended sync.Once // of the daemon, by itself: its log is printed

	mu      sync.Mutex // guards the following
	offset  int64      // of the events that were read
	decided map[string][]gate.Document
}

// open starts a daemon with the lenient policy that has all that a level needs and no more. It returns
// nil and what is missing if this host or this version does not have the level.
func open(t *testing.T, level attribution.Level) (a *arena, missing string) {
	t.Helper()
	labtest.RequireRoot(t)
	p, err := build()
	if err != nil {
		t.Fatal(err)
	}
	a = &arena{installed: p, level: level, decided: map[string][]gate.Document{}}
	a.Lab = labtest.Start(t, netlab.Options{Containers: true, IMDS: &imdstest.Config{TokensRequired: true, HopLimit: 2}})
	config, err := p.lenient()
	if err != nil {
		t.Fatal(err)
	}
	lacks := attribution.Level(0)
	if level < attribution.Level3 {
		lacks = level + 1
	}
	d, err := gate.Start(a.Lab, p.gate, gate.Settings{Config: config, Lacks: lacks})
	if d != nil {
		t.Cleanup(func() { d.Close() })
	}
	if err != nil {
		t.Fatal(err)
	}
	a.Daemon = d
	s, err := d.Status()
	if err != nil {
		t.Fatal(err)
	}
	if s.Attribution.Level != level.String() {
		for _, m := range s.Attribution.Missing {
			missing += fmt.Sprintf("; %s: %s", m.Level, m.Reason)
		}
		return nil, fmt.Sprintf("the daemon has %s%s", s.Attribution.Level, missing)
	}
	a.dir = filepath.Join(p.dir, level.String())
	if err := errors.Join(os.MkdirAll(a.dir, 0o755), os.Chown(a.dir, user, user), a.Instance.Do(secondAddress)); err != nil {
		t.Fatal(err)
	}
	if a.token, err = a.fetchToken(); err != nil {
		t.Fatal(err)
	}
	return a, ""
}

// secondAddress gives the instance another address.
func secondAddress() error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	address, err := netlink.ParseAddr(twin + "/20")
	if err != nil {
		return err
	}
	return netlink.AddrAdd(link, address)
}

// fetchToken asks the service, past the daemon.
func (a *arena) fetchToken() (string, error) {
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		return a.Metadata.Dial(ctx, nil, network, address)
	}
	c := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: patience}
	q, err := http.NewRequest(http.MethodPut, "http://169.254.169.254/latest/api/token", nil)
	if err != nil {
		return "", err
	}
	q.Header.Set("X-aws-ec2-metadata-token-ttl-seconds", "600")
	r, err := c.Do(q)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("token: %s", r.Status)
	}
	return string(b), err
}

// reload replaces the policy.
func (a *arena) reload(config, posture string) error {
	if err := errors.Join(a.Write(config), a.Signal(syscall.SIGHUP)); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		s, err := a.Status()
		if err == nil && s.Policy.Posture == posture {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("posture %q, %w\n%s", s.Policy.Posture, err, a.Log())
		}
	}
}

// decisions are the records so far of the requests of one user agent. The file
// is read once, not again for every attack.
func (a *arena) decisions(agent string) ([]gate.Document, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f, err := os.Open(a.Events)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Seek(a.offset, io.SeekStart); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	b = b[:bytes.LastIndexByte(b, '\n')+1]
	a.offset += int64(len(b))
	for line := range bytes.Lines(b) {
		if !bytes.Contains(line, []byte("attack/")) {
			continue
		}
		var d gate.Document
		if err := json.Unmarshal(line, &d); err != nil {
			return nil, fmt.Errorf("%w in %s", err, line)
		}
		if agent, ok := d.At("user_agent.original").(string); ok && d.At("data_stream.dataset") == "imdsgate.decision" {
			a.decided[agent] = append(a.decided[agent], d)
		}
	}
	return a.decided[agent], nil
}

// awaitDecision is the record of the last request of a user agent.
func (a *arena) awaitDecision(agent string, wait time.Duration) (gate.Document, error) {
	for end := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		ds, err := a.decisions(agent)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if len(ds) > 0 {
			return ds[len(ds)-1], nil
		}
		if time.Now().After(end) {
			return nil, nil
		}
	}
}

// scene is one run of one attack.
type scene struct {
	*arena
	agent  string // user agent of the request that matters
	evil   string // the attacker's own copy of its program
	actors []*actor
}

// actor is a program that was started for a scene. One goroutine uses it.
type actor struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
	ready bool // said so
	said  []string
}

// errUnavailable is an attack for which this kernel has no means.
var errUnavailable = errors.New("unavailable")

// errAct is an attack that did not come as far as an outcome.
var errAct = errors.New("act")

// errRefused is a program with a grant that did not get what an attack needs it to
// have.
var errRefused = errors.New("a program with a grant was refused")

// start starts a program in the instance.
func (s *scene) start(uid uint32, program string, args ...string) (*actor, error) {
	return s.startIn(s.Instance, uid, program, args...)
}

func (s *scene) startIn(n *netlab.Namespace, uid uint32, program string, args ...string) (*actor, error) {
	a := &actor{cmd: exec.Command(program, args...), lines: make(chan string, 100)}
	a.cmd.Dir = "/"
	a.cmd.Env = []string{
		"PATH=/usr/bin:/bin", "GODEBUG=asyncpreemptoff=1", // children of ask.Fork have one thread, which nothing may interrupt
		ask.Token + "=" + s.token, ask.Name + "=" + s.agent, ask.Granted + "=" + s.granted, ask.Dir + "=" + s.dir,
	}
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if uid != 0 {
		a.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	var err error
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	a.cmd.Stderr = a.cmd.Stdout
	if err := n.Start(a.cmd); err != nil {
		return nil, err
	}
	go a.listen(out)
	s.actors = append(s.actors, a)
	return a, nil
}

// listen ends with the last process that has the output.
func (a *actor) listen(out io.Reader) {
	defer close(a.lines)
	for lines := bufio.NewScanner(out); lines.Scan(); {
		a.lines <- lines.Text()
	}
}

// await waits until it says something, and returns what comes after that word.
func (a *actor) await(word string) (string, error) {
	timeout := time.After(patience)
	for {
		select {
		case line, ok := <-a.lines:
			if !ok {
				return "", fmt.Errorf("it ended without %q after %q", word, a.said)
			}
			a.said = append(a.said, line)
			first, rest, _ := strings.Cut(line, " ")
			switch {
			case line == "ready":
				a.ready = true
			case strings.HasPrefix(line, errUnavailable.Error()):
				return "", fmt.Errorf("%w%s", errUnavailable, strings.TrimPrefix(line, errUnavailable.Error()))
			case line == "refused":
				return "", errRefused
			case first == "failed":
				return "", errors.New(line)
			}
			if first == word {
				return rest, nil
			}
		case <-timeout:
			return "", fmt.Errorf("no %q within %v after %q", word, patience, a.said)
		}
	}
}

// result waits for what it got, which is nothing unless everything was ready.
func (a *actor) result() (string, error) {
	r, err := a.await("result")
	if err == nil && !a.ready {
		err = fmt.Errorf("a result without having been ready: %q", a.said)
	}
	return r, err
}

// close ends all that a scene started. Most end by themselves, and some have
// something to clean up.
func (s *scene) close() {
	for _, a := range s.actors {
		a.in.Close()
		kill := time.AfterFunc(time.Second, func() { syscall.Kill(-a.cmd.Process.Pid, syscall.SIGKILL) })
		for range a.lines { // until the last process has closed its output
		}
		kill.Stop()
		syscall.Kill(-a.cmd.Process.Pid, syscall.SIGKILL)
		a.cmd.Wait()
	}
}

// keeper is a program with a grant that keeps a connection.
type keeper struct {
	*actor
	pid, fd string
	from    netip.AddrPort
}

func (s *scene) keep() (*keeper, error) {
	a, err := s.start(user, s.granted, "keep", s.agent+"-before")
	if err != nil {
		return nil, err
	}
	said, err := a.await("keeps")
	if err != nil {
		return nil, err
	}
	var fd int
	var port uint16
	if _, err := fmt.Sscan(said, &fd, &port); err != nil {
		return nil, err
	}
	return &keeper{a, fmt.Sprint(a.cmd.Process.Pid), fmt.Sprint(fd), netip.AddrPortFrom(netip.MustParseAddr("172.31.0.10"), port)}, nil
}
