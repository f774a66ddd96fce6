// Command imdsgate is how an operator talks to the daemon imdsgated, and works
// on files without it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/control"
	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "dev"

// Exit codes, as sysexits.h and grep have them.
const (
	exitNo         = 1  // a clean no: not protected, differences found
	exitTrouble    = 2  // could not answer
	exitNotRunning = 3  // as LSB has it for status
	exitUnknown    = 4  // likewise
	exitNoPerm     = 77 // not permitted
	exitConfig     = 78 // the configuration is wrong
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// What waits where no context reaches, such as for somebody to write to a named pipe,
	// ends some seconds after it was told to.
	context.AfterFunc(ctx, func() {
		time.Sleep(5 * time.Second)
		fmt.Fprintln(os.Stderr, "imdsgate: interrupted")
		os.Exit(exitTrouble)
	})
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// exit is an error that is only an exit code: everything has been said.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit %d", int(e)) }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return exitCode(root.ExecuteContext(ctx), stderr)
}

// exitCode says what went wrong, and gives the code for it.
func exitCode(err error, stderr io.Writer) int {
	var code exit
	if err == nil {
		return 0
	}
	if errors.As(err, &code) {
		return int(code)
	}
	fmt.Fprintln(stderr, "imdsgate:", shown(err.Error())) // it may quote a file
	switch {
	case errors.Is(err, control.ErrNotRunning):
		fmt.Fprintln(stderr, "hint: systemctl start imdsgated, or see journalctl -u imdsgated for why it is not")
		return exitNotRunning
	case errors.Is(err, fs.ErrPermission):
		fmt.Fprintln(stderr, "hint: ask as root, or as a member of the group imdsgate")
		return exitNoPerm
	case errors.Is(err, errConfig):
		return exitConfig
	}
	return exitTrouble
}

var errConfig = errors.New("configuration")

// options are the flags of every verb.
type options struct {
	config string
	socket string
	json   bool
	stderr io.Writer
}

func newRoot() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:              "imdsgate",
		Short:            "See and steer the gate in front of the instance metadata service",
		SilenceUsage:     true,
		SilenceErrors:    true,
		PersistentPreRun: func(cmd *cobra.Command, _ []string) { o.stderr = cmd.ErrOrStderr() },
	}
	flags := root.PersistentFlags()
	flags.StringVar(&o.config, "config", "", "configuration file (default "+config.DefaultPath+", if it exists)")
	flags.StringVar(&o.socket, "socket", "", "control socket of the daemon (default from the configuration: "+control.DefaultSocket+")")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	root.AddCommand(newStatus(&o), newDoctor(&o), newSupport(&o), newEvents(&o), newCredentials(&o), newExplain(&o), newReplay(&o), newTune(&o), newEQL(&o), newWhois(&o), newDecisions(&o), newMode(&o), newRedirect(&o), newRules(&o), newConfig(&o), newCheck(&o), newFmt(), newReload(&o), newTest(&o), newProfiles(&o), newMan(), newVersion(&o))
	return root
}

// oneOf is for a command with one argument, which is one of those in ValidArgs.
func oneOf(cmd *cobra.Command, args []string) error {
	if len(args) == 1 && slices.Contains(cmd.ValidArgs, args[0]) {
		return nil
	}
	example, _, _ := strings.Cut(strings.TrimSpace(cmd.Example), "\n")
	what := "nothing"
	if len(args) > 0 {
		what = strconv.Quote(strings.Join(args, " "))
	}
	return fmt.Errorf("%s takes one of %s, and not %s, as in %s", cmd.CommandPath(), strings.Join(cmd.ValidArgs, ", "), what, example)
}

// completes offers the values of a flag to the shell.
func completes(cmd *cobra.Command, flag string, values ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // there is no such flag
	}
}

// load reads the configuration that the flags name.
func (o *options) load() (config.Config, error) {
	c, err := config.Load(o.config)
	if err != nil {
		return c, fmt.Errorf("%w: %w", errConfig, err)
	}
	return c, nil
}

// client talks to the daemon. The configuration is read only for where its
// socket is. Where that of the host is wrong, the daemon that runs has an earlier one, and
// is asked where it listens by default; a file that was named must be right.
func (o *options) client() (*control.Client, error) {
	if o.socket != "" {
		return control.NewClient(o.socket), nil
	}
	c, err := o.load()
	switch {
	case err == nil:
		return control.NewClient(c.Control.Socket), nil
	case o.config == "":
		return o.anyway(err), nil
	}
	return nil, err
}

// anyway talks to a daemon of which the configuration does not say where it is.
func (o *options) anyway(err error) *control.Client {
	why := "is wrong"
	if errors.Is(err, fs.ErrPermission) {
		why = "cannot be read as this user"
	}
	fmt.Fprintf(o.stderr, "imdsgate: the configuration %s, which leaves open where the daemon listens: asking at %s; --socket names another place\n", why, control.DefaultSocket)
	return control.NewClient(control.DefaultSocket)
}
