package attribution_test

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/witness"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// seen is a Finder with a witness, and the endpoint of a lab that clients connect to.
type seen struct {
	*attribution.Finder
	t        testing.TB
	lab      *netlab.Lab
	endpoint netip.AddrPort
	ln       net.Listener
}

// level3 has this process in the cgroup of its lab until the end of the test.
func level3(t testing.TB) *seen {
	t.Helper()
	s := &seen{t: t, endpoint: netip.MustParseAddrPort("169.254.169.254:80")}
	s.lab = labtest.Start(t, netlab.Options{NoIMDS: true})
	if err := s.lab.Cgroup.Enter(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.lab.Cgroup.Leave(); err != nil {
			t.Error(err)
		}
	})
	var w *witness.Witness
	if err := s.lab.Instance.Do(func() (err error) {
		if w, err = witness.Open(witness.Options{Endpoints: []netip.AddrPort{s.endpoint}, Cgroup: s.lab.Cgroup.Path()}); err != nil {
			return err
		}
		s.Finder, err = attribution.New(attribution.Options{Witness: w})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		w.Close()
	})
	if got := s.Level(); got != attribution.Level3 {
		t.Fatalf("level %s: %v", got, s.Levels())
	}
	var err error
	if s.ln, err = s.lab.Metadata.Listen(t.Context(), nil, "tcp", s.endpoint.String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.ln.Close() })
	return s
}

// start runs a client program as root.
func (s *seen) start(how string) (in io.Writer, out *bufio.Reader) {
	s.t.Helper()
	client := exec.Command("/proc/self/exe", s.endpoint.String())
	client.Env = append(os.Environ(), "IMDSGATE_TEST_ACT_AS="+how)
	client.Stderr = os.Stderr
	stdin, err := client.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	stdout, err := client.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.lab.Instance.Start(client); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		stdin.Close()
		client.Wait()
	})
	return stdin, bufio.NewReader(stdout)
}

// accept gives the next connection and its other end, when the client has said that it is there.
func (s *seen) accept(out *bufio.Reader) (attribution.Conn, *net.TCPConn) {
	s.t.Helper()
	c, err := s.ln.Accept()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	})
	if _, err := out.ReadString('\n'); err != nil {
		s.t.Fatal(err)
	}
	return attribution.Conn{Client: c.RemoteAddr().(*net.TCPAddr).AddrPort(), Endpoint: s.endpoint}, c.(*net.TCPConn)
}

// Whoever connects after setresuid(2) is another user at once, also on a socket that he made before.
func TestOtherUserConnects(t *testing.T) {
	s := level3(t)
	in, out := s.start("user")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for i, want := range []uint32{0, 4321, 4321} {
		if i > 0 {
			if _, err := in.Write([]byte("\n")); err != nil {
				t.Fatal(err)
			}
		}
		conn, _ := s.accept(out)
		l := s.Find(conn)
		defer l.Close()
		o, ok := l.Accounted(ctx)
		if !ok || len(o.Subjects) != 1 {
			t.Fatalf("connection %d: %+v", i, o)
		}
		if p := o.Subjects[0]; p.UID != [4]uint32{want, want, want, want} || p.GID != p.UID {
			t.Errorf("connection %d: users %d and groups %d, want %d", i, p.UID, p.GID, want)
		}
	}
}
