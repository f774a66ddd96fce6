package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cmd/report"
)

func TestPrintCredentials(t *testing.T) {
	at := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	end := at.Add(6 * time.Hour)
	c := report.Credentials{Since: at, Forgotten: 3, Issued: []report.Issuance{
		{AccessKeyID: "ASIA2", Expiration: &end, Last: at, Count: 12, Verdict: "allow", WouldBe: "allow", Grant: "app",
			To: []report.Recipient{{Role: "connector", PID: 7, Executable: "/opt/app", User: "app", Unit: "app.service"}, {Role: "holder", PID: 8, Executable: "/opt/worker", User: "app", Unit: "app.service"}}},
		{AccessKeyID: "ASIA1", Expiration: &end, Last: at, Count: 1, Verdict: "allow", WouldBe: "deny", Rule: "A rule",
			To: []report.Recipient{{PID: 9, Executable: "/tmp/\x1b[2J\n", User: "4321", Unit: "/"}}},
		{Last: at, Count: 1, Verdict: "allow", WouldBe: "deny", Reason: "unattributed: remote", Source: "172.17.0.2"},
	}}
	const want = `LAST                  TIMES  ACCESS KEY ID  EXPIRES               PROCESS                     USER  UNIT         VERDICT
2026-11-25T12:00:00Z  12     ASIA2          2026-11-25T18:00:00Z  /opt/app (pid 7)            app   app.service  allow, grant app
                                                                  holder /opt/worker (pid 8)  app   app.service  
2026-11-25T12:00:00Z  1      ASIA1          2026-11-25T18:00:00Z  "/tmp/\x1b[2J\n" (pid 9)    4321  /            allow, would deny, rule A rule
2026-11-25T12:00:00Z  1      ? (a part)     ?                     not known, from 172.17.0.2                     allow, would deny, unattributed: remote
since 2026-11-25T12:00:00Z; the event file has what was before
3 lines were forgotten for want of room: the event file has them
`
	var b bytes.Buffer
	if err := printCredentials(&b, c); err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
	b.Reset()
	if err := printCredentials(&b, report.Credentials{Since: at}); err != nil || b.String() != "nobody is known to have got them\nsince 2026-11-25T12:00:00Z; the event file has what was before\n" {
		t.Errorf("%v\n%s", err, b.String())
	}
}
