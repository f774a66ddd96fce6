package policy

import (
	"path/filepath"
	"testing"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/test/shared"
)

// BenchmarkRequest is all that a request of a process that has asked before costs
// policy and the log: the verdict, what rules remember of it, and its documents.
// "agent" is what nearly every request is, "curl" matches rules and raises alerts.
func BenchmarkRequest(b *testing.B) {
	agent := asking("/usr/bin/amazon-ssm-agent", func(ev *event.Event, p *event.Process) {
		ev.Request.Path, ev.Request.Class, ev.Request.Guarded = "/latest/meta-data/instance-id", "inventory", false
		ev.Request.Target = ev.Request.Path
		ev.Request.UserAgent = "aws-sdk-go/1.55.5 (go1.22.5; linux; amd64)"
		ev.Connection.First = false
		p.Args = append(p.Args, "--config", "/etc/amazon/ssm/amazon-ssm-agent.json", "--region", "eu-central-1")
		p.CommandLine += " --config /etc/amazon/ssm/amazon-ssm-agent.json --region eu-central-1"
	})
	elastics := func(b *testing.B) Config {
		dir := filepath.Join(shared.Dir(b), "rules")
		return Config{Rules: RulesConfig{Paths: []string{
			filepath.Join(dir, "seed-2025-02-credential_access_unusual_instance_metadata_service_api_request.toml"),
			filepath.Join(dir, "2026-08-credential_access_cloud_imds_credential_http_request.toml"),
		}}}
	}
	for _, c := range []struct {
		name   string
		config func(*testing.B) Config
		ev     *event.Event
	}{
		{"shipped/agent", func(*testing.B) Config { return Config{} }, agent},
		{"shipped/curl", func(*testing.B) Config { return Config{} }, asking("/usr/bin/curl", nil)},
		{"and Elastic's/agent", elastics, agent},
		{"and Elastic's/curl", elastics, asking("/usr/bin/curl", nil)},
	} {
		b.Run(c.name, func(b *testing.B) {
			e := NewEngine(compile(b, c.config(b)))
			judge(e, c.ev) // which has seen the process start
			var line []byte
			b.ReportAllocs()
			for b.Loop() {
				judge(e, c.ev)
				for _, v := range c.ev.Views() {
					line = v.AppendJSON(line[:0])
				}
			}
		})
	}
}
