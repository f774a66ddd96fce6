package policy

import (
	"fmt"
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

// BenchmarkJudge is a verdict. A process that is known has asked before; a new one is
// asked about by all rules, and so are those of which something is left to ask with
// every request.
func BenchmarkJudge(b *testing.B) {
	shipped := Config{Mode: Enforce}
	policies := []struct {
		name   string
		config Config
	}{
		{"shipped rules", shipped},
		{"200 rules about processes", Config{Mode: Enforce, Rules: RulesConfig{WithoutShipped: true, Paths: []string{ruleFiles(b, processRules(200))}}}},
		{"200 rules about requests", Config{Mode: Enforce, Rules: RulesConfig{WithoutShipped: true, Paths: []string{ruleFiles(b, requestRules(200))}}}},
		{"shipped and 190 about processes", Config{Mode: Enforce, Rules: RulesConfig{Paths: []string{ruleFiles(b, processRules(190))}}}},
	}
	for _, p := range policies {
		e := NewEngine(compile(b, p.config))
		ev := asking("/opt/app/bin/app", nil)
		b.Run(p.name+"/known", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				e.Judge(ev)
			}
		})
		b.Run(p.name+"/new", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				ev.Subjects[0].Keep(&settled{})
				e.Judge(ev)
			}
		})
	}
	e := NewEngine(compile(b, shipped))
	ev := asking("/usr/bin/curl", nil)
	b.Run("shipped rules/known, refused", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			e.Judge(ev)
		}
	})
}

// BenchmarkGrants is a verdict with 50 rules and so many grants, of which the last is the
// client's, or none is; and where they are all for one interpreter in units of their own.
func BenchmarkGrants(b *testing.B) {
	rules := []string{ruleFiles(b, append(processRules(25), requestRules(25)...))}
	for _, n := range []int{1, 50, 500} {
		for name, executable := range map[string]func(int) string{
			"programs":    func(i int) string { return fmt.Sprintf("/opt/app%d/bin/app", i) },
			"interpreter": func(int) string { return "/usr/bin/python3.11" },
		} {
			c := Config{Mode: Enforce, Posture: Strict, Rules: RulesConfig{WithoutShipped: true, Paths: rules}}
			for i := range n {
				c.Grants = append(c.Grants, Grant{Name: fmt.Sprint("grant-", i), Who: Who{Executable: OneOrMore{executable(i)}, Unit: fmt.Sprintf("app%d.service", i), User: "app"},
					What: What{Classes: []string{"credentials"}, Paths: []string{"/latest/meta-data/iam/security-credentials/*"}, API: V2}, OwnToken: true, Owner: "o", Reason: "r"})
			}
			p := compile(b, c)
			e := NewEngine(p)
			for who, unit := range map[string]string{"granted": fmt.Sprintf("app%d.service", n-1), "not granted": "other.service"} {
				ev := asking(executable(n-1), func(_ *event.Event, p *event.Process) { p.Unit = unit })
				b.Run(fmt.Sprintf("%d/%s/%s", n, name, who), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						e.Judge(ev)
					}
					if want := unit != "other.service"; (ev.Decision.Verdict == event.Allow) != want {
						b.Fatalf("%+v", ev.Decision)
					}
				})
			}
		}
	}
}

// BenchmarkDenies is a verdict with so many denies, none of which is the client's, or the
// last one.
func BenchmarkDenies(b *testing.B) {
	for _, n := range []int{1, 50, 500} {
		for name, deny := range map[string]func(i int) Who{
			"units":    func(i int) Who { return Who{Unit: fmt.Sprintf("app%d.service", i)} },
			"users":    func(i int) Who { return Who{User: fmt.Sprint(5000 + i)} },
			"programs": func(i int) Who { return Who{Executable: OneOrMore{fmt.Sprintf("/opt/app%d/bin/app", i)}} },
			"interpreter": func(i int) Who {
				return Who{Executable: OneOrMore{"/usr/bin/python3.11"}, Unit: fmt.Sprintf("app%d.service", i)}
			},
		} {
			c := Config{Mode: Enforce, Rules: RulesConfig{WithoutShipped: true}}
			for i := range n {
				c.Denies = append(c.Denies, Deny{Name: fmt.Sprint("deny-", i), Who: deny(i), Reason: "r"})
			}
			e := NewEngine(compile(b, c))
			for who, denied := range map[string]bool{"denied": true, "not denied": false} {
				ev := asking("/usr/bin/other", func(_ *event.Event, p *event.Process) {
					of := deny(n - 1)
					if !denied {
						of = deny(n)
					}
					p.Unit = of.Unit
					if of.User != "" {
						p.UserID = of.User
					}
					if len(of.Executable) > 0 {
						p.Executable = of.Executable[0]
					}
				})
				if name == "interpreter" && !denied {
					ev.Subjects[0].Unit = "other.service"
				}
				b.Run(fmt.Sprintf("%d/%s/%s", n, name, who), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						e.Judge(ev)
					}
					if (ev.Decision.Deny != "") != denied {
						b.Fatalf("%+v", ev.Decision)
					}
				})
			}
		}
	}
}

// processRules are like those for Linux hosts: a program that is executed, and the
// connection that it makes.
func processRules(n int) []string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf(`sequence by host.id, process.parent.entity_id with maxspan=%ds
  [process where host.os.type == "linux" and event.type == "start" and event.action == "exec" and
    process.name in ("tool%[2]d", "helper%[2]d", "sh%[2]d") and process.args : ("-%[2]d*", "*run%[2]d*") and not process.parent.executable : "/opt/%[2]d/*"]
  [network where host.os.type == "linux" and event.action == "connection_attempted" and destination.ip == "169.254.169.254"]`, 1+i%60, i))
	}
	return all
}

// requestRules look at requests first of all.
func requestRules(n int) []string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf(`network where http.request.method == "GET" and url.path : ("/latest/meta-data/%[1]d/*", "*secret%[1]d*") and
  not user_agent.original : "agent%[1]d/*" and process.executable : ("/opt/*", "/usr/*")`, i))
	}
	return all
}
