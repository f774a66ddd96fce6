package proxy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// A client that was allowed and becomes another program while the service thinks does
// not get the answer.
func TestWithheld(t *testing.T) {
	rule := filepath.Join(t.TempDir(), "cat.toml")
	if err := os.WriteFile(rule, []byte(`[rule]
rule_id = "cat"
name = "no cats"
type = "eql"
language = "eql"
severity = "high"
query = 'process where process.name == "cat"'
`), 0o644); err != nil {
		t.Fatal(err)
	}
	tail, err := filepath.EvalSymlinks("/usr/bin/tail")
	if err != nil {
		t.Fatal(err)
	}
	slow := &imdstest.Config{Now: func() time.Time { time.Sleep(300 * time.Millisecond); return fixed }}
	r := newRig(t, setting{
		policy: policy.Config{
			Mode: policy.Enforce, Rules: policy.RulesConfig{Paths: []string{rule}, WithoutShipped: true},
			Denies: []policy.Deny{{Name: "no tails", Who: policy.Who{Executable: []string{tail}}, Owner: "x", Reason: "x"}},
		},
		lab: netlab.Options{IMDS: slow},
	})
	path := "/latest/meta-data/iam/security-credentials/imdsgate-lab-role"
	ask := func(then string) string {
		t.Helper()
		script := `exec 3<>/dev/tcp/169.254.169.254/80
			printf 'GET ` + path + ` HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n' >&3
			sleep 0.1; ` + then
		out, err := exec.Command("bash", "-c", script).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	asked := 0
	once := func(then string) (string, *event.Event) {
		t.Helper()
		got := ask(then)
		asked++
		return got, r.recorded(asked)[asked-1]
	}
	last := func(then string) (got string, ev *event.Event) {
		t.Helper()
		for range 10 {
			if got, ev = once(then); ev.Attribution.Complete { // a busy machine loses what level 1 goes by
				break
			}
		}
		return got, ev
	}
	if got, _ := last("while read -r line <&3; do echo \"$line\"; done"); !strings.Contains(got, "AccessKeyId") {
		t.Errorf("the one who stays got %.60q", got)
	}
	got, ev := last("exec cat <&3")
	if !strings.HasPrefix(got, "HTTP/1.1 403") || strings.Contains(got, "AccessKeyId") {
		t.Errorf("the one who changed got %.60q", got)
	}
	if ev.Decision.Verdict != event.Deny || !ev.Response.Refused || ev.Decision.Rule == nil || ev.Decision.Rule.ID != "cat" || ev.Response.AccessKeyID != "" {
		t.Errorf("%+v, %+v", ev.Decision, ev.Response)
	}
	// Of what is not guarded either, if somebody is denied it.
	path = "/latest/meta-data/instance-id"
	if got, _ := once("while read -r line <&3; do echo \"$line\"; done"); !strings.HasPrefix(got, "HTTP/1.1 200") {
		t.Errorf("the one who stays got %.60q", got)
	}
	if got, ev := once("exec tail -n +1 <&3"); !strings.HasPrefix(got, "HTTP/1.1 403") || ev.Decision.Verdict != event.Deny {
		t.Errorf("one who is denied everything got %.60q: %+v", got, ev.Decision)
	}
}
