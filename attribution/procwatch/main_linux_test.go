package procwatch

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary is also the programs that the tests look at: what it does is in
// its environment. Each says "ready" and waits for a line where it has to.
const role = "PROCWATCH_TEST_ROLE"

func init() {
	if os.Getenv(role) != "" {
		runtime.LockOSThread() // main is the first thread
	}
}

func TestMain(m *testing.M) {
	if r := os.Getenv(role); r != "" {
		if err := play(r); err != nil {
			fmt.Fprintln(os.Stderr, r, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func play(r string) error {
	in := bufio.NewReader(os.Stdin)
	line := func() { in.ReadString('\n') }
	var program string
	if len(os.Args) > 1 {
		program = os.Args[1]
	}
	switch r {
	case "wait":
		fmt.Println("ready")
		io.Copy(io.Discard, in)
	case "exit":
	case "exec": // becomes another program, on its first thread
		fmt.Println("ready")
		line()
		return syscall.Exec(program, []string{program, "second"}, []string{role + "=wait"})
	case "exec-thread": // the same, by a thread that is not the first
		fmt.Println("ready")
		line()
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			if unix.Gettid() == os.Getpid() {
				done <- fmt.Errorf("on the first thread")
				return
			}
			done <- syscall.Exec(program, []string{program, "second"}, []string{role + "=wait"})
		}()
		return <-done
	case "leave": // ends its first thread
		go func() {
			time.Sleep(50 * time.Millisecond)
			fmt.Println("ready")
			io.Copy(io.Discard, in)
			os.Exit(0)
		}()
		syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	case "orphan": // starts a program that outlives it, and says its pid
		p, err := os.StartProcess(program, []string{program}, &os.ProcAttr{Env: []string{role + "=wait"}, Files: []*os.File{os.Stdin, os.Stdout}})
		if err != nil {
			return err
		}
		fmt.Println(p.Pid)
	case "sibling": // starts a program whose parent is ours
		attr := &os.ProcAttr{Env: []string{role + "=wait"}, Files: []*os.File{os.Stdin, os.Stdout}, Sys: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_PARENT}}
		p, err := os.StartProcess(program, []string{program}, attr)
		if err != nil {
			return err
		}
		fmt.Println(p.Pid)
	case "open": // what Open says here
		w, err := Open(Options{})
		if err != nil {
			fmt.Println("error:", err)
			return nil
		}
		defer w.Close()
		child := exec.Command("/bin/true")
		if err := child.Run(); err != nil {
			return err
		}
		if err := w.Drain(); err != nil {
			return err
		}
		s := w.Stats()
		fmt.Printf("forks %v, execs %v, netns unchanged %v\n", s.Forks > 0, s.Execs > 0, sameNet())
	default:
		return fmt.Errorf("no such role")
	}
	return nil
}

func sameNet() bool {
	a, _ := os.Readlink("/proc/self/ns/net")
	tasks, _ := filepath.Glob("/proc/self/task/*/ns/net")
	for _, t := range tasks {
		if b, err := os.Readlink(t); err == nil && a != b {
			return false
		}
	}
	return true
}

// actor is a running program of this test.
type actor struct {
	*exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	first string
}

func (a *actor) say() { io.WriteString(a.in, "go\n") }

func (a *actor) read(t *testing.T) string {
	t.Helper()
	s, err := a.out.ReadString('\n')
	if err != nil {
		t.Fatalf("%s: %v", a.Path, err)
	}
	return strings.TrimSpace(s)
}

// run starts a program of the test until it has said its first word.
func run(t *testing.T, program, r string, args ...string) *actor {
	t.Helper()
	return runAs(t, nil, program, r, args...)
}

// runAs is run by somebody else.
func runAs(t *testing.T, who *syscall.Credential, program, r string, args ...string) *actor {
	t.Helper()
	a := &actor{Cmd: exec.Command(program, args...)}
	a.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	a.Env = []string{role + "=" + r}
	a.Stderr = os.Stderr
	var err error
	if a.in, err = a.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := a.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	a.out = bufio.NewReader(out)
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.in.Close()
		a.Process.Kill()
		a.Wait()
	})
	if r != "exit" {
		a.first = a.read(t)
	}
	return a
}

// program is this binary under another name.
func program(t *testing.T, name string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	b, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(path, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, o Options) *Watcher {
	t.Helper()
	labtest.RequireRoot(t) // for other users' /proc
	w, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func startTicks(t testing.TB, pid int) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	st, err := parseStat(b)
	if err != nil {
		t.Fatal(err)
	}
	return st.ticks
}

// process asks as the consumer does, of a live process.
func process(t testing.TB, w *Watcher, pid int) Process {
	t.Helper()
	if err := w.Drain(); err != nil {
		t.Fatal(err)
	}
	p, ok := w.Process(pid, startTicks(t, pid))
	if !ok {
		all, _ := w.Process(pid, 0)
		t.Fatalf("process %d is not in the table: with that pid there is %+v", pid, all)
	}
	return p
}

// settled waits until a process has executed and its image was read. os.StartProcess
// returns when execve closes its pipe, which is before the event.
func settled(t testing.TB, w *Watcher, pid int) Process {
	t.Helper()
	for range 200 {
		p := process(t, w, pid)
		if p.Execs > 0 && p.Image().Read {
			return p
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("the image of %d was never read", pid)
	return Process{}
}
