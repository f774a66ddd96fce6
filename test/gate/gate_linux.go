// Package gate runs the real daemon in a lab, with the user and the capabilities
// that the systemd unit gives it.
package gate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// UID is the daemon's own user. No account has it.
const UID = 61080

// capabilities are those of packaging/systemd/imdsgated.service, and the one by
// which it opens the ports that imdsgated.socket opens there. Levels 2 and 3 of
// attribution need one more each, and level 1 a socket of the initial network
// namespace, where the lab's daemon is not.
var capabilities = map[attribution.Level]string{
	attribution.Level0: "+net_admin,+net_raw,+sys_ptrace,+dac_read_search,+net_bind_service",
	attribution.Level2: ",+bpf",
	attribution.Level3: ",+perfmon",
}

// privileged runs a program as the daemon's user with some capabilities, in a
// cgroup namespace of its own: the lab's cgroup is the root of all that it sees.
// With a directory, what that has is where packages put the files of the daemon.
const privileged = `caps=$1 uid=$2 hidepid=$3 home=$4 unit=$5; shift 5
umount --lazy /sys/fs/cgroup || true # not twice on one another, where the host has cgroup2 alone
mount -t cgroup2 none /sys/fs/cgroup
if [ -n "$unit" ]; then
	mkdir -p "/sys/fs/cgroup/$unit"; echo $$ >"/sys/fs/cgroup/$unit/cgroup.procs"
fi
if [ -n "$home" ]; then
	mkdir "$home/layers"; mount -t tmpfs none "$home/layers"
	for at in etc var/lib; do
		mkdir -p "$home/layers/$at/upper" "$home/layers/$at/work"
		mount -t overlay -o "lowerdir=/$at,upperdir=$home/layers/$at/upper,workdir=$home/layers/$at/work" none "/$at"
	done
	mount -t tmpfs -o mode=755 none /run
	mount -t tmpfs -o mode=755 none /var/log
	for at in etc var/lib var/log run; do
		mkdir -p "/$at/imdsgate"; mount --bind "$home/${at#var/}" "/$at/imdsgate"
	done
	for at in /usr/lib/imdsgate /usr/local/lib/imdsgate; do
		[ ! -d "$at" ] || mount -t tmpfs none "$at"
	done
fi
mount -t proc -o hidepid=$hidepid proc /proc
export LISTEN_PID=$$
exec setpriv --reuid=$uid --regid=$uid --clear-groups --inh-caps=-all,$caps --ambient-caps=-all,$caps --pdeathsig=KILL -- "$@"`

func command(s Settings, home string, b Binaries, args ...string) *exec.Cmd {
	program := b.Daemon
	if s.Syscalls != nil {
		program, args = b.confine, append([]string{strings.Join(s.Syscalls, ","), b.Daemon}, args...)
	}
	caps, hidepid := "", "0"
	for level := attribution.Level0; level <= attribution.Level3 && (s.Lacks == 0 || level < s.Lacks); level++ {
		caps += capabilities[level]
	}
	if s.HideProcesses {
		hidepid = "2"
	}
	unshare := []string{"--mount", "--cgroup", "--propagation=private"}
	if s.Suspended > 0 {
		unshare = append(unshare, "--time", fmt.Sprintf("--boottime=%d", int(s.Suspended.Seconds())))
	}
	unshare = append(unshare, "--", "sh", "-ec", privileged, "sh", caps, strconv.Itoa(UID), hidepid, home, s.Unit, program)
	return exec.Command("unshare", append(unshare, args...)...)
}

// Binaries are the two programs, and one that confines the daemon.
type Binaries struct{ Daemon, Command, confine string }

// Build builds the programs into dir, as `make build` does, and opens dir to
// the daemon's user.
func Build(dir string) (Binaries, error) {
	b := Binaries{filepath.Join(dir, "imdsgated"), filepath.Join(dir, "imdsgate"), filepath.Join(dir, "confine")}
	if err := os.Chmod(dir, 0o755); err != nil {
		return b, err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=test", "-o", dir+"/",
		"github.com/imdsgate/imdsgate/cmd/imdsgated", "github.com/imdsgate/imdsgate/cmd/imdsgate", "github.com/imdsgate/imdsgate/test/gate/confine")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return b, fmt.Errorf("build the daemon: %w\n%s", err, out)
	}
	return b, nil
}

// Daemon is a running daemon. Its methods may be called from any goroutine.
type Daemon struct {
	Dir    string // with its files; removed by Close
	Config string // file
	Events string // file
	spool  string

	installed bool
	cmd       *exec.Cmd
	done      chan struct{} // closed when the process has ended

	mu  sync.Mutex // guards log
	log bytes.Buffer
}

// Settings say how a daemon is started.
type Settings struct {
	// Config is appended to the settings of files and socket.
	Config string
	// Spool is what is set below events, beside the path, as in "aggregate: 1m".
	Spool string
	Args  []string
	// Dir is that of an earlier daemon, to go on with its files; "" for a new one.
	Dir string
	// Env is added to the environment.
	Env []string
	// Lacks is the lowest level of attribution for which it lacks a capability;
	// zero for none.
	Lacks attribution.Level
	// HideProcesses gives it a /proc that shows nobody the processes of others
	// without CAP_SYS_PTRACE (hidepid=2 of proc(5), ProtectProc= of systemd.exec(5)).
	HideProcesses bool
	// Suspended is for how long the host was suspended since it booted, by the clocks that
	// the daemon has, in whole seconds: CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC by so
	// much more (time_namespaces(7); Linux 6.1, whose execve enters one). What BPF programs
	// are told of CLOCK_BOOTTIME is the host's still, so that Lacks is Level3 at most.
	Suspended time.Duration
	// Installed has it read and write its files where packages put them, in a mount
	// namespace of its own: /etc/imdsgate, /var/lib/imdsgate, /var/log/imdsgate and
	// /run/imdsgate are etc, lib, log and run of its directory, and nothing else is in
	// /run and /var/log. See Operator.
	Installed bool
	// Unit is the cgroup that it runs in, as "system.slice/imdsgated.service", below that
	// of the lab, which it takes for the root; "" for the root. With one the redirect
	// exempts it by that, too.
	Unit string
	// Syscalls are all that it may make; nil for any (UnitSyscalls).
	Syscalls []string
}

// Start starts a daemon in the instance of a lab and waits until it serves. When
// it does not, the error has its log.
func Start(lab *netlab.Lab, b Binaries, s Settings) (*Daemon, error) {
	d := &Daemon{Dir: s.Dir, spool: s.Spool, installed: s.Installed, done: make(chan struct{})}
	if d.Dir == "" {
		dir, err := os.MkdirTemp("", "imdsgate-gate")
		if err != nil {
			return nil, err
		}
		d.Dir = dir
		for _, sub := range []string{"run", "log", "lib"} {
			if err := errors.Join(os.Mkdir(filepath.Join(dir, sub), 0o755), os.Chown(filepath.Join(dir, sub), UID, UID)); err != nil {
				return nil, errors.Join(err, os.RemoveAll(dir))
			}
		}
		if err := errors.Join(os.Chmod(dir, 0o755), os.MkdirAll(filepath.Join(dir, "etc", "config.d"), 0o755)); err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
	}
	d.Config, d.Events = filepath.Join(d.Dir, "etc", "config.yaml"), filepath.Join(d.Dir, "log", "events.ndjson")
	if err := d.Write(s.Config); err != nil {
		return nil, err
	}
	if s.Installed {
		d.cmd = command(s, d.Dir, b, s.Args...)
	} else {
		d.cmd = command(s, "", b, append([]string{"--config", d.Config}, s.Args...)...)
	}
	// As a service manager does: processors are divided between sessions (autogroup in sched(7)).
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	d.cmd.Env = append(os.Environ(), s.Env...)
	if s.Lacks != attribution.Level1 {
		connector, err := netlab.ProcConnector()
		if err != nil {
			return nil, err
		}
		defer connector.Close()
		d.cmd.ExtraFiles = append(d.cmd.ExtraFiles, connector)
		d.cmd.Env = append(d.cmd.Env, "LISTEN_FDS=1", "LISTEN_FDNAMES="+connector.Name())
	}
	stderr, err := d.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := lab.Instance.Start(d.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", b.Daemon, err)
	}
	go func() {
		defer close(d.done)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			d.mu.Lock()
			d.log.Write(append(lines.Bytes(), '\n'))
			d.mu.Unlock()
		}
		d.cmd.Wait()
	}()
	if err := d.ready(); err != nil {
		d.Kill()
		return d, err
	}
	return d, nil
}

// Write replaces the configuration; the daemon reads it on SIGHUP.
func (d *Daemon) Write(config string) error {
	if d.installed {
		return os.WriteFile(d.Config, []byte(config), 0o644)
	}
	text := fmt.Sprintf("events:\n  path: %s\n  %s\nfirst_seen:\n  path: %s\nstate:\n  dir: %s\ncontrol:\n  socket: %s\n%s", d.Events, d.spool, d.FirstSeen(), d.State(), d.Socket(), config)
	return os.WriteFile(d.Config, []byte(text), 0o644)
}

// Operator is a command that finds the files of a daemon that is Installed where that
// does. It runs while the daemon does.
func (d *Daemon) Operator(program string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", d.PID()), "--", program}, args...)...)
}

// FirstSeen is where rules remember what they have seen.
func (d *Daemon) FirstSeen() string { return filepath.Join(d.State(), "first-seen.db") }

// State is where it keeps what operators have decided.
func (d *Daemon) State() string { return filepath.Join(d.Dir, "lib") }

// Socket is the control socket.
func (d *Daemon) Socket() string { return filepath.Join(d.Dir, "run", "control.sock") }

// readyTimeout is far more than a start takes: about 100 ms.
const readyTimeout = time.Minute

func (d *Daemon) ready() error {
	for end := time.Now().Add(readyTimeout); ; time.Sleep(10 * time.Millisecond) {
		s, err := d.Status()
		if err == nil && s.PID == d.PID() && strings.Contains(d.Log(), `"message":"serving"`) && (s.Redirect.Installed || s.Mode == "off" || len(s.Redirect.Locks) > 0) {
			return nil
		}
		select {
		case <-d.done:
			return fmt.Errorf("the daemon ended with %v:\n%s", d.cmd.ProcessState, d.Log())
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("the daemon is not ready: %v, %+v\n%s", err, s.Redirect, d.Log())
		}
	}
}

// Status asks the daemon.
func (d *Daemon) Status() (report.Status, error) {
	var s report.Status
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := control.NewClient(d.Socket()).Get(ctx, "status", nil, &s)
	return s, err
}

// PID of the daemon.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Log is what it wrote to standard error so far.
func (d *Daemon) Log() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.String()
}

// Signal sends a signal.
func (d *Daemon) Signal(sig os.Signal) error { return d.cmd.Process.Signal(sig) }

// Stop ends the daemon as systemd does and returns its exit status.
func (d *Daemon) Stop() int {
	d.Signal(syscall.SIGTERM)
	return d.Wait()
}

// Wait returns the exit status of a daemon that ends, -1 if a signal ended it.
func (d *Daemon) Wait() int {
	<-d.done
	return d.cmd.ProcessState.ExitCode()
}

// Kill ends the daemon without giving it a chance to clean up.
func (d *Daemon) Kill() {
	d.Signal(syscall.SIGKILL)
	<-d.done
}

// Close ends the daemon and removes its files.
func (d *Daemon) Close() error {
	select {
	case <-d.done:
	default:
		d.Stop()
	}
	return os.RemoveAll(d.Dir)
}

// Document is one line of the events, decoded.
type Document map[string]any

// At reads a field by its dotted name; nil if it is not there.
func (d Document) At(name string) any {
	var v any = map[string]any(d)
	for _, part := range strings.Split(name, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[part]
	}
	return v
}

// Documents reads all events that were written so far.
func (d *Daemon) Documents() ([]Document, error) {
	b, err := os.ReadFile(d.Events)
	if err != nil {
		return nil, err
	}
	var all []Document
	for line := range bytes.Lines(b) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // it is being written
		}
		var doc Document
		if err := json.Unmarshal(line, &doc); err != nil {
			return nil, fmt.Errorf("%w in %s", err, line)
		}
		all = append(all, doc)
	}
	return all, nil
}

// Await waits until an event satisfies a condition.
func (d *Daemon) Await(what string, ok func(Document) bool) (Document, error) {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		docs, err := d.Documents()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for i := len(docs) - 1; i >= 0; i-- {
			if ok(docs[i]) {
				return docs[i], nil
			}
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("no event about %s among %d\n%s", what, len(docs), d.Log())
		}
	}
}
