package attribution_test

import (
	"bufio"
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/witness"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// BenchmarkLevel3 asks about a connection of a process that is known, as a client's second one within milliseconds is.
func BenchmarkLevel3(b *testing.B) {
	f, conn, _ := level3(b)
	ctx := context.Background()
	b.Run("Accounted", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			l := f.Find(conn)
			if o, ok := l.Accounted(ctx); !ok || !o.Complete {
				b.Fatalf("%+v", o)
			}
			l.Close()
		}
	})
	l := f.Find(conn)
	defer l.Close()
	b.Run("Changed", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if l.Changed() {
				b.Fatal("changed")
			}
		}
	})
	b.Run("Owner", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if o := l.Owner(ctx); !o.Attributed() {
				b.Fatal(o.Reason)
			}
		}
	})
	b.Run("Process", func(b *testing.B) {
		pid := l.Owner(ctx).Subjects[0].PID
		b.ReportAllocs()
		for b.Loop() {
			if _, err := f.Process(pid); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// level3 has a client connect to the endpoint of a lab, in whose cgroup this process is until the end of the test. The last is the other end of the
// connection.
func level3(t testing.TB) (*attribution.Finder, attribution.Conn, *net.TCPConn) {
	t.Helper()
	endpoint := netip.MustParseAddrPort("169.254.169.254:80")
	lab := labtest.Start(t, netlab.Options{NoIMDS: true})
	if err := lab.Cgroup.Enter(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Cgroup.Leave(); err != nil {
			t.Error(err)
		}
	})
	var w *witness.Witness
	var f *attribution.Finder
	if err := lab.Instance.Do(func() (err error) {
		if w, err = witness.Open(witness.Options{Endpoints: []netip.AddrPort{endpoint}, Cgroup: lab.Cgroup.Path()}); err != nil {
			return err
		}
		f, err = attribution.New(attribution.Options{Witness: w})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		w.Close()
	})
	if got := f.Level(); got != attribution.Level3 {
		t.Fatalf("level %s: %v", got, f.Levels())
	}
	ln, err := lab.Metadata.Listen(t.Context(), nil, "tcp", endpoint.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	client := exec.Command("/proc/self/exe", endpoint.String())
	client.Env = append(os.Environ(), "IMDSGATE_TEST_ACT_AS=plain")
	client.Stderr = os.Stderr
	in, err := client.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := client.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Instance.Start(client); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		client.Wait()
	})
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	return f, attribution.Conn{Client: c.RemoteAddr().(*net.TCPAddr).AddrPort(), Endpoint: endpoint}, c.(*net.TCPConn)
}
