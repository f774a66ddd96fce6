// Package e2e runs the real daemon in a lab, with real clients in front of it and
// the service's stand-in, or AWS's own, behind it.
package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const (
	credentials = "/latest/meta-data/iam/security-credentials/"
	role        = credentials + "imdsgate-lab-role"
	instanceID  = "/latest/meta-data/instance-id"
	service     = "http://169.254.169.254"
	service6    = "http://[fd00:ec2::254]"

	ordinaryUser = 4321
)

// built are the programs, built once for all tests.
var built = sync.OnceValues(func() (programs, error) {
	var p programs
	dir, err := os.MkdirTemp("", "imdsgate-e2e")
	if err != nil {
		return p, err
	}
	p.dir = dir
	if p.gate, err = gate.Build(dir); err != nil {
		return p, err
	}
	if p.sdk, p.mock, err = netlab.BuildClients(dir); err != nil {
		return p, err
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "attacker"), "./attacker")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("build the attacker: %w\n%s", err, out)
	}
	p.attacker = filepath.Join(dir, "attacker")
	return p, nil
})

type programs struct {
	dir, sdk, mock, attacker string
	gate                     gate.Binaries
}

func TestMain(m *testing.M) {
	code := m.Run()
	if p, _ := built(); p.dir != "" {
		os.RemoveAll(p.dir)
	}
	os.Exit(code)
}

// host is a lab with a daemon in it.
type host struct {
	*netlab.Lab
	*gate.Daemon
	t testing.TB
	programs
}

func start(t testing.TB, o netlab.Options, config string) *host {
	t.Helper()
	h := prepare(t, o)
	h.start(config)
	return h
}

// prepare builds a lab without a daemon.
func prepare(t testing.TB, o netlab.Options) *host {
	t.Helper()
	labtest.RequireRoot(t)
	p, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return &host{Lab: labtest.Start(t, o), t: t, programs: p}
}

func (h *host) start(config string, args ...string) {
	h.t.Helper()
	h.startWith(gate.Settings{Config: config, Args: args})
}

func (h *host) startWith(s gate.Settings) {
	h.t.Helper()
	d, err := gate.Start(h.Lab, h.gate, s)
	if d != nil {
		h.t.Cleanup(func() { d.Close() })
	}
	if err != nil {
		h.t.Fatal(err)
	}
	h.Daemon = d
}

// Close is ambiguous between the lab and the daemon, and a test's cleanup does
// both.
func (h *host) Close() { panic("the test's cleanup closes") }

// client is one run of a client program.
type client struct {
	in   *netlab.Namespace // nil: the instance
	uid  uint32            // 0: root
	dir  string
	env  []string
	args []string
}

// run runs a client to its end and returns what it printed.
func (h *host) run(c client) (out string, code int) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.args[0], c.args[1:]...)
	cmd.Dir = c.dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/nonexistent"}, c.env...)
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	if c.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.uid}}
	}
	in := c.in
	if in == nil {
		in = h.Instance
	}
	in.Run(cmd)
	if ctx.Err() != nil {
		h.t.Fatalf("%v hung:\n%s", c.args, b.String())
	}
	return strings.TrimSpace(b.String()), cmd.ProcessState.ExitCode()
}

// curl asks for a path with curl and returns the status, "000" without one.
func (h *host) curl(c client, path string, args ...string) string {
	h.t.Helper()
	base := service
	if strings.HasPrefix(path, "http") {
		base = ""
	}
	c.args = append([]string{"curl", "-s", "-g", "-m", "3", "-o", "/dev/null", "-w", "%{http_code}", base + path}, args...)
	out, _ := h.run(c)
	return out
}

// token asks the service, past the daemon.
func (h *host) token() string {
	h.t.Helper()
	var token string
	err := h.Metadata.Do(func() error {
		out, err := exec.Command("curl", "-s", "-m", "3", "-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 600", service+"/latest/api/token").Output()
		token = string(out)
		return err
	})
	if err != nil || len(token) != 56 {
		h.t.Fatalf("token %q, %v", token, err)
	}
	return token
}

// imdsgate runs the operator's command.
func (h *host) imdsgate(args ...string) (out string, code int) {
	h.t.Helper()
	return h.run(client{args: append([]string{h.gate.Command, "--config", h.Config}, args...)})
}

// ended runs what the unit runs after a daemon.
func (h *host) ended() (out string, code int) {
	h.t.Helper()
	return h.afterwards("-ended")
}

// afterwards runs what the unit runs when there is no daemon.
func (h *host) afterwards(which string) (out string, code int) {
	h.t.Helper()
	return h.run(client{args: []string{h.gate.Daemon, "-config", h.Config, which}, env: []string{"SERVICE_RESULT=signal", "EXIT_CODE=killed", "EXIT_STATUS=KILL"}})
}

// decided waits for the record of a request.
func (h *host) decided(path, name string) gate.Document {
	h.t.Helper()
	d, err := h.Await(name+" asking for "+path, func(d gate.Document) bool {
		return d.At("data_stream.dataset") == "imdsgate.decision" && d.At("url.path") == path && (name == "" || d.At("process.name") == name)
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

// install copies a program to where only root can change it.
func (h *host) install(from string) string {
	h.t.Helper()
	dir, err := os.MkdirTemp("/opt", "imdsgate-e2e")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { os.RemoveAll(dir) })
	to := filepath.Join(dir, filepath.Base(from))
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return to
}

// grant is a configuration that lets one program have credentials.
func grant(executable string, uid int) string {
	return fmt.Sprintf("grants:\n- name: app\n  executable: %s\n  user: %q\n  owner: tests\n  reason: it is the legitimate one\n", executable, fmt.Sprint(uid))
}

// output runs a tool in the instance.
func (h *host) output(tool string, args ...string) string {
	h.t.Helper()
	var out []byte
	err := h.Instance.Do(func() (err error) {
		out, err = exec.Command(tool, args...).Output()
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return string(out)
}

// dial connects from the instance, as this process.
func (h *host) dial(address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	return h.Instance.Dial(ctx, nil, "tcp", address)
}
