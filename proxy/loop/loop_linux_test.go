package loop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func run(t testing.TB) *Loop {
	t.Helper()
	before := descriptors(t)
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	go l.Run()
	t.Cleanup(func() {
		l.Close()
		if after := descriptors(t); after > before {
			t.Errorf("%d descriptors are left open", after-before)
		}
		if _, ok := l.Start(func(*Task) {}); ok {
			t.Error("a closed loop began a task")
		}
	})
	return l
}

func descriptors(t testing.TB) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// do runs a function as a task, and waits for its end.
func do(t testing.TB, l *Loop, f func(*Task)) {
	t.Helper()
	done := make(chan struct{})
	if _, ok := l.Start(func(t *Task) { defer close(done); f(t) }); !ok {
		t.Fatal("the loop is closed")
	}
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the task does not end")
	}
}

// pair is a connection with one end for a loop.
func pair(t testing.TB) (fd int, far *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return fds[0], c.(*net.UnixConn)
}

func TestReadAndWrite(t *testing.T) {
	l := run(t)
	fd, far := pair(t)
	go func() {
		io.Copy(far, far)
		far.CloseWrite()
	}()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // more than the buffers between
	var got []byte
	do(t, l, func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		written := make(chan struct{})
		left := sent
		buf := make([]byte, 4096)
		for {
			n, err := c.Write(left)
			if left = left[n:]; err == nil && len(left) == 0 && written != nil {
				c.CloseWrite()
				close(written)
				written = nil
			}
			n, err = c.Read(buf)
			got = append(got, buf[:n]...)
			if err == io.EOF {
				return
			}
			if err == ErrAgain {
				want := In
				if len(left) > 0 {
					want |= Out
				}
				err = k.Wait(time.Now().Add(5*time.Second), Interest{c, want})
			}
			if err != nil {
				t.Errorf("after %d bytes: %v", len(got), err)
				return
			}
		}
	})
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back, want %d", len(got), len(sent))
	}
}

// The end may come with the last bytes, in one event.
func TestEndWithBytes(t *testing.T) {
	l := run(t)
	for range 100 {
		fd, far := pair(t)
		do(t, l, func(k *Task) {
			c := k.Adopt(fd)
			defer c.Close()
			buf := make([]byte, 64)
			if _, err := c.Read(buf); err != ErrAgain {
				t.Errorf("%v before anything was sent", err)
			}
			go func() {
				far.Write([]byte("last"))
				far.Close()
			}()
			for i := 0; ; i++ {
				n, err := c.Read(buf)
				if err == io.EOF {
					return
				}
				if err == ErrAgain {
					err = k.Wait(time.Now().Add(2*time.Second), Interest{c, In})
				}
				if err != nil {
					t.Errorf("after %d bytes: %v", n, err)
					return
				}
			}
		})
	}
}

func TestDeadline(t *testing.T) {
	l := run(t)
	fd, far := pair(t)
	do(t, l, func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		for _, d := range []time.Duration{time.Hour, 20 * time.Millisecond, time.Millisecond, -time.Second, 20 * time.Millisecond} {
			begin := time.Now()
			if d == time.Hour {
				go far.Write([]byte("x"))
				if err := k.Wait(begin.Add(d), Interest{c, In}); err != nil {
					t.Error(err)
				}
				c.Read(make([]byte, 8))
				continue
			}
			err := k.Wait(begin.Add(d), Interest{c, In})
			if took := time.Since(begin); !errors.Is(err, os.ErrDeadlineExceeded) || took < d || took > d+2*time.Second {
				t.Errorf("%v after %v, want the deadline after %v", err, took, d)
			}
		}
	})
	if len(l.timers) != 0 {
		t.Errorf("%d timers are left", len(l.timers))
	}
}

// A loop that lingers for one answer after the other, on the only processor that there
// is, keeps out nobody: neither its own timers nor other goroutines.
func TestLinger(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l := run(t)
	fd, far := pair(t)
	end, err := far.File()
	if err != nil {
		t.Fatal(err)
	}
	defer end.Close()
	echo := exec.Command("cat") // which needs no processor of this process
	echo.Stdin, echo.Stdout = end, end
	if err := echo.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		far.CloseWrite()
		echo.Wait()
	}()
	if err := unix.SetNonblock(int(end.Fd()), false); err != nil { // both ends of a file description share it
		t.Fatal(err)
	}

	const lasts = 300 * time.Millisecond
	var rounds int
	var expired, ticks atomic.Int32 // other tasks may outlast this one
	stop := make(chan struct{})
	ticking := make(chan struct{})
	go func() {
		defer close(ticking)
		for {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
				ticks.Add(1)
			}
		}
	}()
	do(t, l, func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		begin := time.Now()
		k.Go(func(k *Task) {
			for time.Since(begin) < lasts {
				if k.Sleep(10*time.Millisecond) == nil {
					expired.Add(1)
				}
			}
		})
		buf := make([]byte, 16)
		for ; time.Since(begin) < lasts; rounds++ {
			if _, err := c.Write([]byte("x")); err != nil {
				t.Error(err)
				return
			}
			for {
				if _, err = c.Read(buf); err != ErrAgain {
					break
				}
				if err = k.Wait(time.Now().Add(5*time.Second), Interest{c, In}); err != nil {
					break
				}
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	close(stop)
	<-ticking
	t.Logf("%d round trips, %d timers, %d ticks of a goroutine", rounds, expired.Load(), ticks.Load())
	if rounds < 100 || expired.Load() < 10 || ticks.Load() < 5 {
		t.Errorf("%d round trips, %d timers, %d ticks of a goroutine in %v: somebody was kept out", rounds, expired.Load(), ticks.Load(), lasts)
	}
}

// What is called away runs beside the others, and its task goes on after it.
func TestAway(t *testing.T) {
	l := run(t)
	release := make(chan struct{})
	var first, second atomic.Bool
	gone := make(chan *Task, 1)
	done := make(chan struct{})
	l.Start(func(k *Task) {
		gone <- k
		k.Away(func() { <-release })
		first.Store(true)
		close(done)
	})
	k := <-gone
	do(t, l, func(*Task) { second.Store(true) })
	k.Wake()
	k.Cancel()
	do(t, l, func(*Task) {})
	if first.Load() || !second.Load() {
		t.Errorf("the one that is away went on: %v; another ran: %v", first.Load(), second.Load())
	}
	close(release)
	<-done
	// More at a time than there are goroutines that rest.
	const many = 4 * maxWorkers
	var left atomic.Int32
	left.Store(many)
	all := make(chan struct{})
	for range many {
		l.Start(func(k *Task) {
			k.Away(func() { time.Sleep(time.Millisecond) })
			if left.Add(-1) == 0 {
				close(all)
			}
		})
	}
	<-all
}

func TestCancelAndWake(t *testing.T) {
	l := run(t)
	fd, _ := pair(t)
	tasks := make(chan *Task, 1)
	result := make(chan error, 8)
	l.Start(func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		tasks <- k
		for {
			err := k.Wait(time.Time{}, Interest{c, In})
			result <- err
			if err != nil {
				return
			}
		}
	})
	k := <-tasks
	k.Wake()
	if err := <-result; err != nil {
		t.Errorf("woken: %v", err)
	}
	k.Cancel()
	for err := range result {
		if err == nil {
			continue // a wake may count twice
		}
		if err != ErrCancelled || !k.Cancelled() {
			t.Errorf("cancelled: %v", err)
		}
		break
	}
	k.Cancel() // nothing is left to cancel
	k.Wake()
	do(t, l, func(*Task) {})
}

// Events that were under way for a connection never reach the one that has its
// descriptor, and its place, since. All of it happens in one round: the events of
// both are there when the first task runs.
func TestReusedDescriptor(t *testing.T) {
	l := run(t)
	stale := 0
	for range 200 {
		first, firstFar := pair(t)
		second, secondFar := pair(t)
		var a, b *Conn
		woken := make(chan error, 1)
		do(t, l, func(k *Task) {
			a, b = k.Adopt(first), k.Adopt(second)
			for _, c := range []*Conn{a, b} {
				if err := c.Watch(); err != nil {
					t.Error(err)
				}
			}
		})
		do(t, l, func(k *Task) {
			firstFar.Write([]byte("x"))
			secondFar.Write([]byte("x"))
			// The round that brings both events is collected here, by hand, and told
			// after b was closed and another has its number and place.
			l.n = 0
			l.pollOnce(uintptr(l.ep))
			before := b.place
			b.Close()
			again, _ := pair(t)
			if again != second {
				if err := unix.Dup3(again, second, unix.O_CLOEXEC); err != nil {
					t.Error(err)
				}
				unix.Close(again)
			}
			c := k.Adopt(second)
			if err := c.Watch(); err != nil || c.place != before {
				t.Errorf("%v; place %d, want %d", err, c.place, before)
			}
			for i := range l.events[:l.n] {
				if l.events[i].Fd == before && l.events[i].Events&unix.EPOLLIN != 0 {
					stale++
				}
			}
			l.tell()
			if c.seen != 0 || a.seen&unix.EPOLLIN == 0 {
				t.Errorf("the new one has %#x of the old one's, the other %#x", c.seen, a.seen)
			}
			a.Close()
			c.Close()
			woken <- nil
		})
		<-woken
	}
	if stale == 0 {
		t.Error("no event was under way: the test tests nothing")
	}
}

// A connection that is closed wakes who waits for it, and has no events any more.
func TestCloseWakes(t *testing.T) {
	l := run(t)
	fd, _ := pair(t)
	conns := make(chan *Conn, 1)
	result := make(chan error, 1)
	l.Start(func(k *Task) {
		c := k.Adopt(fd)
		conns <- c
		k.Wait(time.Time{}, Interest{c, In})
		_, err := c.Read(make([]byte, 1))
		result <- err
	})
	c := <-conns
	do(t, l, func(*Task) { c.Close(); c.Close() })
	if err := <-result; err != net.ErrClosed {
		t.Errorf("%v, want %v", err, net.ErrClosed)
	}
}

// A task that always has something to do lets others run, and lets events in.
func TestYield(t *testing.T) {
	l := run(t)
	fd, far := pair(t)
	var stop atomic.Bool
	l.Start(func(k *Task) {
		for !stop.Load() {
			k.Yield()
		}
	})
	defer stop.Store(true)
	do(t, l, func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		go far.Write([]byte("x"))
		if err := k.Wait(time.Now().Add(5*time.Second), Interest{c, In}); err != nil {
			t.Error(err)
		}
		if err := k.Wait(time.Now().Add(10 * time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestAcceptAndPause(t *testing.T) {
	l := run(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	accepted := make(chan string, 8)
	paused, goOn := make(chan struct{}), make(chan *Task, 1)
	ended := make(chan error, 1)
	listening := make(chan struct{})
	listener, _ := l.Start(func(k *Task) {
		from, err := k.Listen(ln.(*net.TCPListener))
		close(listening)
		if err != nil {
			ended <- err
			return
		}
		for n := 1; ; n++ {
			c, peer, err := k.Accept(from)
			if err != nil {
				from.Close()
				ended <- err
				return
			}
			c.Control(func(fd int) {
				if v, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY); v == 0 || err != nil {
					t.Errorf("TCP_NODELAY is %d, %v", v, err)
				}
			})
			c.Close()
			accepted <- peer.String()
			if n == 1 {
				from.Pause()
				goOn <- k
				close(paused)
				k.Wait(time.Time{})
			}
		}
	})
	dial := func() string {
		c, err := net.Dial("tcp4", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.LocalAddr().String()
	}
	<-listening
	if one := dial(); <-accepted != one {
		t.Error("another's address")
	}
	<-paused
	two := dial()
	select {
	case <-accepted:
		t.Error("accepted while paused")
	case <-time.After(20 * time.Millisecond):
	}
	(<-goOn).Wake()
	if <-accepted != two {
		t.Error("another's address")
	}
	listener.Cancel()
	if err := <-ended; err != ErrCancelled {
		t.Error(err)
	}
	if c, err := net.Dial("tcp4", address); err == nil {
		c.Close()
		t.Error("it still listens")
	}
}

// The service manager may have the socket of a listener, too: what still comes there is
// nothing to us when ours is closed.
func TestSharedListener(t *testing.T) {
	l := run(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	others, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer others.Close()
	do(t, l, func(k *Task) {
		from, err := k.Listen(ln.(*net.TCPListener))
		if err != nil {
			t.Fatal(err)
		}
		if err := from.conn.Watch(); err != nil {
			t.Fatal(err)
		}
		from.Close()
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		l.n = 0
		l.pollOnce(uintptr(l.ep))
		for _, e := range l.events[:l.n] {
			if e.Fd != alarmPlace {
				t.Errorf("events %#x of a listener that is closed", e.Events)
			}
		}
	})
}

// BenchmarkRoundTrip is one wait for one connection: a byte there and back.
func BenchmarkRoundTrip(b *testing.B) {
	l := run(b)
	fd, far := pair(b)
	l.Start(func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		var one [1]byte
		for {
			n, err := c.Read(one[:])
			if err == ErrAgain {
				err = k.Wait(time.Time{}, Interest{c, In})
			}
			if n > 0 {
				_, err = c.Write(one[:n])
			}
			if err != nil {
				return
			}
		}
	})
	var one [1]byte
	b.ReportAllocs()
	for b.Loop() {
		if _, err := far.Write(one[:]); err != nil {
			b.Fatal(err)
		}
		if _, err := far.Read(one[:]); err != nil {
			b.Fatal(err)
		}
	}
	far.Close()
}

// BenchmarkAway is what it costs to call something away that takes no time.
func BenchmarkAway(b *testing.B) {
	l := run(b)
	done := make(chan struct{})
	b.ReportAllocs()
	l.Start(func(k *Task) {
		for b.Loop() {
			k.Away(func() {})
		}
		close(done)
	})
	<-done
}

// What happens to two connections at once is dealt with one after the other: the second
// ends the next wait, however long ago it was.
func TestNothingIsForgotten(t *testing.T) {
	l := run(t)
	first, firstFar := pair(t)
	second, secondFar := pair(t)
	do(t, l, func(k *Task) {
		a, b := k.Adopt(first), k.Adopt(second)
		defer a.Close()
		defer b.Close()
		for _, c := range []*Conn{a, b} {
			if err := c.Watch(); err != nil {
				t.Error(err)
			}
		}
		firstFar.Write([]byte("x"))
		secondFar.Close()
		wait := func(for1, for2 Events) error {
			return k.Wait(time.Now().Add(50*time.Millisecond), Interest{a, for1}, Interest{b, for2})
		}
		buf := make([]byte, 8)
		if err := wait(In, Gone); err != nil {
			t.Fatal(err)
		}
		if n, err := a.Read(buf); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if _, err := a.Read(buf); err != ErrAgain {
			t.Fatal(err)
		}
		if err := wait(In, Gone); err != nil || !b.Gone() {
			t.Fatalf("the end of the second was forgotten: %v", err)
		}
		if s := b.Look(); s != Ended {
			t.Errorf("%v", s)
		}
		if err := wait(In, Gone); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("what was dealt with ends a wait: %v", err)
		}
		if n, err := b.Read(buf); n != 0 || err != io.EOF {
			t.Error(n, err)
		}
	})
}

// What came unasked is known until it is read, whatever waits it has ended.
func TestStirred(t *testing.T) {
	l := run(t)
	fd, far := pair(t)
	do(t, l, func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		far.Write([]byte("x"))
		if err := k.Wait(time.Now().Add(time.Second), Interest{c, In}); err != nil || !c.Stirred() {
			t.Fatal(err)
		}
		if s := c.Look(); s != Ready || !c.Stirred() {
			t.Errorf("%v, %v", s, c.Stirred())
		}
		if err := k.Wait(time.Now().Add(20*time.Millisecond), Interest{c, In}); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("what was looked at ends a wait: %v", err)
		}
		if _, err := c.Read(make([]byte, 8)); err != nil || c.Stirred() {
			t.Errorf("%v, %v", err, c.Stirred())
		}
	})
}

// The kernel tells of a reset once, and Look each time. A write after CloseWrite fails,
// too, and says nothing of the other side.
func TestStaysBroken(t *testing.T) {
	tcp, other := tcpPair(t)
	l := run(t)
	other.SetLinger(0)
	other.Close()
	fd, far := pair(t)
	do(t, l, func(k *Task) {
		c := k.Adopt(tcp)
		defer c.Close()
		for n := range 3 {
			if s := c.Look(); s != Broken {
				t.Errorf("%d: %v", n, s)
			}
		}
		half := k.Adopt(fd)
		defer half.Close()
		half.CloseWrite()
		if _, err := half.Write([]byte("x")); err != unix.EPIPE {
			t.Errorf("a write after CloseWrite: %v", err)
		}
		far.Write([]byte("x"))
		if s := half.Look(); s != Ready {
			t.Errorf("%v, though the other side has answered", s)
		}
	})
}

// tcpPair is pair over TCP.
func tcpPair(t testing.TB) (fd int, far *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: ln.Addr().(*net.TCPAddr).Port}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return fd, c.(*net.TCPConn)
}

// Nothing stays unread because a read that ended early said that there is no more: not
// what has come since, nor what is behind urgent data, nor an end.
func TestReadsAll(t *testing.T) {
	fd, far := tcpPair(t)
	l := run(t)
	raw, err := far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	do(t, l, func(k *Task) {
		c := k.Adopt(fd)
		defer c.Close()
		if err := c.Watch(); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 16)
		// It does not wait: at urgent data a read may say that nothing is there when
		// a signal comes.
		read := func(want string, end error) {
			t.Helper()
			var got []byte
			for limit := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
				n, err := c.Read(buf)
				if got = append(got, buf[:n]...); string(got) == want && err == end {
					return
				}
				if err != nil && err != ErrAgain || time.Now().After(limit) {
					t.Fatalf("%q, want %q: %v", got, want, err)
				}
			}
		}
		wait := func() {
			t.Helper()
			if err := k.Wait(time.Now().Add(time.Second), Interest{c, In}); err != nil {
				t.Fatal(err)
			}
		}
		far.Write([]byte("a"))
		read("a", ErrAgain)
		far.Write([]byte("b"))
		for limit := time.Now().Add(time.Second); c.Look() != Ready; {
			if time.Now().After(limit) {
				t.Fatal("nothing comes")
			}
		}
		if n, err := c.Read(buf); n != 1 || err != nil {
			t.Errorf("%d, %v, though Look has seen it", n, err)
		}
		far.Write([]byte("c"))
		if err := raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) }); err != nil {
			t.Fatal(err)
		}
		far.Write([]byte("d"))
		time.Sleep(10 * time.Millisecond) // all of it is there
		wait()
		read("cd", ErrAgain)
		far.Write([]byte("e"))
		far.CloseWrite()
		wait()
		read("e", io.EOF)
	})
}
