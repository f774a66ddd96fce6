package proxy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/proxy/loop"
)

// A self-test goes the way of a client's request: through the redirect, into the backlog
// of the listener, and through the event loop into a session. That session answers it
// itself, and nothing reaches the service. It is known by the ends of its
// connection, which nobody else can have meanwhile, and by a secret that was made for
// it alone. It is not recorded, and counted nowhere.

// Errors of SelfTest. Others are about the connection: there is no route, or it is
// refused.
var (
	// ErrStuck says that the event loop does nothing.
	ErrStuck = errors.New("the event loop does not run")
	// ErrUnanswered says that the connection was made, and nothing comes back.
	ErrUnanswered = errors.New("no answer")
	// ErrBusy says that it waits to be accepted, and that others which came before are
	// being accepted: nothing is known yet.
	ErrBusy = errors.New("no answer yet: others are served first")
	// ErrNotRedirected says that somebody else answered.
	ErrNotRedirected = errors.New("the connection did not come to the daemon")
)

const (
	selfTestIn = 3 * time.Second // for the answer, which takes a millisecond
	stuckAfter = 2 * time.Second // more
)

// selfTest has what is sent, and what is to come back.
type selfTest struct{ ask, answer string }

// selfTests are those that are under way, by their connections. Its methods may be called
// from any goroutine.
type selfTests struct {
	mu   sync.Mutex // guards open, and is held from before one connects until it is there
	open map[ends]selfTest
}

func (a *selfTests) dial(dst netip.AddrPort, mark uint32, minTTL int, t selfTest) (fd int, e ends, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fd, near, err := dial(dst, mark, minTTL)
	e = ends{near, dst}
	if err == nil {
		if a.open == nil {
			a.open = map[ends]selfTest{}
		}
		a.open[e] = t
	}
	return fd, e, err
}

// take gives each away once.
func (a *selfTests) take(e ends) (selfTest, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t, ok := a.open[e]
	delete(a.open, e)
	return t, ok
}

// SelfTest sees whether a connection from this host to an endpoint comes here and is
// answered. Any error but ErrStuck and ErrUnanswered says that the event loop works,
// whatever the redirect does. Where that is missing, the service gets a request for a
// path that it does not have. It may be called from any goroutine, once Serve is.
func (p *Proxy) SelfTest(ctx context.Context, endpoint netip.AddrPort) error {
	secret := selfTest{"GET /" + rand.Text() + " HTTP/1.1\r\nHost: imdsgate\r\n\r\n", rand.Text()}
	accepted := p.acceptedOver(endpoint)
	before := accepted.Load()
	err := p.onLoop(ctx, func(t *loop.Task) error {
		fd, e, err := p.selfTests.dial(endpoint, 0, 0, secret)
		if err != nil {
			return err
		}
		defer p.selfTests.take(e)
		c := t.Adopt(fd)
		defer c.Close()
		until := time.Now().Add(selfTestIn)
		if err := write(t, c, secret.ask, until); errors.Is(err, os.ErrDeadlineExceeded) {
			return syscall.ETIMEDOUT // to connect
		} else if err != nil {
			return err
		}
		answer, err := read(t, c, len(secret.answer), until)
		switch {
		case err == nil && answer != secret.answer:
			return ErrNotRedirected
		case errors.Is(err, os.ErrDeadlineExceeded):
			if _, waits := p.selfTests.take(e); waits && accepted.Load() != before {
				return ErrBusy
			}
			return ErrUnanswered
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("self-test of %v: %w", endpoint, err)
	}
	return nil
}

// acceptedOver counts the connections of this host that were accepted over the same
// family as one to an endpoint is. A listener that accepts nothing must not be taken for
// a busy one because another one works.
func (p *Proxy) acceptedOver(endpoint netip.AddrPort) *atomic.Uint64 {
	if endpoint.Addr().Is4() {
		return &p.accepted[0]
	}
	return &p.accepted[1]
}

// Turns reports whether the event loop works, with an error that is ErrStuck if not.
func (p *Proxy) Turns(ctx context.Context) error {
	return p.onLoop(ctx, func(*loop.Task) error { return nil })
}

// onLoop runs a function as a task and waits for it, but not for ever.
func (p *Proxy) onLoop(ctx context.Context, f func(*loop.Task) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, selfTestIn+stuckAfter, ErrStuck)
	defer cancel()
	p.mu.Lock()
	if p.loop == nil || p.closing.Load() {
		p.mu.Unlock()
		return net.ErrClosed
	}
	ended := make(chan error, 1)
	p.wg.Add(1)
	task, _ := p.loop.Start(func(t *loop.Task) {
		defer p.wg.Done()
		ended <- f(t)
	})
	p.mu.Unlock()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		task.Cancel()
		return context.Cause(ctx)
	}
}

// write sends all of it.
func write(t *loop.Task, c *loop.Conn, b string, until time.Time) error {
	for len(b) > 0 {
		n, err := c.Write([]byte(b))
		b = b[n:]
		if err == loop.ErrAgain {
			err = t.Wait(until, loop.Interest{Conn: c, For: loop.Out})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// read takes so many bytes, or fewer if the other end has no more.
func read(t *loop.Task, c *loop.Conn, n int, until time.Time) (string, error) {
	b := make([]byte, n)
	for have := 0; ; {
		got, err := c.Read(b[have:])
		have += got
		if err == loop.ErrAgain {
			err = t.Wait(until, loop.Interest{Conn: c, For: loop.In})
		}
		switch {
		case err == io.EOF, have == n:
			return string(b[:have]), nil
		case err != nil:
			return "", err
		}
	}
}

// testsItself reports whether the client is a self-test of ours, and then serves it.
func (s *session) testsItself() bool {
	if s.forwarded {
		return false
	}
	test, ok := s.p.selfTests.take(s.arrived())
	if !ok {
		return false
	}
	until := time.Now().Add(selfTestIn)
	if asked, err := read(s.task, s.client, len(test.ask), until); err == nil && asked == test.ask {
		write(s.task, s.client, test.answer, until)
	}
	return true
}
