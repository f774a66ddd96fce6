package netlab_test

import (
	"context"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// TestClients runs the AWS SDK against the emulator and against AWS's own mock.
func TestClients(t *testing.T) {
	labtest.RequireRoot(t)
	dir := t.TempDir()
	sdkclient, aemm, err := netlab.BuildClients(dir)
	if err != nil {
		t.Fatal(err)
	}
	run := func(from *netlab.Namespace, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, sdkclient, args...)
		cmd.Env = []string{"HOME=" + dir}
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := from.Run(cmd); err != nil {
			t.Errorf("sdkclient %q from %s: %v: %s", args, from, err, out.String())
		}
		return strings.TrimSpace(out.String())
	}

	t.Run("emulator", func(t *testing.T) {
		l := labtest.Start(t, netlab.Options{Containers: true, IMDS: &imdstest.Config{
			TokensRequired: true, HopLimit: 2,
			Now: func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) },
		}})
		const want = "credentials ASIAEXAMPLEFAKE00001 expires 2026-01-02T09:04:05Z"
		for _, from := range []*netlab.Namespace{l.Instance, l.Bridged, l.Routed} {
			for _, mode := range []string{"ipv4", "ipv6"} {
				if got := run(from, "--endpoint-mode", mode); got != want {
					t.Errorf("from %s over %s: %q, want %q", from, mode, got, want)
				}
			}
		}
		if got := run(l.Instance, "--path", "instance-id", "--repeat", "2"); got != "i-0123456789abcdef0\ni-0123456789abcdef0" {
			t.Errorf("path: %q", got)
		}
	})

	t.Run("aemm", func(t *testing.T) {
		l := labtest.Start(t, netlab.Options{NoIMDS: true})
		mock := exec.Command(aemm, "--hostname", "169.254.169.254", "--port", "80", "--imdsv2")
		mock.Env = []string{"HOME=" + dir}
		if err := l.Metadata.Start(mock); err != nil {
			t.Fatal(err)
		}
		defer mock.Wait()
		defer mock.Process.Kill()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			conn, err := l.Instance.Dial(context.Background(), &net.Dialer{Timeout: time.Second}, "tcp", v4)
			if err == nil {
				conn.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
		if got := run(l.Instance); got != "credentials 12345678901 expires 2020-04-02T00:49:51Z" {
			t.Errorf("credentials: %q", got)
		}
	})
}
