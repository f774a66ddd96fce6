package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/spf13/cobra"
)

func newStatus(o *options) *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show whether this host is protected, by what, and what is missing",
		Long: `Show whether this host is protected, by what, and what is missing.

Exit status: 0 traffic to the metadata service goes through the daemon, 1 it
does not, or not all of it; 3 the daemon is not running.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			var s report.Status
			deadline := time.Now().Add(wait)
			for {
				err = client.Get(cmd.Context(), "status", nil, &s)
				if err == nil && s.Redirect.Installed || !time.Now().Before(deadline) {
					break
				}
				select {
				case <-cmd.Context().Done():
					return cmd.Context().Err()
				case <-time.After(100 * time.Millisecond):
				}
			}
			if err != nil {
				return err
			}
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(s)
			} else {
				err = printStatus(cmd.OutOrStdout(), s)
			}
			if err == nil && !protected(s) {
				return exit(exitNo)
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait so long for the daemon and its redirect")
	return cmd
}

func protected(s report.Status) bool {
	return s.Redirect.Installed && len(s.Redirect.Differences) == 0 && len(s.Redirect.Locks) == 0 && s.SelfTest.Error == "" &&
		s.Attribution.Broken == "" && s.Attribution.Level >= s.Attribution.Required
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
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	switch {
	case !s.Redirect.Installed:
		row("protection", "NONE: metadata traffic does not go through the daemon")
	case !protected(s):
		row("protection", "INCOMPLETE in %s mode: see redirect and attribution", s.Mode)
	case s.Mode == "enforce":
		row("protection", "on: requests are attributed, judged and blocked")
	default:
		row("protection", "watching: requests are attributed and judged; %s mode blocks nothing", s.Mode)
	}
	row("daemon", "imdsgated %s, pid %d, up %v", s.Version, s.PID, time.Since(s.Since).Round(time.Second))
	row("mode", "%s, posture %s", s.Mode, s.Policy.Posture)
	if set := s.Modes.Set; set != nil {
		row("", "! the configuration asks for %s; set by %s %s: %s", s.Modes.Configured, set.By, lasting(set.Until), set.Reason)
	}
	if s.Modes.Error != "" {
		row("", "! %s", s.Modes.Error)
	}
	if s.Mode == "enforce" && s.Policy.Posture == "default" {
		row("", "a program that no rule matches gets what it asks for; in posture strict only one with a grant does")
	}
	row("policy", "%d rules, %d grants, %.19s", len(s.Policy.Rules), len(s.Policy.Grants), s.Policy.Digest)
	if n := s.Policy.Skipped; n > 0 {
		row("", "%d rule files were left out: imdsgate rules check says why", n)
	}
	if n := s.SequencesEvicted; n > 0 {
		row("", "! sequences had no room for %d events that they waited with, and may have missed what followed", n)
	}
	if n := len(s.Decisions.All); n > 0 {
		row("decisions", "%d, which come before rules and grants", n)
		for _, d := range s.Decisions.All[:min(n, maxListed)] {
			row("", "%s %s %s, %s by %s: %s", d.ID, d.Effect, d.About(), lasting(d.Expires), d.By, d.Reason)
		}
		if n > maxListed {
			row("", "and %d more: imdsgate decisions list", n-maxListed)
		}
	}
	if s.Decisions.Error != "" {
		row("decisions", "! %s", s.Decisions.Error)
	}
	row("redirect", "%s %s, %d repairs", s.Redirect.Backend, strings.Join(s.Redirect.Covered, ", "), s.Redirect.Repairs)
	for _, problem := range [][]string{{s.Redirect.Error}, s.Redirect.Differences, s.Redirect.Locks} {
		for _, p := range problem {
			if p != "" {
				row("", "! %s", p)
			}
		}
	}
	for _, n := range s.Redirect.Notes {
		row("", "%s", n)
	}
	switch test := s.SelfTest; {
	case test.Error != "":
		row("self-test", "! %s", test.Error)
	case test.NoRoute != "":
		row("self-test", "not possible: %s", test.NoRoute)
	case test.Passed != nil:
		row("self-test", "passed %v ago: a request of the daemon's own came through the redirect", time.Since(*test.Passed).Round(time.Second))
	}
	a := s.Attribution
	last := "by the kernel"
	if a.Descriptors > 0 {
		last = fmt.Sprintf("of %d descriptors", a.Descriptors)
	}
	row("attribution", "level %s, %d full searches, the last %s in %v", a.Level, a.Scans, last, a.LastScan.Round(time.Microsecond))
	if a.Slow() {
		row("", "! a search may take %v: in enforce mode requests for credentials are refused when it is not over by then; process %d has %d of the descriptors",
			a.Budget, a.Largest.PID, a.Largest.Descriptors)
	}
	if a.Broken != "" {
		row("", "! the kernel no longer tells what level %s needs, so that clients are unattributed: %s", a.Level, a.Broken)
	}
	if a.Level < a.Required {
		row("", "! level %s is required for enforce mode", a.Required)
	}
	if w := a.Witness; w != nil {
		row("", "%d of %d sockets have a witness", w.Sockets, w.MaxSockets)
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
	if h := a.History; h != nil && h.Lost > 0 {
		row("", "! %d process events were lost; the table was read anew %d times", h.Lost, h.Rebuilds)
	}
	if h := a.History; h != nil && h.Refused+h.Unjudged > 0 {
		row("", "! %d processes had no room in the table, %d executions were not shown to the rules", h.Refused, h.Unjudged)
	}
	for _, m := range a.Missing {
		row("", "no %s (%s): %s", m.Level, gives[m.Level], m.Reason)
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
	row("tokens", "whose %d are is known; %d were forgotten for want of room", r.Tokens, r.Forgotten)
	row("events", "%s: %d written, %d dropped, %d lost, %d removed from a full disk", s.Events.Path, s.Events.Written, s.Events.Dropped, s.Events.Failed, s.Events.Removed)
	if s.Events.Error != "" {
		row("", "! %s", s.Events.Error)
	}
	if f := s.FirstSeen; f.Rules > 0 {
		row("first seen", "%s: %d combinations of %d rules, %d forgotten for want of room", f.Path, f.Terms, f.Rules, f.Forgotten)
		if f.Error != "" {
			row("", "! new again after a restart, because they are not kept: %s", f.Error)
		}
	}
	row("process", "uid %d, %d MB resident, %d descriptors", s.Process.UID, s.Process.ResidentMB, s.Process.Descriptors)
	return t.Flush()
}
