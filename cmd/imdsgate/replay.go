package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
	"github.com/imdsgate/imdsgate/policy/replay"
	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
)

// replayOptions are the flags of imdsgate replay.
type replayOptions struct {
	policy, against string
	actual          bool
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

Bad lines are named and left out. Exit status: 0 nothing would newly be refused, 1
something would, 2 there is no answer, or not the whole of one.`,
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
	files, err := expand(args)
	if err != nil {
		return err
	}
	p := &player{inputs: newInputs(stderr, "replaying", "would newly be refused"), replay: replay.New(options), events: map[string]uint64{}}
	opened := p.open(files, stdin)
	walk := ndjson.Walk{Inputs: opened, Roles: ndjson.Roles{Timestamp: "@timestamp"}, Line: p.line, Bad: p.badLine, Failed: p.failed, Progress: p.report}
	if err := walk.Run(ctx); err != nil {
		return interrupted(err)
	}
	p.progress.clear()
	p.summary(opened)
	d := p.replay.Diff()
	if common.json {
		err = json.NewEncoder(stdout).Encode(d)
	} else {
		err = printDiff(stdout, d, o.all)
	}
	switch {
	case err != nil:
		return err
	case p.trouble:
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
	to.Actual = o.actual
	now := time.Now()
	if to.Since, err = moment("--since", o.since, now); err != nil {
		return to, err
	}
	if to.Until, err = moment("--until", o.until, now); err != nil {
		return to, err
	}
	if !to.Until.IsZero() && !to.Since.Before(to.Until) {
		return to, errors.New("--since is not before --until")
	}
	return to, nil
}

// expand puts the files of events in a directory in its place.
func expand(args []string) ([]string, error) {
	var all []string
	for _, arg := range args {
		info, err := os.Stat(arg)
		if arg == "-" || err != nil || !info.IsDir() {
			all = append(all, arg)
			continue
		}
		before := len(all)
		err = filepath.WalkDir(arg, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.Type().IsRegular() && eventFile(entry.Name()) {
				all = append(all, path)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("read directory: %w", err)
		}
		if len(all) == before {
			return nil, fmt.Errorf("%s has no files of events: their names have .ndjson, .jsonl or .json in them", arg)
		}
	}
	return all, nil
}

// eventFile tells files of events by their names: events.ndjson, events.ndjson.1,
// events-20261126.ndjson.gz.
func eventFile(name string) bool {
	for _, part := range []string{".ndjson", ".jsonl", ".json"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

// player gives lines to a replay, and says what it meets.
type player struct {
	inputs
	replay  *replay.Replay
	events  map[string]uint64 // documents of ours, by input
	foreign uint64
}

func (p *player) line(name string, number int, line []byte) error {
	switch err := p.replay.Line(line); {
	case err == nil:
		p.events[name]++
	case errors.Is(err, event.ErrForeign):
		p.foreign++
	default:
		p.badLine(ndjson.BadLine{Input: name, Number: number, Err: err})
	}
	return nil
}

func (p *player) report(at ndjson.Progress) {
	at.Events, at.Matches = p.replay.Requests(), p.replay.Newly()
	p.progress.show(at)
}

// summary says what a reader of the answer should know about it.
func (p *player) summary(opened []ndjson.Input) {
	if p.bad > 0 {
		p.say("%s left out", count(p.bad, "bad line", ""))
	}
	if p.foreign > 0 {
		p.say("%s no document of imdsgate, and left out", count(p.foreign, "line", ""))
	}
	for _, in := range opened {
		if p.events[in.Name] == 0 && in.Size != 0 {
			p.trouble = true
			p.say("%s has no events of imdsgate in it: is it the right file? They are written to events.path of the configuration", in.Name)
		}
	}
	if len(opened) == 0 {
		p.trouble = true
	}
}
