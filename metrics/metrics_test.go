package metrics

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func request(class, mode string, verdict, wouldBe event.Verdict) *event.Event {
	return &event.Event{
		Subjects:    []*event.Process{{PID: 7, Executable: "/opt/secret-name"}},
		Attribution: event.Attribution{Via: "sock_diag,witness,references", Confidence: "high"},
		Request:     event.Request{Class: class, Token: true, Path: "/latest/" + class},
		Decision:    event.Decision{Mode: mode, Verdict: verdict, WouldBe: wouldBe, Took: 80 * time.Microsecond},
		Response:    event.Response{Status: 200, Took: 700 * time.Microsecond},
	}
}

func TestObserve(t *testing.T) {
	r := NewRequests([]string{"credentials", "inventory"}, []string{"no_witness", "late"})
	r.Observe(request("inventory", "audit", event.Allow, event.Allow))
	r.Observe(request("credentials", "audit", event.Allow, event.Deny))
	r.Observe(request("credentials", "enforce", event.Deny, event.Deny))
	unknown := request("credentials", "enforce", event.Deny, event.Deny)
	unknown.Subjects, unknown.Attribution.Reason = nil, "no_witness"
	unknown.Request.Container = true
	r.Observe(unknown)
	odd := request("", "enforce", event.Deny, event.Deny)
	odd.Request.Malformed = "head without its end"
	odd.Decision.Matches = []event.Match{{Rule: &event.Rule{Severity: "high"}, Alert: true}, {Rule: &event.Rule{Severity: "high"}}}
	r.Observe(odd)
	r.Observe(&event.Event{Kind: event.Integrity, State: event.State{Action: "imds-mark-forged"}})

	// An alert on an increase tells of the first only if there was a 0 before.
	for _, series := range []string{`imdsgate_integrity_findings_total{action="direct-imds-connection"} 0`, `imdsgate_requests_total{api="container",class="credentials",mode="audit",verdict="deny"} 0`} {
		if !strings.Contains(expose(t, r), series+"\n") {
			t.Errorf("there is no %s", series)
		}
	}
	var none []string
	for line := range strings.Lines(expose(t, r)) {
		if !strings.HasPrefix(line, "#") && !strings.HasSuffix(line, " 0\n") && !strings.Contains(line, "_bucket") && !strings.Contains(line, "_sum") {
			none = append(none, strings.TrimSpace(line))
		}
	}
	const want = `imdsgate_alerts_total{severity="high"} 1
imdsgate_attribution_failures_total{reason="no_witness"} 1
imdsgate_attribution_total{confidence="high",method="witness"} 4
imdsgate_decision_duration_seconds_count{mode="audit"} 2
imdsgate_decision_duration_seconds_count{mode="enforce"} 3
imdsgate_events_total{kind="integrity"} 1
imdsgate_events_total{kind="request"} 5
imdsgate_integrity_findings_total{action="imds-mark-forged"} 1
imdsgate_requests_total{api="container",class="credentials",mode="enforce",verdict="deny"} 1
imdsgate_requests_total{api="none",class="malformed",mode="enforce",verdict="deny"} 1
imdsgate_requests_total{api="v2",class="credentials",mode="audit",verdict="would_deny"} 1
imdsgate_requests_total{api="v2",class="credentials",mode="enforce",verdict="deny"} 1
imdsgate_requests_total{api="v2",class="inventory",mode="audit",verdict="allow"} 1
imdsgate_upstream_duration_seconds_count 5`
	if got := strings.Join(none, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if problems, err := testutil.CollectAndLint(r); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

func gatherer(t *testing.T, c prometheus.Collector) prometheus.Gatherer {
	t.Helper()
	registry := prometheus.NewRegistry()
	if err := registry.Register(c); err != nil {
		t.Fatal(err)
	}
	return registry
}

func expose(t *testing.T, c prometheus.Collector) string {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "metrics.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(ln, gatherer(t, c))
	defer s.Close()
	conn, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /metrics HTTP/1.1\r\nHost: imdsgate\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%s, %v", resp.Status, err)
	}
	return string(text)
}

// It can be read, and nothing else.
func TestServeOnlyMetrics(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(ln, gatherer(t, NewRequests(nil, nil)))
	base := "http://" + ln.Addr().String()
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/metrics", 200}, {"HEAD", "/metrics", 200},
		{"POST", "/metrics", 405}, {"PUT", "/metrics", 405}, {"DELETE", "/metrics", 405},
		{"GET", "/", 404}, {"GET", "/metrics/", 404}, {"GET", "/debug/pprof/", 404}, {"GET", "/debug/vars", 404}, {"GET", "/v1/status", 404},
	} {
		req, err := http.NewRequest(c.method, base+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != c.want {
			t.Errorf("%s %s: %d, want %d", c.method, c.path, resp.StatusCode, c.want)
		}
	}

	http.DefaultClient.CloseIdleConnections()

	// Who keeps connections and says nothing loses them, and then others are served.
	for range 3 * maxConnections {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	client := &http.Client{Timeout: 4 * scrapeTakes}
	began := time.Now()
	resp, err := client.Get(base + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if waited := time.Since(began); waited < scrapeTakes/4 || resp.StatusCode != 200 {
		t.Errorf("%d after %v: the connections have no bound", resp.StatusCode, waited)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := net.DialTimeout("tcp", ln.Addr().String(), time.Second); err == nil {
		t.Error("it is closed, and accepts connections")
	}
}

func BenchmarkObserve(b *testing.B) {
	r := NewRequests([]string{"credentials", "inventory"}, []string{"no_witness", "late"})
	ev := request("inventory", "audit", event.Allow, event.Allow)
	b.ReportAllocs()
	for b.Loop() {
		r.Observe(ev)
	}
}
