package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const (
	alertRules = "../../packaging/prometheus/imdsgate.rules.yaml"
	dashboard  = "../../packaging/grafana/imdsgate.json"
)

// promtool is Prometheus's own judge.
func promtool(t *testing.T, stdin string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil && os.Getenv("CI") == "" {
		t.Skip("needs promtool, which test/deps.sh installs")
	}
	cmd := exec.Command("promtool", args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// scrape reads all series of the exposition.
func (h *host) scrape() (text string, value func(series string) float64) {
	h.t.Helper()
	text, code := h.run(client{args: []string{"curl", "-sf", "-m", "3", "http://127.0.0.1:9254/metrics"}})
	if code != 0 {
		h.t.Fatalf("scrape: %d %s\n%s", code, text, h.Log())
	}
	all := map[string]float64{}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		if name, n, ok := cutLast(lines.Text(), " "); ok && !strings.HasPrefix(name, "#") {
			v, err := strconv.ParseFloat(n, 64)
			if err != nil {
				h.t.Fatalf("%q: %v", lines.Text(), err)
			}
			all[name] = v
		}
	}
	return text + "\n", func(series string) float64 {
		h.t.Helper()
		v, ok := all[series]
		if !ok {
			h.t.Errorf("there is no %s", series)
		}
		return v
	}
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// The daemon counts what clients do, in series that exist from the start, and none has
// anything in it that a client can choose.
func TestMetrics(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\nmetrics: {listen: '127.0.0.1:9254'}\n")
	before, value := h.scrape()
	if s, err := h.Status(); err != nil || value(fmt.Sprintf(`imdsgate_policy_info{digest=%q,name="",posture="default",revision=""}`, s.Policy.Digest)) != 1 {
		t.Errorf("which policy: %v\n%s", err, before)
	}
	const denied = `imdsgate_requests_total{api="v1",class="credentials",mode="enforce",verdict="deny"}`
	if got := value(denied); got != 0 {
		t.Errorf("before any request: %v", got)
	}
	for _, action := range []string{"imds-mark-forged", "uncovered-imds-connection", "direct-imds-connection", "bpf-program-detached"} {
		if got := value(fmt.Sprintf("imdsgate_integrity_findings_total{action=%q}", action)); got != 0 {
			t.Errorf("%s before there was any: %v", action, got)
		}
	}
	if value(`imdsgate_redirect_healthy{backend="nft",family="IPv4"}`)+value(`imdsgate_redirect_healthy{backend="nft",family="IPv6"}`) != 2 {
		t.Errorf("the redirect is not healthy:\n%s", before)
	}

	for range 2 {
		h.curl(client{uid: ordinaryUser}, instanceID, "-A", "seen-by-nobody")
		h.curl(client{uid: ordinaryUser}, role)
	}
	h.decided(role, "curl")
	h.Instance.Do(func() error { return exec.Command("iptables", "-t", "nat", "-F", "OUTPUT").Run() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if s, err := h.Status(); err == nil && s.Redirect.Repairs > 0 || time.Now().After(end) {
			break
		}
	}

	text, value := h.scrape()
	if got := value(denied); got != 2 {
		t.Errorf("denied: %v", got)
	}
	if got := value(`imdsgate_requests_total{api="v1",class="inventory",mode="enforce",verdict="allow"}`); got != 2 {
		t.Errorf("allowed: %v", got)
	}
	for series, least := range map[string]float64{
		`imdsgate_attribution_total{confidence="high",method="witness"}`:    2,
		`imdsgate_decision_duration_seconds_count{mode="enforce"}`:          4,
		`imdsgate_upstream_duration_seconds_count`:                          2,
		`imdsgate_integrity_repairs_total{object="redirect"}`:               1,
		`imdsgate_integrity_findings_total{action="redirect-rule-changed"}`: 1,
		`imdsgate_events_total{kind="request"}`:                             4,
		`imdsgate_events_written_total{sink="file"}`:                        5,
		`imdsgate_attribution_level`:                                        3,
		`imdsgate_mode{mode="enforce"}`:                                     1,
		`imdsgate_policy_rules`:                                             10,
		`process_resident_memory_bytes`:                                     1 << 20,
		`go_goroutines`:                                                     1,
		`imdsgate_sink_failed{sink="file"}`:                                 0,
		`imdsgate_first_seen_forgotten_total`:                               0,
		`imdsgate_sequences_evicted_total`:                                  0,
	} {
		if got := value(series); got < least {
			t.Errorf("%s: %v, want at least %v", series, got, least)
		}
	}
	for _, chosen := range []string{"curl", "seen-by-nobody", "instance-id", strconv.Quote(strconv.Itoa(ordinaryUser)), "imdsgate-lab-role"} {
		if strings.Contains(text, chosen) {
			t.Errorf("%q is in the exposition", chosen)
		}
	}
	promtool(t, text, "check", "metrics")

	// What Grafana and Prometheus ask for is there.
	text += "imdsgate_linklocal_allowance_exceeded_total 0\n" // of a driver that a namespace has not
	for _, file := range []string{alertRules, dashboard} {
		asksFor(t, file, series(t, text))
	}
	panels(t, series(t, text))
}

// series are the labels of each series of an exposition, by the name of the metric.
func series(t *testing.T, text string) map[string][]map[string]string {
	t.Helper()
	all := map[string][]map[string]string{}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") || strings.TrimSpace(line) == "" {
			continue
		}
		m := regexp.MustCompile(`^(\w+)(?:\{(.*)\})? \S+\n$`).FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("no series: %q", line)
		}
		labels := map[string]string{}
		for _, l := range regexp.MustCompile(`(\w+)="([^"]*)"`).FindAllStringSubmatch(m[2], -1) {
			labels[l[1]] = l[2]
		}
		all[m[1]] = append(all[m[1]], labels)
	}
	return all
}

// ofPrometheus are labels that are not the daemon's.
var ofPrometheus = map[string]bool{"instance": true, "job": true}

// asksFor compares the metrics, labels and values that a file names with those that the daemon has.
func asksFor(t *testing.T, file string, has map[string][]map[string]string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(b), `\"`, `"`)
	uses := regexp.MustCompile(`\b((?:imdsgate|process|go)_[a-z_]+[a-z])(?:\{([^}]*)\})?`).FindAllStringSubmatch(text, -1)
	if len(uses) < 10 {
		t.Errorf("%s asks for %v", file, uses)
	}
	known := map[string]bool{}
	for _, use := range uses {
		name := use[1]
		if len(has[name]) == 0 {
			t.Errorf("%s asks for %s, which the daemon does not have", filepath.Base(file), name)
		}
		for _, labels := range has[name] {
			for label := range labels {
				known[label] = true
			}
		}
		for _, l := range regexp.MustCompile(`(\w+)=~?"([^"]*)"`).FindAllStringSubmatch(use[2], -1) {
			for value := range strings.SplitSeq(l[2], "|") {
				if !ofPrometheus[l[1]] && !slices.ContainsFunc(has[name], func(labels map[string]string) bool { return labels[l[1]] == value }) {
					t.Errorf("%s asks for %s with %s %q, which the daemon does not have", filepath.Base(file), name, l[1], value)
				}
			}
		}
	}
	for _, by := range regexp.MustCompile(`by \(([^)]*)\)`).FindAllStringSubmatch(text, -1) {
		for label := range strings.SplitSeq(by[1], ", ") {
			if !ofPrometheus[label] && !known[label] {
				t.Errorf("%s sums by %s, which no metric of it has", filepath.Base(file), label)
			}
		}
	}
}

// panels has Prometheus ask what each panel of the dashboard does, of the series that there are: an expression that is
// none is refused, and each has an answer.
func panels(t *testing.T, has map[string][]map[string]string) {
	t.Helper()
	b, err := os.ReadFile(dashboard)
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	var rules, cases, input []object
	for name, all := range has {
		for _, labels := range all {
			one := []string{`instance="here"`, `job="imdsgate"`}
			for label, value := range labels {
				one = append(one, fmt.Sprintf("%s=%q", label, value))
			}
			input = append(input, object{"series": name + "{" + strings.Join(one, ",") + "}", "values": "0+1x20"})
		}
	}
	variables := strings.NewReplacer("$instance", "here", "$__rate_interval", "5m")
	for _, panel := range board.Panels {
		for i, target := range panel.Targets {
			name := fmt.Sprintf("%s %d", panel.Title, i)
			rules = append(rules, object{"alert": name, "expr": "count(" + variables.Replace(target.Expr) + ") > 0"})
			cases = append(cases, object{"alertname": name, "eval_time": "15m", "exp_alerts": []object{{"exp_labels": object{}}}})
		}
	}
	if len(rules) < 20 {
		t.Errorf("the dashboard asks for %v", rules)
	}
	dir := t.TempDir()
	for file, content := range map[string]object{ // JSON is YAML
		"rules.yaml": {"groups": []object{{"name": "dashboard", "rules": rules}}},
		"test.yaml":  {"rule_files": []string{"rules.yaml"}, "evaluation_interval": "1m", "tests": []object{{"interval": "1m", "input_series": input, "alert_rule_test": cases}}},
	} {
		b, err := json.Marshal(content)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	promtool(t, "", "test", "rules", filepath.Join(dir, "test.yaml"))
}

// A client that is gone before anybody looks is counted among those of whom nobody
// knows anything.
func TestMetricsUnattributed(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.startWith(gate.Settings{Config: "metrics: {listen: '127.0.0.1:9254'}\n", Lacks: attribution.Level1})
	h.Signal(syscall.SIGSTOP)
	conn, err := h.dial("169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", role)
	conn.Close()
	h.Signal(syscall.SIGCONT)
	d := h.decided(role, "")
	reason, _ := d.At("imdsgate.attribution.reason").(string)
	_, value := h.scrape()
	if got := value(fmt.Sprintf("imdsgate_attribution_failures_total{reason=%q}", reason)); got != 1 {
		t.Errorf("unattributed: %v, %s", got, reason)
	}
	if got := value(`imdsgate_requests_total{api="v1",class="credentials",mode="audit",verdict="would_deny"}`); got != 1 {
		t.Errorf("it would be denied: %v", got)
	}
}

// A time without a daemon is among what the next one has found.
func TestMetricsAfterDeath(t *testing.T) {
	t.Parallel()
	const config = "mode: enforce\nmetrics: {listen: '127.0.0.1:9254'}\n"
	h := start(t, netlab.Options{}, config)
	h.Kill()
	if out, code := h.ended(); code != 0 {
		t.Fatalf("%d, %s", code, out)
	}
	h.startWith(gate.Settings{Config: config, Dir: h.Dir})
	h.found("requests-held", says("killed KILL"))
	_, value := h.scrape()
	if got := value(`imdsgate_integrity_findings_total{action="requests-held"}`); got != 1 {
		t.Errorf("times without a daemon: %v", got)
	}
}

func TestAlertRules(t *testing.T) {
	promtool(t, "", "check", "rules", alertRules)
	promtool(t, "", "test", "rules", "../../packaging/prometheus/imdsgate.rules.test.yaml")
	rules, err := os.ReadFile(alertRules)
	if err != nil {
		t.Fatal(err)
	}
	cases, err := os.ReadFile("../../packaging/prometheus/imdsgate.rules.test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, alert := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		if n := strings.Count(string(cases), "alertname: "+alert[1]+"\n"); n < 2 {
			t.Errorf("%s has %d cases, want one that fires and one that does not", alert[1], n)
		}
	}
}

// A port that somebody else has taken does not keep the daemon from protecting.
func TestMetricsPortTaken(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	ln, err := h.Instance.Listen(t.Context(), nil, "tcp", "127.0.0.1:9254")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	h.start("metrics: {listen: '127.0.0.1:9254'}\n")
	if s, err := h.Status(); err != nil || !strings.Contains(s.Metrics.Error, "address already in use") {
		t.Errorf("%+v, %v", s.Metrics, err)
	}
}

// On a Unix socket root reads them, and the daemon's group; what a daemon that was killed has left is in nobody's way.
func TestMetricsUnix(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, gate.UID, gate.UID), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "metrics.sock")
	scrape := func(uid uint32) (text string, code int) {
		return h.run(client{uid: uid, args: []string{"curl", "-sf", "-m", "3", "--unix-socket", socket, "http://imdsgate/metrics"}})
	}
	config := "metrics: {listen: 'unix:" + socket + "'}\n"
	h.start(config)
	h.Kill()
	h.startWith(gate.Settings{Config: config, Dir: h.Dir})
	for uid, may := range map[uint32]bool{0: true, gate.UID: true, ordinaryUser: false} {
		if text, code := scrape(uid); may != (code == 0 && strings.Contains(text, "imdsgate_build_info")) {
			t.Errorf("user %d: %d %s", uid, code, text)
		}
	}
	h.Stop()
	if _, err := os.Lstat(socket); err == nil {
		t.Error("the socket is left")
	}
}
