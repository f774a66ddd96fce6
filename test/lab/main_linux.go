// Lab runs a command on a private EC2 instance: a network namespace whose metadata service is the emulator. See
// --help; package netlab builds the same for tests.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const help = `usage: lab [options] -- COMMAND [ARGUMENT...]

Runs COMMAND in a network namespace that looks like an EC2 instance: eth0 has 172.31.0.10/20 and fd00:ec2:1::10/64,
and 169.254.169.254 and fd00:ec2::254, port 80, are an emulated metadata service. There is no other network. COMMAND
keeps its standard streams, environment, working directory and terminal. Needs root.

  --containers           add two containers that reach the service through the instance. Their namespaces are in the
                         environment, for nsenter --net="$LAB_BRIDGED" or "$LAB_ROUTED"
  --imds-hop-limit N     HttpPutResponseHopLimit of the service, 1 to 64 (default 1)
  --imds-tokens WHEN     HttpTokens of the service: optional or required (default optional)
  --no-imds              run no emulator
  -h, --help             show this help

The exit status is COMMAND's, or 128 and the number of the signal that ended it; 127 when COMMAND is not found, 126
when it cannot be run, 125 when lab fails itself. ("go run" turns every status but 0 into 1.)

When COMMAND ends, so do all processes that it left behind, wherever they are: SIGKILL. SIGINT, SIGTERM, SIGHUP and
SIGQUIT are passed on to COMMAND; SIGTERM and SIGHUP are followed by SIGKILL after 5 s, or at once when they come
again. If lab is killed, COMMAND is killed with it; what COMMAND had started goes on, and with its end the namespaces
do.
`

// grace is how long COMMAND may take to end after SIGTERM: too short and it cannot clean up, too long and whoever
// supervises the lab kills it first.
const grace = 5 * time.Second

const (
	exitFailed    = 125 // these three as env(1) and timeout(1) have them
	exitCannotRun = 126
	exitNotFound  = 127
	exitSignal    = 128
)

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
	}
	os.Exit(code)
}

func run(args []string) (code int, err error) {
	o, command, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Print(help)
		return 0, nil
	}
	if err != nil {
		return exitFailed, err
	}
	signals := make(chan os.Signal, 4)
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT} {
		if !signal.Ignored(s) { // nohup(1)
			signal.Notify(signals, s)
		}
	}
	defer signal.Stop(signals)
	// Processes that lose their parent become ours, so that they can be ended (PR_SET_CHILD_SUBREAPER(2const)).
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return exitFailed, fmt.Errorf("become a subreaper: %w", err)
	}
	lab, err := netlab.New(o)
	if err != nil {
		return exitFailed, err
	}
	defer func() {
		if closeErr := errors.Join(endChildren(), lab.Close()); closeErr != nil {
			code, err = exitFailed, errors.Join(err, closeErr)
		}
	}()

	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if lab.Bridged != nil {
		cmd.Env = append(os.Environ(), "LAB_BRIDGED="+lab.Bridged.Path(), "LAB_ROUTED="+lab.Routed.Path())
	}
	err = lab.Instance.Start(cmd)
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return exitNotFound, err
	case err != nil:
		return exitCannotRun, err
	}
	ended := make(chan unix.WaitStatus, 1)
	go reap(cmd.Process.Pid, ended)
	status := await(cmd.Process, ended, signals)
	if status.Signaled() {
		return exitSignal + int(status.Signal()), nil
	}
	return status.ExitStatus(), nil
}

func parse(args []string) (o netlab.Options, command []string, err error) {
	flags := flag.NewFlagSet("lab", flag.ContinueOnError)
	flags.Usage = func() {}
	flags.SetOutput(new(strings.Builder)) // the error says it, once
	o.IMDS = new(imdstest.Config)
	flags.BoolVar(&o.Containers, "containers", false, "")
	flags.BoolVar(&o.NoIMDS, "no-imds", false, "")
	flags.Func("imds-hop-limit", "", func(value string) error {
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 || n > 64 {
			return errors.New("want a number from 1 to 64")
		}
		o.IMDS.HopLimit = n
		return nil
	})
	flags.Func("imds-tokens", "", func(value string) error {
		if value != "optional" && value != "required" {
			return errors.New("want optional or required")
		}
		o.IMDS.TokensRequired = value == "required"
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return o, nil, err
	}
	if flags.NArg() == 0 {
		return o, nil, errors.New("no COMMAND: see --help")
	}
	return o, flags.Args(), nil
}

// await passes signals on until COMMAND has ended. A COMMAND that handles SIGINT, as an interactive one does, goes on.
func await(p *os.Process, ended <-chan unix.WaitStatus, signals <-chan os.Signal) unix.WaitStatus {
	var late <-chan time.Time
	for {
		select {
		case status := <-ended:
			return status
		case s := <-signals:
			if late != nil && (s == unix.SIGTERM || s == unix.SIGHUP) {
				p.Kill()
				continue
			}
			p.Signal(s)
			if s == unix.SIGTERM || s == unix.SIGHUP {
				late = time.After(grace)
			}
		case <-late:
			p.Kill()
		}
	}
}

// reap waits for all children, those that others left to us included, until COMMAND has ended.
func reap(command int, ended chan<- unix.WaitStatus) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err == nil && pid == command {
			ended <- status
			return
		}
	}
}

// endChildren kills all children, then those that become ours by that, until there are none. It must be the only
// one to wait for children.
func endChildren() error {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		lists, err := filepath.Glob("/proc/self/task/*/children")
		if err != nil {
			return err
		}
		for _, list := range lists {
			pids, _ := os.ReadFile(list) // of a thread that has ended: its children are another's
			for _, pid := range strings.Fields(string(pids)) {
				if n, err := strconv.Atoi(pid); err == nil {
					unix.Kill(n, unix.SIGKILL)
				}
			}
		}
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if errors.Is(err, unix.ECHILD) {
				return nil
			}
			if pid <= 0 {
				break
			}
		}
	}
	return errors.New("processes left by COMMAND did not end within 5 s of SIGKILL")
}
