package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	credentials = "/latest/meta-data/iam/security-credentials/"
	role        = credentials + "imdsgate-lab-role"
	instanceID  = "/latest/meta-data/instance-id"
	service     = "http://169.254.169.254"

	appUser   = 61001 // runs what is legitimate
	thiefUser = 61002 // has broken into something

	ruleOdd       = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a01"
	ruleUntrusted = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a02"
	ruleV1        = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a03"
	ruleRelayed   = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a04"
	rulePath      = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a0c"
	ruleFirstSeen = "5d0c5b5e-5f0b-4d8e-9b42-1f5f6e1c2a0d"
)

// policy is the demo's: one rule logs, one alerts, and two block. The two that raise
// an alert for each program that is new here would do so for all.
const policy = `mode: enforce
rules:
  actions:
    ` + ruleV1 + `:
      action: log
    ` + ruleOdd + `:
      classes: {inventory: log, token: log, listing: log}
    ` + rulePath + `:
      action: log
    ` + ruleFirstSeen + `:
      action: log
grants:
  - name: demo-app
    executable: ` + stage + `/app
    user: "61001"
    classes: [credentials]
    owner: platform team
    reason: the application signs its requests with the instance's role
`

// stage is where legitimate programs are installed for the demo: root's own,
// and none of the places that the rule calls odd.
const stage = "/opt/imdsgate-demo"

// part is one client with what has to come of it.
type part struct {
	who     string
	run     []string
	dir     string
	uid     uint32
	path    string // that decides
	name    string // process.name of the one who asks
	parent  string // process.parent.name
	verdict string // allow, deny
	rule    string // that is named, or the grant
	alert   bool
	got     string // what the client prints has this
}

// props are the files that the cast needs.
type props struct {
	app, asker string   // built
	tmp        string   // a directory in /tmp
	created    []string // files before the directories that they are in
}

// put copies a program to where it plays, for its user.
func (p *props) put(from, to string, uid int) error {
	made := []string{to}
	for dir := filepath.Dir(to); ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		made = append(made, dir)
	}
	p.created = append(made, p.created...)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		return err
	}
	if uid == 0 {
		return nil
	}
	return os.Chown(to, uid, uid)
}

// strike takes everything away again that put had made.
func (p *props) strike() error {
	var errs []error
	for _, path := range p.created {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, os.RemoveAll(p.tmp))...)
}

// cast prepares the programs and says who plays what.
func cast(p *props) ([]part, error) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		return nil, err
	}
	if curl, err = filepath.EvalSymlinks(curl); err != nil {
		return nil, err
	}
	loaders, _ := filepath.Glob("/lib*/ld-linux-*.so.*")
	if len(loaders) == 0 {
		return nil, fmt.Errorf("no dynamic loader in /lib or /lib64: the demo needs a glibc host")
	}
	loader, err := filepath.EvalSymlinks(loaders[0])
	if err != nil {
		return nil, err
	}
	if p.tmp, err = os.MkdirTemp("/tmp", "imdsgate-demo"); err != nil {
		return nil, err
	}
	if err := os.Chmod(p.tmp, 0o755); err != nil {
		return nil, err
	}
	const agentDir = "/var/log/amazon/ssm/imdsgate-demo"
	upload := stage + "/upload/metrics"
	for _, copy := range []struct {
		from, to string
		uid      int
	}{
		{p.app, stage + "/app", 0},
		{p.asker, stage + "/legacy", 0},
		{p.asker, stage + "/gateway", 0},
		{curl, p.tmp + "/kworker", thiefUser},
		{p.asker, "/var/www/imdsgate-demo/shell", 0},
		{curl, agentDir + "/anything", 0},
		{curl, upload, thiefUser},
	} {
		if err := p.put(copy.from, copy.to, copy.uid); err != nil {
			return nil, fmt.Errorf("prepare %s: %w", copy.to, err)
		}
	}
	// curl reads its arguments from a file: nothing in argv gives it away.
	quiet := filepath.Join(p.tmp, "curlrc")
	const named = "instance-data"
	config := fmt.Sprintf("silent\nmax-time = 5\noutput = /dev/null\nwrite-out = \"%%{http_code}\\n\"\nconnect-to = \"%s:80:169.254.169.254:80\"\nurl = \"http://%s%s\"\n", named, named, role)
	if err := os.WriteFile(quiet, []byte(config), 0o644); err != nil {
		return nil, err
	}

	withToken := func(curl string) string {
		return fmt.Sprintf(`t=$(%[1]s -s -m 5 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" %[2]s/latest/api/token); `+
			`%[1]s -s -m 5 -o /dev/null -w "%%{http_code}\n" -H "X-aws-ec2-metadata-token: $t" %[2]s%[3]s`, curl, service, role)
	}
	python := strings.Join([]string{
		"import urllib.request as u, urllib.error as e",
		"t = u.urlopen(u.Request('" + service + "/latest/api/token', method='PUT', headers={'X-aws-ec2-metadata-token-ttl-seconds': '60'})).read().decode()",
		"try: print(u.urlopen(u.Request('" + service + role + "', headers={'X-aws-ec2-metadata-token': t})).status)",
		"except e.HTTPError as x: print(x.code)",
	}, "\n")
	devTCP := `exec 3<>/dev/tcp/169.254.169.254/80; printf 'GET ` + role + ` HTTP/1.0\r\n\r\n' >&3; head -n 1 <&3`

	return []part{
		{who: "application with AWS's SDK", run: []string{stage + "/app"}, uid: appUser, path: role,
			name: "app", verdict: "allow", rule: "grant demo-app", got: "credentials ASIA"},
		{who: "old application, IMDSv1", run: []string{stage + "/legacy", "-v1", "-path", role}, uid: appUser, path: role,
			name: "legacy", verdict: "allow", rule: ruleV1, got: "200, "},
		{who: "open reverse proxy", run: []string{stage + "/gateway", "-v1", "-path", instanceID, "-header", "X-Forwarded-For: 203.0.113.9"},
			uid: appUser, path: instanceID, name: "gateway", verdict: "allow", rule: ruleRelayed, alert: true, got: "200, "},
		{who: "curl in a shell, inventory", run: []string{"bash", "-c", curl + ` -s -m 5 -o /dev/null -w "%{http_code}\n" ` + service + instanceID + "; :"},
			uid: thiefUser, path: instanceID, name: "curl", parent: "bash", verdict: "allow", rule: ruleOdd, got: "200"},
		{who: "curl in a shell", run: []string{"bash", "-c", withToken(curl) + "; :"}, uid: thiefUser, path: role,
			name: "curl", parent: "bash", verdict: "deny", rule: ruleOdd, alert: true, got: "403"},
		{who: "renamed binary in /tmp", run: []string{"bash", "-c", withToken(p.tmp+"/kworker") + "; :"}, uid: thiefUser, path: role,
			name: "kworker", parent: "bash", verdict: "deny", rule: ruleOdd, alert: true, got: "403"},
		{who: "python", run: []string{"/usr/bin/python3", "-c", python}, uid: thiefUser, path: role,
			name: "python3", verdict: "deny", rule: ruleOdd, alert: true, got: "403"},
		{who: "bash with /dev/tcp", run: []string{"bash", "-c", devTCP}, uid: thiefUser, path: role,
			name: "bash", verdict: "deny", rule: ruleOdd, alert: true, got: "HTTP/1.1 403"},
		{who: "native binary in /var/www", run: []string{"/var/www/imdsgate-demo/shell", "-path", role}, uid: thiefUser, path: role,
			name: "shell", verdict: "deny", rule: ruleOdd, alert: true, got: "403, "},
		{who: "curl in an excluded agent's directory", run: []string{"bash", "-c", withToken(curl) + "; :"}, dir: agentDir, uid: thiefUser, path: role,
			name: "curl", parent: "bash", verdict: "deny", rule: ruleOdd, alert: true, got: "403"},
		{who: "renamed copy of curl, by host name", run: []string{upload, "--config", quiet}, uid: thiefUser, path: role,
			name: "metrics", verdict: "deny", rule: ruleUntrusted, alert: true, got: "403"},
		{who: "the dynamic loader, with curl", run: []string{loader, curl, "--config", quiet}, uid: thiefUser, path: role,
			name: filepath.Base(loader), verdict: "deny", rule: ruleUntrusted, alert: true, got: "403"},
	}, nil
}
