package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

const (
	ecs, eks, eks6 = "http://169.254.170.2", "http://169.254.170.23", "http://[fd00:ec2::23]"

	task     = "2d8c2a5e-6c0e-4d5e-8d3c-0123456789ab"
	taskPath = "/v2/credentials/" + task
	podPath  = "/v1/credentials"
	podToken = "fake-service-account-token-of-a-pod"

	// listed makes the agents' addresses endpoints beside those of the service.
	listed = `redirect:
  endpoints: ["169.254.169.254:80", "[fd00:ec2::254]:80", "169.254.170.2:80", "169.254.170.23:80", "[fd00:ec2::23]:80"]
`
)

// withAgents has what gives tasks of ECS and pods of EKS their credentials on the instance.
func withAgents(t *testing.T) (*host, *netlab.Agents) {
	t.Helper()
	h := prepare(t, netlab.Options{Containers: true})
	agents, err := h.ServeAgents(
		imdstest.Config{Agent: &imdstest.Agent{Task: task}, Persistence: imdstest.AlwaysKeep},
		imdstest.Config{Agent: &imdstest.Agent{PodToken: podToken}, Persistence: imdstest.AlwaysKeep})
	if err != nil {
		t.Fatal(err)
	}
	return h, agents
}

// environments are what SDKs find in a task and in a pod.
func environments(t *testing.T) map[string][]string {
	t.Helper()
	token := filepath.Join(t.TempDir(), "token")
	for dir := filepath.Dir(token); dir != os.TempDir(); dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755)
	}
	if err := os.WriteFile(token, []byte(podToken), 0o644); err != nil {
		t.Fatal(err)
	}
	pod := func(base string) []string {
		return []string{"AWS_CONTAINER_CREDENTIALS_FULL_URI=" + base + podPath, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=" + token}
	}
	return map[string][]string{
		ecs: {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=" + taskPath}, eks: pod(eks), eks6: pod(eks6),
	}
}

// The endpoints of ECS and EKS, where they are listed: who asks there is known and judged like who asks the instance's
// own, from the host and from a container; a program gets its credentials by grant, with AWS's SDK; and the path and
// the token by which the agents know a container are in nothing that is written.
func TestContainerCredentials(t *testing.T) {
	t.Parallel()
	h, agents := withAgents(t)
	sdk := h.install(h.sdk)
	h.start("mode: enforce\nposture: strict\nlog: {level: debug}\n" + listed + grant(sdk, ordinaryUser))
	keys := map[string]string{ecs: "ASIAEXAMPLEFAKE70001", eks: "ASIAEXAMPLEFAKE80001", eks6: "ASIAEXAMPLEFAKE80001"}
	paths := map[string]string{ecs: taskPath, eks: podPath, eks6: podPath}
	authorization := []string{"-H", "Authorization: " + podToken}

	for base, env := range environments(t) {
		for _, in := range []*netlab.Namespace{nil, h.Bridged, h.Routed} {
			out, code := h.run(client{in: in, uid: ordinaryUser, env: env, args: []string{sdk, "--default-chain"}})
			if code != 0 || !strings.HasPrefix(out, "credentials "+keys[base]) {
				t.Errorf("%s, granted, in %v: %d, %s", base, in, code, out)
			}
			if got := h.curl(client{in: in, uid: ordinaryUser}, base+paths[base], authorization...); got != "403" {
				t.Errorf("%s, a thief in %v: %s", base, in, got)
			}
		}
		ip := strings.Trim(strings.TrimPrefix(base, "http://"), "[]")
		for name, verdict := range map[string]string{"sdkclient": "allow", "curl": "deny"} {
			d, err := h.Await(name+" at "+base, func(d gate.Document) bool {
				return d.At("destination.ip") == ip && d.At("process.name") == name && d.At("data_stream.dataset") == "imdsgate.decision"
			})
			if err != nil {
				t.Fatal(err)
			}
			if d.At("imdsgate.verdict") != verdict || d.At("imdsgate.request.class") != "credentials" || d.At("imdsgate.request.api") != "container" ||
				d.At("imdsgate.attribution.complete") != true {
				t.Errorf("%s, %s: %v", base, name, d)
			}
			if name == "sdkclient" && d.At("imdsgate.credential.access_key_id") != keys[base] {
				t.Errorf("%s: %v", base, d.At("imdsgate.credential"))
			}
		}
	}
	if got := h.curl(client{uid: ordinaryUser}, ecs+"/v4/"+task+"/task"); got != "200" {
		t.Errorf("metadata of a task: %s", got)
	}
	if d := h.decided("/v4/"+task+"/task", "curl"); d.At("imdsgate.request.class") != "inventory" {
		t.Errorf("%v", d)
	}
	for _, ask := range []string{
		"GET /v2/%63redentials/" + task + "?x HTTP/1.1\r\nHost: x\r\nUser-Agent: " + taskPath + "\r\n\r\n",
		"GET " + taskPath + " HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
	} {
		conn, err := h.dial("169.254.170.2:80")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, ask)
		answer, _ := io.ReadAll(conn)
		conn.Close()
		if !bytes.HasPrefix(answer, []byte("HTTP/1.1 4")) {
			t.Errorf("%q got %q", ask, answer)
		}
	}
	for _, key := range []string{keys[ecs], keys[eks]} {
		if out, code := h.imdsgate("credentials", key); code != 0 || !strings.Contains(out, sdk) {
			t.Errorf("%s: %d, %s", key, code, out)
		}
	}

	// The agents see the requests as they are.
	seen := ""
	for _, s := range []*imdstest.Server{agents.ECS, agents.EKS} {
		for _, c := range s.Transcript().Connections {
			seen += string(c.Received())
		}
	}
	if strings.Count(seen, "GET "+taskPath) != 3 || strings.Count(seen, "Authorization: "+podToken+"\r\n") != 6 ||
		!strings.Contains(seen, "\r\nHost: 169.254.170.23\r\n") || strings.Contains(seen, "curl") != strings.Contains(seen, "/v4/") {
		t.Errorf("the agents saw\n%s", seen)
	}

	h.Stop()
	written := []byte(h.Log())
	events, err := os.ReadFile(h.Events)
	if err != nil {
		t.Fatal(err)
	}
	// The path of its metadata has the same identifier, in this lab alone.
	events = bytes.ReplaceAll(events, []byte("/v4/"+task), nil)
	for _, secret := range []string{task, podToken, "fake-secret", "fake-session"} {
		if i := bytes.Index(append(written, events...), []byte(secret)); i >= 0 {
			t.Errorf("%s is in what the daemon wrote: %.300s", secret, append(written, events...)[max(0, i-200):])
		}
	}
}

// Endpoints that are not listed are none of our business: nobody is refused, and nothing is recorded.
func TestContainerCredentialsUnlisted(t *testing.T) {
	t.Parallel()
	h, _ := withAgents(t)
	h.start("mode: enforce\nposture: strict\n")
	for _, in := range []*netlab.Namespace{nil, h.Bridged, h.Routed} {
		for url, args := range map[string][]string{ecs + taskPath: nil, eks + podPath: {"-H", "Authorization: " + podToken}, eks6 + podPath: {"-H", "Authorization: " + podToken}} {
			if got := h.curl(client{in: in, uid: ordinaryUser}, url, args...); got != "200" {
				t.Errorf("%s in %v: %s", url, in, got)
			}
		}
	}
	if got := h.curl(client{uid: ordinaryUser}, instanceID); got != "200" {
		t.Errorf("%s", got)
	}
	h.decided(instanceID, "curl")
	docs, err := h.Documents()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range docs {
		if ip := fmt.Sprint(d.At("destination.ip")); strings.Contains(ip, "169.254.170.") || ip == "fd00:ec2::23" {
			t.Errorf("recorded: %v", d)
		}
	}
}
