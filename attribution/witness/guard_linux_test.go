package witness_test

import (
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/witness"
)

// Somebody detaches the programs while clients connect: their sockets have no witness,
// Check says so, and Reattach puts everything back. Nobody is ever named wrongly.
func TestDetached(t *testing.T) {
	w := open(t, witness.Options{})
	ln := serve(t, endpoint4)
	// Processes of their own, since ours is the daemon to the witness.
	clients := []*process{start(t, "again"), start(t, "again")}
	var detached time.Duration // CLOCK_MONOTONIC
	type outcome struct{ named, none int }
	round := func(d time.Duration) (o outcome) {
		for end := time.Now().Add(d); time.Now().Before(end); {
			ln.SetDeadline(end)
			c, err := ln.Accept()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			found, err := w.Connectors(tupleOf(c), false)
			switch {
			case err == nil && found[0].At < detached:
				o.none++ // an old record, as its cookie shows: nobody was there to forget it
			case err == nil && found[0].PID != os.Getpid():
				o.named++
			case errors.Is(err, attribution.ErrNoWitness):
				o.none++
			default:
				t.Errorf("%+v, %v", found, err)
			}
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		return o
	}
	if o := round(300 * time.Millisecond); o.named == 0 {
		t.Fatalf("before: %+v", o)
	}
	if n := detach(t); n != 4 {
		t.Fatalf("%d links of this cgroup were detached", n)
	}
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	detached = time.Duration(now.Nano())
	round(100 * time.Millisecond) // what was seen before
	if o := round(300 * time.Millisecond); o.named != 0 || o.none == 0 {
		t.Errorf("detached: %+v", o)
	}
	if err := w.Check(t.Context()); err == nil {
		t.Error("Check is content")
	}
	names, err := w.Reattach()
	slices.Sort(names)
	if want := []string{"cgroup/connect4", "cgroup/connect6", "cgroup/sock_release", "sockops"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("%v, %v", names, err)
	}
	if err := w.Check(t.Context()); err != nil {
		t.Error(err)
	}
	// What was not seen waits to be accepted: on a busy machine that is thousands.
	for end := time.Now().Add(10 * time.Second); round(100*time.Millisecond).named == 0 && time.Now().Before(end); {
	}
	// On a busy machine each client may have been in the middle of a connect for so long.
	if o := round(400 * time.Millisecond); o.named == 0 || o.none > len(clients) {
		t.Errorf("attached again: %+v", o)
	}
	if names, err := w.Reattach(); len(names) != 0 || err != nil {
		t.Errorf("again: %v, %v", names, err)
	}
	for _, c := range clients {
		c.stdin.Close()
	}
	round(100 * time.Millisecond) // the last ones
	ln.Close()
}

// Whoever keeps millions of descriptors makes a search long. Nobody waits for it who only
// asks who connected, not even while the programs are looked after.
func TestReattachBesideSearch(t *testing.T) {
	w := open(t, witness.Options{})
	start(t, "crowd").numbers()
	ln := serve(t, endpoint4)
	start(t, "plain4")
	_, tuple := accept(t, ln)
	for range 10 { // on a busy machine the search may be over before we run again
		var searched, reattached atomic.Bool
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := w.Holders(t.Context(), []uint32{1}); err != nil {
				t.Error(err)
			}
			searched.Store(true)
		})
		time.Sleep(10 * time.Millisecond)
		wg.Go(func() {
			if _, err := w.Reattach(); err != nil {
				t.Error(err)
			}
			reattached.Store(true)
		})
		time.Sleep(10 * time.Millisecond)
		_, err := w.Connectors(tuple, false)
		inTime := reattached.Load() && !searched.Load()
		wg.Wait()
		if err != nil {
			t.Fatal(err)
		}
		if inTime {
			return
		}
	}
	t.Error("answers wait for a search")
}

// detach does as `bpftool link detach` to every link of the tests' cgroup.
func detach(t *testing.T) (n int) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(os.Getenv(inCgroup), &st); err != nil {
		t.Fatal(err)
	}
	links := new(link.Iterator)
	defer links.Close()
	for links.Next() {
		info, err := links.Link.Info()
		if err != nil || info.Type != link.CgroupType || info.Cgroup() == nil || info.Cgroup().CgroupId != st.Ino {
			continue
		}
		if err := links.Link.Detach(); err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}
