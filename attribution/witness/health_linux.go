package witness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
)

// checkTimeout bounds a Check: it connects over the loopback, which takes some 50 µs.
const checkTimeout = 2 * time.Second

// A probe listens where only we connect: the programs treat its addresses like
// endpoints, and refuse everybody else.
type probe struct {
	listeners []*net.TCPListener
	turn      chan struct{} // one Check at a time
}

func newProbe() (*probe, error) {
	p := &probe{turn: make(chan struct{}, 1)}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	for _, l := range []struct{ network, addr string }{{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}} {
		ln, err := lc.Listen(context.Background(), l.network, l.addr)
		if err != nil {
			if l.network == "tcp6" {
				break // without IPv6 on lo a v4-mapped address passes connect6
			}
			return nil, fmt.Errorf("listen for our own probes: %w", err)
		}
		p.listeners = append(p.listeners, ln.(*net.TCPListener))
	}
	return p, nil
}

func (p *probe) addrs() []netip.AddrPort {
	var all []netip.AddrPort
	for _, ln := range p.listeners {
		all = append(all, unmap(ln.Addr()))
	}
	return all
}

func unmap(a net.Addr) netip.AddrPort {
	at := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

func (p *probe) close() error {
	var errs []error
	for _, ln := range p.listeners {
		errs = append(errs, ln.Close())
	}
	return errors.Join(errs...)
}

// Check connects to a listener of our own, by IPv4 and by an IPv6 socket, and says
// what did not see it. It takes some 300 µs, and two seconds at most. A BPF link can be
// detached by root without a word to us, so it is worth repeating.
func (w *Witness) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	select {
	case w.probe.turn <- struct{}{}:
		defer func() { <-w.probe.turn }()
	case <-ctx.Done():
		return fmt.Errorf("check the witness: %w", ctx.Err())
	}
	for _, ln := range w.probe.listeners {
		if err := w.checkHook(ctx, ln, false); err != nil {
			return fmt.Errorf("check the witness: %w", err)
		}
	}
	if len(w.probe.listeners) == 1 {
		if err := w.checkHook(ctx, w.probe.listeners[0], true); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return fmt.Errorf("check the witness: %w", err)
		}
	}
	return nil
}

// checkHook connects once. Mapped uses an IPv6 socket for an IPv4 address.
func (w *Witness) checkHook(ctx context.Context, ln *net.TCPListener, mapped bool) error {
	deadline, _ := ctx.Deadline()
	if err := ln.SetDeadline(deadline); err != nil {
		return err
	}
	addr := unmap(ln.Addr())
	hook, family := "cgroup/connect6", unix.AF_INET6
	to := unix.Sockaddr(&unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if addr.Addr().Is4() && !mapped {
		hook, family = "cgroup/connect4", unix.AF_INET
		to = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	open := true
	defer func() {
		if open {
			unix.Close(fd)
		}
	}()
	left := unix.NsecToTimeval(max(time.Until(deadline).Nanoseconds(), 1e6))
	if err := errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &left),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), // no TIME_WAIT
	); err != nil {
		return err
	}
	if err := unix.Connect(fd, to); errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s takes us for another process than %d (%v); the witness works in the initial pid namespace only: %w",
			hook, os.Getpid(), err, errors.ErrUnsupported)
	} else if err != nil && !errors.Is(err, unix.EINTR) { // with a time-out a signal ends the wait (signal(7)); it goes on
		return fmt.Errorf("connect to our own %v: %w", addr, err)
	}
	conn, err := acceptFrom(ln, fd)
	if err != nil {
		return fmt.Errorf("accept our own connection: %w", err)
	}
	defer conn.Close()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return fmt.Errorf("ask for the cookie of our socket: %w", err)
	}
	t := diag.Tuple{Local: unmap(conn.RemoteAddr()), Remote: addr}
	found, err := w.Connectors(t, false)
	switch {
	case err != nil:
		return fmt.Errorf("%s or sockops did not see our own connection %v: %w", hook, t, err)
	case len(found) != 1 || found[0].SocketCookie != cookie || found[0].Tuple != t:
		return fmt.Errorf("%s saw %+v for our own connection %v with cookie %#x", hook, found, t, cookie)
	case found[0].PID != os.Getpid():
		return fmt.Errorf("%s says that process %d made our connection, and we are %d; the witness works in the initial pid namespace only: %w",
			hook, found[0].PID, os.Getpid(), errors.ErrUnsupported)
	}
	if err := errors.Join(w.checkWriter(fd), w.checkHolding(fd)); err != nil {
		return err
	}
	open = false
	if err := unix.Close(fd); err != nil {
		return err
	}
	if _, err := w.Connectors(t, false); !errors.Is(err, attribution.ErrNoWitness) {
		return fmt.Errorf("cgroup/sock_release left %v behind: %w", t, err)
	}
	if kept, err := w.recorded(cookie); kept || err != nil {
		return fmt.Errorf("cgroup/sock_release left cookie %#x behind: %w", cookie, err)
	}
	return nil
}

// acceptFrom accepts the connection of a socket of ours, and closes what an earlier check
// that failed has left in the backlog.
func acceptFrom(ln *net.TCPListener, fd int) (net.Conn, error) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return nil, err
		}
		own, err := unix.Getsockname(fd)
		port := 0
		switch own := own.(type) {
		case *unix.SockaddrInet4:
			port = own.Port
		case *unix.SockaddrInet6:
			port = own.Port
		}
		if err != nil || port == conn.RemoteAddr().(*net.TCPAddr).Port {
			return conn, err
		}
		conn.Close()
	}
}

// recorded reports whether a socket has a record.
func (w *Witness) recorded(cookie uint64) (bool, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return false, errClosed
	}
	l := lookups.Get().(*lookup)
	defer lookups.Put(l)
	l.cookie = cookie
	return l.get(w.plan.connectors, unsafe.Pointer(&l.cookie), unsafe.Pointer(&l.record))
}
