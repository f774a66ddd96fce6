package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/replay"
	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
)

// replayOptions are the flags of imdsgate replay.
type replayOptions struct {
	policy, against string
	actual          bool
	undecided       bool
	since, until    string
	all             bool
}

func newReplay(o *options) *cobra.Command {
	var r replayOptions
	cmd := &cobra.Command{
		Use:   "replay [--policy FILE] [--against FILE | --actual] FILE|DIR|-...",
		Short: "Try a policy on recorded events",
		Long: `Judge recorded events by another policy, and show what would have been different:
what would newly be refused, what would newly pass, what cannot be decided, and what
would still be refused.

The policy is the one of --policy, or of --config: a whole configuration, of which the
rest does not matter. It is compared with what was recorded, which is what enforce
mode did or would have done; with --against FILE, with another policy; with --actual,
with what clients got, so that what audit mode let pass and the policy refuses is
newly refused: what turning enforce mode on would break.

Events are lines of JSON as imdsgate writes them, of FILEs, of all such files in DIRs,
or of standard input (-); files may be packed by gzip. They may be those of many hosts.
Where secrets were taken out of a command line, or it was cut, a rule that looks there
may say something else than it did: then the request is undecidable, and never
guessed. What a rule of the type new_terms had seen before is not known either.

What a decision of an operator has let pass, or stopped, it lets pass or stops again,
with any policy; --without-decisions shows what will be when its time is over.

Bad lines are named and left out. Exit status: 0 nothing would newly be refused, 1
something would, 2 there is no answer, or not the whole of one, 78 a configuration is
wrong.`,
		Example: `  imdsgate replay --policy new.yaml /var/log/imdsgate
  imdsgate replay --actual --since 7d --json fleet/*.ndjson.gz
  imdsgate replay --policy new.yaml --against old.yaml - < events.ndjson`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return r.run(cmd.Context(), o, args, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&r.policy, "policy", "", "configuration with the policy to try (default: that of --config)")
	flags.StringVar(&r.against, "against", "", "configuration with the policy to compare with, instead of what was recorded")
	flags.BoolVar(&r.actual, "actual", false, "compare with what clients got")
	flags.BoolVar(&r.undecided, "without-decisions", false, "judge as if operators had decided nothing for a time")
	flags.StringVar(&r.since, "since", "", "count requests from a time on: 2026-11-26, 2026-11-26T08:00:00Z, or how long ago, as in 7d")
	flags.StringVar(&r.until, "until", "", "count requests before this time")
	flags.BoolVar(&r.all, "all", false, "show every group of requests, and not only the largest")
	cmd.MarkFlagsMutuallyExclusive("against", "actual")
	return cmd
}

func (o *replayOptions) run(ctx context.Context, common *options, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	options, err := o.compare(common)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		if f, ok := stdin.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
			return errors.New("which events? Name a FILE or a directory, as in imdsgate replay /var/log/imdsgate, or - for standard input")
		}
		args = []string{"-"}
	}
	in, r := newInputs(stderr, "replaying", "would newly be refused"), replay.New(options)
	err = in.history(ctx, args, stdin, r.Line, func() (events, found uint64) { return r.Requests(), r.Newly() })
	if err != nil {
		return err
	}
	d := r.Diff()
	if common.json {
		err = json.NewEncoder(stdout).Encode(d)
	} else {
		err = printDiff(stdout, d, o)
		if err == nil && !in.trouble {
			err = printNext(stdout, d)
		}
	}
	switch {
	case err != nil:
		return err
	case in.trouble, d.Requests == 0: // nothing was compared, which a pipeline must not take for a yes
		return exit(exitTrouble)
	case d.New.Requests > 0:
		return exit(exitNo)
	}
	return nil
}

// compare reads what is compared with what.
func (o *replayOptions) compare(common *options) (to replay.Options, err error) {
	if o.policy != "" && common.config != "" {
		return to, errors.New("--policy and --config both name the policy to try: leave one out")
	}
	load := func(path string) (*policy.Policy, error) {
		c, err := config.Load(path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errConfig, err)
		}
		p, err := c.Policy()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errConfig, err)
		}
		return p, nil
	}
	path := common.config
	if o.policy != "" {
		path = o.policy
	}
	if to.Policy, err = load(path); err != nil {
		return to, err
	}
	if o.against != "" {
		if to.Against, err = load(o.against); err != nil {
			return to, err
		}
	}
	to.Actual, to.WithoutDecisions = o.actual, o.undecided
	to.Since, to.Until, err = span(o.since, o.until, time.Now())
	return to, err
}

// span reads the values of --since and --until. The zero time is no bound.
func span(since, until string, now time.Time) (from, to time.Time, err error) {
	if from, err = moment("--since", since, now); err != nil {
		return from, to, err
	}
	if to, err = moment("--until", until, now); err != nil {
		return from, to, err
	}
	if !to.IsZero() && !from.Before(to) {
		return from, to, errors.New("--since is not before --until")
	}
	return from, to, nil
}
