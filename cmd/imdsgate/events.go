package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/spf13/cobra"
)

func newEvents(o *options) *cobra.Command {
	var e eventsOptions
	cmd := &cobra.Command{
		Use:   "events [FILE...]",
		Short: "Show what was asked, by whom, and what became of it",
		Long: `Show what was asked, by whom, and what became of it: the last events of the
daemon, or those of FILEs in which it wrote them, - being standard input. --json
prints them as they are written, one ECS document to a line, also those that tell of
nothing but the start of a program or a connection, which its requests tell of, too.

With a filter all events are looked at, those of rotated files, too, unless --lines
says how many of the past; several filters must all hold. --since and --until take a time as in RFC 3339, or how
long ago (90m).

--cursor FILE begins behind the last event that was shown with this FILE, and writes
down how far it came: each event is shown once at least, through rotations and
restarts. The first time it begins with the oldest.`,
		Example: `  imdsgate events -f --verdict would-deny
  imdsgate events --class credentials --user www-data --since 24h
  imdsgate events --json --cursor /var/lib/shipper/imdsgate.cursor | shipper`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("lines") && e.filter != (filter{}) {
				e.lines = sink.All
			}
			return e.run(cmd, o, args)
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&e.follow, "follow", "f", false, "go on with those to come")
	flags.IntVarP(&e.lines, "lines", "n", 60, "how many documents of the past to look at")
	flags.StringVar(&e.cursor, "cursor", "", "file that says how far the last run came")
	flags.StringVar(&e.verdict, "verdict", "", "allow, deny or would-deny")
	flags.StringVar(&e.class, "class", "", "class of the request, such as credentials")
	flags.StringVar(&e.process, "process", "", "name, path or PID of the program")
	flags.StringVar(&e.user, "user", "", "name or ID of its user")
	flags.StringVar(&e.rule, "rule", "", "name or ID of a rule that matched or decided")
	flags.StringVar(&e.since, "since", "", "not those before")
	flags.StringVar(&e.until, "until", "", "not those after")
	completes(cmd, "verdict", "allow", "deny", "would-deny")
	completes(cmd, "class", classes()...)
	return cmd
}

func classes() (all []string) {
	for _, class := range imds.Classes() {
		all = append(all, class.String())
	}
	return all
}

// eventsOptions are the flags of imdsgate events.
type eventsOptions struct {
	follow bool
	lines  int
	cursor string
	filter
}

func (e *eventsOptions) run(cmd *cobra.Command, o *options, args []string) error {
	matches, err := e.compile(time.Now())
	if err != nil {
		return err
	}
	show := func(line []byte) error {
		if ok, err := matches(line); err != nil || !ok {
			return err
		}
		if o.json {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", line)
			return err
		}
		return printEvent(cmd.OutOrStdout(), line)
	}
	switch {
	case e.cursor != "":
		return e.fromCursor(cmd, o, args, show)
	case len(args) == 0:
		client, err := o.client()
		if err != nil {
			return err
		}
		last := strconv.Itoa(e.lines)
		if e.lines == sink.All {
			last = "all"
		}
		return client.Stream(cmd.Context(), "events", url.Values{
			"last": {last}, "follow": {strconv.FormatBool(e.follow)},
		}, show)
	case e.follow && len(args) > 1:
		return errors.New("--follow goes on with one FILE alone, and through its rotations")
	}
	for _, name := range args {
		if name == "-" {
			err = eachLine(cmd.InOrStdin(), show)
		} else {
			err = sink.TailFile(cmd.Context(), name, e.lines, e.follow, show)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// commitEvery is how many events at most are shown once more after a crash.
const commitEvery = 1000

// fromCursor shows what came since the last run. What is written down was shown.
func (e *eventsOptions) fromCursor(cmd *cobra.Command, o *options, args []string, show func([]byte) error) error {
	if len(args) > 1 {
		return errors.New("--cursor is about one FILE, and its rotations")
	}
	var path string
	if len(args) == 1 {
		path = args[0]
	} else {
		c, err := o.load()
		if err != nil {
			return err
		}
		path = c.Events.Path
	}
	c, err := sink.OpenCursor(path, e.cursor)
	if err != nil {
		return err
	}
	defer c.Close()
	missed := 0
	for shown := 0; cmd.Context().Err() == nil; {
		line, err := c.Next()
		if n := c.Missed(); n > missed {
			missed = n
			fmt.Fprintln(cmd.ErrOrStderr(), "imdsgate: events are missing: they were removed before they were read")
		}
		if err != nil && err != io.EOF {
			return err
		}
		if err == nil {
			if err := show(line); err != nil {
				return err
			}
			shown++
		}
		if err == io.EOF && shown > 0 || shown == commitEvery {
			if err := c.Commit(); err != nil {
				return err
			}
			shown = 0
		}
		switch {
		case err == nil:
			continue
		case !e.follow:
			return nil
		}
		select {
		case <-cmd.Context().Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return c.Commit()
}

func eachLine(r io.Reader, fn func([]byte) error) error {
	for in := bufio.NewReader(r); ; {
		line, err := in.ReadBytes('\n')
		if line = bytes.TrimSpace(line); len(line) > 0 {
			if err := fn(line); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
	}
}

// filter says which events are shown; an empty one is all.
type filter struct {
	verdict, class, process, user, rule, since, until string
}

// compile returns what tells whether a line is shown.
func (f filter) compile(now time.Time) (func(line []byte) (bool, error), error) {
	if f == (filter{}) {
		return func([]byte) (bool, error) { return true, nil }, nil
	}
	switch f.verdict {
	case "", "allow", "deny", "would-deny":
	default:
		return nil, fmt.Errorf("--verdict %s: there are allow, deny and would-deny", f.verdict)
	}
	if f.class != "" && !slices.Contains(classes(), f.class) {
		return nil, fmt.Errorf("--class %s: there are %s", f.class, strings.Join(classes(), ", "))
	}
	since, err := moment("--since", f.since, now)
	if err != nil {
		return nil, err
	}
	until, err := moment("--until", f.until, now)
	if err != nil {
		return nil, err
	}
	return func(line []byte) (bool, error) {
		var d struct {
			Time    time.Time `json:"@timestamp"`
			Process struct {
				Name, Executable string
				PID              int64
			}
			User struct{ ID, Name string }
			Rule struct{ ID, Name string }
			Own  struct {
				Verdict string
				WouldBe string `json:"audit_verdict"`
				Matched []string
				Request struct{ Class string }
			} `json:"imdsgate"`
		}
		if err := json.Unmarshal(line, &d); err != nil {
			return false, fmt.Errorf("a line that is no event: %w", err)
		}
		verdict := d.Own.Verdict
		if verdict == "allow" && d.Own.WouldBe == "deny" {
			verdict = "would-deny"
		}
		is := func(want string, have ...string) bool { return want == "" || slices.Contains(have, want) }
		return is(f.verdict, verdict) && is(f.class, d.Own.Request.Class) &&
			is(f.process, d.Process.Name, d.Process.Executable, strconv.FormatInt(d.Process.PID, 10)) &&
			is(f.user, d.User.ID, d.User.Name) && is(f.rule, append(d.Own.Matched, d.Rule.ID, d.Rule.Name)...) &&
			!d.Time.Before(since) && (until.IsZero() || !d.Time.After(until)), nil
	}, nil
}

// moment is a time, a day, or how long ago.
func moment(flag, text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil {
		return now.Add(-ago), nil
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.AddDate(0, 0, -int(n)), nil
		}
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if at, err := time.Parse(layout, text); err == nil {
			return at, nil
		}
	}
	return time.Time{}, fmt.Errorf("%s %s: a time as in 2026-11-23T18:04:05Z, a day as in 2026-11-23, or how long ago, as in 90m or 7d", flag, text)
}

// document is what one line of an event says to a person.
type document struct {
	Timestamp string `json:"@timestamp"`
	Message   string `json:"message"`
	Event     struct {
		Dataset string `json:"dataset"`
		Kind    string `json:"kind"`
		Action  string `json:"action"`
		Reason  string `json:"reason"`
	} `json:"event"`
	Process *struct {
		PID        int    `json:"pid"`
		Executable string `json:"executable"`
		Parent     struct {
			Executable string `json:"executable"`
		} `json:"parent"`
	} `json:"process"`
	HTTP struct {
		Response struct {
			Status int `json:"status_code"`
		} `json:"response"`
	} `json:"http"`
	Imdsgate struct {
		Subjects struct {
			PID        []int    `json:"pid"`
			Executable []string `json:"executable"`
			Role       []string `json:"role"`
		} `json:"subjects"`
		Credential struct {
			AccessKeyID string `json:"access_key_id"`
		} `json:"credential"`
	} `json:"imdsgate"`
}

func printEvent(w io.Writer, line []byte) error {
	var d document
	if err := json.Unmarshal(line, &d); err != nil {
		return fmt.Errorf("a line that is no event: %w", err)
	}
	if strings.HasSuffix(d.Event.Dataset, ".process") || strings.HasSuffix(d.Event.Dataset, ".network") {
		return nil // the decision says it all
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s  ", d.Timestamp)
	if d.Event.Kind == "alert" {
		b.WriteString("ALERT ")
	}
	b.WriteString(d.Message)
	if p := d.Process; p != nil && d.Event.Kind == "alert" {
		fmt.Fprintf(&b, "; %s (pid %d)", p.Executable, p.PID)
	}
	if p := d.Process; p != nil && p.Parent.Executable != "" {
		fmt.Fprintf(&b, "; parent %s", p.Parent.Executable)
	}
	// Who else is judged; what this one was before is in the document.
	if p, all := d.Process, d.Imdsgate.Subjects; p != nil && len(all.Executable) == len(all.PID) && len(all.Role) == len(all.PID) {
		for i, pid := range all.PID {
			if pid != p.PID {
				fmt.Fprintf(&b, "; %s %s (pid %d)", all.Role[i], all.Executable[i], pid)
			}
		}
	}
	if d.HTTP.Response.Status != 0 {
		fmt.Fprintf(&b, "; %d", d.HTTP.Response.Status)
	}
	if id := d.Imdsgate.Credential.AccessKeyID; id != "" {
		fmt.Fprintf(&b, "; got %s", id)
	}
	// That a rule decided is in the message already.
	if d.Event.Reason != "" && d.Event.Kind != "alert" && !strings.HasPrefix(d.Event.Reason, "rule ") {
		fmt.Fprintf(&b, "; %s", d.Event.Reason)
	}
	_, err := fmt.Fprintln(w, b.String())
	return err
}
