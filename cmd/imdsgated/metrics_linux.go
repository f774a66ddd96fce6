package main

import (
	"net"
	"runtime"
	"slices"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/metrics"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// record counts an event, where somebody wants to know, and queues it.
func (d *daemon) record(ev *event.Event) {
	if d.counted != nil {
		d.counted.Observe(ev)
	}
	d.spool.Record(ev)
}

// countEvents begins to count, if there is a place where that can be read.
func (d *daemon) countEvents(c config.Metrics) {
	if c.Listen.Address == "" {
		return
	}
	var classes, reasons []string
	for _, class := range imds.Classes() {
		classes = append(classes, class.String())
	}
	for _, reason := range attribution.Reasons() {
		reasons = append(reasons, reason.String())
	}
	d.counted = metrics.NewRequests(classes, reasons)
}

// serveMetrics serves what is counted, until the function that it returns is called. A
// port that somebody else has is no reason not to protect: whoever wanted to keep us from
// that would take it first.
func (d *daemon) serveMetrics(c config.Config) (func() error, error) {
	none := func() error { return nil }
	if d.counted == nil {
		return none, nil
	}
	var ln net.Listener
	var err error
	if at := c.Metrics.Listen; at.Network == "unix" {
		ln, err = control.Listen(at.Address, d.controlGroup(c))
	} else {
		ln, err = net.Listen(at.Network, at.Address)
	}
	if err != nil {
		d.log.Error().Err(err).Msg("metrics are not served")
		d.mu.Lock()
		d.unserved = err.Error()
		d.mu.Unlock()
		return none, nil
	}
	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		metrics.Build(version, runtime.Version()), d.counted, newState(d),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := registry.Register(c); err != nil {
			return none, err
		}
	}
	return metrics.Serve(ln, registry).Close, nil
}

// state is what the daemon knows at the moment of a scrape. It asks no other process.
type state struct {
	daemon *daemon
	all    []*prometheus.Desc

	mode, policyInfo, policyLoaded, policyRules, policyGrants, refused, decisions          *prometheus.Desc
	healthy, repairs, allowance                                                            *prometheus.Desc
	dropped, lag, written, sinkFailed, sinkMissed, forgottenTerms, forgottenEvents         *prometheus.Desc
	connections, open, connectionsRefused, upstreamFailed, throttled, evicted              *prometheus.Desc
	tokens, forgotten                                                                      *prometheus.Desc
	selfTest, selfTested, level, broken, searches                                          *prometheus.Desc
	processEvents, processLost, processes, processRefused, witnessed, witnessRoom, unknown *prometheus.Desc
}

func newState(d *daemon) *state {
	s := &state{daemon: d}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		one := prometheus.NewDesc("imdsgate_"+name, help, labels, nil)
		s.all = append(s.all, one)
		return one
	}
	s.mode = desc("mode", "1 for the mode in force: audit blocks nothing, off has no redirect.", "mode")
	s.policyInfo = desc("policy_info", "Always 1; the labels say which policy is in force.", "name", "revision", "digest", "posture")
	s.policyLoaded = desc("policy_last_success_timestamp_seconds", "When the policy in force was loaded.")
	s.policyRules = desc("policy_rules", "Rules in force.")
	s.policyGrants = desc("policy_grants", "Grants in force.")
	s.refused = desc("policy_refused_total", "Reloads whose policy was refused, so that the one before stayed in force.")
	s.forgottenTerms = desc("first_seen_forgotten_total", "Combinations that rules of the type new_terms have forgotten for want of room.")
	s.forgottenEvents = desc("sequences_evicted_total", "Events with which sequences waited, and which had no room.")
	s.decisions = desc("decisions", "Decisions of operators in force, which come before rules and grants.", "effect")
	s.healthy = desc("redirect_healthy", "1 if traffic of this family came here when it was last looked, at most 15 seconds ago; 0 if not, or not all of it.", "family", "backend")
	s.repairs = desc("integrity_repairs_total", "What somebody had changed and was put right.", "object")
	s.allowance = desc("linklocal_allowance_exceeded_total", "Packets to the metadata service, DNS and NTP that network interfaces have dropped, as the ENA driver counts them.")
	s.dropped = desc("events_dropped_total", "Events that are missing.", "sink", "reason")
	s.lag = desc("sink_lag_events", "Events that wait to be written.", "sink")
	s.sinkFailed = desc("sink_failed", "1 if a sink takes no events now; those for journald wait in the file.", "sink")
	s.sinkMissed = desc("sink_missed_total", "How often events were removed from the file before they were passed on.", "sink")
	s.written = desc("events_written_total", "Documents that were written; an event can be several.", "sink")
	s.connections = desc("connections_total", "Connections of clients.")
	s.open = desc("open_connections", "Connections of clients that are there now.")
	s.connectionsRefused = desc("connections_refused_total", "Connections that were ended before a request.", "reason")
	s.upstreamFailed = desc("upstream_failures_total", "Requests and connections to which the service gave no answer.")
	s.throttled = desc("requests_throttled_total", "Requests of callers who ask more often than limits.requests_per_second allows.")
	s.evicted = desc("connections_evicted_total", "Connections that were closed because their user had the most when there was no room.")
	s.tokens = desc("tokens", "Session tokens of which it is known whose they are.")
	s.forgotten = desc("tokens_forgotten_total", "Session tokens that made room for others before they had expired.")
	s.selfTest = desc("self_test_failed", "1 if the daemon's own request to the service does not come here, or nobody serves it.")
	s.selfTested = desc("self_test_last_success_timestamp_seconds", "When it last did; not there if it never has.")
	s.level = desc("attribution_level", "Level of attribution, 0 to 3.")
	s.broken = desc("attribution_broken", "1 if the kernel no longer tells what the level needs, so that clients are unattributed.")
	s.searches = desc("attribution_searches_total", "Searches of the whole host for who holds a connection.")
	s.processEvents = desc("process_events_total", "What the proc connector has told; level 1 and above.", "type")
	s.processLost = desc("process_events_lost_total", "Process events that were lost, or not shown to the rules.", "reason")
	s.processes = desc("process_table_entries", "Processes whose parents and programs are remembered.")
	s.processRefused = desc("process_table_refused_total", "Processes for which the table had no room.")
	s.witnessed = desc("witness_sockets", "Sockets of which it is known who called connect; level 2 and above.")
	s.witnessRoom = desc("witness_sockets_max", "Sockets for which there is room.")
	s.unknown = desc("witness_missed_total", "Connections and records that the witness has not kept.", "reason")
	return s
}

func (s *state) Describe(to chan<- *prometheus.Desc) {
	for _, d := range s.all {
		to <- d
	}
}

func (s *state) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	one := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	d := s.daemon
	p, mode := d.engine.Policy(), d.engine.Mode()
	for _, m := range []policy.Mode{policy.Off, policy.Audit, policy.Enforce} {
		gauge(s.mode, one(m == mode), m.String())
	}
	gauge(s.policyInfo, 1, p.Name, p.Revision, p.Digest, p.Posture.String())
	gauge(s.policyRules, float64(len(p.Rules())))
	gauge(s.policyGrants, float64(len(p.Grants())))
	count(s.forgottenTerms, d.terms.Stats().Forgotten)
	count(s.forgottenEvents, d.engine.Evicted())
	decisions := map[string]int{policy.Allows.String(): 0, policy.Denies.String(): 0}
	for _, one := range d.decisionsNow().All {
		decisions[one.Effect.String()]++
	}
	for effect, n := range decisions {
		gauge(s.decisions, float64(n), effect)
	}

	d.mu.Lock()
	loaded, refused, repairs, reattached, report, failed, broken := d.loaded, d.refused, d.repairs, d.reattached, d.found, d.failure != "", d.broken != nil
	d.mu.Unlock()
	gauge(s.policyLoaded, float64(loaded.UnixNano())/1e9)
	count(s.refused, refused)
	count(s.repairs, repairs, "redirect")
	count(s.repairs, reattached, "bpf")
	for _, f := range report.Families {
		if f.Skipped == "" {
			gauge(s.healthy, one(mode != policy.Off && !failed && whole(f, report.Evasions)), f.Family.String(), report.Backend.String())
		}
	}
	if n, err := allowanceExceeded("ena", "linklocal_allowance_exceeded"); err == nil && n != nil {
		count(s.allowance, *n)
	}

	e := d.spool.Stats()
	count(s.written, e.Written, "file")
	count(s.dropped, e.Dropped, "file", "queue_full")
	count(s.dropped, e.Failed, "file", "write_failed")
	count(s.dropped, e.Removed, "file", "disk_full")
	gauge(s.lag, float64(e.Waiting), "file")
	gauge(s.sinkFailed, one(e.Error != ""), "file")
	journal := d.journalNow()
	gauge(s.sinkFailed, one(journal.Error != ""), "journal")
	count(s.sinkMissed, journal.Missed, "journal")

	n := d.proxy.Stats()
	count(s.connections, n.Connections.Load())
	gauge(s.open, float64(d.proxy.Open()))
	count(s.connectionsRefused, n.NotRedirected.Load(), "not_redirected")
	count(s.connectionsRefused, n.NotForwardable.Load(), "not_forwardable")
	count(s.connectionsRefused, n.Looped.Load(), "looped")
	count(s.upstreamFailed, n.UpstreamFailed.Load())
	count(s.throttled, n.Throttled.Load())
	count(s.evicted, n.Evicted.Load())
	known, forgotten := d.proxy.Tokens()
	gauge(s.tokens, float64(known))
	count(s.forgotten, forgotten)

	test := d.healthNow()
	gauge(s.selfTest, one(test.Error != ""))
	if test.Passed != nil {
		gauge(s.selfTested, float64(test.Passed.UnixNano())/1e9)
	}
	gauge(s.level, float64(d.finder.Level()))
	gauge(s.broken, one(broken))
	found := d.finder.Stats()
	count(s.searches, found.Scans)
	if h, ok := d.finder.History(); ok {
		count(s.processEvents, h.Forks, "fork")
		count(s.processEvents, h.Execs, "exec")
		count(s.processEvents, h.Exits, "exit")
		count(s.processLost, h.Lost, "lost")
		count(s.processLost, h.Unsent, "not_judged")
		gauge(s.processes, float64(h.Processes))
		count(s.processRefused, h.Refused)
	}
	if d.witness != nil {
		w := d.witness.Stats()
		gauge(s.witnessed, float64(w.Live))
		gauge(s.witnessRoom, float64(w.MaxSockets))
		count(s.unknown, w.Full, "full")
		count(s.unknown, w.OverShare, "over_share")
		count(s.unknown, w.Ambiguous, "ambiguous")
		count(s.unknown, w.LostExecs+w.LostCreators+w.LostWriters+w.Dropped, "lost")
		count(s.unknown, found.NoWitness, "unseen")
	}
}

// whole reports whether everything that a family has leads here.
func whole(f iptables.FamilyReport, evasions []iptables.Evasion) bool {
	return f.Hooks.Host && f.Hooks.Forwarded && !slices.ContainsFunc(evasions, func(e iptables.Evasion) bool { return e.Family == f.Family })
}
