package proxy

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/http1"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/loop"
)

// session is one client connection with its own connection upstream. One task
// runs it.
type session struct {
	p         *Proxy
	task      *loop.Task
	client    *loop.Conn
	up        *loop.Conn // to the service; nil while there is none
	slots     *slots     // the kind of connection that it is
	forwarded bool
	accepted  time.Time
	busy      atomic.Bool // a request has begun
	asking    atomic.Bool // enter is under way
	kind      atomic.Uint32
	idle      atomic.Int64 // since when it is not busy, in nanoseconds of the monotonic clock

	// Proxy.mu guards the following.
	of       part
	held     *int // by its owner, with this one
	part     *int // from its cgroup
	arriving bool // has a place among those without a slot
	ending   bool // is counted in slots.ending
	room     bool // for many more, when it was accepted

	turn bool // it has waited for one, and has it

	prepared bool           // up was made before it was asked for, and has not answered yet
	used     bool           // up has answered a request
	near     netip.AddrPort // of up; the zero value if there is none
	looped   atomic.Bool    // up came back to us

	conn      event.Connection
	minTTL    int
	lookup    *attribution.Lookup
	later     sync.WaitGroup // of what still uses lookup
	completes bool           // something was counted there
	count     int            // of requests
	told      bool           // there is an event of this connection

	buf []byte // of in; nil while nothing is there
	in  []byte // bytes of the client that were read and not passed on
	out []byte // an answer on its way

	reset   bool         // the client's connection ends with a reset
	guarded *event.Event // the request under way, if its answer may yet be withheld
	unread  bool         // what is passed on is no request that can be read

	half halfClosed // for the request under way

	owed bool   // the client has yet to send its body
	sent []byte // of in: the request under way, while it may be sent again

	resent bool // it was, because the service had ended the connection, or must not be
}

// buffers hold a request, for as long as the connection lives, or an answer
// while it passes. Larger ones are made anew.
var buffers = sync.Pool{New: func() any { return new(buffer) }}

type buffer [4 << 10]byte

func hold() []byte { return buffers.Get().(*buffer)[:] }

// release takes a whole buffer back, of any size.
func release(b []byte) {
	if b == nil {
		return
	}
	clear(b) // tokens and keys went through
	if len(b) == len(buffer{}) {
		buffers.Put((*buffer)(b))
	}
}

// grow returns a buffer of twice the size with the same content, and releases b.
func grow(b []byte) []byte {
	larger := make([]byte, 2*len(b))
	copy(larger, b)
	release(b)
	return larger
}

// start is the origin of idle.
var start = time.Now()

// errClient says that the client is gone, or may as well be: nobody is left to
// tell anything.
var errClient = errors.New("the client has left")

func (s *session) run() {
	defer s.release()
	defer s.close()
	stats := &s.p.stats
	dst, err := originalDst(s.client, s.conn.Source.Addr().Is4())
	s.conn.Destination = dst
	redirected := err == nil && s.p.serves(dst) && s.began()
	if redirected && s.testsItself() {
		return
	}
	stats.Connections.Add(1)
	if !redirected {
		stats.NotRedirected.Add(1)
		s.refuse("not redirected from an endpoint of the metadata service")
		return
	}
	switch {
	case !s.early():
		if !s.known() || s.p.pace.each == 0 && !s.ready() {
			return
		}
	case !s.ready(), !s.first() && !s.known():
		return
	}
	for s.next() == nil {
		s.count++
		s.used, s.prepared = true, false
		s.idle.Store(int64(time.Since(start)))
		s.busy.Store(false)
		// What has been asked behind it is answered, too.
		if s.ends() && len(s.in) == 0 && s.client.Look() != loop.Ready {
			s.goodbye(false)
			return
		}
	}
}

// began corrects where the client began, if that need not be where it comes from.
func (s *session) began() bool {
	if !s.p.finder.SharedPorts() {
		return true
	}
	var here netip.AddrPort
	var err error
	s.client.Control(func(fd int) { here, err = nearEnd(fd) })
	if err != nil {
		return false
	}
	var client netip.AddrPort
	s.task.Away(func() { client, err = s.p.finder.Origin(here, s.conn.Source, s.conn.Destination) })
	if err != nil {
		return false // the record has what is known; and what the tracker has forgotten gets no answer
	}
	s.conn.Source = client
	return true
}

// ends reports whether the connection shall end when nothing is under way. It may be
// called from any goroutine.
func (s *session) ends() bool {
	return s.p.closing.Load() || int64(s.accepted.Sub(start)) < s.p.drained.Load()
}

// early reports whether the connection to the service may begin before it is known who
// asks: where there is room for both, and it is none of ours that came back. Where
// requests are counted it waits even for those, since it costs the service packets.
func (s *session) early() bool {
	return s.p.pace.each == 0 && !s.forwarded && s.room && !s.p.own(s.arrived())
}

// arrived are the ends of the client's connection as it made it.
func (s *session) arrived() ends { return ends{s.conn.Source, s.conn.Destination} }

// first reports whether the request is there, and may be read before it is known who
// asks: where the kernel has kept who called connect.
func (s *session) first() bool {
	return s.p.finder.Level() >= attribution.Level2 && s.fill() == nil
}

// known finds out whose the connection is, unless it was. It reports false if there is
// no room for it.
func (s *session) known() bool {
	if s.lookup != nil {
		return true
	}
	admitted := true
	if s.forwarded {
		t, o := &s.p.turns, forwardedOwner(s.conn.Source.Addr())
		if !t.take(o) {
			s.task.Away(func() { admitted = s.comeIn() })
			if !admitted || !t.wait(s, o) {
				return false
			}
		}
		defer t.give(o)
	}
	s.task.Away(func() { admitted = s.enter() })
	return admitted
}

// enter finds out whose the connection is, and whether there is room for it. It is
// called away from the loop.
func (s *session) enter() bool {
	s.asking.Store(true)
	defer s.asking.Store(false)
	if s.forwarded && s.minTTL == 0 && !s.comeIn() {
		return false
	}
	s.lookup = s.p.finder.Ask(attribution.Conn{Client: s.conn.Source, Endpoint: s.conn.Destination, Forwarded: s.forwarded, Arrived: true})
	if s.p.looped(s) {
		s.reset = true
		return false
	}
	if s.forwarded && s.task.Cancelled() || !s.forwarded && !s.p.admit(s, s.ownedBy()) {
		return false
	}
	s.lookup.Search()
	return true
}

// comeIn finds out whether there is room for a forwarded connection, whose owner is known
// from its address, before the kernel is asked about it (turns). It is called away from
// the loop.
func (s *session) comeIn() bool {
	if err := s.forwardable(); err != nil {
		s.p.stats.NotForwardable.Add(1)
		s.refuse("the host would not have forwarded it: " + err.Error())
		return false
	}
	// One hop from the container to this host, and one that the service's
	// answer has already made. Deeper nesting cannot be told from outside,
	// and a client's own TTL is his to choose.
	s.minTTL = 2
	return s.p.admit(s, s.ownedBy())
}

// close ends both connections. An answer that is cut off must not look like a whole
// one, so the client then gets a reset.
func (s *session) close() {
	if s.reset || s.task.Cancelled() && s.busy.Load() {
		s.client.Reset()
	}
	s.client.Close()
	s.hangUp()
	release(s.buf)
	if s.up != nil && !s.forwarded {
		s.p.ahead.fill(s.task, s.conn.Destination)
	}
}

func (s *session) ownedBy() part {
	if s.forwarded {
		return part{owner: forwardedOwner(s.conn.Source.Addr())}
	}
	uid, known := s.lookup.UID()
	if known && uid == 0 {
		s.kind.Store(roots)
	}
	return part{owner{known: known, uid: uid}, s.lookup.CgroupID()}
}

// ready connects before there is a request. It reports false if that cannot be done, and
// the client sees what it would see of the service.
func (s *session) ready() bool {
	err := s.connect()
	if err != nil && !errors.Is(err, loop.ErrCancelled) {
		s.p.stats.UpstreamFailed.Add(1)
		s.client.Reset()
	}
	return err == nil
}

// connect begins a connection upstream. Where descriptors have run out it waits a
// little for some: the client has a connection, and nobody to tell it why it ends.
func (s *session) connect() error {
	for begin := time.Now(); ; {
		err := s.dial()
		if err == nil || !exhausted(err) || time.Since(begin) > descriptorsIn {
			return err
		}
		if err := s.task.Sleep(exhaustedFor); err != nil {
			return err
		}
	}
}

// descriptorsIn is how long connect waits for some.
const descriptorsIn = 250 * time.Millisecond

func (s *session) dial() error {
	if !s.forwarded && !s.resent { // a second try needs one that is alive for certain
		if p, ok := s.p.ahead.take(s.conn.Destination); ok {
			s.reached(p.conn, p.near, true)
			return nil
		}
	}
	fd, near, err := dial(s.conn.Destination, s.p.options.Mark, s.minTTL)
	if err != nil {
		return err
	}
	s.reached(s.task.Adopt(fd), near, false)
	return nil
}

func (s *session) reached(up *loop.Conn, near netip.AddrPort, prepared bool) {
	s.up, s.near, s.prepared, s.used = up, near, prepared, false
	s.p.ours.add(ends{near, s.conn.Destination}, s)
}

// old reports whether the connection to the service may have waited for a request so
// long that the service has ended it, which is no answer to that.
func (s *session) old() bool { return s.used || s.prepared }

// hangUp ends the connection to the service.
func (s *session) hangUp() {
	if s.up != nil {
		s.p.ours.remove(ends{s.near, s.conn.Destination}, s)
		s.up.Close()
		s.half.told = false
	}
}

// unused reports whether nothing of a request has come for a while. A client that has
// not asked yet takes a reset for a failure, while one that has tries again (RFC 9112
// section 9.3.1).
func (s *session) unused() bool {
	within := grace
	if s.count == 0 {
		within = askIn
	}
	return !s.busy.Load() && time.Since(start)-time.Duration(s.idle.Load()) > within && s.client.Look() != loop.Ready
}

// askIn is how long a connection that ends waits for its first request, which a client
// sends at once. Shorter, and on a busy host one that had connected and was not run for
// so long is reset (measured: 2 of 390, at 50 ms); longer, and one who never asks holds
// up each restart for so long, while others wait in the backlog.
const askIn = time.Second

// release gives the lookup back when nothing needs it any more: the evidence for
// an event may come after the client has left, and a search may be under way.
func (s *session) release() {
	if s.lookup == nil {
		return
	}
	if !s.completes && s.lookup.Searched() {
		s.lookup.Close()
		return
	}
	s.p.wg.Add(1)
	go func() {
		defer s.p.wg.Done()
		s.later.Wait()
		s.lookup.Close()
	}()
}

func (s *session) forwardable() error {
	if s.p.options.Forwardable == nil {
		return errors.New("forwarded clients are not served")
	}
	return s.p.options.Forwardable(s.conn.Source, s.conn.Destination)
}

// refuse records a connection that should not be here, which then ends.
func (s *session) refuse(why string) {
	ev := s.event()
	ev.Request.Malformed = why
	ev.Attribution.Reason = "not_asked"
	ev.Decision = event.Decision{Mode: ev.Decision.Mode, Verdict: event.Deny, WouldBe: event.Deny, Reason: why}
	s.p.options.Record(ev)
	s.reset = true
}

// event begins a record. The first of a connection is from when it was accepted.
func (s *session) event() *event.Event {
	ev := &event.Event{Host: s.p.options.Host(), Time: s.accepted, Connection: s.conn}
	ev.Decision.Mode = s.p.engine.Mode().String()
	if ev.Connection.First = !s.told; s.told {
		ev.Time = time.Now()
	}
	s.told = true
	return ev
}

// next waits for a request and serves it. It returns nil when the connection goes on.
// An idle connection waits here rather than in exchange, whose frame is so large that
// its stack could not shrink to 4 KiB.
func (s *session) next() error {
	s.half = halfClosed{}
	r, err := s.read()
	if err != nil {
		if errors.Is(err, http1.ErrMalformed) {
			s.odd(err, http1.Beginning(s.in))
		}
		return err
	}
	return s.exchange(r)
}

func (s *session) exchange(r *http1.Request) error {
	size := r.Size
	token := s.p.tokens.find(r.Bearer.Of(s.in))
	target, err := imds.Classify(s.conn.Destination.Addr(), r.Target)
	r.Expect = r.Expect && len(s.in) == size // or else the client did not wait
	if err == nil && r.Chunked && !r.Expect {
		size += len(http1.EmptyBody)
		err = s.readBody(r.Size)
	}
	if err != nil {
		if errors.Is(err, http1.ErrMalformed) || errors.Is(err, imds.ErrTarget) {
			s.odd(err, r)
		}
		return err
	}
	s.p.stats.Requests.Add(1)
	ev := s.event()
	ev.Request = r.Asked(target, size)
	ev.Request.Read = time.Now()
	ev.Token = token

	enforce := ev.Decision.Mode == policy.Enforce.String()
	search := likely
	if s.p.engine.Decisive(&ev.Request) {
		if search = whole; !enforce {
			search = wholeLater
		}
	}
	decided := make(chan struct{})
	if enforce {
		comesIn := true
		s.task.Away(func() {
			if comesIn = s.lookup != nil || s.enter(); comesIn {
				s.decide(ev, AttributeIn, search)
			}
		})
		close(decided)
		if !comesIn {
			s.reset = true // as if nothing had been read
			return loop.ErrCancelled
		}
		if ev.Decision.Verdict == event.Deny {
			// The whole request has been read, or else it waits for 100 Continue
			// and gets this instead.
			s.in = s.in[size:]
			return s.refused(ev, r)
		}
		if search == whole {
			s.guarded = ev
		}
	}
	switch soon, err := s.paced(target.Class, enforce); {
	case err != nil:
		return s.upstreamFailed(ev, err, enforce)
	case !soon:
		s.in = s.in[size:]
		return s.throttled(ev, r)
	}
	if s.resent = !http1.Repeatable(r.Method); s.resent && s.prepared {
		s.hangUp() // it might have ended, and then there is no second try
		s.up = nil
	}
	if err := s.reach(s.in[:size]); err != nil {
		return s.upstreamFailed(ev, err, enforce)
	}
	passed := time.Now()
	s.in, s.sent = s.in[size:], s.in[:size]

	if !enforce {
		// Nothing is left for policy to stop: it judges while the service
		// thinks. A client that has its answer may be gone the next moment, so
		// the answer waits a little for the likely owners to be read; what takes
		// longer is completed afterwards.
		s.task.Away(func() {
			if s.hint(ev, attributeInA, search) || !s.complete(ev, search, func() { close(decided) }) {
				s.p.engine.Observe(ev)
				close(decided)
			}
		})
	}
	answer, err := s.relayed(r, target.Class)
	if errors.Is(err, errWithheld) {
		return s.refused(ev, r)
	}
	failed := s.failed(err)
	select {
	case <-decided:
		s.answered(ev, answer, passed, failed)
	default:
		s.completes = true
		s.later.Add(1)
		go func() {
			defer s.later.Done()
			<-decided
			s.answered(ev, answer, passed, failed)
		}()
	}
	if err == nil && (answer.close || r.Close) {
		s.goodbye(r.Expect)
		return io.EOF
	}
	if errors.Is(err, http1.ErrMalformed) {
		s.odd(err, r) // a body, behind a head that asked to wait for it
	}
	return err
}

// relayed passes the answer on, and sends the request again where the connection has met
// ourselves, or was old.
func (s *session) relayed(r *http1.Request, class imds.Class) (answer, error) {
	s.out = hold()
	defer func() {
		s.sent, s.guarded = nil, nil
		release(s.out)
	}()
	a, err := s.relay(r, class)
	for try := 1; err != nil && a.lost; try++ {
		if try < maxLoops {
			s.owed = false // of the request on the connection that is over
			err = s.reach(s.sent)
		}
		if try == maxLoops || err != nil {
			if !errors.Is(err, errClient) && !s.task.Cancelled() {
				s.p.stats.UpstreamFailed.Add(1)
			}
			s.client.Reset()
			break
		}
		a, err = s.relay(r, class)
	}
	return a, err
}

// failed is what the record says of an answer that did not come to its end.
func (s *session) failed(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, http1.ErrMalformed):
		return "its body is malformed"
	case err == errSwitched:
		return err.Error()
	case s.task.Cancelled():
		return "the proxy closed the connection"
	}
	s.reset = s.reset || errors.Is(err, errClient) // it may be there still, with half of an answer that looks whole
	return "upstream or client left before the end"
}

// refused answers a request that is denied, and ends the connection.
func (s *session) refused(ev *event.Event, r *http1.Request) error {
	s.say(imds.AppendRefusal(nil, time.Now()))
	ev.Response = event.Response{Status: 403, Refused: true}
	s.finish(ev)
	s.goodbye(r.Expect)
	return io.EOF
}

// throttled answers a request for which the caller has asked too often, and ends the
// connection.
func (s *session) throttled(ev *event.Event, r *http1.Request) error {
	s.say(imds.AppendUnavailable(nil, time.Now()))
	ev.Response = event.Response{Status: 503, Refused: true, Failed: "the caller asks more often than limits.requests_per_second allows"}
	s.finish(ev)
	s.goodbye(r.Expect)
	return io.EOF
}

// complete decides in the background, and then calls the function. It does nothing
// and reports false if too many events wait for their evidence already.
func (s *session) complete(ev *event.Event, how search, then func()) bool {
	select {
	case s.p.evidence <- struct{}{}:
	default:
		return false
	}
	s.completes = true
	s.later.Add(1)
	go func() {
		defer s.later.Done()
		s.decide(ev, completeIn, how)
		<-s.p.evidence
		then()
	}()
	return true
}

// hint judges by what is known without a search of the host. It reports whether that
// is all that was wanted.
func (s *session) hint(ev *event.Event, within time.Duration, how search) (enough bool) {
	begin := time.Now()
	if s.lookup == nil && !s.enter() { // there was room, so that it is the end
		s.task.Cancel()
	}
	s.lookup.Search() // for the record of one who was turned away
	ctx := context.Background()
	if how != likely || !s.lookup.Searched() { // or else nothing is waited for, and a timer takes a microsecond
		var cancel func()
		ctx, cancel = context.WithDeadline(ctx, begin.Add(within))
		defer cancel()
	}
	var owner attribution.Owner
	if how != likely {
		owner, enough = s.lookup.Accounted(ctx)
	}
	if !enough {
		owner = s.lookup.Owner(ctx)
		enough = how == likely && owner.Reason != attribution.Late
	}
	s.verdict(ev, owner, false)
	return enough
}

// verdict judges by what is known of the owner.
func (s *session) verdict(ev *event.Event, owner attribution.Owner, unawaited bool) {
	s.p.rendered.observe(ev, owner)
	ev.Attribution.Unawaited = unawaited
	s.p.engine.Judge(ev)
	ev.Decision.Took = time.Since(ev.Request.Read)
	if ev.Decision.Grant != "" {
		s.kind.CompareAndSwap(ordinary, granted)
	}
}

// search says how far decide looks for owners.
type search uint8

const (
	likely     search = iota // in the likely places
	whole                    // on the whole host, unless nothing found there can change the verdict
	wholeLater               // likewise, when that disturbs nobody and if the client stays so long
)

// decide finds out who asks and what policy says, and tells the rules.
func (s *session) decide(ev *event.Event, within time.Duration, how search) {
	s.judge(ev, within, how)
	s.p.engine.Observe(ev)
}

// judge finds out who asks and what policy says.
func (s *session) judge(ev *event.Event, within time.Duration, how search) {
	begin := time.Now()
	if !s.hint(ev, within, how) && how != likely && !s.p.engine.Final(ev) {
		ctx, cancel := context.WithDeadline(context.Background(), begin.Add(within))
		defer cancel()
		owner := s.lookup.Complete(ctx, how == whole)
		s.verdict(ev, owner, how == wholeLater && owner.Attributed() && owner.Reason == attribution.ClientGone)
	}
}

// answered completes the record of a request that was passed on.
func (s *session) answered(ev *event.Event, a answer, passed time.Time, failed string) {
	ev.Response = event.Response{Status: int64(a.status), Bytes: a.bytes, AccessKeyID: a.issued.AccessKeyID, Expiration: a.issued.Expiration}
	ev.Response.Failed = failed
	if a.status != 0 {
		ev.Response.Took = a.end.Sub(passed)
	}
	s.p.remember(s.of.owner, ev, a)
	ev.Duration = a.end.Sub(ev.Time)
	s.finish(ev)
}

func (s *session) finish(ev *event.Event) {
	switch {
	case ev.Decision.Verdict == event.Deny:
		s.p.stats.Denied.Add(1)
	case ev.Decision.WouldBe == event.Deny:
		s.p.stats.WouldDeny.Add(1)
	}
	if ev.Duration == 0 {
		ev.Duration = time.Since(ev.Time)
	}
	s.p.options.Record(ev)
}

// upstreamFailed records a request that could not be sent, and ends the client's
// connection as the service would have.
func (s *session) upstreamFailed(ev *event.Event, err error, decided bool) error {
	ev.Response.Failed = "the service cannot be reached"
	switch {
	case s.task.Cancelled(), errors.Is(err, loop.ErrCancelled): // or there was no room for it
		ev.Response.Failed = "the proxy closed the connection"
	case errors.Is(err, errClient):
		ev.Response.Failed = "the client left before it was sent"
	default:
		s.p.stats.UpstreamFailed.Add(1)
	}
	s.client.Reset()
	if !decided {
		s.task.Away(func() { s.decide(ev, attributeInA, likely) })
	}
	s.finish(ev)
	return err
}

// unmap gives an address the form in which the kernel's other tables have it.
func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
