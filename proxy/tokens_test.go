package proxy

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/proxy/http1"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

const aServicesToken = "AQAEAAjFRqvT9oIhGaPLHWp0mnzkXYoZbv3LQ8m5yM2nqfGIrtD_cQ=="

func issue(t *tokens, uid uint32, token string, lives time.Duration, to ...*event.Process) {
	if sum, ok := t.sum([]byte(token)); ok {
		t.issued(owner{known: true, uid: uid}, sum, &event.Event{Subjects: to}, fixedStart, lives)
	}
}

var (
	fixedStart = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	app        = &event.Process{EntityID: "app", PID: 7, Executable: "/opt/app"}
)

// A stolen token is the same token however it is spelled, and another is another.
func TestSpelling(t *testing.T) {
	all := newTokens()
	issue(all, 1, aServicesToken, time.Hour, app)
	for name, c := range map[string]struct {
		token string
		known bool
	}{
		"as it was issued":         {aServicesToken, true},
		"without padding":          {strings.TrimRight(aServicesToken, "="), true},
		"with one":                 {strings.TrimSuffix(aServicesToken, "="), true},
		"in the other alphabet":    {strings.ReplaceAll(aServicesToken, "_", "/"), true},
		"with bits that no byte":   {strings.Replace(aServicesToken, "Q==", "R==", 1), true},
		"all of them":              {strings.Replace(aServicesToken, "Q==", "f", 1), true},
		"with blanks":              {"AQAE AAjF\t" + aServicesToken[8:], true},
		"in quotes":                {`"` + aServicesToken + `"`, true},
		"with something behind":    {aServicesToken + "x", true},
		"with another last letter": {strings.Replace(aServicesToken, "cQ==", "dQ==", 1), false},
		"in another case":          {strings.ToLower(aServicesToken), false},
		"without its end":          {aServicesToken[:40], false},
		"twice":                    {strings.Repeat(strings.TrimRight(aServicesToken, "="), 2), false},
		"empty":                    {"", false},
		"no letters":               {strings.Repeat("!", 56), false},
		"short":                    {"wrong", false},
		"too long":                 {aServicesToken[:54] + strings.Repeat("A", 300), false},
	} {
		if got := len(all.find([]byte(c.token)).Issuers) > 0; got != c.known {
			t.Errorf("%s: known %v", name, got)
		}
	}
}

// Decoders agree with the one spelling: what they take for the same bytes has the
// same sum.
func FuzzSpelling(f *testing.F) {
	f.Add([]byte(aServicesToken))
	f.Add([]byte("AAAAAAAAAAAAAAAAAB"))
	all := newTokens()
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxToken {
			return
		}
		var dst [maxToken]byte
		n := spell(dst[:], b)
		again := dst
		if m := spell(again[:], dst[:n]); string(again[:m]) != string(dst[:n]) {
			t.Errorf("%q is spelled %q and then %q", b, dst[:n], again[:m])
		}
		decoded, err := base64.URLEncoding.DecodeString(string(b))
		if err != nil || len(decoded) < minToken {
			return
		}
		sum, ok := all.sum(b)
		if other, _ := all.sum([]byte(base64.RawStdEncoding.EncodeToString(decoded))); !ok || other != sum {
			t.Errorf("%q has another sum than what it decodes to", b)
		}
	})
}

// The service lets a token live for as long as it says; a mock may hand out the same
// one to everybody.
func TestIssuedTwice(t *testing.T) {
	all := newTokens()
	other := &event.Process{EntityID: "other", PID: 8}
	issue(all, 1, aServicesToken, time.Hour, app, app)
	issue(all, 2, aServicesToken, time.Hour, other)
	issue(all, 2, aServicesToken, time.Hour)
	found := all.find([]byte(aServicesToken))
	if len(found.Issuers) != 2 || found.Foreign(app) || found.Foreign(other) || !found.Foreign(&event.Process{EntityID: "thief"}) {
		t.Errorf("%+v", found)
	}
	if !found.Issued.Equal(fixedStart) || !found.Expires.Equal(fixedStart.Add(time.Hour)) {
		t.Errorf("from %v to %v", found.Issued, found.Expires)
	}
	issue(all, 1, strings.Repeat("B", 56), time.Hour)
	if n, _ := all.count(); n != 1 {
		t.Errorf("%d tokens, one of them of nobody", n)
	}
}

// Who floods the table, from one user or from as many addresses as a container may
// have, forgets his own.
func TestFlood(t *testing.T) {
	all := newTokens()
	nth := func(n int) string { return fmt.Sprintf("%056d", n) }
	issue(all, 33, nth(0), time.Hour, app)
	for n := 1; n <= 2*maxTokens; n++ {
		issue(all, 4321, nth(n), 6*time.Hour, app)
	}
	const addresses = 5000
	for n := range addresses {
		sum, _ := all.sum([]byte(nth(-n - 1)))
		o := forwardedOwner(netip.AddrFrom4([4]byte{172, 17, byte(n >> 8), byte(n)}))
		all.issued(o, sum, &event.Event{Subjects: []*event.Process{app}}, fixedStart, 6*time.Hour)
	}
	if len(all.find([]byte(nth(0))).Issuers) == 0 {
		t.Error("the token of another user was forgotten")
	}
	if len(all.find([]byte(nth(2*maxTokens))).Issuers) == 0 {
		t.Error("his latest was forgotten")
	}
	if len(all.find([]byte(nth(1))).Issuers) != 0 {
		t.Error("his first is still known")
	}
	if n, forgotten := all.count(); n != maxTokens || forgotten != maxTokens+1+addresses {
		t.Errorf("%d known, %d forgotten", n, forgotten)
	}
}

// What is over goes before what is not, whoever it belongs to.
func TestOverFirst(t *testing.T) {
	s := newShares[int, string](4) // three of the host's own
	one, two := owner{known: true, uid: 1}, owner{known: true, uid: 2}
	now := fixedStart
	s.add(two, 1, "short", now.Add(time.Minute), now)
	s.add(one, 2, "a", now.Add(time.Hour), now)
	s.add(one, 3, "b", now.Add(2*time.Hour), now)
	now = now.Add(time.Minute)
	s.add(one, 4, "c", now.Add(time.Hour), now)
	if s.get(1) != nil || s.forgotten != 0 || s.get(2) == nil {
		t.Errorf("%v, %d forgotten", s.entries, s.forgotten)
	}
	s.add(two, 5, "d", now.Add(time.Minute), now)
	if s.get(2) != nil || s.forgotten != 1 || len(s.entries) != 3 {
		t.Errorf("%v, %d forgotten", s.entries, s.forgotten)
	}
}

// The counts and the entries agree whatever comes.
func TestShares(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	s := newShares[int, int](64)
	for n := range 10_000 {
		o := owner{known: true, uid: r.Uint32N(7)}
		if r.IntN(3) == 0 {
			o = forwardedOwner(netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(40))}))
		}
		s.add(o, n, n, fixedStart.Add(time.Duration(r.IntN(1000))*time.Second), fixedStart.Add(time.Duration(n/20)*time.Second))
		held := 0
		for kind, owners := range s.owners {
			here := 0
			for _, q := range owners {
				here += q.Len()
			}
			if here != s.count[kind] || here > s.limit[kind] {
				t.Fatalf("%d entries of kind %d, counted %d, limit %d", here, kind, s.count[kind], s.limit[kind])
			}
			held += here
		}
		if held != len(s.entries) || s.get(n) == nil {
			t.Fatalf("%d entries, of owners %d", len(s.entries), held)
		}
	}
}

// What an answer hands out, by request and status, framed in any way.
func TestIssued(t *testing.T) {
	const doc = `{"Code":"Success","AccessKeyId":"ASIAEXAMPLEFAKE00001","SecretAccessKey":"fake","Token":"fake","Expiration":"2026-11-25T18:00:00Z"}`
	chunked := func(s string, size int) string {
		var b strings.Builder
		for len(s) > 0 {
			n := min(size, len(s))
			fmt.Fprintf(&b, "%x;x=y\r\n%s\r\n", n, s[:n])
			s = s[n:]
		}
		return b.String() + "0\r\nX-Trailer: 1\r\n\r\n"
	}
	sized := func(s string) string { return fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(s), s) }
	inChunks := func(s string, size int) string { return "Transfer-Encoding: chunked\r\n\r\n" + chunked(s, size) }
	const ttl = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds: 300\r\n"
	for _, c := range []struct {
		name   string
		method string
		class  imds.Class
		answer string // behind HTTP/1.1
		key    string
		lives  time.Duration
	}{
		{"a token", "PUT", imds.Token, "200 OK\r\n" + ttl + sized(aServicesToken), "", 5 * time.Minute},
		{"in chunks", "PUT", imds.Token, "200 OK\r\n" + ttl + inChunks(aServicesToken, 7), "", 5 * time.Minute},
		{"until the end", "PUT", imds.Token, "200 OK\r\n" + ttl + "\r\n" + aServicesToken, "", 5 * time.Minute},
		{"with a newline", "PUT", imds.Token, "200 OK\r\n" + ttl + sized(aServicesToken+"\n"), "", 5 * time.Minute},
		{"without its time to live", "PUT", imds.Token, "200 OK\r\n" + sized(aServicesToken), "", maxTokenAge},
		{"with one that is none", "PUT", imds.Token, "200 OK\r\nX-Aws-Ec2-Metadata-Token-Ttl-Seconds: -1\r\n" + sized(aServicesToken), "", maxTokenAge},
		{"from an unknown path", "PUT", imds.Unknown, "200 OK\r\n" + ttl + sized(aServicesToken), "", 5 * time.Minute},
		{"refused", "PUT", imds.Token, "403 Forbidden\r\n" + sized(aServicesToken), "", 0},
		{"a page instead", "PUT", imds.Token, "200 OK\r\n" + sized(strings.Repeat("x", 257)), "", 0},
		{"HEAD", "HEAD", imds.Token, "200 OK\r\n" + sized(aServicesToken), "", 0},
		{"half of one", "PUT", imds.Token, "200 OK\r\nContent-Length: 56\r\n\r\n" + aServicesToken[:28], "", 0},
		{"credentials", "GET", imds.Credentials, "200 OK\r\n" + ttl + sized(doc), "ASIAEXAMPLEFAKE00001", 0},
		{"credentials in chunks", "GET", imds.Credentials, "200 OK\r\n" + inChunks(doc, 13), "ASIAEXAMPLEFAKE00001", 0},
		{"credentials until the end", "GET", imds.Credentials, "200 OK\r\n\r\n" + doc, "ASIAEXAMPLEFAKE00001", 0},
		{"credentials from an unknown path", "GET", imds.Unknown, "200 OK\r\n" + sized(doc), "ASIAEXAMPLEFAKE00001", 0},
		{"in part", "GET", imds.Credentials, "206 Partial Content\r\n" + sized(doc[18:70]), "ASIAEXAMPLEFAKE00001", 0},
		{"in chunks of which the last are missing", "GET", imds.Credentials, "200 OK\r\n" + inChunks(doc, 13)[:160], "ASIAEXAMPLEFAKE00001", 0},
		{"more than is kept", "GET", imds.Credentials, "200 OK\r\n" + sized(doc+strings.Repeat(" ", maxIssued)), "ASIAEXAMPLEFAKE00001", 0},
		{"the other part", "GET", imds.Credentials, "206 Partial Content\r\n" + sized(doc[70:]), "", 0},
		{"inventory", "GET", imds.Inventory, "200 OK\r\n" + sized(doc), "", 0},
		{"an error", "GET", imds.Credentials, "404 Not Found\r\n" + sized(doc), "", 0},
		{"role", "GET", imds.Credentials, "200 OK\r\n" + sized("imdsgate-lab-role"), "", 0},
	} {
		for _, step := range []int{1, 5, 1 << 20} {
			i := passed(t, c.method, c.class, "HTTP/1.1 "+c.answer, step)
			if i.AccessKeyID != c.key || i.lives != c.lives {
				t.Errorf("%s, %d bytes at a time: key %q, token for %v; want %q, %v", c.name, step, i.AccessKeyID, i.lives, c.key, c.lives)
			}
		}
	}
}

// passed lets an answer pass, so many bytes at a time.
func passed(t *testing.T, method string, class imds.Class, answer string, step int) issued {
	t.Helper()
	p := &Proxy{tokens: newTokens()}
	r := &http1.Request{Method: method}
	head, err := parseResponse([]byte(answer), method)
	if err != nil || head == nil {
		t.Fatalf("%q: %v", answer, err)
	}
	what := hands(r, class, head)
	b := newBody(head.length)
	b.kept = what.room(head)
	before := cap(b.kept)
	for rest := answer[head.headSize:]; len(rest) > 0 && !b.ended; {
		n := b.take([]byte(rest[:min(step, len(rest))]))
		rest = rest[n:]
	}
	i := p.issued(what, head, &b)
	if cap(b.kept) != before || strings.Trim(string(b.kept), "\x00") != "" {
		t.Errorf("of %q is kept %q", answer, b.kept)
	}
	return i
}

// What each request with a token costs: its hash, and a look into a full table.
func BenchmarkFindToken(b *testing.B) {
	all := newTokens()
	for n := range maxTokens {
		issue(all, uint32(n%10), fmt.Sprintf("%056d", n), time.Hour, app)
	}
	issue(all, 1, aServicesToken, time.Hour, app)
	for name, token := range map[string]string{"known": aServicesToken, "unknown": strings.Repeat("A", 56), "long": strings.Repeat("A", maxToken), "none": ""} {
		b.Run(name, func(b *testing.B) {
			value := []byte(token)
			b.ReportAllocs()
			for b.Loop() {
				if got := len(all.find(value).Issuers) > 0; got != (name == "known") {
					b.Fatal(got)
				}
			}
		})
	}
}

// What each token that is issued costs, the table full and everything in it alive.
func BenchmarkIssueToken(b *testing.B) {
	all := newTokens()
	p := &event.Process{EntityID: "app", PID: 7, Executable: "/opt/app", Parent: &event.Process{EntityID: "shell", PID: 6, Parent: &event.Process{EntityID: "init", PID: 1}}}
	n := 0
	one := func() {
		issue(all, uint32(n%10), fmt.Sprintf("%056d", n), time.Hour, p)
		n++
	}
	for n < maxTokens {
		one()
	}
	b.ReportAllocs()
	for b.Loop() {
		one()
	}
}

// The token in a request is found in what was read, however it came and wherever it
// was moved meanwhile.
func TestBearer(t *testing.T) {
	for _, c := range []struct{ field, want string }{
		{"X-aws-ec2-metadata-token: abc=\r\n", "abc="},
		{"x-AWS-ec2-metadata-TOKEN:abc\r\n", "abc"},
		{"X-aws-ec2-metadata-token: \t a b\t \r\n", "a b"},
		{"X-aws-ec2-metadata-token:\r\n", ""},
		{"X-aws-ec2-metadata-token:  \t\r\n", ""},
		{"X_aws_ec2_metadata_token: abc\r\n", ""},
		{"", ""},
	} {
		whole := []byte("GET / HTTP/1.1\r\nHost: a\r\n" + c.field + "Accept: */*\r\n\r\nGET / HTTP/1.1\r\n")
		for piece := 1; piece <= len(whole); piece++ {
			var h http1.Head
			for n := piece; ; n += piece {
				moved := append([]byte(nil), whole[:min(n, len(whole))]...)
				r, err := h.Read(moved)
				if err != nil {
					t.Fatalf("%q: %v", c.field, err)
				}
				if r == nil {
					clear(moved)
					continue
				}
				if got := string(r.Bearer.Of(moved)); got != c.want {
					t.Errorf("%q in pieces of %d: %q, want %q", c.field, piece, got, c.want)
				}
				break
			}
		}
	}
}
