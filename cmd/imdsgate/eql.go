package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// eqlOptions are the flags of imdsgate eql.
type eqlOptions struct {
	file      string
	rule      string
	timestamp string
	roles     ndjson.Roles
	pending   int
	explain   bool
	given     func(flag string) bool // on the command line
}

func newEQL(o *options) *cobra.Command {
	var e eqlOptions
	cmd := &cobra.Command{
		Use:   "eql QUERY [FILE...]",
		Short: "Search files of events with a query in EQL",
		Long: `Search events with a query in EQL, the language of Elastic's detection rules. Events
are lines of JSON, of FILEs or else of standard input, which is also -; files may be
packed by gzip. Keys may be nested or have dots.

A match is printed as a line of JSON: the event as it stands in its line, or for a
sequence or sample an array of events, with null for one that is missing. With
--id FIELD an event is only what it has in that field.

Events are taken in the order of their times, then of the tiebreaker (those without
one last), then as they come, whatever their order in the files: of several files
the one that begins first is first. Where that is necessary a temporary file helps
(in TMPDIR). From a pipe, events are put in order as far as 64 MB hold them or until
nothing has come for a second; those that come later than that are counted.

Times are dates as in RFC 3339 (without an offset: UTC) or numbers. Numbers are told
apart by their size: below 1e9 they are milliseconds, below 1e11 seconds, below 1e14
milliseconds, below 1e17 microseconds, below 1e18 Windows file time (100 ns since
1601), else nanoseconds. --timestamp FIELD:FORM says which they are: s, ms, us, ns or
filetime. An event without a time is a bad line for a sequence, a sample or a pipe,
and happened with the event before it for any other query.

Fields that imdsgate writes have their types in ECS. Others have the type of the
first value that they have among the first 1,000 events, or if they have none, of
what the query compares them with; a field that no event has is worth a warning.
Values are taken as Elasticsearch takes them: "42" is good for a number, and
42 for a string.

With --rule the query is that of a rule file in Elastic's form, of the type eql. Its
event_category_override, timestamp_field and tiebreaker_field hold unless a flag says
another; what else the rule says is left to who runs it.

Bad lines are named and left out. Exit status: 0 something matches, 1 nothing does,
2 the query is wrong, or a file could not be read.`,
		Example: `  imdsgate eql 'process where process.name : "curl"' /var/log/imdsgate/events.ndjson*
  imdsgate eql --id event.id 'sequence by process.entity_id with maxspan=1m
    [process where event.action == "exec"] [network where destination.port == 80]' events.ndjson.gz
  imdsgate eql --rule credential_access.toml --id event.id events.ndjson
  imdsgate eql -f hunt.eql --timestamp time:ms --category kind < events.ndjson`,
		RunE: func(cmd *cobra.Command, args []string) error {
			e.given = cmd.Flags().Changed
			return e.run(cmd.Context(), o.json, args, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&e.file, "file", "f", "", "file with the query, instead of QUERY; - is standard input")
	flags.StringVar(&e.rule, "rule", "", "rule file with the query, instead of QUERY")
	flags.StringVar(&e.roles.Category, "category", "event.category", "field that the category is in (process where ...)")
	flags.StringVar(&e.timestamp, "timestamp", "@timestamp", "field with the time, FIELD or FIELD:FORM")
	flags.StringVar(&e.roles.Tiebreaker, "tiebreaker", "event.sequence", "field that orders events of the same time")
	flags.StringVar(&e.roles.ID, "id", "", "print only this field of the events, such as event.id")
	flags.IntVar(&e.pending, "pending", 1<<16, "unfinished sequences, and keys of samples, that are kept")
	flags.BoolVar(&e.explain, "explain", false, "print how the query is understood, and stop")
	return cmd
}

func (o *eqlOptions) run(ctx context.Context, json bool, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	tree, files, err := o.query(args, stdin)
	if err != nil {
		return err
	}
	if err := o.form(); err != nil {
		return err
	}
	if len(files) == 0 && !o.explain {
		if f, ok := stdin.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
			return errors.New("which events? Name a FILE, or - to type them")
		}
		files = []string{"-"}
	}
	out := bufio.NewWriter(stdout)
	_, single := tree.Body.(*syntax.Event)
	t := &eqlOutput{inputs: newInputs(stderr, "searching", "matches"), out: out, array: !single, byID: o.roles.ID != ""}
	search := ndjson.Search{
		Query: tree, Schema: policy.Schema(), Roles: o.roles, Pending: o.pending,
		Found: t.found, Bad: t.badLine, Failed: t.failed, Progress: t.report, Inputs: t.open(files, stdin),
	}
	if len(search.Inputs) == 0 && !o.explain {
		return exit(exitTrouble)
	}
	plan, err := search.Plan(ctx)
	if err != nil {
		return interrupted(err)
	}
	for _, w := range plan.Warnings {
		t.say("%s", w)
	}
	if o.explain {
		plan.Close()
		return explainQuery(stdout, json, planOf(tree, plan, o.roles))
	}
	sum, err := plan.Run(ctx)
	t.progress.clear()
	if err := cmp.Or(err, out.Flush()); err != nil {
		return interrupted(err)
	}
	t.summary(sum, plan.Fields, o.pending)
	switch {
	case t.trouble, sum.Events == 0 && sum.Bad > 0:
		return exit(exitTrouble)
	case sum.Matches == 0:
		return exit(exitNo)
	}
	return nil
}

// query reads the query, and says which of the arguments are files.
func (o *eqlOptions) query(args []string, stdin io.Reader) (*syntax.Query, []string, error) {
	switch {
	case o.rule != "" && o.file != "":
		return nil, nil, errors.New("the query is either in the file of -f or in that of --rule")
	case o.rule != "":
		tree, err := o.queryOfRule()
		return tree, args, err
	case o.file == "":
		if len(args) == 0 {
			return nil, nil, errors.New(`which query? One is given as in imdsgate eql 'process where process.name == "curl"' FILE, or in a file with -f`)
		}
		tree, err := syntax.Parse("query", args[0])
		if err != nil {
			if info, statErr := os.Stat(args[0]); statErr == nil && info.Mode().IsRegular() {
				flag := "-f"
				if strings.HasSuffix(args[0], ".toml") {
					flag = "--rule"
				}
				err = fmt.Errorf("%w\n%s is a file: %s %[2]s takes the query from it", err, args[0], flag)
			}
			return nil, nil, err
		}
		return tree, args[1:], nil
	}
	var src []byte
	var err error
	name := o.file
	if name == "-" {
		if len(args) == 0 || slices.Contains(args, "-") {
			return nil, nil, errors.New("standard input cannot be both the query and the events")
		}
		name = "standard input"
		src, err = io.ReadAll(stdin)
	} else {
		src, err = os.ReadFile(name)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the query: %w", err)
	}
	tree, err := syntax.Parse(name, strings.TrimPrefix(string(src), "\uFEFF"))
	return tree, args, err
}

// queryOfRule reads a rule file, and takes from it the fields that no flag names.
func (o *eqlOptions) queryOfRule() (*syntax.Query, error) {
	src, err := os.ReadFile(o.rule)
	if err != nil {
		return nil, fmt.Errorf("read the rule: %w", err)
	}
	rule, err := policy.ParseRuleQuery(o.rule, src)
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		flag, of string
		field    *string
	}{
		{"category", rule.Category, &o.roles.Category},
		{"timestamp", rule.Timestamp, &o.timestamp},
		{"tiebreaker", rule.Tiebreaker, &o.roles.Tiebreaker},
	} {
		if f.of != "" && !o.given(f.flag) {
			*f.field = f.of
		}
	}
	return rule.Tree, nil
}

// form takes the form of times off the name of their field.
func (o *eqlOptions) form() error {
	o.roles.Timestamp = o.timestamp
	if i := strings.LastIndexByte(o.timestamp, ':'); i >= 0 {
		o.roles.Timestamp = o.timestamp[:i]
		if err := o.roles.Form.UnmarshalText([]byte(o.timestamp[i+1:])); err != nil {
			return fmt.Errorf("--timestamp %s: %w", o.timestamp, err)
		}
	}
	if o.roles.Timestamp == "" || o.roles.Category == "" {
		return errors.New("--timestamp and --category need the name of a field")
	}
	return nil
}

func interrupted(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted before the end")
	}
	return err
}

// eqlOutput prints what a search finds, and says what it meets.
type eqlOutput struct {
	inputs
	out   *bufio.Writer
	array bool // a match is one
	byID  bool
}

// found prints a match.
func (o *eqlOutput) found(m ndjson.Match) error {
	o.progress.clear()
	if !o.array {
		o.event(m[0])
		return o.out.WriteByte('\n')
	}
	o.out.WriteByte('[')
	for i, e := range m {
		if i > 0 {
			o.out.WriteByte(',')
		}
		o.event(e)
	}
	_, err := o.out.WriteString("]\n") // or what went wrong before
	return err
}

func (o *eqlOutput) event(e *ndjson.Event) {
	switch {
	case e == nil:
		o.out.WriteString("null")
	case o.byID:
		o.out.WriteString(e.ID())
	default:
		o.out.WriteString(e.JSON())
	}
}

// report is called again and again. What was found so far should be seen.
func (o *eqlOutput) report(p ndjson.Progress) {
	if o.out.Buffered() > 0 {
		o.progress.clear()
		o.out.Flush() // an error comes again
	}
	o.progress.show(p)
}

// summary says what a reader of the matches should know about them.
func (o *eqlOutput) summary(sum ndjson.Summary, fields *ndjson.Fields, pending int) {
	if sum.Bad > 0 {
		o.say("%s left out, of %d", count(sum.Bad, "bad line", ""), sum.Bad+sum.Events)
	}
	if sum.Bad > 0 && sum.Events == 0 {
		o.say("no line is a JSON object; jq -c . FILE, or jq -c '.[]' FILE for an array, makes lines of what is spread over several")
	}
	for _, name := range slices.Sorted(maps.Keys(sum.Misfits)) {
		f, _ := fields.Field(name)
		o.say("%s taken for missing: not of type %s", count(sum.Misfits[name], "value", " of "+name), f.Type)
	}
	if sum.Late > 0 {
		o.say("%s judged out of order: older than others that had been judged", count(sum.Late, "event", ""))
	}
	if sum.Evicted > 0 {
		o.say("matches may be missing: %s given up, because no more than %d are kept; --pending keeps more", count(sum.Evicted, "unfinished sequence", ""), pending)
	}
}
