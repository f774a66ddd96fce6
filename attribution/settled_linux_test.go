package attribution_test

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
)

// settled has a client that was asked about so often that the witness need not be.
func settled(t *testing.T) (*attribution.Lookup, attribution.Owner, *net.TCPConn) {
	t.Helper()
	s := level3(t)
	_, out := s.start("plain")
	conn, server := s.accept(out)
	l := s.Find(conn)
	t.Cleanup(l.Close)
	var o attribution.Owner
	for range 3 {
		var ok bool
		if o, ok = l.Accounted(t.Context()); !ok || !o.Complete || len(o.Subjects) != 1 {
			t.Fatalf("%+v", o)
		}
	}
	return l, o, server
}

// owner asks a little later, when an answer is not one of a moment ago.
func owner(t *testing.T, l *attribution.Lookup) attribution.Owner {
	t.Helper()
	time.Sleep(5 * time.Millisecond)
	return l.Owner(t.Context())
}

func TestWriterAfterwards(t *testing.T) {
	l, o, _ := settled(t)
	fd := taken(t, o.Subjects[0].PID, fmt.Sprintf("socket:[%d]", o.Socket.Inode))
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if !l.Changed() {
		t.Error("nothing has changed, though somebody else has written")
	}
	o = owner(t, l)
	if i := slices.Index(o.Roles, attribution.RoleWriter); i < 0 || o.Subjects[i].PID != os.Getpid() {
		t.Errorf("%+v", o)
	}
}

// The process goes on, and so does its descriptor.
func TestGoneAfterwards(t *testing.T) {
	l, o, server := settled(t)
	server.SetLinger(0)
	server.Close()
	for end := time.Now().Add(2 * time.Second); o.Reason != attribution.ClientGone; {
		if o = owner(t, l); time.Now().After(end) {
			t.Fatalf("%+v, after the connection has ended", o)
		}
	}
}

// taken is a copy of a process's descriptor that refers to this.
func taken(t *testing.T, pid int, to string) int {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if text, err := os.Readlink(dir + "/" + e.Name()); err != nil || !strings.HasPrefix(text, to) {
			continue
		}
		var n int
		fmt.Sscan(e.Name(), &n)
		fd, err := unix.PidfdGetfd(process, n, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	t.Fatalf("process %d has no %s", pid, to)
	return -1
}
