package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/spf13/cobra"
)

func newStatus(o *options) *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show whether this host is protected, by what, and what is missing",
		Long: `Show whether this host is protected, by what, and what is missing. The first line
is the answer; lines with ! are for somebody to do something about.

Exit status: 0 the daemon does what its mode says: in enforce mode it refuses, in
audit mode it records, and refuses nothing; 1 it does not, or not for all traffic,
or the mode is off; 3 it is not running; 4 it is running, and how it is doing
cannot be told; 77 not permitted.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var s report.Status
			deadline := time.Now().Add(wait)
			for {
				ctx, cancel := context.WithTimeout(cmd.Context(), statusTakes)
				err = client.Get(ctx, "status", nil, &s)
				cancel()
				if err == nil && s.Redirect.Installed || !time.Now().Before(deadline) {
					break
				}
				select {
				case <-cmd.Context().Done():
					return cmd.Context().Err()
				case <-time.After(100 * time.Millisecond):
				}
			}
			w := cmd.OutOrStdout()
			if err != nil {
				return o.noStatus(cmd.Context(), w, err)
			}
			if o.json {
				err = json.NewEncoder(w).Encode(struct {
					answer
					report.Status
				}{answered(s), s})
			} else {
				err = printStatus(w, s)
			}
			if err == nil && !healthy(s) {
				return exit(exitNo)
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait so long for the daemon and its redirect")
	return cmd
}

// statusTakes is far longer than a daemon that is well needs to read its rules.
const statusTakes = 15 * time.Second

// answer is what the status comes to.
type answer struct {
	Protected bool     `json:"protected"`
	Summary   string   `json:"summary"`
	Gaps      []string `json:"not_protected_from"`
}

// noStatus is about a daemon that does not say how it is.
func (o *options) noStatus(ctx context.Context, w io.Writer, why error) error {
	a := answer{Summary: "NOT protected: imdsgated is not running; ", Gaps: []string{}}
	switch {
	case errors.Is(why, fs.ErrPermission):
		return why
	case errors.Is(why, control.ErrNotRunning):
		a.Summary += leftBehind(ctx)
	default:
		a.Summary = "unknown: the daemon does not say how it is: " + why.Error()
		why = exit(exitUnknown)
	}
	if o.json {
		if err := json.NewEncoder(w).Encode(a); err != nil {
			return err
		}
	} else {
		fmt.Fprintln(w, a.Summary)
	}
	return why
}

// healthy reports whether the daemon does what its mode says.
func healthy(s report.Status) bool {
	return s.Redirect.Installed && len(s.Redirect.Differences) == 0 && len(s.Redirect.Locks)+len(s.Redirect.Evasions) == 0 && s.Redirect.Contested == "" &&
		s.Redirect.Error == "" && s.SelfTest.Error == "" &&
		s.Attribution.Broken == "" && s.Attribution.Level >= s.Attribution.Required
}

// answered sums a status up.
func answered(s report.Status) answer {
	since := s.Since
	if s.Modes.Since.After(since) {
		since = s.Modes.Since
	}
	when := fmt.Sprintf("%s mode since %s (%v)", s.Mode, since.UTC().Format("2006-01-02 15:04:05 UTC"), time.Since(since).Round(time.Second))
	a := answer{Gaps: gaps(s)}
	switch {
	case s.Mode == "off":
		a.Summary = "NOT protected: " + when + ": the redirect is removed, and requests go to the service unseen"
	case !s.Redirect.Installed:
		a.Summary = "NOT protected: requests do not go through the daemon; " + when
	case !healthy(s):
		a.Summary = "NOT protected: INCOMPLETE, see the lines with !; " + when
	case s.Mode == "enforce":
		a.Protected = true
		a.Summary = "protected: " + when + ": requests are attributed, judged and refused"
	default:
		a.Summary = fmt.Sprintf("NOT protected: %s: watching; everything passes, and enforce mode would have refused %d of %d requests", when, s.Requests.WouldDeny, s.Requests.Requests)
	}
	return a
}

// gaps are what protection does not extend to on this host, as it is now.
func gaps(s report.Status) []string {
	all := []string{}
	add := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	if s.Mode == "off" {
		return all
	}
	for _, way := range []string{"IPv4 host", "IPv4 forwarded", "IPv6 host", "IPv6 forwarded"} {
		if !slices.Contains(s.Redirect.Covered, way) {
			family, hook, _ := strings.Cut(way, " ")
			of := map[string]string{"host": "this host's own processes", "forwarded": "containers and other namespaces"}[hook]
			add("%s requests of %s do not come here", family, of)
		}
	}
	if s.Mode == "enforce" && s.Policy.Posture == "default" {
		add("a program that no rule matches: posture strict gives guarded things to grants alone")
	}
	for _, m := range s.Attribution.Missing {
		add("no %s (%s): %s", m.Level, gives[m.Level], m.Reason)
	}
	if s.Attribution.Level < "L2" {
		add("network namespaces with an interface of their own: nobody sees their connections below L2")
		add("clients bound to a network device (SO_BINDTODEVICE) get no answer below L2")
	} else if s.Attribution.Uncovered == "report" {
		add("network namespaces with an interface of their own: they are reported and not refused (attribution.uncovered)")
	}
	return all
}

// maxListed bounds the decisions that status names.
const maxListed = 5

// gives is what a level adds to the ones below.
var gives = map[string]string{
	"L1": "who forked whom, what a process was before",
	"L2": "who called connect",
	"L3": "who else has written, what the kernel has executed",
}

func printStatus(w io.Writer, s report.Status) error {
	a := answered(s)
	fmt.Fprintln(w, a.Summary)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("daemon", "imdsgated %s, pid %d, up %v, uid %d, %d MB resident", s.Version, s.PID, time.Since(s.Since).Round(time.Second), s.Process.UID, s.Process.ResidentMB)
	if set := s.Modes.Set; set != nil {
		row("", "! the configuration asks for %s; set by %s %s: %s", s.Modes.Configured, set.By, lasting(set.Until), printable(set.Reason))
	}
	if s.Modes.Error != "" {
		row("", "! %s", s.Modes.Error)
	}
	called := strings.TrimSpace(s.Policy.Name + " " + s.Policy.Revision)
	if called != "" {
		called += ", "
	}
	row("policy", "%sposture %s, %d rules, %d grants, %.19s", called, s.Policy.Posture, len(s.Policy.Rules), len(s.Policy.Grants), s.Policy.Digest)
	for _, e := range s.Policy.Expiring {
		row("", "! grant %s ends with %s", e.Name, e.Expires)
	}
	if n := s.Policy.Skipped; n > 0 {
		row("", "%d rule files were left out: imdsgate rules check says why", n)
	}
	for _, f := range s.Files.Changed {
		switch {
		case f.SHA256 == "":
			row("", "! %s is gone, and what it said is in force until the next reload or start", f.Path)
		default:
			row("", "! %s is not what is in force: of %s, of %s", f.Path, f.Owner, f.Modified.UTC().Format(time.RFC3339))
		}
	}
	for _, e := range s.Files.Exposed[:min(len(s.Files.Exposed), maxListed)] {
		row("", "! %s", e)
	}
	if n := s.SequencesEvicted; n > 0 {
		row("", "! sequences had no room for %d events that they waited with, and may have missed what followed", n)
	}
	if n := len(s.Decisions.All); n > 0 {
		row("decisions", "%d, which come before rules and grants", n)
		for _, d := range s.Decisions.All[:min(n, maxListed)] {
			row("", "%s %s %s, %s by %s: %s", d.ID, d.Effect, d.About(), lasting(d.Expires), printable(d.By.String()), printable(d.Reason))
		}
		if n > maxListed {
			row("", "and %d more: imdsgate decisions list", n-maxListed)
		}
	}
	if s.Decisions.Error != "" {
		row("decisions", "! %s", s.Decisions.Error)
	}
	if s.Mode != "off" {
		row("redirect", "%s: %s; %d repairs", s.Redirect.Backend, strings.Join(s.Redirect.Covered, ", "), s.Redirect.Repairs)
	}
	for _, problem := range slices.Concat([]string{s.Redirect.Error, s.Redirect.Contested}, s.Redirect.Differences) {
		if problem != "" {
			row("", "! %s", problem)
		}
	}
	for _, rule := range slices.Concat(s.Redirect.Locks, s.Redirect.Evasions) {
		row("", "! %s", rule)
	}
	for _, n := range s.Redirect.Notes {
		row("", "%s", n)
	}
	switch test := s.SelfTest; {
	case test.Error != "":
		row("self-test", "! %s", test.Error)
	case test.NoRoute != "":
		row("self-test", "not possible: %s", test.NoRoute)
	case test.Busy != "":
		row("self-test", "%s", test.Busy)
	case test.Passed != nil:
		row("self-test", "passed %v ago: a request of the daemon's own came through the redirect", time.Since(*test.Passed).Round(time.Second))
	}
	by := s.Attribution
	last := "by the kernel"
	if by.Descriptors > 0 {
		last = fmt.Sprintf("of %d descriptors", by.Descriptors)
	}
	row("attribution", "level %s, %d full searches, the last %s in %v", by.Level, by.Scans, last, by.LastScan.Round(time.Microsecond))
	if by.Slow() {
		row("", "! a search took %v, %v ago, and may take %v: in enforce mode requests for credentials are refused when it is not over by then; process %d had %d of %d descriptors",
			by.Longest.Took.Round(time.Millisecond), time.Since(by.Longest.Ended).Round(time.Second), by.Budget, by.Longest.Largest.PID, by.Longest.Largest.Descriptors, by.Longest.Descriptors)
	}
	if by.Broken != "" {
		row("", "! the kernel no longer tells what level %s needs, so that clients are unattributed: %s", by.Level, by.Broken)
	}
	if by.Level < by.Required {
		row("", "! level %s is required for enforce mode", by.Required)
	}
	if w := by.Witness; w != nil {
		if n := w.Full + w.OverShare + w.Ambiguous; n > 0 {
			row("", "! %d sockets were connected without one: for want of room %d, because their user had more than a quarter of it %d, because another had the same addresses and ports %d",
				n, w.Full, w.OverShare, w.Ambiguous)
		}
		if w.Missing > 0 {
			row("", "! %d connections came that nobody was seen to make: unattributed", w.Missing)
		}
		if w.Namespaces > 0 {
			row("", "! %d connections from network namespaces that had no room: not checked for ways past the redirect", w.Namespaces)
		}
		if w.StillBound > 0 {
			row("", "! %d clients are bound to a network device and get no answer: only root's can be unbound (CAP_NET_RAW)", w.StillBound)
		}
		if w.Lost > 0 {
			row("", "! %d executions, clones or writes were not kept for want of room", w.Lost)
		}
	}
	if h := by.History; h != nil && h.Lost > 0 {
		row("", "! %d process events were lost; the table was read anew %d times", h.Lost, h.Rebuilds)
	}
	if h := by.History; h != nil && h.Refused+h.Unjudged > 0 {
		row("", "! %d processes had no room in the table, %d executions were not shown to the rules", h.Refused, h.Unjudged)
	}
	r := s.Requests
	row("requests", "%d (%d connections, %d open): %d denied, %d would be denied", r.Requests, r.Connections, r.Open, r.Denied, r.WouldDeny)
	if r.Malformed+r.NotRedirected+r.NotForwardable+r.UpstreamFailed > 0 {
		row("", "%d malformed, %d not redirected, %d that the host would not have forwarded, %d without an answer upstream",
			r.Malformed, r.NotRedirected, r.NotForwardable, r.UpstreamFailed)
	}
	if r.Evicted+r.Looped > 0 {
		row("", "%d closed because their user had the most when there was no room, %d of our own that came back to us", r.Evicted, r.Looped)
	}
	if r.DialledAhead > 0 {
		row("", "%d connections to the service made ahead, of which %d served nobody", r.DialledAhead, r.DialledUnused)
	}
	if r.Throttled > 0 {
		row("", "%d of callers who ask more often than limits.requests_per_second allows", r.Throttled)
	}
	if n := r.LinkLocalExceeded; n != nil && *n > 0 {
		row("", "! %d packets to the metadata service, DNS and NTP dropped by the network interfaces: more than 1,024 a second", *n)
	}
	if r.Forgotten > 0 {
		row("", "! %d session tokens were forgotten for want of room, so that nobody knows whose they are", r.Forgotten)
	}
	row("events", "%s: %d written", s.Events.Path, s.Events.Written)
	if s.Events.Dropped+s.Events.Failed+s.Events.Removed > 0 {
		row("", "! missing: %d that the queue had no room for, %d that the disk did not take, %d removed from a full disk", s.Events.Dropped, s.Events.Failed, s.Events.Removed)
	}
	if n := s.Events.Repeats; n > 0 {
		row("", "%d requests that were like one that was written are counted there (events.aggregate)", n)
	}
	if s.Events.Error != "" {
		row("", "! %s", s.Events.Error)
	}
	if j := s.Events.Journal; j != nil {
		if j.Error != "" {
			row("", "! journald: %s", j.Error)
		}
		if j.Missed > 0 {
			row("", "! journald does not have all: %d times some were removed before they were passed on", j.Missed)
		}
	}
	if f := s.FirstSeen; f.Rules > 0 {
		row("first seen", "%d combinations of %d rules, %d forgotten for want of room", f.Terms, f.Rules, f.Forgotten)
		if f.Error != "" {
			row("", "! new again after a restart, because they are not kept in %s: %s", f.Path, f.Error)
		}
	}
	if s.Metrics.Error != "" {
		row("metrics", "! not served on %s: %s", s.Metrics.Listen, s.Metrics.Error)
	}
	for i, gap := range a.Gaps {
		row(map[bool]string{true: "not from"}[i == 0], "%s", gap)
	}
	return t.Flush()
}
