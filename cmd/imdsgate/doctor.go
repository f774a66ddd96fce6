package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/spf13/cobra"
)

// severity of a finding.
type severity string

const (
	failing  severity = "error"   // protection does not hold, or will not start
	doubtful severity = "warning" // it holds with exceptions, or will not for long
	notable  severity = "info"
)

var graver = []severity{failing, doubtful, notable}

// symptom is one thing that an operator should know. IDs do not change: scripts and
// pages of wikis name them.
type symptom struct {
	ID       string   `json:"id"`
	Severity severity `json:"severity"`
	Message  string   `json:"message"`
	Fix      string   `json:"fix"` // each has one
}

// diagnosis is all that doctor has found.
type diagnosis struct {
	Findings []symptom `json:"findings"`
	Probes   []probed  `json:"probes"`
	// Left is what was not looked at, and why.
	Left []string `json:"not_looked_at"`
}

// probed is one try to get past the daemon.
type probed struct {
	Way    string `json:"way"`
	As     string `json:"as"`
	From   string `json:"from"`
	Result string `json:"result"` // past: answered and not recorded; recorded; none: no answer
	Detail string `json:"detail"` // status of the answer, or why there was none
}

const (
	gotPast  = "past"
	wasSeen  = "recorded"
	noAnswer = "none"
	nonceIn  = "imdsgate-doctor-" // in what is asked for
)

func (d *diagnosis) find(id string, s severity, message, fix string) {
	d.Findings = append(d.Findings, symptom{id, s, message, fix})
}

func (d *diagnosis) leave(what string) { d.Left = append(d.Left, what) }

func newDoctor(o *options) *cobra.Command {
	var preflight, quiet bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find what is wrong with this host's protection, and try to get past it",
		Long: `Find what is wrong with this host's protection, and try to get past it. Nothing is
changed. Each finding has an ID that does not change, a severity and what to do.

The tries are requests for names that the service does not have, with a nonce in
each: over every endpoint and spelling, as an ordinary user, as root, with the
daemon's mark, past the route, straight at where the daemon listens, and from the
other network namespaces of the host.
What is answered and not in the events has got past the daemon. They are in the
events afterwards, as imdsgate-doctor-NONCE. As root it can try everything; as
another user, what that user can.

With --preflight it says whether imdsgate would work on this host, before it is
installed or started.

Exit status: 0 no errors, 1 errors, 2 it could not look.`,
		Example: "  sudo imdsgate doctor\n  imdsgate doctor --json | jq '.findings[] | select(.severity == \"error\")'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := &diagnosis{Findings: []symptom{}, Probes: []probed{}, Left: []string{}}
			if err := o.diagnose(cmd.Context(), d, preflight); err != nil {
				return err
			}
			slices.SortStableFunc(d.Findings, func(a, b symptom) int {
				return cmp.Compare(slices.Index(graver, a.Severity), slices.Index(graver, b.Severity))
			})
			var err error
			if o.json {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(d)
			} else {
				err = d.print(cmd.OutOrStdout(), quiet)
			}
			if err == nil && slices.ContainsFunc(d.Findings, func(f symptom) bool { return f.Severity == failing }) {
				return exit(exitNo)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&preflight, "preflight", false, "look at the host alone: no daemon is expected, and nothing tried")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "leave out what was tried in vain and what was not looked at")
	cmd.AddCommand(newAttempt())
	return cmd
}

func (d *diagnosis) print(w io.Writer, quiet bool) error {
	p := &printer{w: w}
	for _, f := range d.Findings {
		p.line("%-7s  %s: %s\n         fix: %s", f.Severity, f.ID, shown(f.Message), shown(f.Fix))
	}
	if len(d.Findings) == 0 {
		p.line("nothing is wrong that can be seen from here")
	}
	counts := map[string]int{}
	for _, t := range d.Probes {
		counts[t.Result]++
	}
	if len(d.Probes) > 0 {
		p.line("\ntried to get past: %d ways, %d got past, %d recorded by the daemon, %d without an answer", len(d.Probes), counts[gotPast], counts[wasSeen], counts[noAnswer])
	}
	for _, t := range d.Probes {
		if t.Result == gotPast || !quiet {
			p.line("  %-8s  %s, as %s, from %s: %s", t.Result, t.Way, t.As, shown(t.From), shown(t.Detail))
		}
	}
	if len(d.Left) > 0 && !quiet {
		p.line("\nnot looked at:")
		for _, l := range d.Left {
			p.line("  %s", l)
		}
	}
	return p.err
}

// ofInstance has the daemon ask the service, since nobody else gets past the daemon.
func (d *diagnosis) ofInstance(ctx context.Context, client *control.Client) {
	ctx, cancel := context.WithTimeout(ctx, 2*instanceTakes)
	defer cancel()
	var v1 report.IMDSv1
	if err := client.Get(ctx, "imds-v1", nil, &v1); err != nil {
		d.leave("whether the service requires session tokens: " + err.Error())
	} else if v1.Answered {
		d.findV1()
	}
	var l report.HopLimit
	if err := client.Get(ctx, "hop-limit", nil, &l); err != nil {
		d.leave("the hop limit of the instance: " + err.Error())
	} else if l.Beyond {
		d.find("hop-limit", notable, "the hop limit of the instance is 2 or more: containers get session tokens, and with them credentials of the host's role, unless policy refuses",
			"aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 1; then containers get none, and need roles of their own (of the ECS task, of the EKS pod) or the host's network")
	}
}

// instanceTakes is what the daemon takes for two endpoints that do not answer, and more.
const instanceTakes = 12 * time.Second

func (d *diagnosis) findV1() {
	d.find("imds-v1", doubtful, "the service answers without a session token: a proxy that can be made to fetch a URL gets credentials (IMDSv1)",
		`aws ec2 modify-instance-metadata-options --http-tokens required, once nobody needs it: imdsgate eql 'any where imdsgate.request.api == "v1" and process.name != "imdsgate"' /var/log/imdsgate/events.ndjson*`)
}

// ofStatus is what the daemon itself knows to be wrong. It reports whether one runs.
func (d *diagnosis) ofStatus(ctx context.Context, client *control.Client) (s report.Status, running bool) {
	ctx, cancel := context.WithTimeout(ctx, statusTakes)
	defer cancel()
	err := client.Get(ctx, "status", nil, &s)
	switch {
	case errors.Is(err, control.ErrNotRunning):
		d.find("daemon-not-running", failing, "imdsgated is not running; "+leftBehind(ctx), "systemctl enable --now imdsgated.socket imdsgated.service; journalctl -u imdsgated says why it has ended")
		return s, false
	case err != nil:
		d.find("daemon-silent", failing, err.Error(), "ask as root or as a member of the group imdsgate; if you did, systemctl restart imdsgated")
		return s, false
	}
	switch s.Mode {
	case "off":
		fix := "mode: audit, or enforce, in the configuration, and imdsgate reload"
		if s.Modes.Configured != policy.Off {
			fix = fmt.Sprintf("imdsgate mode set %s --reason TEXT: so it is configured", s.Modes.Configured)
		}
		d.find("mode-off", failing, "the mode is off: the redirect is removed, and requests go to the service unseen", fix)
	case "audit":
		d.find("mode-audit", notable, "the mode is audit: everything passes, and what enforce mode would refuse is recorded", "when imdsgate tune finds nothing unexplained: mode: enforce")
	}
	if s.Modes.Error != "" {
		d.find("mode-wrong", failing, s.Modes.Error, "imdsgate mode; systemctl restart imdsgated")
	}
	if s.Redirect.Error != "" {
		d.find("redirect-failed", failing, s.Redirect.Error, "iptables-save and iptables-restore, and those of ip6tables, must work for the daemon: journalctl -u imdsgated; imdsgate redirect verify says what is missing")
	}
	for _, x := range s.Redirect.Differences {
		d.find("redirect-changed", failing, x, "the daemon repairs it within 15 seconds; if it does not, another program writes the rules again: imdsgate events --rule integrity.redirect")
	}
	for _, x := range s.Redirect.Locks {
		d.find("redirect-lock", failing, x.Message, x.Fix)
	}
	for _, x := range s.Redirect.Evasions {
		d.find("redirect-evaded", failing, x.Message, x.Fix)
	}
	if x := s.Redirect.Contested; x != "" {
		d.find("redirect-contested", failing, x, "have the other program leave our rules alone: imdsgate events --rule integrity.redirect names it, if nftables can tell")
	}
	if s.Mode != "off" {
		for _, gap := range gaps(s) {
			d.find("not-covered", doubtful, gap, "SECURITY.md says what each level and posture leaves open")
		}
	}
	if s.SelfTest.Error != "" {
		d.find("self-test", failing, s.SelfTest.Error, "imdsgate redirect verify, if the request did not come; if nobody answers it, whether ip route get 169.254.169.254 leads there; journalctl -u imdsgated says since when")
	}
	if s.SelfTest.NoRoute != "" {
		d.find("no-route", notable, s.SelfTest.NoRoute, "none is needed before the network is up")
	}
	a := s.Attribution
	if a.Broken != "" {
		d.find("attribution-broken", failing, a.Broken, "systemctl restart imdsgated; somebody may have detached its BPF programs")
	}
	if a.Level < a.Required {
		d.find("attribution-level", failing, "level "+a.Level+" of attribution, and the configuration requires "+a.Required, "the reasons are under not-covered; attribution.require_level")
	}
	if a.Slow() {
		d.find("attribution-slow", doubtful,
			fmt.Sprintf("at %s a search of the host took longer than the %v that a request waits in enforce mode, so that credentials that waited for it were refused: process %d had %d of %d descriptors",
				a.Longest.Ended.Format(time.RFC3339), a.Budget, a.Longest.Largest.PID, a.Longest.Largest.Descriptors, a.Longest.Descriptors),
			"ask whoever runs that process why it has so many; a kernel and capabilities for level 3 make the search short")
	}
	if n := s.Requests.LinkLocalExceeded; n != nil && *n > 0 {
		d.find("linklocal-throttled", doubtful, fmt.Sprintf("the network interfaces have dropped %d packets to the metadata service, DNS and NTP: more than 1,024 a second", *n), "find out who asks so often (imdsgate events); limits.requests_per_second")
	}
	e := s.Events
	if e.Dropped+e.Failed+e.Removed > 0 || e.Error != "" {
		d.find("events-missing", doubtful, strings.TrimSuffix("events are missing since the daemon started: "+e.Error, ": "), "make room for "+e.Path+"; events.queue")
	}
	if j := e.Journal; j != nil && (j.Error != "" || j.Missed > 0) {
		d.find("events-missing", doubtful, strings.TrimSuffix("journald does not have all events: "+j.Error, ": "), "systemctl status systemd-journald; the event file has them: imdsgate events")
	}
	for _, g := range s.Policy.Expiring {
		d.find("grant-expiring", doubtful, "grant "+g.Name+" ends with "+g.Expires, "look whether it is still needed, and set expires: anew")
	}
	if s.Policy.Skipped > 0 {
		d.find("rules-skipped", doubtful, "rule files were left out", "imdsgate rules check says why")
	}
	if s.Metrics.Error != "" {
		d.find("metrics-not-served", doubtful, s.Metrics.Error, "metrics.listen: another port, or a Unix socket")
	}
	return s, true
}
