package main_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// binary is the lab, built once.
var binary string

func TestMain(m *testing.M) { os.Exit(build(m)) }

func build(m *testing.M) int {
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "lab")
	cmd := exec.Command("go", "build", "-o", binary, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the lab: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

func TestCommand(t *testing.T) {
	labtest.RequireRoot(t)
	const code = `curl -q -s -m 2 -o /dev/null -w %{http_code}`
	for _, c := range []struct {
		name, args, stdin string
		out               string // of both streams; "*" is anything
		status            int
	}{
		{"success", "-- true", "", "", 0},
		{"without dashes", "true", "", "", 0},
		{"status", "-- sh -c 'exit 3'", "", "", 3},
		{"streams", "-- sh -c 'cat; echo err >&2'", "in\n", "in\nerr\n", 0},
		{"crash", "-- sh -c 'kill -SEGV $$'", "", "", 139},
		{"not found", "-- no-such-command", "", "lab: exec: \"no-such-command\": executable file not found in $PATH\n", 127},
		{"no such path", "-- /no/such/path", "", "lab: fork/exec /no/such/path: no such file or directory\n", 127},
		{"not executable", "-- /etc/passwd", "", "lab: fork/exec /etc/passwd: permission denied\n", 126},
		{"no command", "--containers", "", "lab: no COMMAND: see --help\n", 125},
		{"unknown option", "--container -- true", "", "lab: flag provided but not defined: -container\n", 125},
		{"hop limit", "--imds-hop-limit 65 -- true", "", "lab: invalid value \"65\" for flag -imds-hop-limit: want a number from 1 to 64\n", 125},
		{"tokens", "--imds-tokens always -- true", "", "lab: invalid value \"always\" for flag -imds-tokens: want optional or required\n", 125},
		{"help", "--help", "", "*", 0},
		{"service", "-- curl -q -s http://169.254.169.254/latest/meta-data/ami-id", "", "ami-0fa4e000000000001", 0},
		{"service, IPv6", "-- curl -q -s http://[fd00:ec2::254]/latest/meta-data/ami-id", "", "ami-0fa4e000000000001", 0},
		{"tokens required", "--imds-tokens required -- " + code + " http://169.254.169.254/latest/", "", "401", 0},
		{"tokens optional", "--imds-tokens optional -- " + code + " http://169.254.169.254/latest/", "", "200", 0},
		{"no emulator", "--no-imds -- " + code + " http://169.254.169.254/latest/", "", "000", 7},
		{"containers, hop limit 1", `--containers -- sh -c 'nsenter --net=$LAB_BRIDGED ` + strings.Replace(code, "-m 2", "-m 0.3", 1) +
			` -X PUT -H X-aws-ec2-metadata-token-ttl-seconds:1 http://169.254.169.254/latest/api/token'`, "", "000", 28},
		{"containers, hop limit 2", `--containers --imds-hop-limit 2 -- sh -c 'for c in $LAB_BRIDGED $LAB_ROUTED; do nsenter --net=$c ` + code +
			` -X PUT -H X-aws-ec2-metadata-token-ttl-seconds:1 http://169.254.169.254/latest/api/token; done'`, "", "200200", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("sh", "-c", "exec "+binary+" "+c.args)
			cmd.Stdin = strings.NewReader(c.stdin)
			out, err := cmd.CombinedOutput()
			if got := cmd.ProcessState.ExitCode(); got != c.status {
				t.Errorf("status %d, want %d: %v", got, c.status, err)
			}
			if c.out != "*" && string(out) != c.out {
				t.Errorf("output %q, want %q", out, c.out)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	labtest.RequireRoot(t)
	cmd := exec.Command(binary, "--", "env")
	cmd.Env = []string{"B=2", "A=1", "PATH=" + os.Getenv("PATH")}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(cmd.Env, strings.Fields(string(out))); diff != "" {
		t.Errorf("COMMAND's environment (-want +got):\n%s", diff)
	}
}

// family is a COMMAND that leaves behind a grandchild in a session of its own and one whose parent is gone, both deaf
// to signals, prints their process IDs and its own once all are there, and waits for a line. Its argument is a
// directory.
const family = `
	mkfifo $1/a $1/b
	setsid sh -c 'trap "" TERM INT HUP QUIT; echo $$ >$1/a; exec sleep 1000' sh $1 &
	(setsid sh -c 'trap "" TERM INT HUP QUIT; echo $$ >$1/b; exec sleep 1000' sh $1 &)
	read a <$1/a; read b <$1/b
	echo $a $b $$
	read line
	`

// A process is a descriptor of one (pidfd_open(2)), so that a reused number is nobody else.
type process int

func (p process) kill() { unix.PidfdSendSignal(int(p), unix.SIGKILL, nil, 0) }

// ended reports whether the process has ended and its parent has been told.
func (p process) ended() bool { return errors.Is(unix.PidfdSendSignal(int(p), 0, nil, 0), unix.ESRCH) }

// watch opens a process that is killed, at the latest, when the test ends.
func watch(t *testing.T, pid int) process {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatalf("open process %d: %v", pid, err)
	}
	t.Cleanup(func() {
		process(fd).kill()
		unix.Close(fd)
	})
	return process(fd)
}

// start runs the lab with a COMMAND made of family and what it does then. It returns the two grandchildren and COMMAND.
func start(t *testing.T, then string) (lab *exec.Cmd, all [3]process, gone func()) {
	t.Helper()
	labtest.RequireRoot(t)
	lab = exec.Command(binary, "--", "sh", "-c", family+then, "sh", t.TempDir())
	in, err := lab.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := lab.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	lab.Stderr = os.Stderr
	if err := lab.Start(); err != nil {
		t.Fatal(err)
	}
	for n := range all {
		var pid int
		if _, err := fmt.Fscan(out, &pid); err != nil {
			t.Fatalf("read process ID %d: %v", n, err)
		}
		all[n] = watch(t, pid)
		if n == 0 {
			gone = labtest.Watch(t, fmt.Sprintf("/proc/%d/ns/net", pid))
		}
	}
	io.WriteString(in, "\n")
	return lab, all, gone
}

func finish(t *testing.T, lab *exec.Cmd, status int) {
	t.Helper()
	killed := time.AfterFunc(20*time.Second, func() { lab.Process.Kill() })
	defer killed.Stop()
	err := lab.Wait()
	if got := lab.ProcessState.ExitCode(); got != status {
		t.Errorf("status %d, want %d: %v", got, status, err)
	}
}

func TestNothingIsLeft(t *testing.T) {
	for _, c := range []struct {
		name, then string
		signals    []unix.Signal // sent to the lab
		status     int
	}{
		{"success", "exit 0", nil, 0},
		{"crash", "kill -SEGV $$", nil, 139},
		{"SIGINT", "exec sleep 1000", []unix.Signal{unix.SIGINT}, 130},
		{"SIGTERM", "exec sleep 1000", []unix.Signal{unix.SIGTERM}, 143},
		{"SIGHUP", "exec sleep 1000", []unix.Signal{unix.SIGHUP}, 129},
		{"SIGTERM, handled", "trap 'exit 5' TERM; while :; do sleep 0.01; done", []unix.Signal{unix.SIGTERM}, 5},
		{"SIGINT twice, handled, then SIGTERM", "trap : INT; while :; do sleep 0.01; done",
			[]unix.Signal{unix.SIGINT, unix.SIGINT, unix.SIGTERM}, 143},
		{"SIGTERM, ignored, and again", "trap '' TERM; exec sleep 1000", []unix.Signal{unix.SIGTERM, unix.SIGTERM}, 137},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			lab, all, gone := start(t, c.then)
			for _, s := range c.signals {
				time.Sleep(50 * time.Millisecond) // until the trap is set
				if err := lab.Process.Signal(s); err != nil {
					t.Fatal(err)
				}
			}
			finish(t, lab, c.status)
			for n, p := range all {
				if !p.ended() {
					t.Errorf("process %d of 0 to 2 is still there", n)
				}
			}
			gone()
		})
	}
}

func TestKilledLab(t *testing.T) {
	lab, all, gone := start(t, "exec sleep 1000")
	lab.Process.Kill()
	lab.Wait()
	awaitEnd(t, all[2], "COMMAND, whose lab was killed,")
	all[0].kill()
	all[1].kill()
	gone()
}

// TestReaping checks that a process left to the lab does not stay a zombie while COMMAND runs.
func TestReaping(t *testing.T) {
	labtest.RequireRoot(t)
	lab := exec.Command(binary, "--", "sh", "-c", "(sh -c 'echo $$; sleep 0.1' &); read line")
	in, err := lab.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := lab.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, watch(t, pid), "an orphan")
	io.WriteString(in, "\n")
	finish(t, lab, 0)
}

func awaitEnd(t *testing.T, p process, who string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Second); !p.ended(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s is still there", who)
		}
	}
}
