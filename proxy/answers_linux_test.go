package proxy

import (
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// What the service answers reaches the client byte for byte, whatever it is, and the
// connection ends as it would. The client asks a second time behind it, so that it
// shows whether the end of the answer was found.
func TestAnswers(t *testing.T) {
	const hello = "Content-Length: 5\r\n\r\nhello"
	at := func(after time.Duration, data ...string) []imdstest.Segment {
		var all []imdstest.Segment
		for _, s := range data {
			all = append(all, imdstest.Segment{After: after, Data: s})
		}
		return all
	}
	r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
	const soon, later = 5 * time.Millisecond, 400 * time.Millisecond
	for _, c := range []struct {
		name    string
		method  string
		raw     []imdstest.Segment
		then    imdstest.Outcome
		answers string // statuses of all
		end     string
		ours    string // what the client gets through us, if it is not the same
	}{
		{"length", "GET", at(0, "HTTP/1.1 200 OK\r\n"+hello), imdstest.Answered, "200 404", "FIN", ""},
		{"byte by byte", "GET", at(time.Millisecond, strings.Split("HTTP/1.1 200 OK\r\n"+hello, "")...), imdstest.Answered, "200 404", "FIN", ""},
		{"head and body", "GET", at(later, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "hello"), imdstest.Answered, "200 404", "FIN", ""},
		{"chunked", "GET", at(soon, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "3;x=\"y\"\r\nhel\r", "\n2\r\nlo\r\n0\r\nTrailer: z\r\n", "\r\n"), imdstest.Answered, "200 404", "FIN", ""},
		{"chunked, cut", "GET", at(soon, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "5\r\nhel"), imdstest.FIN, "200", "FIN", ""},
		{"chunked, reset", "GET", at(soon, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "5\r\nhel", ""), imdstest.RST, "200", "RST", ""},
		{"no chunks", "GET", at(soon, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "hello"), imdstest.FIN, "200", "FIN", ""},
		{"103", "GET", at(soon, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", "HTTP/1.1 200 OK\r\n"+hello), imdstest.Answered, "103 200 404", "FIN", ""},
		{"several interim ones", "GET", at(0, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n"+hello), imdstest.Answered, "100 102 103 200 404", "FIN", ""},
		{"interim, and no more", "GET", at(soon, "HTTP/1.1 103 Early Hints\r\n\r\n", ""), imdstest.FIN, "103", "FIN", ""},
		{"until the end", "GET", at(soon, "HTTP/1.1 200 OK\r\n\r\n", "hel", "lo"), imdstest.FIN, "200", "FIN", ""},
		{"until a reset", "GET", at(soon, "HTTP/1.1 200 OK\r\n\r\n", "hel", ""), imdstest.RST, "200", "RST", ""},
		{"204", "GET", at(0, "HTTP/1.1 204 No Content\r\n\r\n"), imdstest.Answered, "204 404", "FIN", ""},
		{"304", "GET", at(0, "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"), imdstest.Answered, "304 404", "FIN", ""},
		{"HEAD", "HEAD", at(0, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), imdstest.Answered, "200 404", "FIN", ""},
		{"HEAD, chunked", "HEAD", at(0, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), imdstest.Answered, "200 404", "FIN", ""},
		{"HTTP/1.0", "GET", at(0, "HTTP/1.0 200 OK\r\n"+hello), imdstest.FIN, "200", "FIN", ""},
		{"HTTP/1.0, kept", "GET", at(0, "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n"+hello), imdstest.Answered, "200 404", "FIN", ""},
		{"close and keep", "GET", at(0, "HTTP/1.1 200 OK\r\nConnection: close, keep-alive\r\n"+hello), imdstest.FIN, "200", "FIN", ""},
		{"the same length twice", "GET", at(0, "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello"), imdstest.Answered, "200 404", "FIN", ""},
		{"two lengths", "GET", at(0, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 3\r\n\r\nhello"), imdstest.FIN, "200", "FIN", ""},
		{"bare LF", "GET", at(0, "HTTP/1.1 200 OK\nContent-Length: 0\n\n"), imdstest.Answered, "200 404", "FIN", ""},
		{"bare LF, at last", "GET", at(soon, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", "\nhello"), imdstest.Answered, "200 404", "FIN", ""},
		{"half a head", "GET", at(soon, "HTTP/1.1 200 OK\r\nContent-", ""), imdstest.FIN, "200", "FIN", ""},
		{"half a head, reset", "GET", at(soon, "HTTP/1.1 200 OK\r\nContent-", ""), imdstest.RST, "200", "RST", ""},
		{"half a body, reset", "GET", at(soon, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", ""), imdstest.RST, "200", "RST", ""},
		{"no HTTP", "GET", at(soon, "SSH-2.0-x\r\n", "more of it"), imdstest.FIN, "", "FIN", ""},
		{"hardly anything", "GET", at(soon, "hi"), imdstest.FIN, "", "FIN", ""},
		{"a long head", "GET", at(0, "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", maxResponseHead)+"\r\n"+hello), imdstest.FIN, "200", "FIN", ""},
		{"ended when idle", "GET", at(later, "HTTP/1.1 200 OK\r\n"+hello, ""), imdstest.FIN, "200", "FIN", ""},
		{"reset when idle", "GET", at(later, "HTTP/1.1 200 OK\r\n"+hello, ""), imdstest.RST, "200", "RST", ""},
		// Nobody asked for these, and a client that took one for an answer could be
		// made to believe anything.
		{"surplus", "GET", at(0, "HTTP/1.1 200 OK\r\n"+hello+"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"), imdstest.FIN, "200 200", "FIN", "HTTP/1.1 200 OK\r\n" + hello},
		{"surplus, later", "GET", at(soon, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", "loHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"), imdstest.Answered, "200 200 404", "FIN", "HTTP/1.1 200 OK\r\n" + hello},
		{"another protocol", "GET", at(0, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nevil"), imdstest.FIN, "101", "FIN", "nothing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.lab.IMDS.Update(func(cfg *imdstest.Config) {
				cfg.Fault = func(q *imdstest.Request) imdstest.Fault {
					if q.OnConn > 1 {
						return imdstest.Fault{Status: 404}
					}
					return imdstest.Fault{Raw: c.raw, Outcome: c.then}
				}
			})
			ask := c.method + " /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "Connection: keep-alive\r\n\r\n"
			if c.then == imdstest.Answered {
				ask += "GET /latest/meta-data/ami-id HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n"
			}
			got, end := talk(t, r.dial(true), ask, 4*time.Second)
			if statuses(got) != c.answers || end != c.end {
				t.Errorf("directly %.300q, %s; want %s, %s", got, end, c.answers, c.end)
			}
			switch c.ours {
			case "":
			case "nothing":
				got = ""
			default:
				got = c.ours
			}
			conn := r.dial(false)
			defer conn.Close()
			if ours, oursEnd := talk(t, conn, ask, 4*time.Second); ours != got || oursEnd != end {
				t.Errorf("through us %.300q, %s; want %.300q, %s", ours, oursEnd, got, end)
			}
		})
	}
	r.settled()
}
