// Command imdsgated stands in front of the EC2 instance metadata service: it
// finds out which process asks, judges it, and passes the request on or not.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/rs/zerolog"
)

// version is set by the linker.
var version = "dev"

// Exit codes that the unit file and people rely on (sysexits.h).
const (
	exitFailed = 1
	exitUsage  = 2
	exitNoPerm = 77
	exitConfig = 78 // RestartPreventExitStatus
)

func main() {
	// One processor carries several times what EC2 lets an instance ask of its
	// link-local services (1,024 packets a second on each interface), and waking
	// a second one for a request costs more than it does.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	// Of a journald that was stopped, not restarted, there is a broken pipe. Go would end us for it
	// at the next line of the log (os/signal, SIGPIPE), which is more than a log is worth.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("imdsgated", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var mode *policy.Mode
	path := flags.String("config", "", "configuration `file` (default "+config.DefaultPath+", if it exists)")
	flags.Func("mode", "audit, enforce or off, whatever the configuration says", func(s string) error {
		mode = new(policy.Mode)
		return mode.UnmarshalText([]byte(s))
	})
	check := flags.Bool("check", false, "read the configuration and the rules, say what is wrong, and exit")
	ended := flags.Bool("ended", false, "clean up after a daemon that has ended, as its mode asks for (ExecStopPost=), and exit")
	failed := flags.Bool("failed", false, "likewise, when no daemon will be started any more (OnFailure=), and exit")
	show := flags.Bool("version", false, "print the version and exit")
	flags.Usage = func() {
		fmt.Fprintln(stderr, "usage: imdsgated [flags]\n\nThe gate in front of the instance metadata service. SIGHUP reads the configuration again.\n\nflags:")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return exitUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "imdsgated: unexpected argument %q\n", flags.Arg(0))
		return exitUsage
	}
	if *show {
		fmt.Fprintln(stdout, "imdsgated", version)
		return 0
	}

	d := &daemon{path: *path, mode: mode}
	if *ended || *failed {
		if err := d.afterwards(ctx, stdout, *failed); err != nil {
			fmt.Fprintf(stderr, "imdsgated: clean up after a daemon that has ended: %v\n", err)
			return exitFailed
		}
		return 0
	}
	c, p, err := d.load()
	if err != nil {
		fmt.Fprintf(stderr, "imdsgated: the configuration is refused:\n%v\n", err)
		return exitConfig
	}
	level, err := zerolog.ParseLevel(string(c.Log.Level))
	if err != nil {
		fmt.Fprintf(stderr, "imdsgated: log.level: %v\n", err)
		return exitConfig
	}
	if *check {
		for _, w := range warnings(p) {
			fmt.Fprintln(stdout, "warning:", w)
		}
		fmt.Fprintf(stdout, "%d rules, %d grants, mode %s\n", len(p.Rules()), len(p.Grants()), p.Mode)
		return 0
	}
	d.log = zerolog.New(logStream{stderr}).Level(level).With().Timestamp().Logger()
	for _, w := range warnings(p) {
		d.log.Warn().Msg(w)
	}
	if err := d.run(ctx, c, p); err != nil {
		d.log.Error().Err(err).Msg("stopped")
		switch {
		case errors.Is(err, errLevel), errors.Is(err, errPorts):
			return exitConfig
		case errors.Is(err, fs.ErrPermission):
			return exitNoPerm
		}
		return exitFailed
	}
	return 0
}

// logStream is standard error. Of a journald that was stopped it stays a broken pipe, and
// lines go to the socket that the next one makes.
type logStream struct{ io.Writer }

func (l logStream) Write(line []byte) (int, error) {
	n, err := l.Writer.Write(line)
	if errors.Is(err, syscall.EPIPE) {
		err = journal.Send(string(bytes.TrimSuffix(line, []byte("\n"))), journal.PriInfo, nil)
		n = len(line)
	}
	return n, err
}

// load reads the configuration and compiles the policy, with the mode of the
// command line.
func (d *daemon) load() (config.Config, *policy.Policy, error) {
	c, err := config.Load(d.path)
	if err != nil {
		return c, nil, err
	}
	if d.mode != nil {
		c.Mode = *d.mode
	}
	p, err := c.Policy()
	return c, p, err
}

// warnings are what the authors of rules should know although their rules work, and
// which files are left out.
func warnings(p *policy.Policy) (all []string) {
	for _, r := range p.Rules() {
		for _, w := range r.Warnings {
			all = append(all, w.Error())
		}
	}
	for _, err := range p.Skipped {
		all = append(all, "left out, as skip_refused says: "+err.Error())
	}
	return all
}
