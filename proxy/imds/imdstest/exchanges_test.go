package imdstest_test

import (
	"bytes"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var options = map[string]func(*imdstest.Config){
	"required":     func(c *imdstest.Config) { c.TokensRequired = true },
	"disabled":     func(c *imdstest.Config) { c.EndpointDisabled = true },
	"xhtml":        func(c *imdstest.Config) { c.Pages = imdstest.XHTML },
	"lenient":      func(c *imdstest.Config) { c.Reading = imdstest.Lenient },
	"always-close": func(c *imdstest.Config) { c.Persistence = imdstest.AlwaysClose },
	"always-keep":  func(c *imdstest.Config) { c.Persistence = imdstest.AlwaysKeep },
	"http10":       func(c *imdstest.Config) { c.HTTP10 = []string{"user-data"} },
	"no-user-data": func(c *imdstest.Config) { c.UserData = []byte{} },
}

var launch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func TestExchanges(t *testing.T) {
	text, err := os.ReadFile("testdata/exchanges.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range strings.Split(string(text), "\n=== ")[1:] {
		title, script, _ := strings.Cut(c, "\n")
		name, words, _ := strings.Cut(title, " | ")
		cfg := imdstest.Config{Now: func() time.Time { return launch }}
		for _, word := range strings.Fields(words) {
			options[word](&cfg)
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, addr := serve(t, cfg)
			play(t, s, addr, strings.Split(script, "\n"))
		})
	}
}

// serve starts an emulator on a loopback address.
func serve(t testing.TB, cfg imdstest.Config) (*imdstest.Server, string) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := imdstest.Serve(cfg, ln)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, ln.Addr().String()
}

func dial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	return conn.(*net.TCPConn)
}

// ask sends a raw request and returns all that comes until the emulator closes.
func ask(t testing.TB, addr, request string) string {
	t.Helper()
	conn := dial(t, addr)
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("%q: %v after %q", request, err, answer)
	}
	return string(answer)
}

func get(path string) string { return "GET " + path + " HTTP/1.1\r\n\r\n" }

func body(answer string) string {
	_, b, _ := strings.Cut(answer, "\r\n\r\n")
	return b
}

func newToken(t testing.TB, addr string, ttl int) string {
	t.Helper()
	token := body(ask(t, addr, "PUT /latest/api/token HTTP/1.1\r\n"+
		"X-aws-ec2-metadata-token-ttl-seconds: "+strconv.Itoa(ttl)+"\r\n\r\n"))
	if !anyToken.MatchString(token) || len(token) != 56 {
		t.Fatalf("token %q", token)
	}
	return token
}

var anyToken = regexp.MustCompile(`AQAEA[0-9A-Za-z_-]{49}==`)

// play runs one case of exchanges.txt and then compares the emulator's transcript with what it saw itself.
func play(t *testing.T, s *imdstest.Server, addr string, script []string) {
	var token string
	if strings.Contains(strings.Join(script, "\n"), "-token: TOKEN") {
		token = newToken(t, addr, 21600)
	}
	conn := dial(t, addr)
	var sent, received, want []byte
	expect := func() {
		if len(want) == 0 {
			return
		}
		got := make([]byte, len(want)+strings.Count(string(want), "TOKEN")*(56-len("TOKEN")))
		n, err := io.ReadFull(conn, got)
		received = append(received, got[:n]...)
		masked := anyToken.ReplaceAllString(string(got[:n]), "TOKEN")
		if diff := cmp.Diff(strings.Split(string(want), "\r\n"), strings.Split(masked, "\r\n")); diff != "" {
			t.Fatalf("answer (-want +got): %v\n%s", err, diff)
		}
		want = nil
	}
	for _, line := range script {
		kind, text, _ := strings.Cut(line, " ")
		raw, err := strconv.Unquote(`"` + strings.ReplaceAll(text, `"`, `\"`) + `"`)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		switch {
		case kind == ">" || kind == ">|":
			expect()
			if kind == ">" {
				raw = strings.ReplaceAll(text, "TOKEN", token) + "\r\n"
			}
			if _, err := io.WriteString(conn, raw); err != nil {
				t.Fatal(err)
			}
			sent = append(sent, raw...)
		case line == "< EOF":
			expect()
			if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Fatalf("got %d bytes more and %v, want EOF", n, err)
			}
		case line == "< KEPT":
			expect()
			conn.SetDeadline(time.Now().Add(20 * time.Millisecond))
			if n, err := conn.Read(make([]byte, 1)); n != 0 || !os.IsTimeout(err) {
				t.Fatalf("got %d bytes more and %v, want an open connection", n, err)
			}
		case kind == "<":
			want = append(want, text+"\r\n"...)
		case kind == "<|":
			want = append(want, raw...)
		case line != "" && !strings.HasPrefix(line, "#"):
			t.Fatalf("cannot read line %q", line)
		}
	}
	expect()

	log := s.Transcript()
	c := log.Connections[len(log.Connections)-1]
	if c.Remote.String() != conn.LocalAddr().String() || c.Local.String() != addr || log.Lost != 0 {
		t.Errorf("transcript of %v to %v, lost %d; the connection is %v to %v",
			c.Remote, c.Local, log.Lost, conn.LocalAddr(), addr)
	}
	if !bytes.Equal(c.Received(), sent) {
		t.Errorf("transcript has received %q, sent was %q", c.Received(), sent)
	}
	if !bytes.Equal(c.Sent(), received) {
		t.Errorf("transcript has sent %q, received was %q", c.Sent(), received)
	}
}
