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
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/loop"
)

// Options of a Proxy.
type Options struct {
	// Endpoints are the destinations that are served. A connection that was
	// going anywhere else is refused.
	Endpoints []netip.AddrPort
	// Mark is set on our own connections, so that the redirect lets them pass.
	Mark uint32
	// MaxConns bounds the connections that are served at once, 4096 if 0. A
	// quarter of them is for forwarded clients, and the rest for the host's own.
	// When one more comes, the user (or the forwarded address) who has the most
	// loses one, from the cgroup with the most: the one that has been idle longest,
	// as a server may close any idle connection, or else the oldest. Root's are
	// spared while they are no more than an eighth, and so are those of who has a
	// grant. Lower makes it more likely that one who needs many loses one in use,
	// higher takes more memory.
	MaxConns int
	// Rate bounds the requests a second of one caller, after as many at once as
	// Burst says, twice as many if 0: more wait a little, and get 503 in enforce mode.
	// Those for session tokens count and do not wait, and are refused only when they are
	// far ahead.
	// 0 sets no bounds. Lower than what an SDK asks in a row, which is some ten, makes
	// it wait. In audit mode it slows down and bounds nothing.
	Rate, Burst int
	// DialAhead bounds the connections to each endpoint that are made before somebody
	// asks for them, as far as some were wanted lately; 0 for none. Each that is not
	// used within two seconds has cost the service packets for nothing.
	DialAhead int
	// Forwardable says whether the host would have forwarded a connection from
	// this client in another network namespace. Nil is never.
	Forwardable func(client, endpoint netip.AddrPort) error
	// Record takes each finished event.
	Record func(*event.Event)
	// Host is of each event.
	Host func() *event.Host
}

// Timeouts. None is shorter than the shortest of a real client's, which is
// why they need no configuration.
const (
	headTimeout  = 10 * time.Second // for a request that has begun; clients take milliseconds
	idleTimeout  = 5 * time.Minute  // for the next request, an answer, or a client that reads it; the service closes earlier
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

	uid     uint32         // our own
	silence time.Duration  // idleTimeout
	half    time.Duration  // headTimeout, for the answer to a client that sends no more
	wg      sync.WaitGroup // listeners, sessions, and events that wait for their evidence

	mu               sync.Mutex // guards the following
	local, forwarded *slots
	loop             *loop.Loop   // nil before the first Serve
	standing         []*loop.Task // end with Shutdown
	over             bool         // Shutdown waits for nobody any more

	closing atomic.Bool  // set with mu held
	drained atomic.Int64 // connections that were accepted before end, in nanoseconds of the monotonic clock

	// evidence has a place for each event that waits for its evidence, in audit
	// mode, after its client was served and has perhaps left. Events for which
	// there is none have the evidence of the moment.
	evidence chan struct{}

	ahead ahead
	ours  ours

	selfTests selfTests
	accepted  [2]atomic.Uint64 // as acceptedOver says

	turns    turns
	pace     pace
	rendered rendered
	tokens   *tokens
	ledger   *ledger
	stats    Stats
}

// Stats counts since the start.
type Stats struct {
	Connections, Requests, Denied, WouldDeny, Malformed, NotRedirected, NotForwardable, UpstreamFailed atomic.Uint64

	// Evicted counts connections that were closed because their owner had the most
	// when another came.
	Evicted atomic.Uint64

	// Throttled counts requests of callers who ask more often than Options.Rate
	// allows, and for whom it would have taken too long to wait.
	Throttled atomic.Uint64

	// Looped counts our own connections that came back to us instead of reaching the
	// service.
	Looped atomic.Uint64
}

// New makes a Proxy that asks the finder who and the engine whether.
func New(o Options, finder *attribution.Finder, engine *policy.Engine) *Proxy {
	if o.MaxConns == 0 {
		o.MaxConns = 4096
	}
	forwarded := max(o.MaxConns/4, 1)
	p := &Proxy{options: o, finder: finder, engine: engine, uid: uint32(os.Geteuid()), silence: idleTimeout, half: headTimeout,
		local: newSlots(o.MaxConns - forwarded), forwarded: newSlots(forwarded), evidence: make(chan struct{}, o.MaxConns),
		pace: pace{each: rate.Limit(o.Rate), burst: cmp.Or(o.Burst, 2*o.Rate), held: heldFor, heldA: heldForA, owed: owedFor}, tokens: newTokens(), ledger: newLedger()}
	if o.Rate == 0 { // or else requests are counted, since they cost the service packets
		p.ahead.most = o.DialAhead
	}
	p.ahead.dial = func(dst netip.AddrPort) (int, netip.AddrPort, error) { return dial(dst, o.Mark, 0) }
	return p
}

// Ahead is live.
func (p *Proxy) Ahead() *AheadStats { return &p.ahead.stats }

// Stats is live.
func (p *Proxy) Stats() *Stats { return &p.stats }

// Tokens says of how many session tokens it is known whose they are, and how many
// others were forgotten before they had expired.
func (p *Proxy) Tokens() (known int, forgotten uint64) { return p.tokens.count() }

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
	ended := make(chan error, 1)
	if err := p.listen(ln.(*net.TCPListener), forwarded, ended); err != nil {
		return err
	}
	return <-ended
}

// listen begins to accept, unless the Proxy is closed.
func (p *Proxy) listen(ln *net.TCPListener, forwarded bool, ended chan<- error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closing.Load() {
		ended <- nil
		return ln.Close()
	}
	if p.loop == nil {
		l, err := loop.New()
		if err != nil {
			return errors.Join(err, ln.Close())
		}
		p.loop = l
		go l.Run()
		p.ahead.keeper = p.stand(p.ahead.keep)
	}
	p.stand(func(t *loop.Task) { ended <- p.accept(t, ln, forwarded) })
	return nil
}

// stand begins a task that Shutdown cancels. It is called with p.mu held.
func (p *Proxy) stand(f func(*loop.Task)) *loop.Task {
	p.wg.Add(1)
	t, _ := p.loop.Start(func(t *loop.Task) {
		defer p.wg.Done()
		f(t)
	})
	p.standing = append(p.standing, t)
	return t
}

// accept begins a session for each connection.
func (p *Proxy) accept(t *loop.Task, from *net.TCPListener, forwarded bool) error {
	slots, accepted := p.local, p.acceptedOver(unmap(from.Addr().(*net.TCPAddr).AddrPort()))
	if forwarded {
		slots, accepted = p.forwarded, new(atomic.Uint64) // of which no self-test is one
	}
	ln, err := t.Listen(from)
	if err != nil {
		return fmt.Errorf("listen on %v: %w", from.Addr(), err)
	}
	defer ln.Close()
	for left := p.options.MaxConns; ; {
		for p.full(slots, t) && !t.Cancelled() {
			ln.Pause()
			t.Wait(time.Time{})
		}
		c, peer, err := t.Accept(ln)
		if err == loop.ErrCancelled && left > 0 && p.engine.Mode() == policy.Audit {
			// The redirect is gone, and the tracker goes with us: those who were led
			// here just before have nobody else.
			left--
			if c, peer, err = t.AcceptLeft(ln); err == loop.ErrAgain {
				return nil
			}
		}
		switch {
		case err == loop.ErrCancelled:
			return nil
		case err == loop.ErrAgain:
			continue
		case exhausted(err):
			ln.Pause()
			if t.Cancelled() { // and waits for nothing any more; others shall end meanwhile
				left -= p.options.MaxConns / 256
				t.Away(func() { time.Sleep(exhaustedFor) })
				continue
			}
			t.Sleep(exhaustedFor)
			continue
		case err != nil:
			return fmt.Errorf("accept on %v: %w", from.Addr(), err)
		}
		accepted.Add(1)
		s := &session{p: p, client: c, slots: slots, forwarded: forwarded, accepted: time.Now()}
		s.conn = event.Connection{Source: unmap(peer), Forwarded: forwarded, Accepted: s.accepted}
		s.idle.Store(int64(time.Since(start)))
		p.wg.Add(1)
		s.task = t.Go(func(*loop.Task) { // which does not run yet
			defer p.wg.Done()
			s.run()
			p.leave(s)
		})
		p.arrive(s)
	}
}

// exhaustedFor is how long it waits before it tries again what exhausted is about.
const exhaustedFor = 5 * time.Millisecond

// exhausted reports whether something failed for want of what connections give back
// when they end.
func exhausted(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Open counts the connections that are served now.
func (p *Proxy) Open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.local.taken() + p.forwarded.taken()
}

// Shutdown stops accepting, lets requests that have come be answered, in audit
// mode also on connections that wait to be accepted, and closes the rest when
// ctx is done or after five seconds. It returns when everything has ended. In
// audit mode nobody should be led here any more, in enforce mode those who wait
// do so for the next daemon, if the service manager has the port.
func (p *Proxy) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	p.mu.Lock()
	p.closing.Store(true)
	for _, t := range p.standing {
		t.Cancel()
	}
	p.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.wg.Wait()
		p.mu.Lock()
		l := p.loop
		p.mu.Unlock()
		if l != nil {
			l.Close()
		}
	}()
	left := p.end(ctx, done)
	<-done
	return unanswered(left)
}

// Drain ends the connections that there are, as Shutdown does, and serves those that
// come meanwhile. After a change of the mode none is left that began in the old one.
func (p *Proxy) Drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	p.drained.Store(int64(time.Since(start)))
	return unanswered(p.end(ctx, nil))
}

// end has the connections that end go when they are idle, and cancels those that are
// left when ctx is done. It returns how many these were, once none is left or done is
// closed.
func (p *Proxy) end(ctx context.Context, done <-chan struct{}) (cancelled int) {
	for {
		left := 0
		p.mu.Lock()
		for s := range p.sessions() {
			if s.ends() {
				s.task.Wake() // it sees for itself whether it has a request in its hands
				left++
			}
		}
		p.mu.Unlock()
		if left == 0 && done == nil {
			return 0
		}
		select {
		case <-done:
			return 0
		case <-ctx.Done():
			p.mu.Lock()
			defer p.mu.Unlock()
			p.over = p.closing.Load()
			for s := range p.sessions() {
				if s.ends() && !s.task.Cancelled() { // or else it was told before
					s.task.Cancel()
					cancelled++
				}
			}
			return cancelled
		case <-time.After(grace / 5):
		}
	}
}

func unanswered(connections int) error {
	if connections == 0 {
		return nil
	}
	return fmt.Errorf("closed %d connections whose answer had not come", connections)
}

// sessions yields those that have not ended. It is called with p.mu held.
func (p *Proxy) sessions() iter.Seq[*session] {
	return func(yield func(*session) bool) {
		for _, h := range []*slots{p.local, p.forwarded} {
			for s := range h.sessions {
				if !yield(s) {
					return
				}
			}
		}
	}
}

// looped reports whether a client is one of our own connections to the service, and
// tells the session that it belongs to, which happens where the kernel does not keep
// them apart from clients' (iptables.Coverage.Zone). When our side resets a redirected
// connection, conntrack keeps where it led for some ten seconds, and a connection
// of ours that happens to have the same port is led there, too, whatever its mark
// (the entry is reused, so that no rule is asked; nf_conntrack_proto_tcp.c).
func (p *Proxy) looped(client *session) bool {
	if uid, known := client.lookup.UID(); !known || uid != p.uid {
		return false
	}
	if p.ahead.has(client.arrived()) { // which learns it by being reset
		p.stats.Looped.Add(1)
		return true
	}
	s := p.ours.find(client.arrived())
	if s == nil {
		return false
	}
	p.stats.Looped.Add(1)
	s.looped.Store(true)
	return true
}

// own reports whether a connection is one of ours to the service.
func (p *Proxy) own(e ends) bool { return p.ours.find(e) != nil || p.ahead.has(e) }

// For names the client for whom a connection of ours to the service is, by the ends of
// that. It is false for every other connection.
func (p *Proxy) For(near, endpoint netip.AddrPort) (client netip.AddrPort, ok bool) {
	s := p.ours.find(ends{near, endpoint})
	if s == nil {
		return netip.AddrPort{}, false
	}
	return s.conn.Source, true
}

// serves reports whether a destination is one of the endpoints.
func (p *Proxy) serves(dst netip.AddrPort) bool { return slices.Contains(p.options.Endpoints, dst) }
