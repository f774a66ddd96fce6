// Package metrics counts what the daemon does, in the form in which Prometheus reads
// it, and serves the counts on loopback or a Unix socket.
//
// Requests counts events where they are recorded; who has other counters registers a
// collector of his own. No label has a value that a client can choose: names of
// processes, paths and users are in the events. It is the wrong place to look for who
// did something.
package metrics

import (
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"github.com/prometheus/client_golang/prometheus"
)

// Requests counts events. Observe may be called from any goroutine.
type Requests struct {
	requests    map[series]prometheus.Counter // of vec; does not change, so that nobody locks it
	vec         *prometheus.CounterVec
	decision    map[string]prometheus.Observer
	upstream    prometheus.Histogram
	attribution *prometheus.CounterVec
	failures    *prometheus.CounterVec
	events      map[event.Kind]prometheus.Counter
	alerts      map[string]prometheus.Counter
	findings    *prometheus.CounterVec
	all         []prometheus.Collector
}

// series is one of imdsgate_requests_total.
type series struct{ verdict, class, api, mode string }

// Verdicts: what would be denied in enforce mode passes in audit mode, and is neither
// counted as allowed nor as denied.
const (
	allow     = "allow"
	wouldDeny = "would_deny"
	deny      = "deny"
)

// malformed is the class of what could not be read as a request, which has no API.
const malformed = "malformed"

// Buckets, in seconds. Attribution takes some 50 µs where the kernel tells, milliseconds
// where the host is searched, and after 100 ms enforce mode decides without it; in audit
// mode it may take two seconds. The service answers within a millisecond, and a minute
// is a client's patience.
var (
	decisionBuckets = []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}
	upstreamBuckets = []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60}
)

// NewRequests makes the counters, with a series for each of the classes of requests, of the
// reasons for which nobody is known, and of the findings. Prometheus sees no increase in one
// that appears only when it counts, so that no alert would tell of the first.
func NewRequests(classes, reasons []string) *Requests {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "imdsgate_requests_total",
		Help: "Requests to the metadata service. would_deny passed in audit mode, and enforce mode would have denied it."},
		[]string{"verdict", "class", "api", "mode"})
	decision := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "imdsgate_decision_duration_seconds", Buckets: decisionBuckets,
		Help: "From when a request was there until it was known who asks and what policy says. In audit mode no request waits for it."}, []string{"mode"})
	events := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "imdsgate_events_total",
		Help: "Events that were made, written or not."}, []string{"kind"})
	alerts := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "imdsgate_alerts_total",
		Help: "Alerts that rules have raised."}, []string{"severity"})
	r := &Requests{
		vec: requests, requests: map[series]prometheus.Counter{}, decision: map[string]prometheus.Observer{},
		upstream: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "imdsgate_upstream_duration_seconds", Buckets: upstreamBuckets,
			Help: "From when a request was passed on to the service until its answer was passed back."}),
		attribution: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "imdsgate_attribution_total",
			Help: "Requests of which it is known who asked, by what found him and how certain that is."}, []string{"method", "confidence"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "imdsgate_attribution_failures_total",
			Help: "Requests of which nobody is known to have asked, by why."}, []string{"reason"}),
		events: map[event.Kind]prometheus.Counter{}, alerts: map[string]prometheus.Counter{},
		findings: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "imdsgate_integrity_findings_total",
			Help: "What was found that should not be: changed rules, ways past the redirect, forged marks."}, []string{"action"}),
	}
	for _, mode := range []string{"audit", "enforce"} {
		r.decision[mode] = decision.WithLabelValues(mode)
		for _, verdict := range []string{allow, wouldDeny, deny} {
			add := func(class, api string) {
				r.requests[series{verdict, class, api, mode}] = requests.WithLabelValues(verdict, class, api, mode)
			}
			for _, class := range classes {
				add(class, "v1")
				add(class, "v2")
				add(class, "container") // what tasks and pods ask their agents for
			}
			add(malformed, "none")
		}
	}
	for _, reason := range reasons {
		r.failures.WithLabelValues(reason)
	}
	for _, action := range event.Findings() {
		r.findings.WithLabelValues(action)
	}
	for kind, name := range map[event.Kind]string{event.Asked: "request", event.Started: "process", event.Lifecycle: "lifecycle", event.Integrity: "integrity"} {
		r.events[kind] = events.WithLabelValues(name)
	}
	for _, severity := range []string{"low", "medium", "high", "critical"} {
		r.alerts[severity] = alerts.WithLabelValues(severity)
	}
	r.all = []prometheus.Collector{requests, decision, r.upstream, r.attribution, r.failures, events, alerts, r.findings}
	return r
}

// Describe and Collect make it a collector.
func (r *Requests) Describe(to chan<- *prometheus.Desc) {
	for _, c := range r.all {
		c.Describe(to)
	}
}

// Collect sends what was counted so far.
func (r *Requests) Collect(to chan<- prometheus.Metric) {
	for _, c := range r.all {
		c.Collect(to)
	}
}

// Observe counts an event that is finished.
func (r *Requests) Observe(ev *event.Event) {
	r.events[ev.Kind].Inc()
	for i := range ev.Decision.Matches {
		if m := &ev.Decision.Matches[i]; m.Alert {
			if c := r.alerts[m.Rule.Severity]; c != nil {
				c.Inc()
			}
		}
	}
	switch ev.Kind {
	case event.Integrity:
		r.findings.WithLabelValues(ev.State.Action).Inc()
	case event.Asked:
		r.asked(ev)
	}
}

func (r *Requests) asked(ev *event.Event) {
	s := series{verdict: allow, class: ev.Request.Class, api: ev.Request.API(), mode: ev.Decision.Mode}
	switch {
	case ev.Decision.Verdict == event.Deny:
		s.verdict = deny
	case ev.Decision.WouldBe == event.Deny:
		s.verdict = wouldDeny
	}
	if s.api == "" {
		s.class, s.api = malformed, "none"
	}
	if c := r.requests[s]; c != nil {
		c.Inc()
	} else {
		r.vec.WithLabelValues(s.verdict, s.class, s.api, s.mode).Inc()
	}
	if took := ev.Decision.Took; took > 0 {
		if h := r.decision[s.mode]; h != nil {
			h.Observe(took.Seconds())
		}
	}
	if took := ev.Response.Took; took > 0 {
		r.upstream.Observe(took.Seconds())
	}
	switch a := &ev.Attribution; {
	case len(ev.Subjects) > 0:
		r.attribution.WithLabelValues(method(a.Via), a.Confidence).Inc()
	case a.Reason != "":
		r.failures.WithLabelValues(a.Reason).Inc()
	}
}

// method is what has found the first subject, of all that had a part in the answer.
func method(via string) string {
	first, others, _ := strings.Cut(via, ",")
	if found, _, _ := strings.Cut(others, ","); found != "" {
		return found
	}
	return first
}

// Build is imdsgate_build_info.
func Build(version, goVersion string) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "imdsgate_build_info",
		Help: "Always 1; the labels say what runs.", ConstLabels: prometheus.Labels{"version": version, "goversion": goVersion}},
		func() float64 { return 1 })
}
