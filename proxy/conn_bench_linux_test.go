package proxy

import (
	"io"
	"net"
	"testing"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// BenchmarkConnection is a new connection with one request, the client and the
// service included.
func BenchmarkConnection(b *testing.B) {
	for _, mode := range []policy.Mode{policy.Audit, policy.Enforce} {
		b.Run(mode.String(), func(b *testing.B) {
			newRig(b, setting{lab: netlab.Options{IMDS: emulator()}, policy: policy.Config{Mode: mode}})
			ask := []byte("GET /latest/meta-data/instance-id HTTP/1.1\r\n" + host + "\r\n")
			b.ReportAllocs()
			for b.Loop() {
				conn, err := net.Dial("tcp", "169.254.169.254:80")
				if err != nil {
					b.Fatal(err)
				}
				if _, err := conn.Write(ask); err != nil {
					b.Fatal(err)
				}
				if got, err := io.ReadAll(conn); err != nil || len(got) < 15 {
					b.Fatalf("%q, %v", got, err)
				}
				conn.Close()
			}
		})
	}
}
