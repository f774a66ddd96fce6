package witness_test

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/witness"
)

func BenchmarkOpen(b *testing.B) {
	requireRoot(b)
	for b.Loop() {
		w, err := witness.Open(witness.Options{Endpoints: endpoints, Cgroup: os.Getenv(inCgroup)})
		if err != nil {
			b.Fatal(err)
		}
		w.Close()
	}
}

// quantiles reports the median and the 99th percentile of f.
func quantiles(b *testing.B, f func()) {
	b.ReportAllocs()
	var all []time.Duration
	for b.Loop() {
		begin := time.Now()
		f()
		all = append(all, time.Since(begin))
	}
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Nanoseconds()), "p50-ns")
	b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds()), "p99-ns")
}

func BenchmarkLookups(b *testing.B) {
	w := open(b, witness.Options{})
	ln := serve(b, endpoint4)
	c := start(b, "plain4")
	_, tuple := accept(b, ln)
	got := one(b, w, tuple, false)
	inode := inodeOf(b, tuple)
	check := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	b.Run("Connectors", func(b *testing.B) {
		quantiles(b, func() { _, err := w.Connectors(tuple, false); check(err) })
	})
	b.Run("Writers", func(b *testing.B) {
		quantiles(b, func() { _, err := w.Writers(got.SocketCookie); check(err) })
	})
	b.Run("Executed", func(b *testing.B) {
		quantiles(b, func() { _, err := w.Executed(c.pid()); check(err) })
	})
	b.Run("Holding", func(b *testing.B) {
		quantiles(b, func() { _, err := w.Holding(b.Context(), c.pid(), inode); check(err) })
	})
	b.Run("Holders", func(b *testing.B) {
		quantiles(b, func() { _, err := w.Holders(b.Context(), []uint32{inode}); check(err) })
	})
	b.Run("Arrived", func(b *testing.B) {
		quantiles(b, func() { w.Arrived(tuple, []attribution.Connector{got}) })
	})
	b.Run("Check", func(b *testing.B) {
		quantiles(b, func() { check(w.Check(b.Context())) })
	})
}

func BenchmarkForwarded(b *testing.B) {
	w := open(b, witness.Options{})
	p := elsewhere(b, "elsewhere")
	tuple := from(p.numbers()[0])
	quantiles(b, func() {
		if _, err := w.Connectors(tuple, true); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkConnect shows what a client pays: rounds of 500 connects, in turns with the
// programs attached and without. Our own connects are not recorded, so the client is
// another process.
func BenchmarkConnect(b *testing.B) {
	for _, to := range []string{"endpoint", "other", "refused"} {
		b.Run(to, func(b *testing.B) {
			requireRoot(b)
			switch to {
			case "endpoint":
				drain(b, serve(b, endpoint4))
			case "other":
				drain(b, serve(b, other4))
			}
			c := start(b, "measure", to)
			round := func() int { c.tell(); return c.numbers()[0] }
			var without, with []int
			for b.Loop() {
				without = append(without, round())
				w, err := witness.Open(witness.Options{Endpoints: endpoints, Cgroup: os.Getenv(inCgroup)})
				if err != nil {
					b.Fatal(err)
				}
				with = append(with, round())
				w.Close()
			}
			slices.Sort(without)
			slices.Sort(with)
			b.ReportMetric(float64(without[len(without)/2]), "without-ns")
			b.ReportMetric(float64(with[len(with)/2]), "with-ns")
			b.ReportMetric(float64(with[0]-without[0]), "least-ns-more")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// measure prints the median of 500 connects each time that it is told to.
func measure(to string) error {
	addr := map[string]*unix.SockaddrInet4{
		"endpoint": sockaddr4,
		"other":    {Port: int(other4.Port()), Addr: other4.Addr().As4()},
		"refused":  {Port: 9, Addr: [4]byte{127, 0, 0, 1}},
	}[to]
	all := make([]time.Duration, 500)
	for {
		if wait(); ended {
			return nil
		}
		for i := range all {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			begin := time.Now()
			err = unix.Connect(fd, addr)
			all[i] = time.Since(begin)
			if err != nil && to != "refused" {
				return err
			}
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			unix.Close(fd)
		}
		slices.Sort(all)
		fmt.Println(all[len(all)/2].Nanoseconds())
	}
}
