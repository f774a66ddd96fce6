// Package arrows holds the table of who may import whom.
package arrows

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/imdsgate/imdsgate/"

// arrows are the imports between our packages, each with its reason. Everything
// else is an error: a new arrow is a decision, and is written here.
var arrows = []struct{ from, to, reason string }{
	{"cmd/imdsgated", "cmd/config", "reads what the operator wrote"},
	{"cmd/imdsgated", "cmd/report", "answers in the form that the command reads"},
	{"cmd/imdsgated", "attribution", "puts it together"},
	{"cmd/imdsgated", "attribution/witness", "puts it together"},
	{"cmd/imdsgated", "attribution/diag", "tells connections that are older than the redirect apart"},
	{"cmd/imdsgated", "control", "puts it together"},
	{"cmd/imdsgated", "event", "puts it together"},
	{"cmd/imdsgated", "event/sink", "puts it together"},
	{"cmd/imdsgated", "iptables", "puts it together"},
	{"cmd/imdsgated", "metrics", "puts it together"},
	{"cmd/imdsgated", "policy", "puts it together"},
	{"cmd/imdsgated", "policy/firstseen", "puts it together"},
	{"cmd/imdsgated", "proxy", "puts it together"},
	{"cmd/imdsgated", "proxy/imds", "counts requests by their classes"},
	{"cmd/imdsgate", "cmd/config", "reads what the operator wrote"},
	{"cmd/imdsgate", "cmd/report", "shows what the daemon answers"},
	{"cmd/imdsgate", "control", "asks the daemon"},
	{"cmd/imdsgate", "attribution", "names the containers and units of processes"},
	{"cmd/imdsgate", "event/sink", "reads events without the daemon"},
	{"cmd/imdsgate", "event", "reads what was recorded, and makes up processes to explain"},
	{"cmd/imdsgate", "iptables", "prints, installs and removes the redirect without the daemon"},
	{"cmd/imdsgate", "policy", "knows the mode that the configuration asks for, the fields that events have, and checks rules"},
	{"cmd/imdsgate", "policy/policytest", "tests a policy"},
	{"cmd/imdsgate", "policy/yamlfile", "shows what is wrong in a file, and where"},
	{"cmd/imdsgate", "policy/eql", "explains a query"},
	{"cmd/imdsgate", "policy/replay", "tries a policy on what was recorded"},
	{"cmd/imdsgate", "policy/eql/ndjson", "searches files of events"},
	{"cmd/imdsgate", "policy/eql/syntax", "reads the query that is searched for, and prints the errors of rules"},
	{"cmd/imdsgate", "policy/tune", "proposes grants for what was recorded"},
	{"cmd/imdsgate", "proxy/imds", "knows the classes of requests"},
	{"cmd/config", "attribution", "has its levels"},
	{"cmd/config", "control", "has its settings"},
	{"cmd/config", "event", "has the scopes of tokens"},
	{"cmd/config", "event/sink", "has its settings"},
	{"cmd/config", "iptables", "has its settings"},
	{"cmd/config", "policy", "has its settings"},
	{"cmd/config", "policy/yamlfile", "takes files apart"},
	{"cmd/config", "proxy/imds", "knows the classes of requests"},
	{"cmd/report", "event", "shows processes, and the request that is explained"},
	{"cmd/report", "event/sink", "shows its counters"},
	{"cmd/report", "policy", "shows its findings"},
	{"cmd/report", "proxy/imds", "asks for one thing of each class"},
	{"cmd/report", "policy/firstseen", "shows its counters"},
	{"proxy", "attribution", "asks who"},
	{"proxy", "policy", "asks whether"},
	{"proxy", "event", "fills the record"},
	{"proxy", "proxy/http1", "reads requests"},
	{"proxy", "proxy/imds", "knows the protocol"},
	{"proxy", "proxy/loop", "waits for both sides at once"},
	{"proxy/http1", "event", "fills the record of a request"},
	{"proxy/http1", "proxy/imds", "records the class of a target"},
	{"attribution", "attribution/diag", "asks the kernel for a socket"},
	{"attribution", "attribution/procwatch", "asks who forked whom, and when a program was executed"},
	{"attribution/witness", "attribution", "answers its questions"},
	{"attribution/witness", "attribution/diag", "names sockets as it does"},
	{"policy", "event", "judges the record"},
	{"policy", "policy/eql", "runs rules"},
	{"policy", "policy/eql/syntax", "moves errors to the line of the file"},
	{"policy", "policy/kql", "runs rules"},
	{"policy", "policy/firstseen", "remembers what is new to a rule"},
	{"policy", "policy/yamlfile", "takes profiles apart"},
	{"policy/yamlfile", "policy/eql/syntax", "guesses what a key was meant to be, and shows a line as errors of rules do"},
	{"policy/replay", "event", "reads records back"},
	{"policy/replay", "policy", "judges them again"},
	{"policy/policytest", "event", "makes the records that are judged"},
	{"policy/policytest", "policy", "is what is tested"},
	{"policy/policytest", "policy/yamlfile", "takes files of cases apart"},
	{"policy/policytest", "proxy/http1", "reads requests as the relay does"},
	{"policy/policytest", "proxy/imds", "classifies them as the relay does"},
	{"policy/eql", "policy/eql/syntax", "compiles what was parsed"},
	{"policy/eql/ndjson", "event/scan", "walks over lines"},
	{"policy/eql/ndjson", "policy/eql", "runs queries over lines"},
	{"policy/eql/ndjson", "policy/eql/syntax", "asks which fields a query reads"},
	{"policy/kql", "policy/eql", "compiles what it has translated"},
	{"policy/kql", "policy/eql/syntax", "translates to its tree"},
	{"policy/tune", "event", "reads records"},
	{"policy/tune", "policy", "judges them, and proposes grants"},
	{"event", "event/scan", "walks over documents"},
	{"event/sink", "event", "writes the record"},
	{"metrics", "event", "counts the record"},
}

// portable packages build on the laptops on which rules are written, and events searched.
var portable = []string{"policy", "policy/eql", "policy/eql/syntax", "policy/eql/ndjson", "policy/kql", "policy/firstseen", "policy/replay", "policy/policytest", "policy/yamlfile", "event", "event/scan", "event/sink", "proxy/http1", "proxy/imds", "cmd/imdsgate"}

type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Deps"}, args...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "GOOS=linux", "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.Bytes())
	}
	var all []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestArrows(t *testing.T) {
	used := map[int]bool{}
	for _, p := range list(t, "./...") {
		from := strings.TrimPrefix(p.ImportPath, module)
		if strings.HasPrefix(from, "test/") || from == "proxy/imds/imdstest" {
			continue
		}
		for _, imported := range p.Imports {
			to, ours := strings.CutPrefix(imported, module)
			if !ours {
				continue
			}
			i := slices.IndexFunc(arrows, func(a struct{ from, to, reason string }) bool { return a.from == from && a.to == to })
			if i < 0 {
				t.Errorf("%s imports %s, which the table of arrows does not have", from, to)
				continue
			}
			used[i] = true
		}
	}
	for i, a := range arrows {
		if !used[i] {
			t.Errorf("%s does not import %s any more: take the arrow out of the table", a.from, a.to)
		}
		if a.reason == "" {
			t.Errorf("%s imports %s: why?", a.from, a.to)
		}
	}
}

// What is shipped has no AWS SDK in it: a daemon that guards the credentials
// must never draw from them. The stand-in for the service shares no code with
// the proxy, so that it cannot share a mistake. No drawers.
func TestDependencies(t *testing.T) {
	for _, p := range list(t, "./...") {
		name := strings.TrimPrefix(p.ImportPath, module)
		for _, dep := range p.Deps {
			if strings.HasPrefix(dep, "github.com/aws/") {
				t.Errorf("%s depends on %s", name, dep)
			}
			if name == "proxy/imds/imdstest" && strings.HasPrefix(dep, module) {
				t.Errorf("the stand-in depends on %s", dep)
			}
			if strings.HasPrefix(name, "cmd/") && (strings.HasPrefix(dep, module+"test/") || dep == "testing") {
				t.Errorf("%s ships %s", name, dep)
			}
			if (name == "proxy" || name == "proxy/http1" || name == "proxy/imds") && dep == "net/http" {
				t.Errorf("%s has net/http on the path of requests", name)
			}
		}
		for _, drawer := range []string{"util", "utils", "common", "helpers", "internal", "pkg", "types", "models", "misc"} {
			if slices.Contains(strings.Split(name, "/"), drawer) {
				t.Errorf("%s is a drawer: name it for what it knows", name)
			}
		}
	}
}

func TestPortable(t *testing.T) {
	for _, goos := range []string{"darwin", "windows"} {
		for _, p := range portable {
			cmd := exec.Command("go", "build", "-o", os.DevNull, module+p)
			cmd.Env = append(os.Environ(), "GOOS="+goos, "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s on %s: %v\n%s", p, goos, err, out)
			}
		}
	}
}
