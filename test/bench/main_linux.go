// Bench measures what imdsgate costs a client of the metadata service, beside haproxy, nginx and nothing in between, in
// one run on one machine. See --help.
//
// The program is several processes. The one that was started copies itself to where only root can change it, so that
// policy can grant it credentials, runs the copy and removes it. The copy builds a lab for each target and is the
// client in all of them. A child of it is the metadata service, of all of them too, so that its work is nobody's but
// its own.
//
// Each server has a session of its own, as a service manager gives it, and with it its share of the processors: the kernel
// divides them between sessions (autogroup in sched(7)). In one session each thread would have a share, and he who has
// more threads more of them.
//
// Absolute numbers belong to the machine; what can be compared elsewhere are the ratios inside one run. That is why
// short blocks of requests alternate between the targets, and why each ratio is taken within a round and then the
// median of the rounds.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const help = `usage: bench [options]
       bench attribution [options]      measures attribution alone; see bench attribution --help

Measures requests to a stand-in for the metadata service: sent directly, and redirected through haproxy, nginx and
imdsgate, in audit and in enforce mode, with attribution, the shipped rules and the event log. Prints tables in
Markdown. Everything happens in network namespaces of its own. Needs root, iptables and a checkout to build from;
haproxy and nginx are left out if they are not installed. The machine should have nothing else to do.

  --rounds N    how often each target has its turn in each mode (default 11)
  --n N         requests of one turn with one client; 32 clients together send six times as many (default 300)
  --quick       5 rounds of 100, in about a minute, unless --rounds or --n say otherwise
  --procs N     run beside N sleeping processes, at most 10000, each with 20 descriptors. They are younger than the
                client and in its cgroup, so that nothing tells where to look for the client first
  --think D     have the service wait for so long before each answer, as in 300us; it answers at once otherwise, which
                hides nothing of what a proxy does meanwhile
  --json FILE   also write everything that was measured to FILE
  -h, --help    show this help

The exit status is 1 if an answer was wrong or something could not be measured. That a goal is missed does not change
it: one run on a busy machine proves little.
`

type options struct {
	rounds, n, procs int
	think            time.Duration
	json             string
}

// maxRun bounds a whole run. One of default length takes three to five minutes on two cores; much longer, and the
// targets do not answer or the machine is too busy to measure anything.
const maxRun = 20 * time.Minute

func main() {
	// Pdeathsig fires when the thread that started a child ends, and this one does not.
	runtime.LockOSThread()
	err := run(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(help)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	role := ""
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		role, args = args[0], args[1:]
	}
	switch role {
	case "upstream": // as startUpstream asks for
		return serveUpstream(args, os.Stdin)
	case "sleepers": // as startSleepers does
		return sleep(os.Stdin)
	case "asker": // as startAsker does
		return beAsked(os.Stdin)
	case "spawner": // as spawn does
		return beSpawner(args)
	case "attribution":
		return attributionMain(args)
	case "measure", "":
	default:
		return fmt.Errorf("unexpected argument %q: see --help", role)
	}
	o, err := parse(args)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes network namespaces and runs the daemon as a user of its own")
	}
	if role == "" {
		return supervise(args)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, maxRun, fmt.Errorf("not done after %v", maxRun))
	defer cancel()
	rep, err := measure(ctx, o, os.Stderr)
	if err != nil {
		return err
	}
	if o.json != "" {
		if err := writeJSON(o.json, rep); err != nil {
			return err
		}
	}
	rep.markdown(os.Stdout)
	if rep.Wrong > 0 {
		return fmt.Errorf("wrong answers: %d, the first: %s", rep.Wrong, rep.FirstWrong)
	}
	return nil
}

func parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.Usage = func() {}
	flags.SetOutput(io.Discard) // the error says it, once
	quick := flags.Bool("quick", false, "")
	flags.IntVar(&o.rounds, "rounds", 0, "")
	flags.IntVar(&o.n, "n", 0, "")
	flags.IntVar(&o.procs, "procs", 0, "")
	flags.DurationVar(&o.think, "think", 0, "")
	flags.StringVar(&o.json, "json", "", "")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	rounds, n := 11, 300
	if *quick {
		rounds, n = 5, 100
	}
	if !given["rounds"] {
		o.rounds = rounds
	}
	if !given["n"] {
		o.n = n
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q: see --help", flags.Arg(0))
	case o.rounds < 1 || o.rounds > 1000:
		return o, errors.New("--rounds: want 1 to 1000")
	case o.n < 1 || o.n > 10000:
		return o, errors.New("--n: want 1 to 10000")
	case o.procs < 0 || o.procs > 10000:
		return o, errors.New("--procs: want 0 to 10000")
	case o.think < 0 || o.think > 10*time.Millisecond:
		return o, errors.New("--think: want 0 to 10ms")
	}
	return o, nil
}

// supervise runs the same command as a copy of this program.
func supervise(args []string) (err error) {
	binary, remove, err := install()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	defer signal.Stop(signals)

	cmd := exec.Command(binary, append([]string{"measure"}, args...)...)
	// The signals that preempt goroutines would interrupt the system calls that are measured.
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGTERM}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case <-signals:
			cmd.Process.Signal(unix.SIGTERM)
		case err := <-ended:
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
				return errors.New("the run failed")
			}
			return err
		}
	}
}

// home is where programs are that other programs run. No rule takes what is there for a stranger.
const home = "/usr/local/libexec"

// install copies this program into a directory of its own below home.
func install() (binary string, remove func() error, err error) {
	made := os.Mkdir(home, 0o755) == nil
	dir := filepath.Join(home, fmt.Sprintf("imdsgate-bench-%d", os.Getpid()))
	remove = func() error {
		err := os.RemoveAll(dir)
		if made {
			os.Remove(home) // unless something else has come to be there
		}
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("copy this program to %s: %w", dir, err), remove())
		}
	}()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", nil, err
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", nil, err
	}
	defer self.Close()
	binary = filepath.Join(dir, "bench")
	copied, err := os.OpenFile(binary, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return "", nil, err
	}
	_, err = io.Copy(copied, self)
	return binary, remove, errors.Join(err, copied.Close())
}

func writeJSON(path string, r *report) error {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetIndent("", " ")
	if err := enc.Encode(r); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}
