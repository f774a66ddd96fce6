package debian

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/gate"
)

// Machine is one with a disk, on or off. A test sets Patience and Run, and switches it on
// with Start; at the end of the test it is switched off, and Dir removed. What asks it may be
// called from any goroutine that Run may be called from, while it stays on.
type Machine struct {
	T     testing.TB
	Image string // the image's directory
	Dir   string // its own, below that

	// Patience is how long Await waits, and half of what Do and Try do: far more than it takes.
	Patience time.Duration
	// Run runs a command in it as root, and returns what that printed, without the space
	// around it, and the exit status.
	Run func(within time.Duration, args ...string) (out string, code int)

	Began time.Time     // when it was switched on
	Done  chan struct{} // closed when it is off
	Said  bytes.Buffer  // to be read when it is off
	cmd   *exec.Cmd
}

// Start switches it on: the machine is a process, which is killed if this one is.
func (m *Machine) Start(cmd *exec.Cmd) {
	m.T.Helper()
	cmd.Stdout, cmd.Stderr = &m.Said, &m.Said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	m.Began = time.Now()
	if err := cmd.Start(); err != nil {
		m.T.Fatal(err)
	}
	done := make(chan struct{})
	m.cmd, m.Done = cmd, done
	go func() {
		cmd.Wait()
		close(done)
	}()
}

// Off cuts the power, if there is any.
func (m *Machine) Off() {
	if m.cmd != nil {
		m.cmd.Process.Kill()
		<-m.Done
		m.cmd = nil
	}
}

// Booted waits until it has.
func (m *Machine) Booted() {
	m.T.Helper()
	m.Await("the boot", func() bool {
		state, _ := m.Try("systemctl", "is-system-running")
		return state == "running" || state == "degraded"
	})
}

// Await waits until something is so, and returns how long that took.
func (m *Machine) Await(what string, is func() bool) time.Duration {
	m.T.Helper()
	begin := time.Now()
	for !is() {
		select {
		case <-m.Done:
			m.T.Fatalf("waiting for %s: the machine went off\n%s", what, m.Said.String())
		default:
		}
		if time.Since(begin) > m.Patience {
			log, _ := m.Try("journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic")
			m.T.Fatalf("waited too long for %s\n%s", what, log)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(begin)
}

// Try runs a command, which may fail.
func (m *Machine) Try(args ...string) (out string, code int) {
	m.T.Helper()
	return m.Run(2*m.Patience, args...)
}

// Do is Try of what must succeed.
func (m *Machine) Do(args ...string) string {
	m.T.Helper()
	out, code := m.Try(args...)
	if code != 0 {
		log, _ := m.Try("journalctl", "--no-pager", "-n", "40", "-o", "short-monotonic", "-u", "imdsgated.service", "-u", "imdsgated.socket")
		m.T.Fatalf("%v: exit %d\n%s\n%s", args, code, out, log)
	}
	return out
}

// Property asks systemd.
func (m *Machine) Property(unit, name string) string {
	m.T.Helper()
	return m.Do("systemctl", "show", "--value", "-p", name, unit)
}

// Curl asks the metadata service, as a unit of its own, and returns the status, "000" without one.
func (m *Machine) Curl(user, path string) string {
	m.T.Helper()
	out, _ := m.Try("systemd-run", "--quiet", "--pipe", "--wait", "--uid="+user, "curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "http://169.254.169.254"+path)
	return out
}

// Spool is what the files of events have, as they are, the oldest first.
func (m *Machine) Spool() string {
	m.T.Helper()
	return m.Do("sh", "-ec", "cd /var/log/imdsgate; for f in $(ls -rv events.ndjson*); do case $f in *.gz) zcat $f;; *) cat $f;; esac; done")
}

// Documents are the events so far.
func (m *Machine) Documents() (all []gate.Document) {
	m.T.Helper()
	for line := range strings.Lines(m.Spool()) {
		var d gate.Document
		if json.Unmarshal([]byte(line), &d) == nil {
			all = append(all, d)
		}
	}
	return all
}

// Event waits for one with an action, and returns the last such.
func (m *Machine) Event(action string) (last gate.Document) {
	m.T.Helper()
	m.Await("an event "+action, func() bool {
		for _, d := range m.Documents() {
			if d.At("event.action") == action {
				last = d
			}
		}
		return last != nil
	})
	return last
}
