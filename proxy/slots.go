package proxy

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/loop"
)

// Any user of the host may open connections and keep them busy for as long as he
// likes: half a head, an answer that he does not read. So connections are counted
// for the owners of their clients, and when there is no room it is made at the
// cost of the owner who has the most, whatever that connection is doing: who
// hoards connections takes them from himself. Of his cgroups the one with the most
// loses: a unit that hoards takes them from itself. That comes second, because a
// user may make as many cgroups as he likes where some are delegated to him. Clients
// of other network namespaces have slots of their own, so that neither side can take
// the other's.
//
// A part of the slots is not taken from root and from who has a grant, however many
// they have. In audit mode, where nothing may break, a connection for which there is
// no room waits for a moment before another one of the same owner loses its place in
// the middle.

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

// roomFor is how long it waits: requests take milliseconds.
const roomFor = 100 * time.Millisecond

// reserve is the part of the slots that is not taken from root, and that which is not
// taken from those who have a grant.
const reserve = 8

// Kinds of sessions.
const (
	ordinary = iota
	roots
	granted // has been, for its last request or one before
	kinds
)

// part is what an owner has in one cgroup.
type part struct {
	owner
	cgroup uint64
}

// slots are the connections of one kind that are served at once. Proxy.mu guards
// them.
type slots struct {
	limit    int
	sessions map[*session]struct{} // those that are arriving, too
	held     map[owner]*int        // how many slots each owner has
	parts    map[part]*int         // and from each cgroup
	waiting  int                   // who wait for room
	left     chan struct{}         // told when there is some, with place for one

	// arriving counts the connections that have no slot: it was accepted
	// and its owner is not known yet, or it was told to end and has not yet. Both
	// take less than a millisecond, or 100 when policy is being asked. That it may take
	// longer is what turns and maxEnding are about.
	arriving  int
	accepting []*loop.Task // wait until there are fewer

	ending map[owner]int // of those that were told to end while they were in use
}

// maxArriving bounds them. Fewer, and connections that are slow to end hold up the
// next ones in the backlog; more, and a flood takes that much more memory.
const maxArriving = 256

// maxEnding bounds those of one owner that end in the middle, which may take long: of him
// none other ends for a new one before they have, but that itself. More, and one owner may
// hold up all others' next ones; fewer, and he loses new ones where he could lose old ones.
const maxEnding = maxArriving / 8

// grace is how long a connection may be without a request before it counts as
// idle: clients that mean to ask do so at once. Shorter, and under load one that
// was about to ask is closed; longer, and connections that are in use are closed
// before those that are not.
const grace = 50 * time.Millisecond

func newSlots(limit int) *slots {
	return &slots{limit: max(limit, 1), sessions: map[*session]struct{}{}, held: map[owner]*int{}, parts: map[part]*int{}, ending: map[owner]int{},
		left: make(chan struct{}, 1)}
}

func (h *slots) add(s *session, of part) {
	s.of = of
	s.held, s.part = count(h.held, of.owner), count(h.parts, of)
	s.arriving = false
	h.sessions[s] = struct{}{}
}

// taken counts the slots that are.
func (h *slots) taken() int { return len(h.sessions) - h.arriving }

// count counts one more.
func count[K comparable](m map[K]*int, k K) *int {
	n := m[k]
	if n == nil {
		n = new(int)
		m[k] = n
	}
	*n++
	return n
}

// remove takes the slot of a session that has one.
func (h *slots) remove(s *session) {
	s.arriving = true
	if *s.held--; *s.held == 0 {
		delete(h.held, s.of.owner)
	}
	if *s.part--; *s.part == 0 {
		delete(h.parts, s.of)
	}
	select {
	case h.left <- struct{}{}:
	default:
	}
}

// inUse reports whether a session that is told to end may take long to: a request is under
// way, or it is being found out who asks, which who asks can make take as long as he likes.
func (s *session) inUse() bool { return s.busy.Load() || s.asking.Load() }

// last is the session that must go first: of the owner with the most, from the cgroup
// with the most, the one that has been idle longest, or else the oldest.
func (h *slots) last() *session {
	var spared [kinds]int
	for s := range h.sessions {
		if !s.arriving {
			spared[s.kind.Load()]++
		}
	}
	spared[ordinary] = h.limit // and more
	var last *session
	var lastIdle int64 // since when; math.MaxInt64 if it is not
	before := int64(time.Since(start) - grace)
	for s := range h.sessions {
		if s.arriving || spared[s.kind.Load()] <= h.limit/reserve {
			continue
		}
		idle := s.idle.Load()
		if s.inUse() || idle >= before {
			idle = math.MaxInt64
		}
		if last == nil || cmp.Or(
			cmp.Compare(*s.held, *last.held), cmp.Compare(*s.part, *last.part), cmp.Compare(lastIdle, idle), last.accepted.Compare(s.accepted),
		) > 0 {
			last, lastIdle = s, idle
		}
	}
	return last
}

// admit gives a session a slot, if need be another's. It reports whether it got
// one.
func (p *Proxy) admit(s *session, of part) bool {
	h := s.slots
	p.lockWithRoom(s, of)
	if p.over {
		p.mu.Unlock()
		return false
	}
	h.add(s, of)
	h.arriving--
	var last *session
	if h.taken() > h.limit {
		last = cmp.Or(h.last(), s)
		if busy := last != s && last.inUse(); busy && last.of.owner == of.owner && h.ending[of.owner] >= maxEnding {
			last = s
		} else if busy {
			last.ending = true
			h.ending[last.of.owner]++
		}
		h.remove(last)
		h.arriving++
		p.stats.Evicted.Add(1)
	} else {
		h.arrived()
	}
	p.mu.Unlock()
	if last == s {
		return false
	}
	if last != nil {
		last.task.Cancel()
	}
	return true
}

// arrive counts a session that has no slot yet.
func (p *Proxy) arrive(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.arriving = true
	s.slots.arriving++
	s.slots.sessions[s] = struct{}{}
	s.room = len(s.slots.sessions) < s.slots.limit/2
}

// full reports whether no more should be accepted. The task is woken when that changes.
func (p *Proxy) full(h *slots, t *loop.Task) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	full := h.arriving >= maxArriving
	if full && !slices.Contains(h.accepting, t) {
		h.accepting = append(h.accepting, t)
	}
	return full
}

// arrived tells who waits that there are fewer.
func (h *slots) arrived() {
	for _, t := range h.accepting {
		t.Wake()
	}
	h.accepting = h.accepting[:0]
}

// maxWaiting bounds those that wait for room, which have a place among the arriving
// meanwhile.
const maxWaiting = maxArriving / 4

// lockWithRoom locks mu when there is room, or nothing better than to make some: in
// enforce mode, when something idle can go, for root, and for everybody but those who
// would take it from themselves.
func (p *Proxy) lockWithRoom(s *session, of part) {
	h := s.slots
	if p.engine.Mode() == policy.Enforce || s.kind.Load() != ordinary {
		p.mu.Lock()
		return
	}
	var timer <-chan time.Time // made when there is no room
	for waits := true; ; {
		p.mu.Lock()
		if !waits || p.over || h.taken() < h.limit || h.waiting >= maxWaiting {
			return
		}
		if last := h.last(); last == nil || !last.inUse() || last.of.owner != of.owner {
			return
		}
		h.waiting++
		p.mu.Unlock()
		if timer == nil {
			timer = time.After(roomFor)
		}
		select {
		case <-h.left:
		case <-timer:
			waits = false
		}
		p.mu.Lock()
		h.waiting--
		p.mu.Unlock()
	}
}

// leave gives back what a session has that is over.
func (p *Proxy) leave(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.arriving {
		s.slots.remove(s)
	} else {
		s.slots.arriving--
		s.slots.arrived()
	}
	if s.ending {
		if s.slots.ending[s.of.owner]--; s.slots.ending[s.of.owner] == 0 {
			delete(s.slots.ending, s.of.owner)
		}
	}
	delete(s.slots.sessions, s)
}
