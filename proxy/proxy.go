// Package proxy stands between the clients of the metadata service and the
// service.
//
// Each client connection has one connection of ours to the service, and the
// bytes pass between them unchanged: the request that the service sees is the
// one it would see without us, or none. What is decided is decided on the bytes
// that are passed on. There is no pool, no header added or taken away, no
// answer invented but the refusal; whether a connection is kept alive is
// between client and service.
//
// In enforce mode a request waits until it is known who asks and what policy
// says. In audit mode it does not wait, and the record is completed afterwards.
//
// It is the wrong tool for any other HTTP: it reads what clients of the
// metadata service send, and refuses the rest of HTTP/1.1 as a riddle.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
)

// Options of a Proxy.
type Options struct {
	// Endpoints are the destinations that are served. A connection that was
	// going anywhere else is refused.
	Endpoints []netip.AddrPort
	// Mark is set on our own connections, so that the redirect lets them pass.
	Mark uint32
	// MaxConns bounds the connections that are served at once, 4096 if 0. When
	// one more comes, the one that has been idle longest is closed for it, as a
	// server may close any idle connection; if none is idle, it waits. Lower
	// makes a process that hoards connections cost others theirs sooner, higher
	// lets it take more memory.
	MaxConns int
	// Forwardable says whether the host would have forwarded a connection from
	// this client in another network namespace. Nil is never.
	Forwardable func(client, endpoint netip.AddrPort) error
	// Record takes each finished event.
	Record func(*event.Event)
	Host   *event.Host
}

// Timeouts. None is shorter than the shortest of a real client's, which is
// why they need no configuration.
const (
	headTimeout  = 10 * time.Second // for a request that has begun; clients take milliseconds
	idleTimeout  = 5 * time.Minute  // for the next request; the service closes earlier
	AttributeIn  = 100 * time.Millisecond
	attributeInA = 20 * time.Millisecond // in audit mode, while the answer is under way
	completeIn   = 2 * time.Second       // in audit mode, after the answer
	drainTimeout = 5 * time.Second
)

// Proxy serves redirected connections. Its methods may be called from any
// goroutine.
type Proxy struct {
	options Options
	finder  *attribution.Finder
	engine  *policy.Engine

	slots chan struct{}
	wg    sync.WaitGroup // sessions, and events that wait for their evidence

	mu        sync.Mutex // guards the following
	listeners []net.Listener
	sessions  map[*session]struct{}
	closing   bool

	rendered rendered
	stats    Stats
}

// Stats counts since the start.
type Stats struct {
	Connections, Requests, Denied, WouldDeny, Malformed, NotRedirected, NotForwardable, UpstreamFailed atomic.Uint64
}

// New makes a Proxy that asks the finder who and the engine whether.
func New(o Options, finder *attribution.Finder, engine *policy.Engine) *Proxy {
	if o.MaxConns == 0 {
		o.MaxConns = 4096
	}
	return &Proxy{options: o, finder: finder, engine: engine,
		slots: make(chan struct{}, o.MaxConns), sessions: map[*session]struct{}{}}
}

// Stats is live.
func (p *Proxy) Stats() *Stats { return &p.stats }

// Listen opens a listener for redirected connections. Multipath TCP, which
// net.Listen speaks by default, is off: SO_ORIGINAL_DST fails on it.
func Listen(ctx context.Context, addr netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{KeepAlive: -1}
	lc.SetMultipathTCP(false)
	network := "tcp4"
	if addr.Addr().Is6() {
		network = "tcp6"
		lc.Control = freebind
	}
	return lc.Listen(ctx, network, addr.String())
}

// Serve accepts connections until the listener or the Proxy is closed.
// forwarded says that they come from other network namespaces. It closes the
// listener and returns nil after Close or Shutdown.
func (p *Proxy) Serve(ln net.Listener, forwarded bool) error {
	p.mu.Lock()
	if p.closing {
		p.mu.Unlock()
		return ln.Close()
	}
	p.listeners = append(p.listeners, ln)
	p.mu.Unlock()
	for {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			if exhausted(err) {
				time.Sleep(5 * time.Millisecond) // until some connection has ended
				continue
			}
			return fmt.Errorf("accept on %v: %w", ln.Addr(), err)
		}
		p.acquire()
		s := &session{p: p, client: c.(*net.TCPConn), forwarded: forwarded, accepted: time.Now()}
		s.idle.Store(int64(time.Since(start)))
		if !p.add(s) {
			<-p.slots
			c.Close()
			continue
		}
		go func() {
			defer p.wg.Done()
			s.run()
			p.remove(s)
			<-p.slots
		}()
	}
}

// grace is how long a connection may be without a request before it counts as
// idle: clients that mean to ask do so at once. Shorter, and under load one that
// was about to ask is closed; longer, and hoarded connections hold up others.
const grace = 50 * time.Millisecond

// acquire waits for a slot.
func (p *Proxy) acquire() {
	for {
		select {
		case p.slots <- struct{}{}:
			return
		default:
		}
		p.evict()
		select {
		case p.slots <- struct{}{}:
			return
		case <-time.After(grace / 10):
		}
	}
}

// evict closes the connection that has been idle longest, if it is idle.
func (p *Proxy) evict() {
	p.mu.Lock()
	defer p.mu.Unlock()
	var oldest *session
	for s := range p.sessions {
		if !s.busy.Load() && (oldest == nil || s.idle.Load() < oldest.idle.Load()) {
			oldest = s
		}
	}
	if oldest != nil && time.Since(start)-time.Duration(oldest.idle.Load()) > grace {
		oldest.client.Close()
	}
}

// exhausted reports whether accept failed for want of something that
// connections give back when they end.
func exhausted(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (p *Proxy) add(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closing {
		return false
	}
	p.wg.Add(1)
	p.sessions[s] = struct{}{}
	return true
}

func (p *Proxy) remove(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.sessions, s)
}

// Open counts the connections that are served now.
func (p *Proxy) Open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.sessions)
}

// Shutdown stops accepting, lets answers that are under way be passed on, and
// closes the rest when ctx is done or after five seconds. It returns when
// everything has ended.
func (p *Proxy) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	p.mu.Lock()
	p.closing = true
	for _, ln := range p.listeners {
		ln.Close()
	}
	for s := range p.sessions {
		if !s.busy.Load() {
			s.client.Close()
		}
	}
	p.mu.Unlock()
	done := make(chan struct{})
	go func() {
		p.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	left := len(p.sessions)
	for s := range p.sessions {
		s.client.Close()
	}
	p.mu.Unlock()
	<-done
	if left > 0 {
		return fmt.Errorf("closed %d connections whose answer had not come", left)
	}
	return nil
}

func (p *Proxy) stopping() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closing
}

// serves reports whether a destination is one of the endpoints.
func (p *Proxy) serves(dst netip.AddrPort) bool { return slices.Contains(p.options.Endpoints, dst) }
