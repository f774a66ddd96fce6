package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/proxy/http1"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// excused are the complaints of net/http about requests that we accept, each with such
// a request.
var excused = []struct{ complaint, because, send string }{
	{"bad trailer key", "trailers themselves are refused, whatever was said of them",
		"PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: Content-Length\r\n\r\n0\r\n\r\n"},
}

// agree compares our reading of a request with the standard library's: where
// both accept one, they agree on what it is. Where only we refuse, that is the
// point of it; where only the library refuses, it returns why we do not, and fails
// the test if that is not among the reasons.
func agree(t *testing.T, b []byte) (because string) {
	t.Helper()
	ours, err := http1.Parse(b)
	if ours == nil || err != nil {
		return ""
	}
	if _, err := imds.Classify(imds.Endpoints[0].Addr(), ours.Target); err != nil {
		return ""
	}
	theirs, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
	if err != nil {
		for _, e := range excused {
			if strings.Contains(err.Error(), e.complaint) {
				return e.because
			}
		}
		t.Errorf("%q: net/http refuses it, %v, and we do not", b, err)
		return ""
	}
	if theirs.Method != ours.Method || theirs.RequestURI != ours.Target || theirs.ProtoMinor != int(ours.Minor) {
		t.Errorf("%q: we read %s %s HTTP/1.%d, net/http %s %s %s", b, ours.Method, ours.Target, ours.Minor, theirs.Method, theirs.RequestURI, theirs.Proto)
	}
	if theirs.Host != ours.Host && theirs.URL.Host == "" {
		t.Errorf("%q: we read host %q, net/http %q", b, ours.Host, theirs.Host)
	}
	if want := map[bool]int64{true: -1}[ours.Chunked]; theirs.ContentLength != want {
		t.Errorf("%q: we read a body of %d bytes, net/http of %d", b, want, theirs.ContentLength)
	}
	if got := theirs.Header.Get("X-Aws-Ec2-Metadata-Token") != ""; got && !ours.Token {
		t.Errorf("%q: net/http sees a token", b)
	}
	if ours.UserAgent != theirs.UserAgent() && len(theirs.Header.Values("User-Agent")) == 1 {
		t.Errorf("%q: we read user agent %q, net/http %q", b, ours.UserAgent, theirs.UserAgent())
	}
	size := ours.Size
	if ours.Chunked {
		if whole, err := http1.ParseBody(b[size:]); !whole || err != nil {
			return ""
		}
		size += len(http1.EmptyBody)
	}
	// net/http, too, finds nothing in the body, and the next request where we do.
	alone := bufio.NewReader(bytes.NewReader(b[:size]))
	theirs, err = http.ReadRequest(alone)
	if err != nil {
		t.Fatalf("%q: net/http says %v of the first %d bytes", b, err, size)
	}
	if body, err := io.ReadAll(theirs.Body); len(body) > 0 || err != nil {
		t.Errorf("%q: net/http reads the body %q, %v", b, body, err)
	}
	if rest, err := io.ReadAll(alone); len(rest) > 0 || err != nil {
		t.Errorf("%q: net/http leaves %q of it, %v", b, rest, err)
	}
	return ""
}

func TestRequestDifferential(t *testing.T) {
	for _, c := range evasions {
		agree(t, []byte(c.send))
	}
	for _, e := range excused {
		if got := agree(t, []byte(e.send)); got != e.because {
			t.Errorf("%q: net/http refuses it, because of %q: %q", e.send, e.complaint, got)
		}
	}
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"PUT /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
		"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
	} {
		if r, err := http1.Parse([]byte(s)); r == nil || err != nil {
			t.Errorf("%q: %v", s, err)
		}
		agree(t, []byte(s))
	}
}

// What clients send, as it was captured, is nothing odd to us, and to net/http the same.
func TestRequestsOfClients(t *testing.T) {
	const dir = "testdata/fuzz/FuzzRequest"
	files, err := os.ReadDir(dir)
	if err != nil || len(files) < 20 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		_, line, _ := strings.Cut(string(text), "\n[]byte(")
		send, err := strconv.Unquote(strings.TrimSuffix(line, ")\n"))
		if err != nil {
			t.Fatalf("%s: %v", f.Name(), err)
		}
		r, err := http1.Parse([]byte(send))
		if err != nil || r == nil || r.Odd || r.Relayed || r.Chunked != strings.HasSuffix(send[r.Size:], http1.EmptyBody) {
			t.Errorf("%s: %+v, %v", f.Name(), r, err)
		}
		if because := agree(t, []byte(send)); because != "" {
			t.Errorf("%s: net/http refuses it: %s", f.Name(), because)
		}
	}
}

// A request is the same whatever the pieces in which it comes, and what is not
// all there is never taken for a whole one.
func TestRequestInPieces(t *testing.T) {
	whole := []byte("PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 0\r\n\r\n")
	for n := range whole {
		if r, err := http1.Parse(whole[:n]); r != nil || err != nil {
			t.Errorf("the first %d bytes: %+v, %v", n, r, err)
		}
	}
	if r, err := http1.Parse(whole); err != nil || r.Size != len(whole) {
		t.Errorf("%+v, %v", r, err)
	}
	for _, c := range evasions {
		for n := range len(c.send) {
			if r, err := http1.Parse([]byte(c.send[:n])); r != nil && err != nil {
				t.Errorf("%s, %d bytes: both %+v and %v", c.name, n, r, err)
			}
		}
	}
}

// An error is short, and says nothing that a field has for a value.
func TestMalformedIsShort(t *testing.T) {
	long, secret := strings.Repeat("X", http1.MaxHead-200), "c2VjcmV0"
	for _, fields := range []string{
		long + ": " + secret + "\x01", "Host: " + secret + "\r\nHost: " + secret, "Content-Length: " + secret, "Content-Length" + strings.Repeat("_", 10000) + ": 0",
		"X-aws-ec2-metadata-token: " + secret + "\r\n " + secret, "Transfer-Encoding: " + secret, "Expect: " + secret, secret + " " + long,
	} {
		_, err := http1.Parse([]byte("GET / HTTP/1.1\r\n" + fields + "\r\n\r\n"))
		if err == nil || len(err.Error()) > 150 || strings.Contains(err.Error(), secret) {
			t.Errorf("%.60q: %.200v", fields, err)
		}
	}
}

// What can be read of no request.
func TestBeginning(t *testing.T) {
	for _, c := range []struct{ send, method, target, agent string }{
		{"GET /a HTTP/1.1\r\nUser-Agent: x\r\nno colon\r\nUser-Agent: y\r\n\r\n", "GET", "/a", "x"},
		{"GET /a HTTP/1.1\r\nUser-Agent: x\r\n\r\nUser-Agent: body\r\n", "GET", "/a", "x"},
		{"GET /a HTTP/1.1\r\nUser-Agent: x\nUser-Agent: y\r\n\r\n", "GET", "/a", ""},
		{"GET /a HTTP/1.1\r\nUser-Agent: ha", "GET", "/a", ""},
		{"GET http://user:pass@evil/ HTTP/1.1\r\nUser-Agent: x\r\n\r\n", "GET", "http://user:pass@evil/", ""},
		{"CONNECT evil:80 HTTP/1.1\r\n\r\n", "CONNECT", "evil:80", ""},
		{"GET /a HTTP/1.2\r\n\r\n", "GET", "/a", ""},
		{"GET /a", "", "", ""},
		{"\x16\x03\x01 a b\r\n\r\n", "", "", ""},
		{"GET /" + strings.Repeat("a", http1.MaxTarget) + " HTTP/1.1\r\n\r\n", "GET", "", ""},
	} {
		r := http1.Beginning([]byte(c.send))
		if r.Method != c.method || r.Target != c.target || r.UserAgent != c.agent {
			t.Errorf("%.60q: %.200q", c.send, []string{r.Method, r.Target, r.UserAgent})
		}
	}
}

// The record of no request says what it was, and no secret.
func TestMalformedIsRedacted(t *testing.T) {
	token := "AQAEA" + strings.Repeat("x", 49) + "=="
	for _, send := range []string{
		"GET http://user:" + token + "@169.254.169.254/latest/?x=" + token + " HTTP/1.1\r\n\r\n",
		"GET /latest/" + token + " HTTP/1.1\r\nUser-Agent: x " + token + "\r\nHost: " + token + "\r\nno colon\r\n\r\n",
		"GET /latest/ HTTP/1.1\r\n" + strings.TrimRight(token, "=") + ": \x01\r\n\r\n",
		"GET /latest/ HTTP/1.1\r\nX-aws-ec2-metadata-token: " + token + "\r\nX-aws-ec2-metadata-token: " + token + "\r\n\r\n",
	} {
		_, err := http1.Parse([]byte(send))
		ev := &event.Event{Host: &event.Host{}, Request: http1.Beginning([]byte(send)).Readable()}
		ev.Request.Malformed = err.Error()
		line := string(ev.Views()[0].AppendJSON(nil))
		if strings.Contains(line, token[:20]) || !strings.Contains(line, "/latest/") {
			t.Errorf("%q: %s", send, line)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, c := range evasions {
		f.Add([]byte(c.send))
	}
	f.Add([]byte("PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
	for _, e := range excused {
		f.Add([]byte(e.send))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		agree(t, b)
		if r := http1.Beginning(b); len(r.Target) > http1.MaxTarget {
			t.Errorf("%q: the target begins with %d bytes", b, len(r.Target))
		}
		r, err := http1.Parse(b)
		if err != nil && !errors.Is(err, http1.ErrMalformed) {
			t.Errorf("%q: %v", b, err)
		}
		if r == nil {
			return
		}
		if r.Size > len(b) || !bytes.HasSuffix(b[:r.Size], []byte("\r\n\r\n")) {
			t.Errorf("%q: %+v", b, r)
		}
		// What comes behind a head does not change it.
		more, err := http1.Parse(append(b[:r.Size:r.Size], "GET / HTTP/1.1\r\n\r\n"...))
		if err != nil || *more != *r {
			t.Errorf("%q: %+v alone, %+v, %v with more behind it", b, r, more, err)
		}
	})
}

// answers have their end where the answer has it, and not behind.
var answers = []struct {
	name, answer, behind, method string
	close                        bool
}{
	{"length", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "HTTP/1.1 200", "GET", false},
	{"chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "x", "GET", false},
	{"chunked, extension and trailer", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n", "x", "GET", false},
	{"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "x", "HEAD", false},
	{"304", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "x", "GET", false},
	{"close", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", "", "GET", true},
	{"HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "", "GET", true},
	{"HTTP/1.0, kept", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", "x", "GET", false},
	{"HTTP/1.0, chunked", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n0\r\n\r\nhello", "", "GET", true},
	{"until the end", "HTTP/1.1 200 OK\r\n\r\nhello", "", "GET", true},
	{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "", "GET", true},
	{"no reason phrase", "HTTP/1.1 204\r\n\r\n", "x", "GET", false},
	{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", "x", "GET", false},
	{"bare LF, and then not", "HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\nhello", "x", "GET", false},
	{"bare LF, at last", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\nhello", "x", "GET", false},
	{"the same length twice", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "x", "GET", false},
	{"the same length twice in one", "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello", "x", "GET", false},
	{"two lengths in one", "HTTP/1.1 200 OK\r\nContent-Length: 5,6\r\n\r\nhello", "", "GET", true},
	{"no length in one", "HTTP/1.1 200 OK\r\nContent-Length: 5,\r\n\r\nhello", "", "GET", true},
	{"close and keep", "HTTP/1.1 200 OK\r\nConnection: close, keep-alive\r\nContent-Length: 5\r\n\r\nhello", "", "GET", true},
	{"close and keep, in two", "HTTP/1.0 200 OK\r\nConnection: close\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", "", "GET", true},
}

// The end of an answer is found whatever the pieces in which it comes, and
// where net/http finds it.
func TestResponseEnd(t *testing.T) {
	for _, c := range answers {
		whole := []byte(c.answer + c.behind)
		for piece := 1; piece <= len(whole); piece++ {
			head, err := parseResponse(whole, c.method)
			if err != nil || head == nil || head.close != c.close {
				t.Fatalf("%s: %+v, %v", c.name, head, err)
			}
			b := newBody(head.length)
			b.kept = make([]byte, 0, 16)
			taken := head.headSize
			for taken < len(whole) && !b.ended {
				taken += b.take(whole[taken:min(taken+piece, len(whole))])
			}
			if taken != len(c.answer) || b.ended == (head.length == untilEOF) {
				t.Errorf("%s in pieces of %d: ends at %d, ended %v; want %d", c.name, piece, taken, b.ended, len(c.answer))
			}
			want := c.answer[head.headSize:]
			if head.length == -1 {
				want = "hello"
			}
			if string(b.kept) != want || b.cut {
				t.Errorf("%s in pieces of %d: kept %q, want %q", c.name, piece, b.kept, want)
			}
		}
	}
	for _, odd := range []string{"ICY 200 OK\r\n\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 2x0 OK\r\n\r\n", "hello there"} {
		if r, err := parseResponse([]byte(odd), "GET"); err == nil {
			t.Errorf("%q: %+v", odd, r)
		}
	}
}

func FuzzResponse(f *testing.F) {
	for i, c := range answers {
		f.Add([]byte(c.answer+c.behind), i)
	}
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n00a\r\nlo, hello!\r\n0\r\n\r\nHTTP/1.1 200"), 2)
	f.Fuzz(func(t *testing.T, b []byte, piece int) {
		head, err := parseResponse(b, "GET")
		if err != nil || head == nil || head.interim() {
			return
		}
		// The same bytes in one piece and in several end at the same place.
		var kept []byte
		ends := func(piece int) (int, bool) {
			d := newBody(head.length)
			d.kept = make([]byte, 0, len(b))
			defer func() { kept = d.kept }()
			at := head.headSize
			for at < len(b) && !d.ended {
				n := d.take(b[at:min(at+piece, len(b))])
				if n == 0 && !d.ended {
					t.Fatalf("%q: no progress at %d", b, at)
				}
				at += n
			}
			return at, d.ended
		}
		at, ended := ends(len(b))
		if n := 1 + (piece&0x7fffffff)%64; len(b) > 0 {
			if at2, ended2 := ends(n); at != at2 || ended != ended2 {
				t.Errorf("%q: ends at %d (%v), in pieces of %d at %d (%v)", b, at, ended, n, at2, ended2)
			}
		}
		behind := bufio.NewReader(bytes.NewReader(b))
		resp, err := http.ReadResponse(behind, nil)
		if err != nil || !ended || head.status != resp.StatusCode {
			return
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return
		}
		if ours := content(head, b); !bytes.Equal(body, ours) {
			t.Errorf("%q: a body %q, net/http reads %q", b, ours, body)
		}
		if rest, _ := io.ReadAll(behind); len(rest) != len(b)-at {
			t.Errorf("%q: net/http leaves %q of it, we %q", b, rest, b[at:])
		}
		// net/http takes no chunks from HTTP/1.0.
		if err == nil && (head.length == -1) == (resp.TransferEncoding != nil) && !bytes.Equal(body, kept) {
			t.Errorf("%q: kept %q, net/http reads %q", b, kept, body)
		}
	})
}

// content is the body of an answer without what frames it.
func content(head *response, b []byte) (content []byte) {
	d := newBody(head.length)
	for at := head.headSize; at < len(b) && !d.ended; at++ {
		if d.left > 0 || d.left == untilEOF {
			content = append(content, b[at])
		}
		d.take(b[at : at+1])
	}
	return content
}

// Nothing of what went through a buffer stays in memory that is given away, in
// the pool or to the garbage collector.
func TestBuffersAreCleared(t *testing.T) {
	secret := []byte("secret")
	first := hold()
	copy(first, secret)
	second := grow(first)
	if len(second) != 2*len(first) || !bytes.HasPrefix(second, secret) || bytes.Contains(first, secret) {
		t.Errorf("grown to %d bytes: %q, and left %q", len(second), second[:6], first[:6])
	}
	third := grow(second)
	if !bytes.HasPrefix(third, secret) || bytes.Contains(second, secret) {
		t.Errorf("grown again: %q, and left %q", third[:6], second[:6])
	}
	release(third)
	if bytes.Contains(third, secret) {
		t.Error("released as it was")
	}
}

func TestPublicHost(t *testing.T) {
	for host, want := range map[string]bool{
		"": false, "169.254.169.254": false, "169.254.169.254:80": false, "[fd00:ec2::254]": false, "[fd00:ec2::254]:80": false,
		"instance-data": false, "instance-data.ec2.internal": false, "Instance-Data.": false,
		"evil.example": true, "evil.example:80": true, "169.254.169.254.nip.io": true, "localhost": true,
	} {
		if got := http1.PublicHost(host); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
}

func BenchmarkParseRequest(b *testing.B) {
	req := []byte("GET /latest/meta-data/iam/security-credentials/role HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: aws-sdk-go-v2/1.36\r\nAccept: */*\r\nX-aws-ec2-metadata-token: " +
		strings.Repeat("A", 54) + "==\r\nAccept-Encoding: gzip\r\n\r\n")
	b.SetBytes(int64(len(req)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := http1.Parse(req); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseResponse(b *testing.B) {
	resp := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nAccept-Ranges: none\r\nContent-Length: " + strconv.Itoa(1300) + "\r\nServer: EC2ws\r\nConnection: close\r\n\r\n")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseResponse(resp, "GET"); err != nil {
			b.Fatal(err)
		}
	}
}
