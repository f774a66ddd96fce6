package main

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/gate"
)

// A row is what is known of a client when it has run in every way.
type row struct {
	client
	version    string
	seen       [blocked + 1]observation
	complaints []string
}

// maxGivesUp bounds the time from the first refusal to the end of a client that does not wait on purpose: the work that
// is left for it, on a busy machine. A client that hangs, or retries with pauses, takes longer.
const maxGivesUp = 5 * time.Second

// compare runs a client in every way.
func compare(ctx context.Context, r root, b gate.Binaries, c client) (row, error) {
	result := row{client: c}
	var err error
	if result.version, err = r.version(c.from); err != nil {
		return result, err
	}
	now := time.Now().Truncate(time.Second)
	for w := direct; w <= blocked; w++ {
		if result.seen[w], err = once(ctx, r, b, c, w, now); err != nil {
			return result, fmt.Errorf("%s: %w", w, err)
		}
		if ctx.Err() != nil {
			return result, ctx.Err()
		}
	}
	result.judge()
	return result, nil
}

func (r *row) complain(format string, args ...any) {
	r.complaints = append(r.complaints, fmt.Sprintf(format, args...))
}

func (r *row) judge() {
	plain := r.seen[direct]
	if plain.hung || len(plain.service) == 0 {
		r.complain("directly: hung %t, %d requests", plain.hung, len(plain.service))
		return
	}
	for _, w := range []way{audit, granted} {
		o := r.seen[w]
		if o.hung {
			r.complain("%s: hung", w)
		}
		if difference := differ(o.requests(r.unordered), plain.requests(r.unordered)); difference != "" {
			r.complain("%s: request %s", w, difference)
		}
		if difference := differ(lines(o.stdout), lines(plain.stdout)); difference != "" {
			r.complain("%s: line %s", w, difference)
		}
		if o.code != plain.code || o.signed != plain.signed {
			r.complain("%s: exit %d, directly %d; %d signed requests, directly %d", w, o.code, plain.code, o.signed, plain.signed)
		}
	}

	o := r.seen[blocked]
	if o.hung || o.givesUp() > maxGivesUp+r.waits {
		r.complain("blocked: gave up after %v, hung %t", o.givesUp(), o.hung)
	}
	limit := r.requests
	if limit == 0 {
		limit = maxRefused
	}
	if limit = max(limit, len(plain.service)); len(o.decisions) > limit {
		r.complain("blocked: %d requests, more than %d", len(o.decisions), limit)
	}
	refused := slices.IndexFunc(o.decisions, func(d decision) bool { return d.status == 403 })
	if refused < 0 {
		r.complain("blocked: nothing was refused")
		return
	}
	if plain.signed > 0 && o.signed > 0 || plain.signed == 0 && o.code == plain.code && slices.Equal(lines(o.stdout+o.stderr), lines(plain.stdout+plain.stderr)) {
		r.complain("blocked: it goes on as if nothing were missing")
	}
	if n := o.fallbacks(); n > 0 && !r.neverV2 {
		r.complain("blocked: %d requests without a token after a refusal", n)
	}
	for _, e := range o.service {
		if strings.Contains(e.sent, "SecretAccessKey") || strings.Contains(e.received, "/user-data") {
			r.complain("blocked: the service was asked for what is guarded: %q", e.received)
		}
	}
}

// givesUp is the time from the first refusal to the client's end.
func (o *observation) givesUp() time.Duration {
	for _, d := range o.decisions {
		if d.status == 403 {
			return o.ended.Sub(d.at)
		}
	}
	return 0
}

// differ says where two lists begin to differ, "" if they do not.
func differ(got, direct []string) string {
	for i := range min(len(got), len(direct)) {
		if got[i] != direct[i] {
			return fmt.Sprintf("%d was\n%s\nand directly\n%s", i+1, got[i], direct[i])
		}
	}
	if len(got) != len(direct) {
		return fmt.Sprintf("%d is the last, directly %d", len(got), len(direct))
	}
	return ""
}

// fallbacks counts requests for data without a token after the first refusal of one with a token.
func (o *observation) fallbacks() int {
	n, refused := 0, false
	for _, d := range o.decisions {
		switch {
		case d.tokenless && refused:
			n++
		case d.status == 403 && !d.tokenless:
			refused = true
		}
	}
	return n
}

// requests is what the service has seen, both directions. A client that asks several addresses at once takes the one that
// answers first: without the order, which of them and how often is left out too.
func (o *observation) requests(unordered bool) []string {
	all := make([]string, 0, len(o.service))
	for _, e := range o.service {
		all = append(all, e.received+e.sent)
	}
	if unordered {
		for i := range all {
			all[i] = strings.ReplaceAll(all[i], "[fd00:ec2::254]", "169.254.169.254")
			all[i] = numbered.ReplaceAllString(all[i], "token")
		}
		slices.Sort(all)
		all = slices.Compact(all)
	}
	return all
}

// says is the last line that a client wrote, or the last with a word.
func (o *observation) says(word string) string {
	all := strings.Split(o.stdout+"\n"+o.stderr, "\n")
	for _, line := range slices.Backward(all) {
		if line = strings.Join(strings.Fields(line), " "); line != "" && strings.Contains(line, word) {
			return line
		}
	}
	return ""
}

var (
	// A token is what the service answers to a PUT: 56 characters of base64url.
	token = regexp.MustCompile(`(?s)Content-Length: 56\r\n(?:.*\r\n)?\r\n([A-Za-z0-9_=-]{56})$`)
	// Each request of AWS's SDKs for Go has an ID.
	unique = regexp.MustCompile(`(?mi)^(amz-sdk-invocation-id): .*$`)
	// What is another each time in output: times, durations, process IDs and addresses.
	varying = regexp.MustCompile(`\d{4}[-/]\d\d[-/]\d\d[T ]\d\d:\d\d:\d\d[0-9.,]*|\d+(\.\d+)?(ms|µs|s)\b|\[\d+\]|@[0-9a-f]{5}|0x[0-9a-f]+|127\.0\.0\.1:\d+`)
	// numbered is a token as exchanges writes it.
	numbered = regexp.MustCompile(`token-\d+\b`)
	method   = regexp.MustCompile(`^[A-Z]+ `)
)

// lines are what a client wrote, to compare.
func lines(s string) []string { return strings.Split(varying.ReplaceAllString(s, "#"), "\n") }

// exchanges cuts a transcript where the client begins a request. A body that it sends when it has been asked to
// continue belongs to the same one.
func exchanges(t imdstest.Transcript) []exchange {
	var all []exchange
	var tokens []string
	for _, c := range t.Connections {
		first := len(all)
		for _, chunk := range c.Chunks {
			if first == len(all) || !chunk.Sent && method.Match(chunk.Data) {
				all = append(all, exchange{})
			}
			last := &all[len(all)-1]
			if !chunk.Sent {
				last.received += string(chunk.Data)
				continue
			}
			last.sent += string(chunk.Data)
			if m := token.FindSubmatch(chunk.Data); m != nil {
				tokens = append(tokens, string(m[1]))
			}
		}
	}
	for i := range all {
		for n, t := range tokens {
			all[i].received = strings.ReplaceAll(all[i].received, t, fmt.Sprintf("token-%d", n+1))
			all[i].sent = strings.ReplaceAll(all[i].sent, t, fmt.Sprintf("token-%d", n+1))
		}
		all[i].received = unique.ReplaceAllString(all[i].received, "$1: #\r")
	}
	return all
}

func (r *row) print(w io.Writer) {
	mark := "ok "
	if len(r.complaints) > 0 {
		mark = "BAD"
	}
	o := &r.seen[blocked]
	fmt.Fprintf(w, "%s %-36s %3d requests, exit %d; blocked: %3d requests, gives up after %.1f s, exit %d: %s\n", mark, r.name,
		len(r.seen[direct].service), r.seen[direct].code, len(o.decisions), o.givesUp().Seconds(), o.code, o.says(r.word))
	if len(r.complaints) > 0 {
		for _, d := range o.decisions {
			if d.status == 403 || d.tokenless {
				fmt.Fprintf(w, "    %s %s %s %d, tokenless %t\n", d.at.Format("15:04:05.000"), d.method, d.target, d.status, d.tokenless)
			}
		}
	}
	for _, c := range r.complaints {
		fmt.Fprintln(w, "   ", c)
	}
}
