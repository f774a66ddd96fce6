package proxy

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/proxy/loop"
)

// ahead keeps connections to the service ready before they are asked for, so that a
// request need not wait for one to be made. Who asks takes one that nobody has used;
// none is used twice, and forwarded clients get none of them, because their hop limit
// is a property of the socket.
//
// A connection that is made in vain costs the service's link some seven packets. So
// there are as many as were wanted lately, and none when nobody has asked for a while.
// It is used on the loop, but for has.
type ahead struct {
	most   int // for each endpoint; 0 for none
	dial   func(netip.AddrPort) (fd int, near netip.AddrPort, err error)
	keeper *loop.Task
	stats  AheadStats

	mu     sync.Mutex // guards what has reads
	stocks map[netip.AddrPort]*stock
}

// AheadStats counts connections that were made before they were asked for.
type AheadStats struct{ Made, Used, Unused atomic.Uint64 }

// stock is what is ready for one endpoint.
type stock struct {
	ready    []prepared // the oldest first
	wanted   int        // connections since then
	since    time.Time
	wantedIn int // in the period before
}

type prepared struct {
	conn *loop.Conn
	near netip.AddrPort
	at   time.Time
}

const (
	// aheadFor is how long a connection is kept ready. How long the service keeps one
	// that says nothing is not known; longer makes fewer in vain where it does.
	aheadFor = 2 * time.Second
	// perReady is how many connections in aheadFor it takes for one more to be kept
	// ready: that many a second come before the first of two is made again.
	perReady = 400
)

// take gives one to a session, if there is one.
func (a *ahead) take(dst netip.AddrPort) (p prepared, ok bool) {
	if a.most == 0 {
		return prepared{}, false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.stock(dst)
	s.wanted++
	for len(s.ready) > 0 {
		p = s.ready[0]
		s.ready = slices.Delete(s.ready, 0, 1)
		if !p.conn.Stirred() && time.Since(p.at) < aheadFor {
			a.stats.Used.Add(1)
			return p, true
		}
		a.drop(p)
	}
	return prepared{}, false
}

// stock is called with a.mu held.
func (a *ahead) stock(dst netip.AddrPort) *stock {
	s := a.stocks[dst]
	if s == nil {
		if a.stocks == nil {
			a.stocks = map[netip.AddrPort]*stock{}
		}
		s = &stock{since: time.Now()}
		a.stocks[dst] = s
	}
	if period := time.Since(s.since); period > aheadFor {
		s.since, s.wantedIn, s.wanted = time.Now(), s.wanted, 0
		if period > 2*aheadFor {
			s.wantedIn = 0
		}
	}
	return s
}

func (a *ahead) drop(p prepared) {
	a.stats.Unused.Add(1)
	p.conn.Close()
}

// fill makes as many ready as are wanted. It is called when nobody waits for it.
func (a *ahead) fill(t *loop.Task, dst netip.AddrPort) {
	if a.most == 0 || a.keeper.Cancelled() {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.stock(dst)
	wanted := max(s.wanted, s.wantedIn)
	if wanted == 0 {
		return
	}
	first := len(s.ready) == 0
	for want := min(1+wanted/perReady, a.most); len(s.ready) < want; {
		fd, near, err := a.dial(dst)
		if err != nil {
			return // who asks next finds out why
		}
		p := prepared{t.Adopt(fd), near, time.Now()}
		if p.conn.Watch() != nil {
			p.conn.Close()
			return
		}
		a.stats.Made.Add(1)
		s.ready = append(s.ready, p)
	}
	if first && len(s.ready) > 0 {
		a.keeper.Wake()
	}
}

// keep ends what is not used in time, until it is cancelled.
func (a *ahead) keep(t *loop.Task) {
	for !t.Cancelled() {
		t.Wait(a.tidy(time.Now().Add(-aheadFor)))
	}
	a.tidy(time.Now())
}

// tidy drops those that were made before then. It returns when there will be more; the
// zero time is never.
func (a *ahead) tidy(before time.Time) (next time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.stocks {
		for len(s.ready) > 0 && !s.ready[0].at.After(before) {
			a.drop(s.ready[0])
			s.ready = slices.Delete(s.ready, 0, 1)
		}
		if len(s.ready) > 0 {
			if end := s.ready[0].at.Add(aheadFor); next.IsZero() || end.Before(next) {
				next = end
			}
		}
	}
	return next
}

// has reports whether a connection is one that is ready. It may be called from any
// goroutine.
func (a *ahead) has(e ends) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.stocks[e.far]
	return s != nil && slices.ContainsFunc(s.ready, func(p prepared) bool { return p.near == e.near })
}
