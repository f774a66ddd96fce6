package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"github.com/imdsgate/imdsgate/test/shared"
	"golang.org/x/sys/unix"
)

// What `make demo` shows is true, line by line.
func TestDemo(t *testing.T) {
	prepare(t, netlab.Options{NoIMDS: true}) // asks for root
	cmd := exec.Command("go", "run", "../demo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// AWS's SDK gets its credentials by grant, from our stand-in over both families
// and from AWS's own mock, and the record joins the process to the key.
func TestSDK(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		args []string
	}{{"IPv4", nil}, {"IPv6", []string{"--endpoint-mode", "ipv6"}}} {
		t.Run(c.name, func(t *testing.T) {
			h := prepare(t, netlab.Options{IMDS: &imdstest.Config{TokensRequired: true}})
			sdk := h.install(h.sdk)
			h.start("mode: enforce\nposture: strict\n" + grant(sdk, ordinaryUser))
			out, code := h.run(client{uid: ordinaryUser, args: append([]string{sdk}, c.args...)})
			if code != 0 || !strings.HasPrefix(out, "credentials ASIAEXAMPLEFAKE00001") {
				t.Fatalf("%d, %s\n%s", code, out, h.Log())
			}
			d := h.decided(role, "sdkclient")
			if d.At("imdsgate.grant") != "app" || d.At("imdsgate.credential.access_key_id") != "ASIAEXAMPLEFAKE00001" ||
				d.At("imdsgate.attribution.complete") != true || d.At("imdsgate.request.api") != "v2" {
				t.Errorf("%v", d)
			}
			// The same program, run by another user: strict.
			if out, code := h.run(client{uid: ordinaryUser + 1, args: append([]string{sdk}, c.args...)}); code == 0 {
				t.Errorf("without a grant: %s", out)
			}
		})
	}
	t.Run("AWS's mock", func(t *testing.T) {
		h := prepare(t, netlab.Options{NoIMDS: true})
		mock := exec.Command(h.mock, "--hostname", "169.254.169.254", "--port", "80", "--imdsv2")
		mock.Env = []string{"HOME=" + t.TempDir(), "PATH=/usr/bin:/bin"}
		if err := h.Metadata.Start(mock); err != nil {
			t.Fatal(err)
		}
		defer mock.Wait()
		defer mock.Process.Kill()
		sdk := h.install(h.sdk)
		h.start("mode: enforce\n" + grant(sdk, ordinaryUser))
		var out string
		var code int
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if out, code = h.run(client{uid: ordinaryUser, args: []string{sdk}}); code == 0 {
				break
			}
		}
		if code != 0 || !strings.HasPrefix(out, "credentials 12345678901") {
			t.Errorf("%d, %s", code, out)
		}
		if got := h.curl(client{uid: ordinaryUser}, "/latest/meta-data/iam/security-credentials/", "-H", "X-aws-ec2-metadata-token: x"); got != "403" {
			t.Errorf("curl got %s", got)
		}
	})
}

// Nothing is configured: audit mode, with the shipped rules. Everything passes,
// and the record has what enforce mode would have done.
func TestAuditByDefault(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "")
	for _, path := range []string{instanceID, role, "/latest/user-data"} {
		if got := h.curl(client{uid: ordinaryUser}, path); got != "200" {
			t.Errorf("%s: %s", path, got)
		}
	}
	d := h.decided(role, "curl")
	if d.At("imdsgate.mode") != "audit" || d.At("imdsgate.verdict") != "allow" || d.At("imdsgate.audit_verdict") != "deny" ||
		d.At("event.action") != "imds-request-would-deny" || d.At("http.response.status_code") != 200.0 || d.At("process.parent.name") == nil {
		t.Errorf("%v", d)
	}
	if d := h.decided(instanceID, "curl"); d.At("imdsgate.audit_verdict") != "allow" {
		t.Errorf("%v", d)
	}
	out, code := h.imdsgate("status")
	if code != 0 || !strings.Contains(out, "watching") || !strings.Contains(out, "level L3") {
		t.Errorf("%d\n%s", code, out)
	}
}

// A client that gets a 403 is refused only what is guarded, and its refusal never
// leads it back to IMDSv1: the token passes.
func TestEnforce(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	token := "X-aws-ec2-metadata-token: " + h.token()
	for _, c := range []struct {
		path, want string
		args       []string
	}{
		{instanceID, "200", nil},
		{"/latest/meta-data/", "200", nil},
		{"/latest/api/token", "200", []string{"-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"}},
		{"/latest/dynamic/instance-identity/document", "200", nil},
		{"/latest/dynamic/instance-identity/pkcs7", "403", []string{"-H", token}},
		{"/latest/user-data", "403", []string{"-H", token}},
		{credentials, "403", []string{"-H", token}},
		{role, "403", []string{"-H", token}},
		{"/latest/meta-data/iam/%73ecurity-credentials/imdsgate-lab-role", "403", []string{"-H", token, "--path-as-is"}},
		{"/latest/meta-data/x/../iam/security-credentials/imdsgate-lab-role", "403", []string{"-H", token, "--path-as-is"}},
		{"//latest/meta-data/iam/security-credentials/", "403", []string{"-H", token, "--path-as-is"}},
		{"/2021-03-23/meta-data/iam/security-credentials/", "403", []string{"-H", token}},
		{"/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance", "403", []string{"-H", token}},
		{"/latest/meta-data/spot/termination-time", "404", nil},
	} {
		if got := h.curl(client{uid: ordinaryUser}, c.path, c.args...); got != c.want {
			t.Errorf("%s: %s, want %s", c.path, got, c.want)
		}
		if got := h.curl(client{uid: ordinaryUser}, service6+c.path, c.args...); got != c.want {
			t.Errorf("IPv6, %s: %s, want %s", c.path, got, c.want)
		}
	}
	for _, c := range h.IMDS.Transcript().Connections {
		if seen := string(c.Received()); strings.Contains(seen, "credentials") || strings.Contains(seen, "user-data") {
			t.Errorf("the service saw %q", seen)
		}
	}
	out, code := h.imdsgate("events", "-n", "200")
	if code != 0 || !strings.Contains(out, "denied GET "+role) || !strings.Contains(out, "ALERT") {
		t.Errorf("%d\n%s", code, out)
	}
}

// No token, key, body or user data is in anything that the daemon writes.
func TestNoSecretLeaves(t *testing.T) {
	t.Parallel()
	const userData = "#cloud-config\npassword: correct-horse-battery-staple\n"
	h := prepare(t, netlab.Options{IMDS: &imdstest.Config{UserData: []byte(userData)}})
	sdk := h.install(h.sdk)
	h.start("log: {level: debug}\n" + grant(sdk, ordinaryUser))
	token := h.token()
	for _, path := range []string{role, "/latest/user-data", instanceID + "?X-aws-ec2-metadata-token=" + token} {
		h.curl(client{uid: ordinaryUser}, path, "-H", "X-aws-ec2-metadata-token: "+token)
	}
	h.run(client{uid: ordinaryUser, args: []string{sdk}})
	h.decided(role, "sdkclient")
	h.decided("/latest/user-data", "curl")
	h.Stop()
	written := []byte(h.Log())
	events, err := os.ReadFile(h.Events)
	if err != nil {
		t.Fatal(err)
	}
	written = append(written, events...)
	for _, c := range h.IMDS.Transcript().Connections {
		for _, secret := range append(secrets(c.Sent()), secrets(c.Received())...) {
			if bytes.Contains(written, []byte(secret)) {
				t.Errorf("%.12s... is in what the daemon wrote", secret)
			}
		}
	}
	if bytes.Contains(written, []byte("correct-horse")) || bytes.Contains(written, []byte(token)) || bytes.Contains(written, []byte("fake-secret")) {
		t.Error("a secret is in what the daemon wrote")
	}
	if !bytes.Contains(written, []byte("ASIAEXAMPLEFAKE00001")) {
		t.Error("the id of the key that was handed out is missing")
	}
}

// secrets finds tokens, secret keys and session tokens in traffic.
func secrets(b []byte) []string {
	var found []string
	var doc struct{ SecretAccessKey, Token string }
	if i := bytes.Index(b, []byte("{")); i >= 0 && json.Unmarshal(b[i:], &doc) == nil {
		found = append(found, doc.SecretAccessKey, doc.Token)
	}
	for _, line := range strings.Split(string(b), "\r\n") {
		if name, value, ok := strings.Cut(line, ": "); ok && strings.EqualFold(name, "X-aws-ec2-metadata-token") {
			found = append(found, value)
		}
	}
	if i := bytes.LastIndex(b, []byte("\r\n\r\n")); i >= 0 && len(b)-i == 60 {
		found = append(found, string(b[i+4:]))
	}
	all := found[:0]
	for _, s := range found {
		if len(s) > 8 {
			all = append(all, s)
		}
	}
	return all
}

// With the hop limit at 1 a container gets no token through us, with 2 it does,
// as it would without us; and policy knows it for what it is.
func TestContainers(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{Containers: true}, "")
	put := []string{"-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"}
	for name, ns := range map[string]*netlab.Namespace{"bridged": h.Bridged, "routed": h.Routed} {
		for _, base := range []string{service, service6} {
			in := client{in: ns, uid: ordinaryUser}
			if got := h.curl(in, base+instanceID); got != "200" {
				t.Errorf("%s: %s: %s", name, base, got)
			}
			if got := h.curl(in, base+"/latest/api/token", put...); got != "000" {
				t.Errorf("%s: %s: a token within one hop: %s", name, base, got)
			}
			h.IMDS.SetHopLimit(2)
			if got := h.curl(in, base+"/latest/api/token", put...); got != "200" {
				t.Errorf("%s: %s: a token within two hops: %s", name, base, got)
			}
			h.IMDS.SetHopLimit(1)
		}
	}
	if got := h.curl(client{}, "/latest/api/token", put...); got != "200" {
		t.Errorf("the host itself: %s", got)
	}
	for _, source := range []string{"172.17.0.2", "172.31.0.77", "fd00:ec2:17::2", "fd00:ec2:1::77"} {
		d, err := h.Await("a container", func(d gate.Document) bool {
			return d.At("source.ip") == source && d.At("event.dataset") == "imdsgate.decision"
		})
		if err != nil {
			t.Fatal(err)
		}
		if d.At("process.name") != "curl" || d.At("imdsgate.attribution.confidence") != "medium" {
			t.Errorf("%s: process %v, attribution %v", source, d.At("process.name"), d.At("imdsgate.attribution"))
		}
	}
}

func TestContainersEnforced(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{Containers: true, IMDS: &imdstest.Config{HopLimit: 2}}, "mode: enforce\n")
	for _, ns := range []*netlab.Namespace{h.Bridged, h.Routed} {
		if got := h.curl(client{in: ns}, role, "-H", "X-aws-ec2-metadata-token: "+h.token()); got != "403" {
			t.Errorf("%s: credentials: %s", ns, got)
		}
		if got := h.curl(client{in: ns}, instanceID); got != "200" {
			t.Errorf("%s: inventory: %s", ns, got)
		}
	}
	// What the host would not forward, we do not either.
	h.Instance.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0) })
	if got := h.curl(client{in: h.Bridged}, instanceID); got != "000" {
		t.Errorf("with ip_forward=0: %s", got)
	}
}

// Policy can be stricter with containers than the hop limit is: a rule names them.
func TestRuleAboutContainers(t *testing.T) {
	t.Parallel()
	rule := filepath.Join(t.TempDir(), "containers.toml")
	if err := os.WriteFile(rule, []byte(`[rule]
rule_id = "containers"
name = "Containers have roles of their own"
type = "eql"
language = "eql"
severity = "medium"
query = "network where imdsgate.forwarded == true"
`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(rule), 0o755); err != nil {
		t.Fatal(err)
	}
	h := start(t, netlab.Options{Containers: true, IMDS: &imdstest.Config{HopLimit: 2}}, "mode: enforce\nrules: {without_shipped: true, paths: ["+rule+"]}\n")
	for _, ns := range []*netlab.Namespace{h.Bridged, h.Routed} {
		if got := h.curl(client{in: ns}, role, "-H", "X-aws-ec2-metadata-token: "+h.token()); got != "403" {
			t.Errorf("%s: %s", ns, got)
		}
	}
	if got := h.curl(client{uid: ordinaryUser}, role, "-H", "X-aws-ec2-metadata-token: "+h.token()); got != "200" {
		t.Errorf("the host: %s", got)
	}
}

// An operator's own lock stays a lock: the way that it guards is not taken.
func TestForeignLock(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{Containers: true})
	h.Instance.Do(func() error {
		return exec.Command("iptables", "-A", "FORWARD", "-d", "169.254.169.254/32", "-j", "DROP").Run()
	})
	h.start("mode: enforce\n")
	if got := h.curl(client{in: h.Bridged}, instanceID); got != "000" {
		t.Errorf("a container, for which there is a lock: %s", got)
	}
	if got := h.curl(client{}, instanceID); got != "200" {
		t.Errorf("the host: %s", got)
	}
	out, code := h.imdsgate("status")
	if code != 1 || !strings.Contains(out, "INCOMPLETE") || !strings.Contains(out, "FORWARD") {
		t.Errorf("%d\n%s", code, out)
	}
	if _, err := h.Await("the lock", func(d gate.Document) bool { return d.At("event.action") == "redirect-hook-not-taken" }); err != nil {
		t.Error(err)
	}
}

// Somebody flushes the tables, as firewalls do when they restart.
func TestFlushIsRepaired(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	before := h.output("iptables-save")
	h.Instance.Do(func() error { return exec.Command("iptables", "-t", "nat", "-F").Run() })
	h.Instance.Do(func() error { return exec.Command("iptables", "-F").Run() })
	if _, err := h.Await("the repair", func(d gate.Document) bool {
		return d.At("event.action") == "redirect-rule-changed" && d.At("event.kind") == "alert"
	}); err != nil {
		t.Fatal(err)
	}
	s, err := h.Status()
	if err != nil || !s.Redirect.Installed || s.Redirect.Repairs == 0 {
		t.Errorf("%+v, %v", s.Redirect, err)
	}
	if after := h.output("iptables-save"); strings.Count(after, "IMDSGATE") != strings.Count(before, "IMDSGATE") {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
		t.Errorf("after the repair: %s", got)
	}
}

// The daemon dies in enforce mode: the redirect stays, requests are refused, an
// ordinary user cannot take its ports, and its successor goes on.
func TestKilledInEnforce(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	h.Kill()
	if got := h.curl(client{}, instanceID); got != "000" {
		t.Errorf("with the daemon dead: %s", got)
	}
	out, code := h.run(client{uid: ordinaryUser, args: []string{h.attacker, "bind"}})
	if code != 0 || !strings.Contains(out, "0 of ") {
		t.Errorf("an ordinary user: %s", out)
	}
	if out, code := h.imdsgate("status"); code != 3 || !strings.Contains(out, "not running") {
		t.Errorf("status: %d, %s", code, out)
	}
	if out, code := h.ended(); code != 0 || !strings.Contains(out, "stays") {
		t.Errorf("%d, %s", code, out)
	}
	h.start("mode: enforce\n")
	if got := h.curl(client{}, instanceID); got != "200" {
		t.Errorf("with its successor: %s", got)
	}
	h.Kill()
	if out, code := h.imdsgate("redirect", "remove"); code != 0 || out != "removed" {
		t.Errorf("%d, %s", code, out)
	}
	if out, _ := h.imdsgate("redirect", "remove"); out != "there was nothing to remove" {
		t.Error(out)
	}
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		if left := h.output(tool); strings.Contains(left, "IMDSGATE") {
			t.Errorf("%s:\n%s", tool, left)
		}
	}
	if got := h.curl(client{}, role); got != "200" {
		t.Errorf("without the redirect: %s", got)
	}
}

// The daemon dies in audit mode, whatever the configuration says: what the unit runs then
// takes the redirect away, and clients reach the service.
func TestKilledInAudit(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	h.start("mode: enforce\n", "--mode", "audit")
	h.Kill()
	if out, code := h.ended(); code != 0 || !strings.Contains(out, "is released") {
		t.Errorf("%d, %s", code, out)
	}
	if got := h.curl(client{}, instanceID); got != "200" {
		t.Errorf("afterwards: %s", got)
	}
}

func TestStopped(t *testing.T) {
	t.Parallel()
	for mode, stays := range map[string]bool{"audit": false, "enforce": true} {
		h := prepare(t, netlab.Options{})
		h.start("mode: off\n", "--mode", mode)
		if code := h.Stop(); code != 0 {
			t.Errorf("%s: exit %d\n%s", mode, code, h.Log())
		}
		if got := strings.Contains(h.output("iptables-save"), "IMDSGATE"); got != stays {
			t.Errorf("%s: the redirect is there: %v", mode, got)
		}
	}
}

// Connections that were there before us do not pass through us: they are told of,
// and in enforce mode ended.
func TestOlderConnections(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"audit", "enforce"} {
		h := prepare(t, netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}})
		conn, err := h.dial("169.254.169.254:80")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ask := func() error {
			conn.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", instanceID); err != nil {
				return err
			}
			_, err := conn.Read(make([]byte, 4096))
			return err
		}
		if err := ask(); err != nil {
			t.Fatal(err)
		}
		h.start("mode: " + mode + "\n")
		if err := ask(); (err == nil) != (mode == "audit") {
			t.Errorf("%s: %v", mode, err)
		}
		d, err := h.Await("an older connection", func(d gate.Document) bool { return d.At("event.action") == "direct-imds-connection" })
		if err != nil {
			t.Fatal(err)
		}
		if got := d.At("imdsgate.actor.executable"); got != self || d.At("imdsgate.actor.pid") != float64(os.Getpid()) {
			t.Errorf("%s: who has it is %v, pid %v", mode, got, d.At("imdsgate.actor.pid"))
		}
		if mode == "audit" {
			h.toldOnce(ask)
		}
		conn.Close()
	}
}

// Of many at once there is an event each only for some, and one for the others, which do not outlive enforce mode
// either.
func TestManyOlderConnections(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}})
	var conns []net.Conn
	for range 40 {
		conn, err := h.dial("169.254.169.254:80")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	told := func(mode, rest string) {
		t.Helper()
		h.told("direct-imds-connection", says(rest))
		docs, err := h.Documents()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, d := range docs {
			if d.At("event.action") == "direct-imds-connection" && d.At("imdsgate.mode") == mode {
				n++
			}
		}
		if n != 33 {
			t.Errorf("%d events, want 33", n)
		}
	}
	h.start("mode: audit\n")
	told("audit", "one by one: 8, each of which is older than the redirect and does not pass through it")
	h.setMode("enforce")
	told("enforce", "one by one: 8, each of which is older than the redirect and does not pass through it; aborted: 8")
	for _, conn := range conns {
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("in enforce mode: %v", err)
		}
	}
}

// toldOnce shows that a repair is no reason to tell again of a connection that does not
// come here, and that it does not outlive the change to enforce mode.
func (h *host) toldOnce(ask func() error) {
	h.t.Helper()
	h.output("iptables", "-t", "raw", "-F") // in nat it would lose its port
	h.told("redirect-rule-changed", nil)
	if err := ask(); err != nil {
		h.t.Error(err)
	}
	h.setMode("enforce", "--reason", "test")
	if err := ask(); err == nil {
		h.t.Error("it outlives the change to enforce mode")
	}
	aborted := func(d gate.Document) bool { return strings.HasSuffix(d.At("message").(string), "it was aborted") }
	h.told("direct-imds-connection", aborted)
	docs, err := h.Documents()
	if err != nil {
		h.t.Fatal(err)
	}
	told := 0
	for _, d := range docs {
		if d.At("event.action") == "direct-imds-connection" && !aborted(d) {
			told++
		}
	}
	if told != 1 {
		h.t.Errorf("it is told %d times", told)
	}
}

// A connection whose SYN was sent before there were rules, and which the service answers
// when the daemon has looked at what is older, is recorded just the same.
func TestConnectionsOfBefore(t *testing.T) {
	t.Parallel()
	for try := 0; try < 3; try++ { // after a second the client sends its SYN again, to us
		h := prepare(t, netlab.Options{})
		warm, err := h.dial("169.254.169.254:80") // so that the client knows the way
		if err != nil {
			t.Fatal(err)
		}
		warm.Close()
		h.deaf(true)
		type made struct {
			net.Conn
			error
		}
		client := make(chan made, 1)
		go func() {
			conn, err := h.dial("169.254.169.254:80")
			client <- made{conn, err}
		}()
		for end := time.Now().Add(5 * time.Second); h.output("ss", "-Htn", "state", "syn-sent") == ""; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("nobody connects")
			}
		}
		h.start("mode: audit\n")
		h.deaf(false)
		conn := <-client
		if conn.error != nil {
			t.Log(conn.error)
			continue
		}
		defer conn.Close()
		local, direct := conn.LocalAddr().String(), false
		for end := time.Now().Add(time.Second); !direct && time.Now().Before(end); time.Sleep(time.Millisecond) {
			direct = slices.ContainsFunc(h.IMDS.Transcript().Connections, func(c imdstest.Connection) bool { return c.Remote.String() == local })
		}
		if !direct {
			t.Log("the daemon took too long to start")
			continue
		}
		if _, err := h.Await("the connection of before", func(d gate.Document) bool { return d.At("event.action") == "direct-imds-connection" }); err != nil {
			t.Error(err)
		}
		return
	}
	t.Fatal("no connection went past the redirect, and so the test has shown nothing")
}

// deaf has the service's answers wait, or lets them go, by not telling it who the
// instance is (arp_ignore of ip-sysctl.rst).
func (h *host) deaf(is bool) {
	h.t.Helper()
	ignore := "0"
	if is {
		ignore = "8"
	}
	if err := h.Instance.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/conf/all/arp_ignore", []byte(ignore), 0)
	}); err != nil {
		h.t.Fatal(err)
	}
	if !is {
		return
	}
	if err := h.Metadata.Do(func() error {
		for name, value := range map[string]string{"mcast_solicit": "1000", "retrans_time_ms": "10"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/neigh/ec2/"+name, []byte(value), 0); err != nil {
				return err
			}
		}
		return exec.Command("ip", "neigh", "flush", "dev", "ec2").Run()
	}); err != nil {
		h.t.Fatal(err)
	}
}

// Connections that are made while the daemon starts either pass through it or are
// recorded as direct ones, if there are many as a number.
func TestConnectionsDuringStart(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{IMDS: &imdstest.Config{Persistence: imdstest.AlwaysKeep}})
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	local := make(map[string]bool)
	clients.Go(func() {
		for ctx.Err() == nil && len(local) < 2000 {
			conn, err := h.dial("169.254.169.254:80")
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { conn.Close() }) // not before the daemon could see it
			local[conn.LocalAddr().String()] = true
			time.Sleep(time.Millisecond)
		}
	})
	defer clients.Wait()
	defer cancel()
	h.start("mode: audit\n")
	time.Sleep(50 * time.Millisecond)
	cancel()
	clients.Wait()
	direct := 0
	for _, c := range h.IMDS.Transcript().Connections {
		if local[c.Remote.String()] {
			direct++
		}
	}
	recorded := 0
	for end := time.Now().Add(5 * time.Second); recorded < direct && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		docs, err := h.Documents()
		if err != nil {
			t.Fatal(err)
		}
		recorded = 0
		for _, d := range docs {
			if d.At("event.action") != "direct-imds-connection" {
				continue
			}
			n := 1
			if _, rest, ok := strings.Cut(d.At("message").(string), "not told one by one: "); ok {
				fmt.Sscanf(rest, "%d", &n)
			}
			recorded += n
		}
	}
	if direct == 0 || recorded != direct {
		t.Errorf("%d of %d connections were direct, %d recorded", direct, len(local), recorded)
	}
}

// A policy that is wrong changes nothing, and says where it is wrong.
func TestReload(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
		t.Fatalf("%s", got)
	}
	rule := filepath.Join(h.Dir, "broken.toml")
	if err := os.WriteFile(rule, []byte("[rule]\nrule_id = \"x\"\nname = \"x\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = '''\nprocess where process.nam == \"x\"\n'''\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct{ config, log string }{
		{"mode: enforce\nrules: {paths: [" + rule + "]}\n", "process.nam"},
		{"mode: enforce\nruels: {}\n", "ruels"},
	} {
		if err := h.Write(bad.config); err != nil {
			t.Fatal(err)
		}
		h.Signal(syscall.SIGHUP)
		h.logged(bad.log)
		if got := h.curl(client{uid: ordinaryUser}, role); got != "403" {
			t.Errorf("after a refused reload: %s", got)
		}
	}
	if _, err := h.Await("the refusal", func(d gate.Document) bool {
		return d.At("event.action") == "policy-rejected" && d.At("event.outcome") == "failure"
	}); err != nil {
		t.Error(err)
	}
	if err := h.Write("mode: enforce\nrules:\n  actions:\n    5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a01: {action: log}\n    5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a03: {action: log}\n"); err != nil {
		t.Fatal(err)
	}
	h.Signal(syscall.SIGHUP)
	h.logged("reloaded")
	if got := h.curl(client{uid: ordinaryUser}, role); got != "200" {
		t.Errorf("after a reload that lets curl pass: %s", got)
	}
}

// The command has the daemon read its configuration again, and says what came of it.
func TestReloadByCommand(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\nposture: strict\n")
	reload := func(code int, says ...string) {
		t.Helper()
		out, got := h.imdsgate("reload")
		for _, want := range says {
			if !strings.Contains(out, want) {
				t.Errorf("does not say %q: %s", want, out)
			}
		}
		if got != code {
			t.Errorf("exit status %d, want %d: %s", got, code, out)
		}
	}
	reload(0, "unchanged")
	if err := h.Write("mode: enforce\nposture: strict\ngrants:\n- name: app\n  executable: /tmp/app\n  user: app\n  owner: o\n  reason: r\n"); err != nil {
		t.Fatal(err)
	}
	reload(1, "refused", ":15: \"/tmp/app\" is below /tmp", "^")
	if err := h.Write("mode: enforce\nposture: default\nlimits: {connections: 100}\ndenies:\n- {name: stop, user: \"61234\", reason: left}\n"); err != nil {
		t.Fatal(err)
	}
	reload(0, "posture default, was strict", "+ deny stop", "! limits", "in force: ", ", was sha256:")
	if _, err := h.Await("the new policy", func(d gate.Document) bool { return d.At("event.action") == "policy-activated" }); err != nil {
		t.Error(err)
	}
	if _, err := h.Await("the refusal", func(d gate.Document) bool { return d.At("event.action") == "policy-rejected" }); err != nil {
		t.Error(err)
	}
}

// logged waits for the daemon's log to say something.
func (h *host) logged(text string) {
	h.t.Helper()
	for end := time.Now().Add(5 * time.Second); !strings.Contains(h.Log(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("the log does not say %q:\n%s", text, h.Log())
		}
	}
}

// What keeps a daemon from starting is said, with what to do, and leaves nothing.
func TestStartRefused(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	broken := filepath.Join(t.TempDir(), "broken.toml")
	if err := os.WriteFile(broken, []byte("[rule]\nrule_id = \"x\"\nname = \"x\"\ntype = \"eql\"\nlanguage = \"eql\"\nseverity = \"low\"\nquery = 'process where'\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	os.Chmod(filepath.Dir(broken), 0o755)
	os.Chmod(filepath.Dir(filepath.Dir(broken)), 0o755)
	for _, c := range []struct {
		name, config string
		args         []string
		code         int
		says         []string
	}{
		{"unknown key", "mdoe: enforce\n", nil, 78, []string{"config.yaml:10:1: ", "mdoe", "^"}},
		{"repeated key", "mode: audit\nmode: enforce\n", nil, 78, []string{"mode", "^"}},
		{"unknown mode", "mode: block\n", nil, 78, []string{"block", "audit, enforce, off"}},
		{"a grant by executable alone", "grants: [{name: x, executable: /bin/x, owner: o, reason: r}]\n", nil, 78, []string{"LD_PRELOAD"}},
		{"a rule that does not parse", "rules: {paths: [" + broken + "]}\n", nil, 78, []string{broken + ":7:", "^"}},
		{"no such rules", "rules: {paths: [/nonexistent]}\n", nil, 78, []string{"/nonexistent"}},
		{"ports that anybody may take", "redirect: {host_port: 2254}\n", nil, 78, []string{"config.yaml:10:1: ", "1024"}},
		{"a negative number", "limits: {connections: -1}\n", nil, 78, []string{"config.yaml:10:23: ", "too small"}},
		{"more than there can be", "limits: {connections: 100000}\n", nil, 78, []string{"config.yaml:10:23: ", "too large"}},
		{"unknown flag", "", []string{"--mood", "x"}, 2, []string{"mood"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := gate.Start(h.Lab, h.gate, gate.Settings{Config: c.config, Args: c.args})
			if d != nil {
				defer d.Close()
			}
			if err == nil {
				t.Fatal("it started")
			}
			if code := d.Wait(); code != c.code {
				t.Errorf("exit %d, want %d", code, c.code)
			}
			for _, want := range c.says {
				if !strings.Contains(d.Log(), want) {
					t.Errorf("does not say %q:\n%s", want, d.Log())
				}
			}
			if left := h.output("iptables-save"); strings.Contains(left, "IMDSGATE") {
				t.Errorf("left behind:\n%s", left)
			}
		})
	}
	t.Run("events where its unit may not write", func(t *testing.T) {
		d, err := gate.Start(h.Lab, h.gate, gate.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		d.Stop()
		if err := unix.Mount("tmpfs", filepath.Dir(d.Events), "tmpfs", unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(filepath.Dir(d.Events), unix.MNT_DETACH)
		again, err := gate.Start(h.Lab, h.gate, gate.Settings{Dir: d.Dir})
		if err == nil || !strings.Contains(again.Log(), d.Events) || !strings.Contains(again.Log(), "ReadWritePaths=") {
			t.Errorf("%v", err)
		}
	})
	t.Run("as root", func(t *testing.T) {
		out, code := h.run(client{args: []string{h.gate.Daemon}})
		if code != 77 || !strings.Contains(out, "imdsgated.service") {
			t.Errorf("%d, %s", code, out)
		}
	})
	t.Run("without capabilities", func(t *testing.T) {
		dir := t.TempDir()
		os.Chown(dir, ordinaryUser, ordinaryUser)
		os.Chmod(filepath.Dir(dir), 0o755)
		config := filepath.Join(dir, "c.yaml")
		os.WriteFile(config, []byte("events: {path: "+dir+"/e}\ncontrol: {socket: "+dir+"/s}\n"), 0o644)
		out, code := h.run(client{uid: ordinaryUser, args: []string{h.gate.Daemon, "--config", config}})
		if code != 77 && code != 1 || !strings.Contains(out, "CAP_") {
			t.Errorf("%d, %s", code, out)
		}
	})
	t.Run("a second daemon", func(t *testing.T) {
		h.start("")
		for _, dir := range []string{h.Dir, ""} {
			d, err := gate.Start(h.Lab, h.gate, gate.Settings{Dir: dir})
			if dir == "" && d != nil {
				defer d.Close()
			}
			if err == nil || !strings.Contains(d.Log(), "another daemon") {
				t.Errorf("%v", err)
			}
		}
		if got := h.curl(client{}, instanceID); got != "200" {
			t.Errorf("the first one: %s", got)
		}
	})
}

// The operator's command, as an operator uses it.
func TestCommand(t *testing.T) {
	t.Parallel()
	h := start(t, netlab.Options{}, "mode: enforce\n")
	h.curl(client{uid: ordinaryUser}, role)
	h.decided(role, "curl")

	out, code := h.imdsgate("status", "--json")
	var status struct {
		Mode     string
		Redirect struct{ Installed bool }
		Requests struct{ Denied int }
		Policy   struct {
			Rules []struct {
				Exclusions []string `json:"exclusions_that_do_not_excuse"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil || code != 0 {
		t.Fatalf("%d, %v\n%s", code, err, out)
	}
	excluded := 0
	for _, r := range status.Policy.Rules {
		excluded += len(r.Exclusions)
	}
	if status.Mode != "enforce" || !status.Redirect.Installed || status.Requests.Denied != 1 || excluded == 0 {
		t.Errorf("%+v", status)
	}

	sleep := exec.Command("/bin/sleep", "30")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer sleep.Wait()
	defer sleep.Process.Kill()
	out, code = h.imdsgate("explain", "--all", "--pid", fmt.Sprint(sleep.Process.Pid))
	if code != 0 || !strings.Contains(out, "/sleep (pid ") || !strings.Contains(out, "process.parent.executable != null") || !strings.Contains(out, "credentials     allow") {
		t.Errorf("%d\n%s", code, out)
	}
	if out, code := h.imdsgate("explain", "--pid", "0"); code != 2 || !strings.Contains(out, "not the number of a process") {
		t.Errorf("%d, %s", code, out)
	}
	if out, code := h.imdsgate("explain"); code != 2 || !strings.Contains(out, "pid") {
		t.Errorf("%d, %s", code, out)
	}

	// The file is the same offline.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		offline, code := h.imdsgate("events", h.Events)
		online, _ := h.imdsgate("events")
		if code == 0 && offline == online {
			break
		}
		if time.Now().After(end) { // an event may come in between
			t.Errorf("%d\n%s\n%s", code, offline, online)
			break
		}
	}
	out, _ = h.imdsgate("events", "--json", "-n", "1")
	if !json.Valid([]byte(out)) {
		t.Error(out)
	}

	// Following shows what comes.
	follow := exec.Command(h.gate.Command, "--config", h.Config, "events", "-f", "-n", "0")
	var seen bytes.Buffer
	follow.Stdout = &seen
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	h.curl(client{uid: ordinaryUser}, "/latest/user-data")
	h.decided("/latest/user-data", "curl")
	time.Sleep(300 * time.Millisecond)
	follow.Process.Signal(syscall.SIGTERM)
	follow.Wait()
	if !strings.Contains(seen.String(), "denied GET /latest/user-data") || strings.Contains(seen.String(), role) {
		t.Errorf("%s", seen.String())
	}

	if out, code := h.imdsgate("version"); code != 0 || !strings.Contains(out, "imdsgate test") {
		t.Errorf("%d, %s", code, out)
	}
	if out, code := h.imdsgate("completion", "bash"); code != 0 || !strings.Contains(out, "imdsgate") {
		t.Errorf("%d, %.100s", code, out)
	}
	if out, code := h.imdsgate("redirct"); code != 2 || !strings.Contains(out, "redirect") {
		t.Errorf("%d, %s", code, out)
	}
	// The socket is for root and the daemon's group.
	if out, code := h.run(client{uid: ordinaryUser, args: []string{h.gate.Command, "--config", h.Config, "status"}}); code != 77 {
		t.Errorf("an ordinary user: %d, %s", code, out)
	}
}

// The script for people with an instance asks what it should and finds no
// difference that is not there.
func TestCheckScript(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	script, err := filepath.Abs("../ec2/check.sh")
	if err != nil {
		t.Fatal(err)
	}
	direct, through := t.TempDir(), t.TempDir()
	h.run(client{args: []string{"bash", script, "--probe", direct}})
	h.start("")
	h.run(client{args: []string{"bash", script, "--probe", through}})
	out, code := h.run(client{args: []string{"bash", script, "--compare", direct, through}})
	if code != 0 || !strings.HasSuffix(out, "\n0 answers differ") || strings.Count(out, "HTTP/1.1 200") < 10 {
		t.Errorf("%d\n%s", code, out)
	}
	if len(secrets([]byte(out))) > 0 || strings.Contains(out, "fake-secret") {
		t.Errorf("a secret is shown:\n%s", out)
	}
	if err := os.WriteFile(filepath.Join(through, "plain-v2"), []byte("HTTP/1.1 500 Oops\r\n\r\n\n== FIN\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := h.run(client{args: []string{"bash", script, "--compare", direct, through}}); code != 1 || !strings.Contains(out, "DIFFERS") {
		t.Errorf("%d\n%s", code, out)
	}
}

// Elastic's own file, unmodified, drives the verdict.
func TestElasticsRule(t *testing.T) {
	t.Parallel()
	file := filepath.Join(shared.Dir(t), "rules", "seed-2025-02-credential_access_unusual_instance_metadata_service_api_request.toml")
	h := prepare(t, netlab.Options{})
	copied := filepath.Join(h.dir, "seed.toml")
	b, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(copied, b, 0o644) // to where the daemon's user may read
	}
	if err != nil {
		t.Fatal(err)
	}
	h.start("mode: enforce\nrules: {without_shipped: true, paths: [" + copied + "]}\n")
	if got := h.curl(client{uid: ordinaryUser}, role, "-H", "X-aws-ec2-metadata-token: "+h.token()); got != "403" {
		t.Errorf("curl: %s", got)
	}
	d := h.decided(role, "curl")
	if d.At("rule.id") != "ecc0cd54-608e-11ef-ab6d-f661ea17fbce" || d.At("rule.version") != "2025/02/04" || d.At("event.severity") != 47.0 {
		t.Errorf("%v", d.At("rule"))
	}
	sdk := h.install(h.sdk)
	if out, code := h.run(client{uid: ordinaryUser, args: []string{sdk}}); code != 0 {
		t.Errorf("a program that the rule does not name: %s", out)
	}
}

// The verbs for people who build an image, or look after one: without a daemon,
// and with the account that packages make.
func TestRedirectVerbs(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	config, passwd := filepath.Join(h.dir, "redirect.yaml"), filepath.Join(h.dir, "passwd")
	for path, text := range map[string]string{config: "mode: enforce\n", passwd: "root:x:0:0::/root:/bin/sh\nimdsgate:x:61080:61080::/:/bin/false\n"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	redirect := func(args ...string) (string, int) {
		t.Helper()
		command := strings.Join(append([]string{h.gate.Command, "--config", config, "redirect"}, args...), " ")
		return h.run(client{args: []string{"unshare", "-m", "sh", "-c", "mount --bind " + passwd + " /etc/passwd && exec " + command}})
	}
	before := h.output("iptables-nft-save")
	if out, code := redirect("verify"); code != 1 || !strings.Contains(out, "IMDSGATE") {
		t.Errorf("before: %d, %s", code, out)
	}
	printed, code := redirect("print")
	if code != 0 || !strings.Contains(printed, "--uid-owner 61080") || !strings.Contains(printed, "169.254.169.254") || !strings.Contains(printed, "fd00:ec2::254") {
		t.Errorf("%d, %s", code, printed)
	}
	if now := h.output("iptables-nft-save"); strings.Contains(now, "IMDSGATE") {
		t.Errorf("print has changed something:\n%s", now)
	}
	for range 2 {
		if out, code := redirect("install"); code != 0 || !strings.Contains(out, "IPv4: host true") || !strings.Contains(out, "IPv6: host true") {
			t.Errorf("install: %d, %s", code, out)
		}
		if out, code := redirect("verify"); code != 0 || out != "the rules are as they should be" {
			t.Errorf("verify: %d, %s", code, out)
		}
	}
	if got := h.curl(client{uid: ordinaryUser}, instanceID); got != "000" {
		t.Errorf("with nobody behind the redirect: %s", got)
	}
	if out, code := h.run(client{args: []string{"iptables-nft", "-t", "nat", "-D", "OUTPUT", "1"}}); code != 0 {
		t.Fatalf("%d, %s", code, out)
	}
	if out, code := redirect("verify"); code != 1 || !strings.Contains(out, "OUTPUT") {
		t.Errorf("a rule is gone: %d, %s", code, out)
	}
	if out, code := redirect("verify", "--json"); code != 1 || !json.Valid([]byte(out)) {
		t.Errorf("%d, %s", code, out)
	}
	if out, code := redirect("install"); code != 0 {
		t.Errorf("install again: %d, %s", code, out)
	}
	if out, code := redirect("verify"); code != 0 {
		t.Errorf("verify: %d, %s", code, out)
	}
	if out, code := redirect("remove"); code != 0 || out != "removed" {
		t.Errorf("remove: %d, %s", code, out)
	}
	if now := h.output("iptables-nft-save"); strings.Contains(now, "IMDSGATE") || strings.Count(now, "-A ") != strings.Count(before, "-A ") {
		t.Errorf("left:\n%s", now)
	}
	if got := h.curl(client{uid: ordinaryUser}, instanceID); got != "200" && got != "401" {
		t.Errorf("without the redirect: %s", got)
	}
	// As somebody else, and without the account.
	if out, code := h.run(client{uid: ordinaryUser, args: []string{h.gate.Command, "--config", config, "redirect", "remove"}}); code == 0 {
		t.Errorf("an ordinary user: %s", out)
	}
	if out, code := h.run(client{args: []string{h.gate.Command, "--config", config, "redirect", "install"}}); code == 0 || !strings.Contains(out, "useradd --system imdsgate") {
		t.Errorf("without the account: %d, %s", code, out)
	}
}

// xtablesLock does what packaging/systemd/imdsgate.tmpfiles does at boot.
func xtablesLock(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/run/xtables.lock", os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// The same with the older back end of iptables.
func TestLegacyBackend(t *testing.T) {
	t.Parallel()
	h := prepare(t, netlab.Options{})
	xtablesLock(t)
	h.start("mode: enforce\nredirect: {backend: legacy}\n")
	if got := h.curl(client{uid: ordinaryUser}, role, "-H", "X-aws-ec2-metadata-token: "+h.token()); got != "403" {
		t.Errorf("credentials: %s", got)
	}
	if got := h.curl(client{uid: ordinaryUser}, service6+instanceID); got != "200" {
		t.Errorf("inventory: %s", got)
	}
	if s, err := h.Status(); err != nil || s.Redirect.Backend != "legacy" || !s.Redirect.Installed {
		t.Errorf("%+v, %v", s.Redirect, err)
	}
	if nft := h.output("iptables-nft-save"); strings.Contains(nft, "IMDSGATE") {
		t.Errorf("in the other back end:\n%s", nft)
	}
	h.Kill()
	if out, code := h.imdsgate("redirect", "remove"); code != 0 || out != "removed" {
		t.Errorf("%d, %s", code, out)
	}
	if left := h.output("iptables-legacy-save"); strings.Contains(left, "IMDSGATE") {
		t.Errorf("left:\n%s", left)
	}
}
