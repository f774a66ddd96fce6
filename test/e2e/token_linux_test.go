package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const (
	foreignToken = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a0a"

	victim = 5001 // a user

	put = `curl -s -m 3 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 600" ` + service + `/latest/api/token`
)

// inUnit runs a bash script as a user in a system unit.
func (h *host) inUnit(unit string, uid int, script string) string {
	h.t.Helper()
	const enter = `mount -t cgroup2 none /sys/fs/cgroup
own=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup) dir=$own/system.slice/$1
mkdir -p $dir; echo $$ >$dir/cgroup.procs
setpriv --reuid=$2 --regid=$2 --clear-groups -- bash -c "$3"; code=$?
echo $$ >$own/cgroup.procs; rmdir $dir $own/system.slice; exit $code`
	out, code := h.run(client{args: []string{"unshare", "-m", "sh", "-c", enter, "sh", unit, fmt.Sprint(uid), script}})
	if code != 0 {
		h.t.Errorf("%s in %s: %d, %s", script, unit, code, out)
	}
	return out
}

// asks is a command that asks for something with a token and prints the status.
func asks(header, target string) string {
	return `curl -s -m 3 -o /dev/null -w '%{http_code}' --path-as-is -H "` + header + `" ` + service + target
}

const bearer = "X-aws-ec2-metadata-token: "

// spelled is a target that differs from those of other cases and means the same.
func spelled(target string, n int) string { return strings.Repeat("/", n) + target }

// decision waits for the record of a request for exactly this target.
func (h *host) decision(target string) gate.Document {
	h.t.Helper()
	d, err := h.Await("a request for "+target, func(d gate.Document) bool {
		return d.At("data_stream.dataset") == "imdsgate.decision" && d.At("url.original") == target
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

func (h *host) alerts(target string) (n int) {
	h.t.Helper()
	docs, err := h.Documents()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, d := range docs {
		if d.At("data_stream.dataset") == "imdsgate.alert" && d.At("url.original") == target && d.At("rule.id") == foreignToken {
			n++
		}
	}
	return n
}

// An ordinary user who has read the token of another service is seen, and refused
// where that is set; however he spells it.
func TestStolenToken(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, config  string
		audit, status string // the verdict of enforce mode, and what he gets
		alerts        int
	}{
		{"nothing is set", "mode: audit\n", "", "200", 1},
		{"audit, block", "mode: audit\nrules: {without_shipped: true}\ntokens: {action: block}\n", "deny", "200", 1},
		{"enforce, alert", "mode: enforce\nrules: {without_shipped: true}\ntokens: {action: alert}\n", "allow", "200", 1},
		{"enforce, block", "mode: enforce\nrules: {without_shipped: true}\ntokens: {action: block}\n", "deny", "403", 1},
		{"enforce, off", "mode: enforce\nrules: {without_shipped: true}\ntokens: {action: off}\n", "allow", "200", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := start(t, netlab.Options{IMDS: &imdstest.Config{TokensRequired: true}}, c.config)
			token := h.inUnit("victim.service", victim, put)
			if len(token) != 56 {
				t.Fatalf("token %q", token)
			}
			for i, header := range []string{bearer + token, "x-AWS-EC2-metadata-TOKEN:\t " + token + " "} {
				target := spelled(role, i)
				if got := h.inUnit("thief.service", ordinaryUser, asks(header, target)); got != c.status {
					t.Errorf("the thief got %s, want %s", got, c.status)
				}
				d := h.decision(target)
				if d.At("imdsgate.token.state") != "foreign" || d.At("imdsgate.token.scope") != "none" || d.At("imdsgate.token.issuer.unit") != "victim.service" ||
					d.At("imdsgate.token.issuer.user.id") != fmt.Sprint(victim) || d.At("imdsgate.token.issuer.executable") != "/usr/bin/curl" || d.At("imdsgate.process.unit") != "thief.service" {
					t.Errorf("token %v, process %v", d.At("imdsgate.token"), d.At("imdsgate.process"))
				}
				if c.audit != "" && d.At("imdsgate.audit_verdict") != c.audit {
					t.Errorf("verdict %v, would be %v", d.At("imdsgate.verdict"), d.At("imdsgate.audit_verdict"))
				}
				if got := h.alerts(target); got != c.alerts {
					t.Errorf("%d alerts, want %d", got, c.alerts)
				}
			}
			// Spelled as the service may or may not take it.
			respelled := spelled(role, 2)
			h.inUnit("thief.service", ordinaryUser, asks(bearer+strings.TrimRight(token, "="), respelled))
			if d := h.decision(respelled); d.At("imdsgate.token.state") != "foreign" {
				t.Errorf("without its padding: %v", d.At("imdsgate.token"))
			}
			// In a header that is none of the service's, as far as is known.
			h.inUnit("thief.service", ordinaryUser, asks("X_aws_ec2_metadata_token: "+token, spelled(instanceID, 3)))
			if d := h.decision(spelled(instanceID, 3)); d.At("imdsgate.token.state") != nil || d.At("imdsgate.request.evasive") != true {
				t.Errorf("with underscores: %v", d.At("imdsgate.token"))
			}
			// What nobody would call a secret is an alert at most.
			h.inUnit("thief.service", ordinaryUser, asks(bearer+token, instanceID))
			if d := h.decision(instanceID); d.At("imdsgate.token.state") != "foreign" || d.At("imdsgate.audit_verdict") != "allow" || h.alerts(instanceID) != c.alerts {
				t.Errorf("inventory: %v, %d alerts", d.At("imdsgate.token"), h.alerts(instanceID))
			}
			h.Stop()
			if strings.Contains(h.Log(), token[:20]) {
				t.Error("the token is in the log")
			}
		})
	}
}

// What programs do with their own tokens is nobody else's business, in the
// narrowest scope in which it is theirs; nor is a token of which nobody knows whose
// it is.
func TestOwnToken(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{IMDS: &imdstest.Config{TokensRequired: true}})
	older := h.token()
	h.start("mode: enforce\nrules: {without_shipped: true}\ntokens: {action: block}\n")
	// A shell that gets a token by itself.
	const itself = `exec 3<>/dev/tcp/169.254.169.254/80
printf 'PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nConnection: close\r\n\r\n' >&3
while IFS= read -r line <&3 || [ -n "$line" ]; do T=$line; done; exec 3>&-
`
	for i, c := range []struct {
		name, script, scope string
	}{
		{"executes another program", itself + "exec " + asks(bearer+"$T", spelled(role, 0)), "process"},
		{"a worker uses what its parent got", itself + "( " + asks(bearer+"$T", spelled(role, 1)) + "; true )", "parent"},
		{"two commands of a script", "T=$(" + put + "); " + asks(bearer+"$T", spelled(role, 2)) + "; true", "parent"},
		{"one of them in a pipe", "T=$(" + put + " | cat; true); " + asks(bearer+"$T", spelled(role, 3)) + "; true", "parent"},
		{"both in subshells", "T=$(" + put + " | cat; true); (" + asks(bearer+"$T", spelled(role, 4)) + "; true)", "parent"},
	} {
		target := spelled(role, i)
		if got := h.inUnit("app.service", victim, c.script); got != "200" {
			t.Errorf("%s: %s", c.name, got)
		}
		if d := h.decision(target); d.At("imdsgate.token.state") != "own" || d.At("imdsgate.token.scope") != c.scope || h.alerts(target) != 0 {
			t.Errorf("%s: %v, %d alerts", c.name, d.At("imdsgate.token"), h.alerts(target))
		}
	}
	// Another process of the unit, of another user.
	target := spelled(role, 5)
	token := h.inUnit("app.service", victim, put)
	if got := h.inUnit("app.service", victim+1, asks(bearer+token, target)); got != "200" {
		t.Errorf("the same unit: %s", got)
	}
	if d := h.decision(target); d.At("imdsgate.token.scope") != "unit" || d.At("imdsgate.token.state") != "own" {
		t.Errorf("the same unit: %v", d.At("imdsgate.token"))
	}
	// From before the daemon was started.
	target = spelled(role, 6)
	if got := h.inUnit("thief.service", ordinaryUser, asks(bearer+older, target)); got != "200" {
		t.Errorf("an older token: %s", got)
	}
	if d := h.decision(target); d.At("imdsgate.token.state") != "unknown" || d.At("imdsgate.token.issuer") != nil || h.alerts(target) != 0 {
		t.Errorf("an older token: %v", d.At("imdsgate.token"))
	}
	// The scope is narrowed without a restart.
	if err := h.Write("mode: enforce\nrules: {without_shipped: true}\ntokens: {scope: parent, action: block}\n"); err != nil {
		t.Fatal(err)
	}
	h.Signal(syscall.SIGHUP)
	h.logged("reloaded")
	target = spelled(role, 7)
	if got := h.inUnit("app.service", victim+1, asks(bearer+token, target)); got != "403" {
		t.Errorf("the same unit in the scope of the parent: %s", got)
	}
	if d := h.decision(target); d.At("imdsgate.token.scope") != "unit" || d.At("imdsgate.token.state") != "foreign" {
		t.Errorf("the same unit in the scope of the parent: %v", d.At("imdsgate.token"))
	}
	s, err := h.Status()
	if err != nil || s.Requests.Tokens != 6 || s.Requests.Forgotten != 0 {
		t.Errorf("%d tokens, %v", s.Requests.Tokens, err)
	}
}

// The ledger tells who got a key, however the service sends it; and there is no
// secret in it.
func TestCredentialsLedger(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{NoIMDS: true})
	const doc = `{"Code":"Success","AccessKeyId":"ASIA%s","SecretAccessKey":"fakesecretfakesecret","Token":"faketoken","Expiration":"2030-01-01T00:00:00Z"}`
	token := strings.Repeat("Q29mZmVl", 7)
	mux := http.NewServeMux()
	chunked := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			for _, c := range body {
				fmt.Fprintf(w, "%c", c)
				w.(http.Flusher).Flush()
			}
		}
	}
	mux.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "300")
		chunked(token)(w, r)
	})
	mux.HandleFunc("GET "+credentials+"chunked", chunked(fmt.Sprintf(doc, "CHUNKED0000000")))
	mux.HandleFunc("GET "+credentials+"part", func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.json", time.Time{}, strings.NewReader(fmt.Sprintf(doc, "PART0000000000")))
	})
	mux.HandleFunc("GET /latest/strange/place", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, doc, "STRANGE0000000")
	})
	ln, err := h.Metadata.Listen(context.Background(), &net.ListenConfig{}, "tcp", "169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: mux}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	defer func() {
		server.Close()
		<-served
	}()
	h.start("")
	got := h.inUnit("app.service", victim, put)
	if got != token {
		t.Fatalf("token %q", got)
	}
	get := func(target string, more ...string) string {
		return "curl -s -m 3 -H '" + bearer + token + "' " + strings.Join(more, " ") + " " + service + target
	}
	for _, script := range []string{
		get(credentials + "chunked"), get(credentials + "chunked"), get("/latest/strange/place"),
		get(credentials+"part", "-r", "10-80"), get(credentials+"part", "-r", "90-"),
	} {
		h.inUnit("app.service", victim, script)
	}
	if d := h.decision(credentials + "chunked"); d.At("imdsgate.token.state") != "own" || d.At("imdsgate.credential.access_key_id") != "ASIACHUNKED0000000" {
		t.Errorf("%v, %v", d.At("imdsgate.token"), d.At("imdsgate.credential"))
	}
	if _, err := h.Await("the other part", func(d gate.Document) bool {
		return d.At("http.response.status_code") == 206.0 && d.At("imdsgate.credential") == nil
	}); err != nil {
		t.Fatal(err)
	}

	out, code := h.imdsgate("credentials", "--json")
	var all report.Credentials
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 0 {
		t.Fatalf("%d, %v: %s", code, err, out)
	}
	lines := map[string]int{}
	for _, i := range all.Issued {
		lines[i.AccessKeyID]++
		if len(i.To) == 0 || i.To[0].Executable != "/usr/bin/curl" || i.To[0].User != fmt.Sprint(victim) || i.To[0].Unit != "app.service" || i.To[0].EntityID == "" ||
			i.Count != 1 || i.Verdict != "allow" || i.Mode != "audit" {
			t.Errorf("%+v", i)
		}
		if i.AccessKeyID == "ASIACHUNKED0000000" && (i.WouldBe != "deny" || i.Rule == "" || i.Expiration == nil || i.Expiration.Year() != 2030) {
			t.Errorf("%+v", i)
		}
	}
	// Two processes got the first of them.
	if len(lines) != 4 || lines["ASIACHUNKED0000000"] != 2 || lines["ASIAPART0000000000"] != 1 || lines["ASIASTRANGE0000000"] != 1 || lines[""] != 1 {
		t.Errorf("%v", lines)
	}
	if strings.Contains(out, "fake") || strings.Contains(out, token) {
		t.Errorf("a secret: %s", out)
	}
	out, code = h.imdsgate("credentials", "ASIASTRANGE0000000")
	if code != 0 || strings.Count(out, "ASIA") != 1 || !strings.Contains(out, "/usr/bin/curl (pid ") || !strings.Contains(out, "app.service") {
		t.Errorf("%d\n%s", code, out)
	}
	if out, code = h.imdsgate("credentials", "AKIANOBODY"); code != 1 || !strings.Contains(out, "nobody") {
		t.Errorf("%d\n%s", code, out)
	}
}
