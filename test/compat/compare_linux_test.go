package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

// good is a client that behaves, as each case spoils it.
func good() *row {
	now := time.Now()
	asked := []exchange{{"PUT", "token-1"}, {"GET", "role"}}
	r := &row{}
	for _, w := range []way{direct, audit, granted} {
		r.seen[w] = observation{stdout: "credentials", service: slices.Clone(asked)}
	}
	r.seen[blocked] = observation{stderr: "no credentials", code: 1, ended: now, service: asked[:1],
		decisions: []decision{{at: now, method: "PUT", status: 200}, {at: now, method: "GET", status: 403}}}
	return r
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(*row)
		want  string // "" for no complaint
	}{
		{"good", func(r *row) {}, ""},
		{"another answer in audit", func(r *row) { r.seen[audit].service[1].sent = "Role" }, "audit: request 2 was"},
		{"a request more with a grant", func(r *row) {
			r.seen[granted].service = append(r.seen[granted].service, exchange{"GET", "role"})
		}, "granted: request 3 is the last, directly 2"},
		{"another output", func(r *row) { r.seen[audit].stdout = "none" }, "audit: line 1 was"},
		{"another exit", func(r *row) { r.seen[granted].code = 1 }, "granted: exit 1, directly 0"},
		{"hangs when refused", func(r *row) { r.seen[blocked].hung = true }, "hung true"},
		{"gives up late", func(r *row) { r.seen[blocked].ended = time.Now().Add(time.Minute) }, "gave up after 1m0"},
		{"a storm of retries", func(r *row) {
			r.seen[blocked].decisions = slices.Repeat(r.seen[blocked].decisions, 10)
		}, "20 requests, more than 6"},
		{"falls back", func(r *row) {
			r.seen[blocked].decisions = append(r.seen[blocked].decisions, decision{method: "GET", status: 403, tokenless: true})
		}, "1 requests without a token"},
		{"begins with v1, which is no fall-back", func(r *row) {
			r.seen[blocked].decisions = append([]decision{{method: "GET", status: 403, tokenless: true, at: time.Now()}}, r.seen[blocked].decisions...)
		}, ""},
		{"is not refused", func(r *row) { r.seen[blocked].decisions = r.seen[blocked].decisions[:1] }, "nothing was refused"},
		{"gets the secret", func(r *row) {
			r.seen[blocked].service = append(r.seen[blocked].service, exchange{"GET", "SecretAccessKey"})
		}, "asked for what is guarded"},
		{"has it from elsewhere", func(r *row) {
			r.seen[blocked].stdout, r.seen[blocked].stderr, r.seen[blocked].code = "credentials", "", 0
		}, "as if nothing were missing"},
	} {
		r := good()
		c.spoil(r)
		r.judge()
		if got := strings.Join(r.complaints, "; "); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// A chunked PUT with Expect is one exchange, and tokens and IDs are the same in every run.
func TestExchanges(t *testing.T) {
	token := strings.Repeat("T", 55) + "="
	got := exchanges(imdstest.Transcript{Connections: []imdstest.Connection{
		{Chunks: []imdstest.Chunk{
			{Data: []byte("PUT /latest/api/token HTTP/1.1\r\nExpect: 100-continue\r\n\r\n")},
			{Sent: true, Data: []byte("HTTP/1.1 100 Continue\r\n\r\n")},
			{Data: []byte("0\r\n\r\n")},
			{Sent: true, Data: []byte("HTTP/1.1 200 OK\r\nContent-Length: 56\r\n\r\n" + token)},
			{Data: []byte("GET / HTTP/1.1\r\nAmz-Sdk-Invocation-Id: 1234\r\nX-aws-ec2-metadata-token: " + token + "\r\n\r\n")},
			{Sent: true, Data: []byte("HTTP/1.1 200 OK\r\n\r\n")},
		}},
	}})
	want := []exchange{
		{"PUT /latest/api/token HTTP/1.1\r\nExpect: 100-continue\r\n\r\n0\r\n\r\n",
			"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 56\r\n\r\ntoken-1"},
		{"GET / HTTP/1.1\r\nAmz-Sdk-Invocation-Id: #\r\nX-aws-ec2-metadata-token: token-1\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
