package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

const intro = `# Clients

Written by ` + "`make test-clients`" + `, which runs the real programs; not by hand.

## What a client sees that is refused

A client that is refused gets its session token as always, and 403 for the credentials, the user data or the signed document that
it asks for: no body, ` + "`Connection: close`" + `, as ` + "`Server: EC2ws`" + `. For most programs that is an instance without a role. They say that they
have found no credentials, and few name the 403; the table has the words to look for in an application's log. Why it was refused
is in imdsgate's event (` + "`imdsgate events`" + `), never in the answer. It takes effect at once: no client here tries for longer than the
table says, and none that has a token asks again without one.

## Why 403, for everybody

It is the one answer to which every client that was tried gives up at once. Measured earlier with most of the programs below, against a
stand-in that refuses in another way: with 401 one release of the CRT asks 900,000 times in a minute; with 503, or a connection that ends without an
answer, the SDKs for Go ask six to twelve times in four to ten seconds; silence costs every client seconds, and cloud-init minutes of
the boot; a body is taken for the name of the role by the CRT. 404 does as well with most, says "this instance has no role" instead of
"you may not", and is tried again by the SDK for PHP and by nodeadm. No client is known for which another answer is better, so there is
no setting for one. An answer by client would go by the User-Agent, which a thief writes himself.

The session token is the exception: a 403 for that sends the SDKs for Go, JavaScript, .NET and Ruby back to IMDSv1 for as long as the
process lives. So nothing refuses it, unless ` + "`rules.actions`" + ` has a rule block the class ` + "`token`" + `. Who asks too often
(` + "`limits.requests_per_second`" + `) gets 503, for the token last of all: that client has done nothing wrong
and shall try again, as the SDKs for Go, .NET, PHP and Rust do after pauses, while after a 403 they would do without credentials.

A block is no revocation. A program that has credentials goes on with them until they expire, after up to six hours, and asks
again every few minutes.

## What was run

Each client four times, each time in a lab of its own with a stand-in for the service, and the real daemon:

- *direct*: without imdsgate. *requests* are those of this run.
- *audit*: through imdsgate as it is by default. *granted*: in enforce mode with posture strict and a grant for the program in its
  unit, as its user. "same" says that the service has seen the same requests, byte for byte and in the same order, and given the same answers, and
  that the client has written the same output with the same exit status. What differs between any two runs is left out: tokens, request
  IDs, and in output times and ports; for cloud-init, which asks IPv4 and IPv6 at once and takes who answers first, also that and the
  order.
- *refused*: the same without the grant. How many requests imdsgate got, the time from the first 403 to the end of the program ("at
  once" is less than a second), whether it asked for data without a token after a request with one had been refused, its exit status,
  and what it said.

Tokens were optional, AWS's old default, so that the way back to IMDSv1 was open. The programs are unmodified and run in a Debian root in
the build folder (` + "`test/clients/install.sh`" + `), chrooted, as an ordinary user where they can. A grant names a file by its path on
the host, which a chroot does not hide. S3 is a server on loopback that has no bucket.

`

const missing = `
## Not here

| client | why |
|---|---|
| AWS's SDKs for Java, .NET, C++, PHP, Rust, Kotlin and Swift | Debian 12 has none of them (` + "`apt-cache search aws`" + `), nor has npm or a Go module; their registries are not used here |
| newer boto3 and AWS CLI | PyPI and AWS's own downloads are not used here; Debian's are of 2022 |
| SSM agent, CloudWatch agent, EC2 Instance Connect, Terraform, Vault, Telegraf, Chef | not in Debian 12; those in Go use the SDKs above |
| VictoriaMetrics | a server that has no run which ends |
| AWS's mock of the service (aemm), as the service | in ` + "`test/e2e`" + ` (TestSDK) |
`

// document is docs/clients.md.
func document(rows []row) string {
	var b strings.Builder
	b.WriteString(intro)
	b.WriteString("| client | version | requests | audit | granted | refused: requests | gives up after | v1 fallback | exit | what it says |\n|---|---|---|---|---|---|---|---|---|---|\n")
	var notes []string
	for _, r := range rows {
		o := &r.seen[blocked]
		name := r.name
		if r.note != "" {
			notes = append(notes, r.note)
			name += fmt.Sprintf(" (%d)", len(notes))
		}
		fallback := "none"
		switch {
		case r.neverV2:
			fallback = "knows no tokens"
		case r.v1First():
			fallback = "none; begins with v1"
		}
		// No row is written in which anything was different.
		fmt.Fprintf(&b, "| %s | %s | %d | same | same | %d | %s | %s | %d | %s |\n", name, r.version, len(r.seen[direct].service),
			len(o.decisions), seconds(o.givesUp()), fallback, o.code, quote(o.says(r.word), r.word))
	}
	b.WriteString("\n")
	for i, note := range notes {
		fmt.Fprintf(&b, "%d. %s.\n", i+1, note)
	}
	b.WriteString(missing)
	return b.String()
}

// v1First reports whether the client asks without a token before it gets one.
func (r *row) v1First() bool {
	isToken := func(e exchange) bool { return strings.HasPrefix(e.received, "PUT ") }
	all := r.seen[direct].service
	return !isToken(all[0]) && slices.ContainsFunc(all, isToken)
}

// stamped is the time at the beginning of a line of a log.
var stamped = regexp.MustCompile(`^(time="[^"]*" |[0-9][0-9/:.TZ-]*[ ]?[0-9:.Z]* )`)

// seconds is a time as it is much the same in the next run.
func seconds(d time.Duration) string {
	if d < time.Second {
		return "at once"
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}

// quote makes a line fit into a cell of a table: from a word on, if it is long.
func quote(s, word string) string {
	const most = 150
	s = stamped.ReplaceAllString(s, "")
	if s == "" {
		return "nothing"
	}
	if i := strings.Index(s, word); len(s) > most && i > 0 {
		s = "… " + s[i:]
	}
	if r := []rune(s); len(r) > most {
		s = string(r[:most]) + " …"
	}
	return "`" + strings.NewReplacer("|", `\|`, "`", "'").Replace(s) + "`"
}
