package witness

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
)

// Kind says what is remarkable about a connect.
type Kind uint8

const (
	// Marked is a connect of another process with the daemon's mark, which the
	// redirect exempts.
	Marked Kind = iota + 1
	// Uncovered is a connect in a network namespace from which nothing arrives
	// through the redirect.
	Uncovered
)

func (k Kind) String() string {
	switch k {
	case Marked:
		return "marked"
	case Uncovered:
		return "uncovered"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Sighting is a connect to an endpoint that the redirect will not see.
type Sighting struct {
	Kind
	Connector attribution.Connector // its NetnsCookie says where
	Refused   bool                  // with EPERM, or by taking off a mark that came after connect
}

const (
	// arrival is how long a connection may take from established to Arrived. Too low,
	// and a busy proxy makes a covered namespace look uncovered, which refuses it where
	// that is asked for; higher lets that much more pass before it is refused.
	arrival = 200 * time.Millisecond
	// coveredFor is how long a namespace counts as covered before the programs ask
	// about it again. Too low costs an event for many connections; too high lets a
	// namespace that got an interface of its own go unnoticed for so long.
	coveredFor = time.Minute
	// forgetAfter is when a namespace without live sockets is dropped.
	forgetAfter = time.Minute
)

// A watch reads what the programs report, and knows which namespaces are covered.
type watch struct {
	w      *Witness
	reader *ringbuf.Reader
	done   chan struct{}

	mu         sync.Mutex    // guards the following, and writes of the map of coverage
	redirected time.Duration // when the redirect was there; CLOCK_MONOTONIC, as all times here
	covered    map[uint64]time.Duration
	uncovered  map[uint64]stray
	waiting    map[uint64]stray

	// Connections that had ended when they arrived: their establishment may not have
	// been read yet. By tuples without a namespace; the older ones are dropped every
	// arrival.
	ended, endedBefore map[tuple]time.Duration
	turned             time.Duration
}

// stray is an established connection that has not arrived at the proxy.
type stray struct {
	since  time.Duration // it was read, or its namespace is uncovered
	record record
}

func startWatch(w *Witness) (*watch, error) {
	reader, err := ringbuf.NewReader(w.maps["events"])
	if err != nil {
		return nil, fmt.Errorf("read the events of the programs: %w", err)
	}
	v := &watch{
		w: w, reader: reader, done: make(chan struct{}),
		redirected: never, covered: map[uint64]time.Duration{}, uncovered: map[uint64]stray{}, waiting: map[uint64]stray{},
		ended: map[tuple]time.Duration{},
	}
	go v.run()
	return v, nil
}

func (v *watch) close() error {
	err := v.reader.Close()
	<-v.done
	return err
}

func (v *watch) run() {
	defer close(v.done)
	var sample ringbuf.Record
	tidy := monotonic() + forgetAfter/2
	for {
		now := monotonic()
		if now >= tidy {
			tidy = now + forgetAfter/2
			v.tidy(now)
		}
		v.reader.SetDeadline(time.Now().Add(v.overdue(now, tidy) - now))
		err := v.reader.ReadInto(&sample)
		switch {
		case errors.Is(err, ringbuf.ErrClosed):
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
		case err == nil && len(sample.RawSample) >= int(recordSize):
			// The ring's samples are aligned to 8 bytes; a copy of one on the heap, too.
			v.event(*(*record)(unsafe.Pointer(&sample.RawSample[0])))
		}
	}
}

// overdue reports what has not arrived in time, and says when to look again.
func (v *watch) overdue(now, next time.Duration) time.Duration {
	var late []record
	v.mu.Lock()
	for netns, wait := range v.waiting {
		if until := wait.since + arrival; until > now {
			next = min(next, until)
			continue
		}
		delete(v.waiting, netns)
		v.uncovered[netns] = stray{now, wait.record}
		v.put(netns, coverage{uncovered: 1})
		late = append(late, wait.record)
	}
	v.mu.Unlock()
	for i := range late {
		v.report(Uncovered, &late[i])
	}
	return next
}

func (v *watch) event(r record) {
	switch {
	case r.flags&flagMarked != 0:
		v.report(Marked, &r)
	case r.flags&flagUncovered != 0:
		v.report(Uncovered, &r)
	default:
		v.established(r)
	}
}

// established begins to wait for a connection.
func (v *watch) established(r record) {
	v.mu.Lock()
	defer v.mu.Unlock()
	netns, at := r.key.netns, time.Duration(r.at)
	if _, asked := v.waiting[netns]; asked || v.covered[netns] >= at || at < v.redirected || len(v.waiting) >= maxNamespaces {
		return
	}
	now, key := monotonic(), r.key
	key.netns = 0
	if max(v.ended[key], v.endedBefore[key]) >= at {
		v.cover(netns, now)
		return
	}
	v.waiting[netns] = stray{now, r}
}

func (v *watch) report(kind Kind, r *record) {
	if v.w.opts.Report != nil {
		v.w.opts.Report(Sighting{kind, r.connector(), r.flags&flagRefused != 0})
	}
}

// put tells the programs. The map is as large as that of the namespaces; namespaces that
// have long been uncovered make room.
func (v *watch) put(netns uint64, c coverage) {
	m := v.w.maps["coverage"]
	if m.Update(netns, unsafe.Pointer(&c), ebpf.UpdateAny) == nil {
		return
	}
	oldest, at := uint64(0), time.Duration(-1)
	for netns, a := range v.uncovered {
		if at < 0 || a.since < at {
			oldest, at = netns, a.since
		}
	}
	if at >= 0 {
		delete(v.uncovered, oldest)
		_ = m.Delete(oldest)
		_ = m.Update(netns, unsafe.Pointer(&c), ebpf.UpdateAny) // without it the programs only ask again
	}
}

// passing leaves out those whose namespaces are known not to go through the redirect,
// unless that are all.
func (v *watch) passing(found []attribution.Connector) []attribution.Connector {
	v.mu.Lock()
	defer v.mu.Unlock()
	var passing []attribution.Connector
	for _, c := range found {
		if _, uncovered := v.uncovered[c.NetnsCookie]; !uncovered {
			passing = append(passing, c)
		}
	}
	if len(passing) == 0 {
		return found
	}
	return passing
}

// Arrived implements attribution.Witness. It takes 0.1 µs, and a system call twice
// a minute.
func (w *Witness) Arrived(t diag.Tuple, connectors []attribution.Connector) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return
	}
	v := w.watch
	now := monotonic()
	v.mu.Lock()
	defer v.mu.Unlock()
	switch len(connectors) {
	case 0:
		v.ending(tupleOf(0, t), now)
	case 1: // of several, nobody knows which
		v.cover(connectors[0].NetnsCookie, now)
	}
}

// cover notes that what a namespace connects to arrives. It is called with v.mu held.
func (v *watch) cover(netns uint64, now time.Duration) {
	_, uncovered := v.uncovered[netns]
	_, waiting := v.waiting[netns]
	if last, ok := v.covered[netns]; ok && !uncovered && !waiting && now-last < coveredFor/2 {
		return
	}
	delete(v.uncovered, netns)
	delete(v.waiting, netns)
	v.covered[netns] = now
	v.put(netns, coverage{until: uint64(now + coveredFor)})
}

// ending takes a connection that ended before it could be asked who made it: a port
// that is only tried. It is called with v.mu held.
func (v *watch) ending(key tuple, now time.Duration) {
	for _, strays := range []map[uint64]stray{v.waiting, v.uncovered} {
		for netns, a := range strays {
			if a.record.key.netns = 0; a.record.key == key {
				v.cover(netns, now)
				return
			}
		}
	}
	if now-v.turned > arrival {
		v.ended, v.endedBefore, v.turned = map[tuple]time.Duration{}, v.ended, now
	}
	v.ended[key] = now
}

// SetRedirected tells whether the redirect is there; after Open it is not. While it is
// not, no namespace is uncovered. What passed by it until now is forgotten.
func (w *Witness) SetRedirected(is bool) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return
	}
	v := w.watch
	v.mu.Lock()
	defer v.mu.Unlock()
	v.redirected = never
	if is {
		v.redirected = monotonic()
	}
	clear(v.waiting)
	for netns := range v.uncovered {
		delete(v.uncovered, netns)
		_ = w.maps["coverage"].Delete(netns)
	}
}

// tidy drops namespaces that have not been heard of. One that is known to be uncovered
// is remembered: its cookie is never given to another.
func (v *watch) tidy(now time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.w.namespaces.tidy(v.w, now, v.uncovered)
	for netns, at := range v.covered {
		if now-at > 2*coveredFor {
			delete(v.covered, netns)
			if _, uncovered := v.uncovered[netns]; !uncovered {
				_ = v.w.maps["coverage"].Delete(netns)
			}
		}
	}
}

// namespaceList are the namespaces other than ours, as the programs met them.
type namespaceList struct {
	mu         sync.Mutex // guards the following
	generation uint64
	known      []uint64
	dropped    []uint64 // from the map, a moment ago: a connect may have been under way
}

// list reads the map again if the programs added to it. The slice must not be changed.
func (n *namespaceList) list(w *Witness) ([]uint64, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	generation := w.shared.count(&w.shared.generation)
	if generation == n.generation {
		return n.known, nil
	}
	known := append([]uint64(nil), n.dropped...)
	var netns uint64
	var value []byte
	all := w.maps["namespaces"].Iterate()
	for all.Next(&netns, &value) {
		known = append(known, netns)
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	n.generation, n.known = generation, known
	return known, nil
}

// tidy keeps those that are uncovered: a refused connect needs its entry to be reported.
func (n *namespaceList) tidy(w *Witness, now time.Duration, keep map[uint64]stray) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var idle, uids []uint64
	var netns uint64
	var b []byte
	all := w.maps["namespaces"].Iterate()
	for all.Next(&netns, &b) {
		value := (*namespace)(unsafe.Pointer(&b[0]))
		if _, uncovered := keep[netns]; !uncovered && value.live == 0 && now-time.Duration(value.last) > forgetAfter {
			idle, uids = append(idle, netns), append(uids, value.uid)
		}
	}
	for i, netns := range idle {
		if w.maps["namespaces"].Delete(netns) == nil && uids[i] != 0 {
			atomic.AddUint64(&w.user(uint32(uids[i])).namespaces, ^uint64(0))
		}
	}
	if len(idle)+len(n.dropped) > 0 {
		n.dropped, n.generation = idle, ^uint64(0)
	}
}

// user is the element of the map of users that a uid has, as the programs find it.
func (w *Witness) user(uid uint32) *user {
	return &w.users[uid*w.plan.factor>>(32-usersBits)]
}

// began is one moment on both clocks: time.Since reads CLOCK_MONOTONIC without a
// system call, and the package unix does not.
var began = func() (m struct {
	at    time.Time
	clock time.Duration
}) {
	var ts unix.Timespec
	m.at = time.Now()
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // every Linux has it
	}
	m.clock = time.Duration(ts.Nano())
	return m
}()

// never is later than every time of that clock.
const never = time.Duration(math.MaxInt64)

// monotonic is the clock of bpf_ktime_get_ns. It is never behind it, so that what the
// programs saw is not taken for later than what came after.
func monotonic() time.Duration { return began.clock + time.Since(began.at) }
