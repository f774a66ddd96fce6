package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"github.com/imdsgate/imdsgate/test/shared"
)

// The query of the rule file finds in our events what the daemon has found by that rule:
// the same processes, each as often, and none of those that it is not about.
func TestQueryFindsWhatTheDaemonFound(t *testing.T) {
	t.Parallel()
	rules := filepath.Join(shared.Dir(t), "rules")
	path := filepath.Join(rules, "seed-2025-02-credential_access_unusual_instance_metadata_service_api_request.toml")
	src, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Rule struct {
			ID    string `toml:"rule_id"`
			Query string
		}
	}
	if err := toml.Unmarshal(src, &file); err != nil {
		t.Fatal(err)
	}
	h := start(t, netlab.Options{}, "mode: audit\nrules:\n  paths: ["+path+"]\n")

	// A program that the rule does not know, and says nothing of the address.
	curl := h.install("/usr/bin/curl")
	fetch := filepath.Join(filepath.Dir(curl), "fetch")
	config := filepath.Join(filepath.Dir(curl), "fetch.conf")
	if err := os.Rename(curl, fetch); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, []byte("silent\nurl = "+service+instanceID+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// Programs of other tests start on the same host, and a rule may be about them.
	const nobodyElse = 61234
	const python = `import sys, time, urllib.request as u; time.sleep(float(sys.argv[1])); u.urlopen("http://169.254.169.254/latest/meta-data/ami-id").read()`
	for _, script := range []string{
		"curl -s " + service + role + " >/dev/null; :",
		"curl -s " + service + instanceID + " " + service + role + " >/dev/null; curl -s " + service + role + " >/dev/null; :",
		"python3 -c '" + python + "' 0; :",
		"python3 -c '" + python + "' 1.5; :",                           // later than the rule looks
		"curl -s file:///dev/null; " + fetch + " -K " + config + "; :", // two siblings make one match
		fetch + " -K " + config + "; :",
		"curl -s file:///dev/null; :",
	} {
		if out, code := h.run(client{uid: nobodyElse, args: []string{"sh", "-c", script}}); code != 0 {
			t.Fatalf("%s: exit %d, %s", script, code, out)
		}
		time.Sleep(50 * time.Millisecond)
	}
	h.curl(client{args: []string{}}, "/latest/meta-data/hostname")
	h.decided("/latest/meta-data/hostname", "curl")
	if code := h.Stop(); code != 0 {
		t.Fatalf("exit %d\n%s", code, h.Log())
	}

	var daemon []string
	starts := map[string]int{}
	concerned, ports := map[any]bool{}, map[any]int{}
	docs, err := h.Documents()
	if err != nil {
		t.Fatal(err)
	}
	var numbered bytes.Buffer // with times as numbers, as the other engine has them
	for _, d := range docs {
		own := d.At("user.id") == strconv.Itoa(nobodyElse)
		switch d.At("data_stream.dataset") {
		case "imdsgate.alert":
			if own {
				concerned[d.At("process.entity_id")] = true // or what a rule is about alone
			}
			if d.At("rule.id") == file.Rule.ID && d.At("imdsgate.alert.match") == "literal" {
				daemon = append(daemon, fmt.Sprint(d.At("process.entity_id")))
			}
		case "imdsgate.process":
			if own {
				starts[fmt.Sprint(d.At("process.entity_id"), d.At("process.command_line"))]++
			}
		case "imdsgate.network":
			ports[d.At("source.port")]++
		case "imdsgate.decision":
			if own {
				concerned[d.At("process.entity_id")] = true
			}
			ports[d.At("source.port")] += 0
		}
		at, err := time.Parse(time.RFC3339Nano, d.At("@timestamp").(string))
		if err != nil {
			t.Fatal(err)
		}
		d["@timestamp"] = float64(at.UnixNano()) / 1e6
		line, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		numbered.Write(append(line, '\n'))
	}
	query := filepath.Join(t.TempDir(), "seed.eql")
	if err := os.WriteFile(query, []byte(file.Rule.Query), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(h.gate.Command, "eql", "-f", query, h.Events).Output()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	var found []string
	for line := range bytes.Lines(out) {
		var match []gate.Document
		if err := json.Unmarshal(line, &match); err != nil || len(match) != 2 {
			t.Fatalf("%v in %s", err, line)
		}
		found = append(found, fmt.Sprint(match[1].At("process.entity_id")))
	}
	slices.Sort(daemon)
	slices.Sort(found)
	if !slices.Equal(daemon, found) || len(found) != 6 {
		t.Errorf("the daemon found %q\nand the query %q", daemon, found)
	}
	for what, n := range starts {
		if n != 1 {
			t.Errorf("%d documents tell of the start of %s", n, what)
		}
	}
	for port, n := range ports {
		if n != 1 {
			t.Errorf("%d documents tell of the connection from port %v", n, port)
		}
	}
	// The start of a program that asked for nothing is told where a sequence has it, and
	// nowhere else.
	if len(starts) != len(concerned)+1 {
		t.Errorf("%d starts of %d programs: %v", len(starts), len(concerned), starts)
	}
	// An engine that is not ours.
	events := filepath.Join(t.TempDir(), "numbered.ndjson")
	if err := os.WriteFile(events, numbered.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command("python3", filepath.Join(shared.Dir(t), "eql", "refeql.py"), query, events, "--id", "event.id", "--tb", "event.sequence").CombinedOutput()
	if err != nil || strings.Count(string(out), "\n") != len(found) {
		t.Errorf("%v\n%s", err, out)
	}
}
