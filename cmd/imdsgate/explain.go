package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
	"github.com/spf13/cobra"
)

// explainOptions are the flags of imdsgate explain.
type explainOptions struct {
	*options
	pid      int
	event    string
	who      hypothesis
	method   string
	path     string
	v1       bool
	all      bool
	exitCode bool
}

// hypothesis is a process that somebody makes up.
type hypothesis struct {
	exe, file, parent, user, unit, container, cmdline, cwd string
}

func newExplain(o *options) *cobra.Command {
	e := explainOptions{options: o}
	cmd := &cobra.Command{
		Use:   "explain (--pid N | --event ID [FILE|DIR...] | --exe PATH)",
		Short: "Show how a verdict comes about, step by step",
		Long: `Show how the verdict on a request comes about: the steps in the order of judging,
what each has looked at, the clause that decided, and the grants that almost covered
it with what they miss it by.

  --pid N     a process that runs now, as the daemon sees it
  --event ID  a request that was recorded, of FILEs (default: those of the
              configuration), by the policy of --config; without the daemon, and on any
              machine. Of a request whose record was redacted, it says where that matters
  --exe PATH  a process that you make up, by the policy of --config

What a process asks for is --path, by default the credentials of a role with a session
token. A rule's conditions are marked: + holds, - does not, ~ does not, and would not
keep the rule from blocking, because the process can bring it about itself, ? is not
known.

Exit status: 0, or with --exit-code 1 if enforce mode refuses the request; 2 if there is
no answer, 78 if the configuration is wrong.`,
		Example: `  imdsgate explain --pid 4711 --path /latest/user-data
  imdsgate explain --event 01KAT5Z3N8Q2 /var/log/imdsgate
  imdsgate explain --exe /usr/bin/python3 --unit backup.service --parent /usr/lib/systemd/systemd --exit-code`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("pid") && e.event == "" && e.who.exe == "" {
				return errors.New("explain what? A process as in imdsgate explain --pid 4711, a recorded request (--event ID), or a process that you make up (--exe PATH)")
			}
			return e.run(cmd.Context(), args, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&e.pid, "pid", 0, "process that runs now")
	flags.StringVar(&e.event, "event", "", "event.id of a request that was recorded, or of its alert")
	flags.StringVar(&e.who.exe, "exe", "", "executable of a process that is made up")
	flags.StringVar(&e.who.file, "file", "root", "whose the executable is: root (the host's own file that only root can change), host (that others can change), other (not the host's)")
	flags.StringVar(&e.who.parent, "parent", "", "executable that started it")
	flags.StringVar(&e.who.user, "user", "root", "its user, a name or number")
	flags.StringVar(&e.who.unit, "unit", "", "its system unit")
	flags.StringVar(&e.who.container, "container", "", "ID of its container")
	flags.StringVar(&e.who.cmdline, "cmdline", "", "its arguments, the program's name first")
	flags.StringVar(&e.who.cwd, "cwd", "/", "its working directory")
	flags.StringVar(&e.method, "method", "", "method of the request (default: that of clients)")
	flags.StringVar(&e.path, "path", report.CredentialsPath, "what it asks for")
	flags.BoolVar(&e.v1, "v1", false, "without a session token")
	flags.BoolVar(&e.all, "all", false, "show every rule and grant, and not only the nearest")
	flags.BoolVar(&e.exitCode, "exit-code", false, "exit 1 if enforce mode refuses the request")
	completes(cmd, "file", "root", "host", "other")
	cmd.MarkFlagsMutuallyExclusive("pid", "event", "exe")
	for _, name := range []string{"file", "parent", "user", "unit", "container", "cmdline", "cwd"} {
		cmd.MarkFlagsMutuallyExclusive("pid", name)
		cmd.MarkFlagsMutuallyExclusive("event", name)
	}
	for _, name := range []string{"method", "path", "v1"} {
		cmd.MarkFlagsMutuallyExclusive("event", name)
	}
	return cmd
}

func (o *explainOptions) run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) > 0 && o.event == "" {
		return fmt.Errorf("what is %q? A process is given as in imdsgate explain --pid 4711, and files go with --event", args[0])
	}
	if strings.ContainsFunc(o.method, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("--method %q is not a method, as in GET or PUT", o.method)
	}
	var x report.Explanation
	var err error
	switch {
	case o.event != "":
		x, err = o.recorded(ctx, args, stdin, stderr)
	case o.who.exe != "":
		x, err = o.madeUp()
	default:
		x, err = o.running(ctx)
	}
	if err != nil {
		return err
	}
	if o.json {
		err = json.NewEncoder(stdout).Encode(x)
	} else {
		err = printExplanation(stdout, x, o.all)
	}
	if err == nil && o.exitCode && x.Verdict == event.Deny.String() {
		return exit(exitNo)
	}
	return err
}

// running asks the daemon about a process.
func (o *explainOptions) running(ctx context.Context) (x report.Explanation, err error) {
	client, err := o.client()
	if err != nil {
		return x, err
	}
	ask := url.Values{"pid": {strconv.Itoa(o.pid)}, "method": {o.method}, "path": {o.path}, "v1": {strconv.FormatBool(o.v1)}}
	return x, client.Get(ctx, "explain", ask, &x)
}

// engine judges by the policy of the configuration.
func (o *explainOptions) engine() (config.Config, *policy.Policy, error) {
	c, err := o.load()
	if err != nil {
		return c, nil, err
	}
	p, err := c.Policy()
	if err != nil {
		return c, nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	return c, p, nil
}

// madeUp is about a process that there need not be.
func (o *explainOptions) madeUp() (x report.Explanation, err error) {
	p, err := o.who.process()
	if err != nil {
		return x, err
	}
	_, rules, err := o.engine()
	if err != nil {
		return x, err
	}
	e := policy.NewEngine(rules)
	ev := report.Asking(&event.Host{}, p, report.Ask(o.method, o.path, !o.v1))
	ev.Time, ev.Connection.Accepted = time.Now(), time.Now()
	x = report.Explain(e, ev)
	x.Verdicts = report.Classes(e, ev)
	return x, nil
}

func (h *hypothesis) process() (*event.Process, error) {
	if !path.IsAbs(h.exe) {
		return nil, fmt.Errorf("--exe %s: an executable is named by its whole path, as in /usr/bin/curl", h.exe)
	}
	p := h.image(h.exe)
	p.Args = []string{p.Name}
	if h.cmdline != "" {
		p.Args = strings.Fields(h.cmdline)
	}
	p.CommandLine, p.WorkingDir = strings.Join(p.Args, " "), h.cwd
	switch h.file {
	case "root":
	case "host":
		p.RootOwned = false
	case "other":
		p.HostVerified, p.RootOwned = false, false
	default:
		return nil, fmt.Errorf("--file %s: there are root, host and other", h.file)
	}
	if p.Container = h.container; h.container != "" {
		p.HostVerified, p.RootOwned = false, false // whose files are its image's
	}
	if p.Unit = h.unit; h.unit != "" {
		p.Cgroup = "/system.slice/" + h.unit
	}
	if h.parent != "" {
		p.Parent, p.Ancestry = h.image(h.parent), "birth"
	}
	return p, nil
}

// image is a program of the host, run by the user.
func (h *hypothesis) image(executable string) *event.Process {
	p := &event.Process{Executable: executable, Name: path.Base(executable), Known: true, HostVerified: true, RootOwned: true}
	name, id := h.user, ""
	if _, err := strconv.ParseUint(h.user, 10, 32); err == nil {
		name, id = "", h.user
	}
	if name == "root" {
		id = "0"
	}
	p.UserName, p.UserID, p.RealUserID, p.SavedUserID = name, id, id, id
	return p
}

// recorded is about a request of a file of events.
func (o *explainOptions) recorded(ctx context.Context, files []string, stdin io.Reader, stderr io.Writer) (x report.Explanation, err error) {
	c, rules, err := o.engine()
	if err != nil {
		return x, err
	}
	if len(files) == 0 {
		if files, err = filepath.Glob(c.Events.Path + "*"); err != nil || len(files) == 0 {
			return x, fmt.Errorf("there are no events in %s: name the FILE or directory that has them", c.Events.Path)
		}
	}
	in := newInputs(stderr, "searching", "matches")
	if files, err = expand(files); err != nil {
		return x, err
	}
	s := &eventSearch{inputs: &in, opened: in.open(files, stdin), reader: event.NewReader()}
	rec, err := s.find(ctx, o.event)
	if err != nil {
		return x, err
	}
	// Whom rules had blocked before is what the record says, as far as it does.
	doubt := policy.NewEngine(rules).Rejudge(rec, false)
	was := rec.Decision
	x = report.Explain(policy.NewEngine(rules), &rec.Event)
	if doubt.About != policy.Nothing {
		x.Doubt = doubt.Why
	}
	host := rec.Event.Host.Name
	if host == "" {
		host = rec.Event.Host.ID
	}
	x.Recorded = &report.Recorded{ID: rec.ID, Time: rec.Event.Time.Format(time.RFC3339Nano), Host: host,
		Mode: was.Mode, Verdict: was.Verdict.String(), WouldBe: was.WouldBe.String(), Reason: was.Reason}
	if n := rec.Event.Repeats.Requests; n > 0 {
		x.Recorded.Repeats, x.Recorded.First = n, rec.Event.Start().Format(time.RFC3339Nano)
	}
	return x, nil
}

// eventSearch looks for one event.
type eventSearch struct {
	*inputs
	opened []ndjson.Input
	reader *event.Reader
}

// find looks for the decision that has an ID, or that is the alert's which has it.
func (s *eventSearch) find(ctx context.Context, id string) (*event.Record, error) {
	alert := id
	for range 2 {
		var found, other *event.Record
		related := ""
		walk := ndjson.Walk{Inputs: s.opened, Failed: s.failed, Line: func(name string, number int, line []byte) error {
			if !bytes.Contains(line, []byte(id)) {
				return nil
			}
			rec := new(event.Record)
			if err := s.reader.Read(line, rec); err != nil {
				if !errors.Is(err, event.ErrForeign) {
					s.badLine(ndjson.BadLine{Input: name, Number: number, Err: err})
				}
				return nil
			}
			switch {
			case rec.ID != id:
			case rec.Document == event.RequestDecision:
				found = rec
				return errFound
			case rec.Document == event.Alert:
				other, related = rec, decisionOf(line)
			default:
				other = rec
			}
			return nil
		}}
		if err := walk.Run(ctx); err != nil && !errors.Is(err, errFound) {
			return nil, interrupted(err)
		}
		switch {
		case found != nil:
			return found, nil
		case other != nil && related == "":
			return nil, fmt.Errorf("event %s is not the decision on a request, nor an alert about one: there is nothing to explain", id)
		case related == "" || related == id:
			if len(s.opened) == 0 {
				return nil, fmt.Errorf("no event has the id %s: nothing could be read", alert)
			}
			return nil, fmt.Errorf("no event has the id %s in %s", alert, strings.Join(names(s.opened), ", "))
		}
		id = related
	}
	return nil, fmt.Errorf("the decision that alert %s is about, %s, is not in %s", alert, id, strings.Join(names(s.opened), ", "))
}

var errFound = errors.New("found")

func names(inputs []ndjson.Input) []string {
	var all []string
	for _, in := range inputs {
		all = append(all, in.Name)
	}
	return all
}

// decisionOf is the ID of the decision that an alert is about.
func decisionOf(alert []byte) string {
	var doc struct {
		Own struct {
			Alert struct {
				IDs []string `json:"correlated_event_ids"`
			} `json:"alert"`
		} `json:"imdsgate"`
	}
	if json.Unmarshal(alert, &doc) != nil || len(doc.Own.Alert.IDs) == 0 {
		return ""
	}
	return doc.Own.Alert.IDs[len(doc.Own.Alert.IDs)-1] // after those of processes and connections
}
