package proxy

import (
	"net/netip"
	"time"
)

// Any user of the host may open connections and keep them busy for as long as he
// likes: half a head, an answer that he does not read. So connections are counted
// for the owners of their clients, and when there is no room it is made at the
// cost of the owner who has the most, whatever that connection is doing: who
// hoards connections takes them from himself. Clients of other network namespaces
// have slots of their own, so that neither side can take the other's.

// owner is who a connection is counted for: the user who made the client's
// socket, or the address of a client in another network namespace. The zero value
// stands for all clients whose socket the kernel does not know any more.
type owner struct {
	known bool
	uid   uint32
	peer  netip.Addr // of IPv6 the first of its /64, within which a client may take any
}

func forwardedOwner(client netip.Addr) owner {
	if client.Is6() {
		client = netip.PrefixFrom(client, 64).Masked().Addr()
	}
	return owner{known: true, peer: client}
}

// slots are the connections of one kind that are served at once. Proxy.mu guards
// all but arriving.
type slots struct {
	limit    int
	sessions map[*session]struct{}
	held     map[owner]*int // how many of the sessions each owner has

	// arriving has a place for each connection that has no slot: it was accepted
	// and its owner is not known yet, or it was told to end and has not yet. Both
	// take less than a millisecond, or 100 when policy is being asked.
	arriving chan struct{}
}

// maxArriving bounds them. Fewer, and connections that are slow to end hold up the
// next ones in the backlog; more, and a flood takes that much more memory.
const maxArriving = 256

// grace is how long a connection may be without a request before it counts as
// idle: clients that mean to ask do so at once. Shorter, and under load one that
// was about to ask is closed; longer, and connections that are in use are closed
// before those that are not.
const grace = 50 * time.Millisecond

func newSlots(limit int) *slots {
	return &slots{limit: max(limit, 1), sessions: map[*session]struct{}{}, held: map[owner]*int{},
		arriving: make(chan struct{}, maxArriving)}
}

func (h *slots) add(s *session, o owner) {
	n := h.held[o]
	if n == nil {
		n = new(int)
		h.held[o] = n
	}
	*n++
	s.owner, s.held = o, n
	h.sessions[s] = struct{}{}
}

func (h *slots) remove(s *session) {
	if _, ok := h.sessions[s]; !ok {
		return
	}
	delete(h.sessions, s)
	if *s.held--; *s.held == 0 {
		delete(h.held, s.owner)
	}
}

// last is the session that must go first: of the owner with the most, the one that
// has been idle longest, or else the oldest.
func (h *slots) last() *session {
	most := 0
	for _, n := range h.held {
		most = max(most, *n)
	}
	var oldest, idle *session
	before := int64(time.Since(start) - grace)
	for s := range h.sessions {
		if *s.held < most {
			continue
		}
		if oldest == nil || s.accepted.Before(oldest.accepted) {
			oldest = s
		}
		if since := s.idle.Load(); !s.busy.Load() && since < before {
			before, idle = since, s
		}
	}
	if idle != nil {
		return idle
	}
	return oldest
}

// admit gives a session a slot, if need be another's. It reports whether it got
// one.
func (p *Proxy) admit(s *session, o owner) bool {
	h := s.slots
	p.mu.Lock()
	if p.closing {
		p.mu.Unlock()
		return false
	}
	h.add(s, o)
	var last *session
	if len(h.sessions) > h.limit {
		last = h.last()
		h.remove(last)
		last.arriving = true // in the place of s, if it is not s
		p.stats.Evicted.Add(1)
	}
	s.arriving = s == last
	p.mu.Unlock()
	switch last {
	case nil:
		<-h.arriving
	case s:
		return false
	default:
		last.abort()
	}
	return true
}

// leave gives back what a session has that is over.
func (p *Proxy) leave(s *session) {
	p.mu.Lock()
	s.slots.remove(s)
	arriving := s.arriving
	p.mu.Unlock()
	if arriving {
		<-s.slots.arriving
	}
}
