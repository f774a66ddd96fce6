package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy/tune"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// tuneOptions are the flags of imdsgate tune.
type tuneOptions struct {
	interactive, batch bool
	maxRisk            string
	minCount, minDays  int
	since, until       string
	format             string
	output             string
	force              bool
	owner              string
	readiness          bool
}

// usualMin is how often, and on how many days, something is proposed that was seen.
const usualMin = 2

func newTune(o *options) *cobra.Command {
	var t tuneOptions
	cmd := &cobra.Command{
		Use:     "tune FILE|DIR...",
		Aliases: []string{"learn"},
		Short:   "Propose grants for what enforce mode would refuse",
		Long: `Read recorded events, of one host or of many, and propose the fewest grants that let
through what looks legitimate and would be refused in enforce mode. Events are judged
again by the configuration (--config), so that what has a grant by now is not proposed.
FILEs may be packed by gzip; of a DIR all files *.ndjson* are read; - is standard input.

Each proposal has the evidence for it, a risk with its reason, and what else of the
recorded history it would have let through. Not proposed are shells, interpreters and
downloaders outside of a unit or container, programs that others than root can change,
what was seen too seldom, and what has a sign of theft: a session token of somebody
else, a disguised request, a proxy's header, a tool that another tool has started.

Without --interactive and --batch nothing is taken, only reported. With one of them,
what is taken is written to the file of -o as a drop-in of the configuration, or as a
list of exceptions that Kibana imports (--format elastic): those silence Elastic's
alerts and let nothing through. An existing file is not written over without --force.

Exit status: 0 nothing is left that enforce mode would refuse, 1 something is, 2 trouble:
the flags or a file are wrong, or no request was recorded; 78 the configuration is wrong.`,
		Example: `  imdsgate tune /var/log/imdsgate/
  imdsgate tune --interactive -o /etc/imdsgate/config.d/50-tune.yaml fleet/*.ndjson.gz
  imdsgate tune --batch --max-risk low -o 50-tune.yaml fleet/
  imdsgate tune --readiness --json fleet/`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("which events? Name a FILE, a DIR with files *.ndjson, or - for standard input")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return t.run(cmd.Context(), o, args, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&t.interactive, "interactive", false, "ask about each proposal")
	flags.BoolVar(&t.batch, "batch", false, "take all proposals up to --max-risk")
	flags.StringVar(&t.maxRisk, "max-risk", "medium", "the most that --batch takes: low or medium")
	flags.IntVar(&t.minCount, "min-count", usualMin, "how often something must have been seen to be proposed")
	flags.IntVar(&t.minDays, "min-days", usualMin, "on how many days")
	flags.StringVar(&t.since, "since", "", "only what was asked since then: 2006-01-02, 2006-01-02T15:04:05Z, or 7d for so long ago")
	flags.StringVar(&t.until, "until", "", "only what was asked before then")
	flags.StringVar(&t.format, "format", "yaml", "what is written: yaml, elastic or json")
	flags.StringVarP(&t.output, "output", "o", "", "file to which what is taken is written (default with --batch: standard output)")
	flags.BoolVar(&t.force, "force", false, "write over the file of -o")
	flags.StringVar(&t.owner, "owner", "", "owner of the grants (default: you)")
	flags.BoolVar(&t.readiness, "readiness", false, "print only what enforce mode would do now")
	completes(cmd, "format", "yaml", "elastic", "json")
	completes(cmd, "max-risk", "low", "medium")
	return cmd
}

func (o *tuneOptions) run(ctx context.Context, all *options, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if all.json {
		o.format = "json"
	}
	if o.output == "-" && o.batch {
		o.output = "" // which is standard output
	}
	tuning, max, err := o.options(stdin)
	if err != nil {
		return err
	}
	c, err := all.load()
	if err != nil {
		return err
	}
	if err := o.writable(c); err != nil {
		return err
	}
	if tuning.Policy, err = c.Policy(); err != nil {
		return fmt.Errorf("%w: %w", errConfig, err)
	}
	t := tune.New(tuning)
	in := newInputs(stderr, "reading", "would be refused")
	err = in.history(ctx, args, stdin, t.Line, func() (events, found uint64) { return t.Sum().Requests, t.Sum().Blocked })
	if err != nil {
		return err
	}
	r := t.Report()
	lookUpExecutables(ctx, t, r)
	var taken []*tune.Proposal
	switch {
	case o.interactive:
		if taken, err = ask(r, stdin, stdout); err != nil {
			return err
		}
	case o.batch:
		for _, p := range r.Proposals {
			if p.Risk <= max {
				taken = append(taken, p)
			}
		}
	}
	r.Take(taken)
	text, err := o.render(c, r, taken)
	if err != nil {
		return err
	}
	report := stdout
	if o.output == "" && text != nil && o.batch {
		report = stderr
	}
	if err := o.print(report, r); err != nil {
		return err
	}
	if text != nil {
		if err := o.write(text, stdout); err != nil {
			return err
		}
		if o.output != "" {
			fmt.Fprintf(stderr, "imdsgate: %s written with %d of %d proposals\n", o.output, len(taken), len(r.Proposals))
		}
	}
	if o.format == "yaml" && !o.readiness && r.Sum.Requests > 0 && !in.trouble {
		if err := o.next(report, r, args, text != nil && o.output != ""); err != nil {
			return err
		}
	}
	if text != nil && o.format == "elastic" {
		fmt.Fprintln(stderr, "imdsgate: exceptions silence alerts of Elastic and let nothing through: what enforce mode allows is said by grants (--format yaml)")
	}
	switch {
	case in.trouble, r.Sum.Requests == 0:
		return exit(exitTrouble)
	case r.Readiness.Left > 0:
		return exit(exitNo)
	}
	return nil
}

// options checks the flags.
func (o *tuneOptions) options(stdin io.Reader) (t tune.Options, max tune.Risk, err error) {
	t = tune.Options{MinCount: o.minCount, MinDays: o.minDays, Owner: o.owner}
	if t.Since, t.Until, err = span(o.since, o.until, time.Now()); err != nil {
		return t, max, err
	}
	for _, class := range imds.Classes() {
		t.Classes = append(t.Classes, class.String())
	}
	if t.Owner == "" {
		if u, err := user.Current(); err == nil {
			t.Owner = u.Username
		}
	}
	switch {
	case o.interactive && o.batch:
		err = errors.New("--interactive asks about each proposal and --batch about none: choose one")
	case o.interactive && !isTerminal(stdin):
		err = errors.New("--interactive asks on a terminal, and standard input is none; --batch takes what --max-risk allows")
	case o.interactive && o.format == "json":
		err = errors.New("--interactive asks where --json would be printed")
	case o.output != "" && !o.interactive && !o.batch:
		err = errors.New("-o writes what is taken: choose with --interactive, or take all up to --max-risk with --batch")
	case o.interactive && (o.output == "" || o.output == "-"):
		err = errors.New("where to? Name a file with -o, such as " + filepath.Join(dropIns, "50-tune.yaml"))
	case o.format == "json" && o.output != "":
		err = errors.New("-o writes a drop-in or exceptions, and --json prints the report: leave out one of them")
	case o.format == "elastic" && !o.interactive && !o.batch:
		err = errors.New("--format elastic writes what is taken: choose with --interactive, or take all up to --max-risk with --batch")
	case o.format != "yaml" && o.format != "elastic" && o.format != "json":
		err = fmt.Errorf("unknown format %q; there are yaml, elastic, json", o.format)
	case o.minCount < 1 || o.minDays < 1:
		err = errors.New("--min-count and --min-days are at least 1")
	case o.maxRisk != "low" && o.maxRisk != "medium":
		err = fmt.Errorf("--max-risk %q: there are low and medium; what is of high risk is taken one by one, with --interactive", o.maxRisk)
	default:
		err = max.UnmarshalText([]byte(o.maxRisk))
	}
	return t, max, err
}

func isTerminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

// render makes what is written of what was taken; nil if nothing is. A drop-in is
// compiled together with the configuration before anybody sees it.
func (o *tuneOptions) render(c config.Config, r *tune.Report, taken []*tune.Proposal) ([]byte, error) {
	switch {
	case len(taken) == 0, o.format == "json":
		return nil, nil
	case o.format == "elastic":
		return tune.Elastic(taken)
	}
	text, err := tune.DropIn(taken, r)
	if err != nil {
		return nil, err
	}
	name := o.output
	if name == "" {
		name = "drop-in"
	}
	if text, err = config.Format(name, text); err != nil {
		return nil, fmt.Errorf("nothing is written: %w", err)
	}
	with, err := c.With(name, text)
	if err == nil {
		_, err = with.Policy()
	}
	if err != nil {
		return nil, fmt.Errorf("nothing is written: with what was taken the configuration is wrong: %w", err)
	}
	read := with.Grants[len(c.Grants):]
	for i, p := range taken { // which has names that processes have chosen
		if len(read) != len(taken) || !reflect.DeepEqual(read[i], p.Grant) {
			return nil, fmt.Errorf("nothing is written: the grant %q would be read as another", p.Grant.Name)
		}
	}
	return text, nil
}

// writable says, before anything is asked, why the file cannot be written.
func (o *tuneOptions) writable(c config.Config) error {
	if o.output == "" {
		return nil
	}
	if dir, err := os.Stat(filepath.Dir(o.output)); err != nil {
		return fmt.Errorf("look for where to write: %w", err)
	} else if !dir.IsDir() {
		return fmt.Errorf("%s is no directory", filepath.Dir(o.output))
	}
	if _, err := os.Lstat(o.output); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("look for the file to write: %w", err)
	}
	if !o.force {
		return fmt.Errorf("%s is there already: name another file, or write over it with --force", o.output)
	}
	full, _ := filepath.Abs(o.output) // as it is, without a working directory
	for i := range c.Grants {
		if at := c.Origin(fmt.Sprintf("grants[%d]", i)); strings.HasPrefix(at, o.output+":") || strings.HasPrefix(at, full+":") {
			return fmt.Errorf("%s has grants by which the events are judged, and which would be lost: write a file beside it, or move it out of the configuration and run again", o.output)
		}
	}
	return nil
}

// write writes a file that is there as a whole or not at all.
func (o *tuneOptions) write(text []byte, stdout io.Writer) error {
	if o.output == "" {
		_, err := stdout.Write(text)
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(o.output), ".tune-")
	if err != nil {
		return fmt.Errorf("write what was taken: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	err = errors.Join(err, takeGroup(f), f.Chmod(0o640), f.Sync(), f.Close())
	if err == nil && o.force {
		err = os.Rename(f.Name(), o.output)
	} else if err == nil {
		err = os.Link(f.Name(), o.output) // which never takes the place of another
	}
	if err != nil {
		return fmt.Errorf("write what was taken: %w", err)
	}
	return nil
}

func (o *tuneOptions) print(w io.Writer, r *tune.Report) error {
	var what any = r
	if o.readiness {
		what = r.Readiness
	}
	switch {
	case o.format == "json":
		return json.NewEncoder(w).Encode(what)
	case o.readiness:
		return printReadiness(w, r)
	}
	return printTuning(w, r, o.batch, o.interactive)
}
