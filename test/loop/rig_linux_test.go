package loop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// host is an instance in a lab, with the daemon installed on it.
type host struct {
	*netlab.Lab
	*gate.Daemon
	t      *testing.T
	opt    string // where programs of the host are installed: root's alone
	built  gate.Binaries
	sdk    string // a program with AWS's SDK for Go
	socket string // of what starts jobs
}

// Close is ambiguous between the lab and the daemon, and a test's cleanup does both.
func (h *host) Close() { panic("the test's cleanup closes") }

// start builds what is needed, and a host with a configuration.
func start(t *testing.T, config string) *host {
	t.Helper()
	labtest.RequireRoot(t)
	h := &host{t: t, Lab: labtest.Start(t, netlab.Options{Containers: true, IMDS: &imdstest.Config{HopLimit: 2}})}
	var err error
	if h.opt, err = os.MkdirTemp("/opt", "imdsgate-loop-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(h.opt) })
	if err := os.Chmod(h.opt, 0o755); err != nil {
		t.Fatal(err)
	}
	if h.built, err = gate.Build(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	// The directory of the test is its user's alone, and the daemon is another.
	for _, program := range []*string{&h.built.Daemon, &h.built.Command} {
		*program = h.install(*program, filepath.Join("imdsgate", filepath.Base(*program)))
	}
	if h.sdk, _, err = netlab.BuildClients(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	h.manage()
	h.Daemon, err = gate.Start(h.Lab, h.built, gate.Settings{Config: strings.ReplaceAll(config, "/opt/", h.opt+"/"), Installed: true})
	if h.Daemon != nil {
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("the daemon's log:\n%s", h.Log())
			}
			h.Daemon.Close()
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// install copies a program to a place where only root can change it.
func (h *host) install(from, to string) string {
	h.t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		h.t.Fatal(err)
	}
	return h.write(to, string(b), 0o755)
}

// write makes a file of the host.
func (h *host) write(name, text string, mode fs.FileMode) string {
	h.t.Helper()
	name = filepath.Join(h.opt, name)
	err := os.MkdirAll(filepath.Dir(name), 0o755)
	if err == nil {
		err = os.WriteFile(name, []byte(text), mode)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return name
}

// A job is a program as a service manager, a container runtime or a login starts it.
type job struct {
	cgroup string // as in /proc/PID/cgroup, below the lab's
	user   uint32
	root   string // of a container's or another tree's files; "" for the host's
	in     *netlab.Namespace
	args   []string
	env    []string
}

// manage starts what starts jobs. Whoever has started it must be gone before the daemon
// comes, which knows of older processes only who their parent is now.
func (h *host) manage() {
	h.t.Helper()
	manager := filepath.Join(h.t.TempDir(), "manager")
	if out, err := exec.Command("go", "build", "-o", manager, "./manager").CombinedOutput(); err != nil {
		h.t.Fatalf("build the manager: %v\n%s", err, out)
	}
	h.socket = filepath.Join(h.t.TempDir(), "manager.sock")
	cmd := exec.Command("sh", "-c", `exec 3<&0; "$0" "$1" <&3 >/dev/null 2>&1 &`, h.install(manager, "lib/systemd/systemd"), h.socket)
	r, w, err := os.Pipe()
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Close()
	h.t.Cleanup(func() { w.Close() }) // at which it ends
	cmd.Stdin = r
	if err := h.Instance.Run(cmd); err != nil {
		h.t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(h.socket); err == nil {
			return
		}
		if time.Now().After(end) {
			h.t.Fatal("the manager does not listen")
		}
	}
}

// begin has a job started. The connection is its standard input and output.
func (h *host) begin(j job) *net.UnixConn {
	h.t.Helper()
	group, err := h.group(j.cgroup)
	if err != nil {
		h.t.Fatal(err)
	}
	network := ""
	if j.in != nil {
		network = j.in.Path()
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: h.socket})
	if err == nil {
		err = json.NewEncoder(conn).Encode(map[string]any{"Cgroup": group, "User": j.user, "Root": j.root, "Network": network, "Args": j.args,
			"Env": append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/nonexistent"}, j.env...)})
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return conn
}

// group is a cgroup, which it makes first: root's own directories, as systemd's are. They
// go with the lab.
func (h *host) group(name string) (string, error) {
	dir := filepath.Join(h.Lab.Cgroup.Path(), name)
	return dir, os.MkdirAll(dir, 0o755)
}

// run runs a job to its end, and returns what it printed.
func (h *host) run(j job) string {
	h.t.Helper()
	conn := h.begin(j)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	out, err := io.ReadAll(conn)
	if err != nil {
		h.t.Fatalf("%q: %v", j.args, err)
	}
	return strings.TrimSpace(string(out))
}

// A service is a job that goes on.
type service struct {
	h     *host
	conn  *net.UnixConn
	lines *bufio.Scanner
	name  string
}

func (h *host) serve(j job) *service {
	h.t.Helper()
	conn := h.begin(j)
	h.t.Cleanup(func() { conn.Close() }) // at which it ends
	return &service{h, conn, bufio.NewScanner(conn), j.args[0]}
}

// fetch has it ask for credentials, and returns the status that it got.
func (s *service) fetch() string {
	s.h.t.Helper()
	s.tell("fetch")
	if !s.lines.Scan() {
		s.h.t.Fatalf("%s has ended: %v", s.name, s.lines.Err())
	}
	return s.lines.Text()
}

// tell sends it a line, for which it has some seconds until the next.
func (s *service) tell(line string) {
	s.h.t.Helper()
	s.conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprintln(s.conn, line); err != nil {
		s.h.t.Fatalf("%s: %v", s.name, err)
	}
}

// imdsgate types a command of the operator, and prints it with what it says.
func (h *host) imdsgate(args ...string) (out string, code int) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := h.Operator(h.built.Command, args...)
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	if err := h.Instance.Start(cmd); err != nil {
		h.t.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	cmd.Wait()
	h.typed(args, b.String(), cmd.ProcessState.ExitCode())
	return b.String(), cmd.ProcessState.ExitCode()
}

func (h *host) typed(args []string, out string, code int) {
	h.t.Helper()
	args = slices.Clone(args)
	for i, a := range args {
		if strings.ContainsAny(a, " *?'\"") {
			args[i] = "'" + a + "'"
		}
	}
	h.t.Logf("\n# imdsgate %s\n%s[%d]", strings.Join(args, " "), out, code)
}

// says fails the test unless a command printed all of this, with this exit status.
func (h *host) says(code int, want []string, args ...string) string {
	h.t.Helper()
	out, got := h.imdsgate(args...)
	if got != code {
		h.t.Errorf("imdsgate %q: exit status %d, want %d", args, got, code)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			h.t.Errorf("imdsgate %q does not say %q", args, w)
		}
	}
	return out
}
