package policy

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/test/shared"
)

// The rules that Elastic has published about the metadata service, as they are: each
// file loads, and sees what it is about.
func TestPublishedRules(t *testing.T) {
	dir := filepath.Join(shared.Dir(t), "rules")
	curl := func(ev *event.Event, p *event.Process) {
		p.Args = []string{"curl", "http://169.254.169.254/latest/meta-data/iam/security-credentials/role"}
		p.CommandLine = strings.Join(p.Args, " ")
	}
	for _, rule := range []struct {
		file  string
		yes   []*event.Event
		no    []*event.Event
		lacks string // fields that no event here has
	}{{
		file: "2026-08-credential_access_suspicious_instance_metadata_service_api_cli.toml",
		yes:  []*event.Event{asking("/usr/bin/curl", curl), asking("/tmp/x", curl), asking("/usr/bin/python3.11", curl)},
		no:   []*event.Event{asking("/usr/bin/curl", nil), asking("/opt/app", curl)},
	}, {
		file: "2026-08-credential_access_suspicious_instance_metadata_service_api_request.toml",
		yes: []*event.Event{asking("/usr/bin/curl", nil), asking("/usr/bin/bash", nil), asking("/usr/bin/python3.11", nil), asking("/home/a/tool", nil),
			asking("/opt/x", func(_ *event.Event, p *event.Process) { p.Args[0] = "./x" })},
		no: []*event.Event{asking("/opt/app", nil), asking("/usr/bin/amazon-ssm-agent", nil), asking("/usr/bin/CURL", nil),
			asking("/vscode/vscode-server/bin/linux-x64/1/node", func(_ *event.Event, p *event.Process) { p.Name = "node" }),
			asking("/usr/bin/curl", func(ev *event.Event, _ *event.Process) {
				ev.Connection.Destination = netip.MustParseAddrPort("[fd00:ec2::254]:80")
			})},
		lacks: "process.code_signature.signing_id,process.code_signature.trusted",
	}, {
		file: "2026-08-credential_access_cloud_imds_credential_http_request.toml",
		yes: []*event.Event{asking("/usr/bin/curl", nil), asking("/tmp/x", nil),
			asking("/opt/app", func(ev *event.Event, _ *event.Process) { ev.Request.UserAgent = "Go-http-client/1.1" })},
		no: []*event.Event{asking("/opt/app", nil), asking("/usr/bin/curl", func(ev *event.Event, _ *event.Process) { ev.Request.Method = "PUT" }),
			asking("/usr/bin/curl", func(ev *event.Event, _ *event.Process) { ev.Request.Path = "/latest/meta-data/instance-id" })},
	}, {
		file: "seed-2025-02-credential_access_unusual_instance_metadata_service_api_request.toml",
		yes:  []*event.Event{asking("/usr/bin/curl", nil)},
		no:   []*event.Event{asking("/opt/app", nil)},
	}} {
		p := compile(t, Config{Rules: RulesConfig{WithoutShipped: true, Paths: []string{filepath.Join(dir, rule.file)}}})
		r := p.Rules()[0]
		if got := strings.Join(r.Missing, ","); got != rule.lacks {
			t.Errorf("%s: lacks %q", rule.file, got)
		}
		if len(r.Threat) == 0 || len(r.Tags) == 0 || r.Reference == "" || r.RiskScore != 47 {
			t.Errorf("%s: threats %v, tags %v, reference %q, score %d", rule.file, r.Threat, r.Tags, r.Reference, r.RiskScore)
		}
		for want, events := range map[bool][]*event.Event{true: rule.yes, false: rule.no} {
			for _, ev := range events {
				judge(NewEngine(p), ev)
				if got := alerts(ev, r.ID); got != want {
					t.Errorf("%s: %s %v: alert %v", rule.file, ev.Subjects[0].Executable, ev.Subjects[0].Args, got)
				}
			}
		}
	}
	// All but one of those with the same id can be loaded together.
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := CheckRules(Host{}, dir)
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, c := range loaded {
		if c.Err != nil {
			refused++
			if !strings.Contains(c.Err.Error(), "is also in") {
				t.Error(c.Err)
			}
		}
	}
	if refused != 1 || len(loaded) != len(files)-1 { // and the README
		t.Errorf("%d of %d files, %d refused", len(loaded), len(files), refused)
	}
}
