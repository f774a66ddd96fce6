package imdstest_test

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

// demand makes the kernel drop what arrives on conn with a smaller TTL (ip(7), IP_MINTTL; IPV6_MINHOPCOUNT).
func demand(t *testing.T, conn *net.TCPConn, ttl int) {
	t.Helper()
	level, option := unix.IPPROTO_IP, unix.IP_MINTTL
	if conn.LocalAddr().(*net.TCPAddr).IP.To4() == nil {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, ttl) })
	if err != nil {
		t.Fatalf("demand a TTL of %d: %v", ttl, err)
	}
}

func TestHopLimit(t *testing.T) {
	const put = "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 9\r\nConnection: keep-alive\r\n\r\n"
	const get = "GET /latest/meta-data/ami-id HTTP/1.1\r\nConnection: keep-alive\r\n\r\n"
	const bad = "PUT /latest/api/token HTTP/1.1\r\nConnection: keep-alive\r\n\r\n"
	for _, loopback := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(loopback, func(t *testing.T) {
			ln, err := net.Listen("tcp", loopback)
			if err != nil {
				t.Fatal(err)
			}
			s := imdstest.Serve(imdstest.Config{}, ln)
			defer s.Close()
			exchange := func(conn *net.TCPConn, ttl int, request string, patience time.Duration) bool {
				t.Helper()
				demand(t, conn, ttl)
				io.WriteString(conn, request)
				conn.SetReadDeadline(time.Now().Add(patience))
				buf := make([]byte, 1024)
				n, err := conn.Read(buf)
				if err != nil && !isTimeout(err) {
					t.Fatal(err)
				}
				return strings.HasPrefix(string(buf[:n]), "HTTP/1.1 ")
			}
			conn := dial(t, ln.Addr().String())
			for _, step := range []struct {
				ttl     int
				request string
				limit   int
				want    bool
			}{
				{2, get, 1, true},
				{2, bad, 1, true},
				{1, put, 1, true},
				{2, get, 1, true}, // the limit is lifted again
				{2, put, 2, true},
				{64, get, 2, true},
				{3, put, 2, false},
			} {
				s.SetHopLimit(step.limit)
				patience := 5 * time.Second
				if !step.want {
					patience = 50 * time.Millisecond
				}
				if got := exchange(conn, step.ttl, step.request, patience); got != step.want {
					t.Errorf("%.20q with limit %d seen at TTL %d or more: answered %v, want %v",
						step.request, step.limit, step.ttl, got, step.want)
				}
			}
			conn = dial(t, ln.Addr().String())
			s.SetHopLimit(1)
			// A pipelined request must not let the token through by lifting the limit under its retransmission.
			if exchange(conn, 2, put+get, 50*time.Millisecond) {
				t.Error("a request pipelined behind the token's carried the answer over the limit")
			}
			conn.SetReadDeadline(time.Now().Add(700 * time.Millisecond))
			if n, err := conn.Read(make([]byte, 1024)); n != 0 || !isTimeout(err) {
				t.Errorf("retransmission: %d bytes, %v", n, err)
			}
			s.SetHopLimit(64)
			if conn := dial(t, ln.Addr().String()); !exchange(conn, 64, put, 5*time.Second) {
				t.Error("with limit 64 the token did not arrive at TTL 64")
			}
		})
	}
}
