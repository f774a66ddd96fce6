package proxy

import (
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/http1"
	"github.com/imdsgate/imdsgate/proxy/imds"
	"github.com/imdsgate/imdsgate/proxy/loop"
)

// errSilent says that the service has neither answered nor ended the connection
// for so long that it will not.
var errSilent = errors.New("the service is silent")

// The task waits for both sides at once: while one is silent, that the other leaves is
// not to be missed.

func (s *session) fromClient(e loop.Events) loop.Interest {
	return loop.Interest{Conn: s.client, For: e}
}
func (s *session) fromUp(e loop.Events) loop.Interest { return loop.Interest{Conn: s.up, For: e} }

// await waits, after it was found out whose the connection is.
func (s *session) await(until time.Time, interests ...loop.Interest) error {
	if !s.known() {
		return loop.ErrCancelled
	}
	return s.task.Wait(until, interests...)
}

// read reads until a request head is there.
func (s *session) read() (*http1.Request, error) {
	deadline := time.Now().Add(s.p.silence)
	begun, woken := false, false
	over := error(nil) // what the service has done to the connection meanwhile
	head := new(http1.Head)
	for {
		if len(s.in) > 0 {
			r, err := head.Read(s.in)
			if r != nil || err != nil {
				s.busy.Store(true)
				return r, err
			}
			if !begun {
				begun = true
				s.busy.Store(true)
				deadline = time.Now().Add(headTimeout)
			}
		}
		switch err := s.fill(); {
		case err == nil:
			continue
		case err == io.EOF && begun:
			return nil, http1.Malformed("head without its end")
		case err != loop.ErrAgain:
			return nil, err
		}
		wait := [2]loop.Interest{s.fromClient(loop.In)}
		waits := 1
		if !begun {
			if woken && s.ends() && s.unused() {
				s.goodbye(false)
				return nil, io.EOF
			}
			if s.up != nil && over == nil {
				if woken {
					over = s.unasked()
				}
				switch {
				case s.up == nil:
				case over == nil:
					wait[1], waits = s.fromUp(loop.In), 2
				case s.count == 0:
					deadline = time.Now().Add(askedIn)
				default:
					s.reset = over == errReset
					return nil, over
				}
			}
		}
		err := s.await(deadline, wait[:waits]...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			switch {
			case begun:
				err = http1.Malformed("head not sent within %v", headTimeout)
			case over != nil:
				s.reset = over == errReset
				err = over
			}
		}
		if err != nil {
			return nil, err
		}
		woken = true
	}
}

// askedIn is how long a client's first request is waited for when the service has
// already ended the connection that was made for it: it is on its way, and is recorded.
const askedIn = 250 * time.Millisecond

var errReset = errors.New("the service has reset the connection")

// unasked looks whether the service has ended the connection, or says something that
// nobody asked for. One that we have aborted ourselves is replaced when somebody asks, and
// so is one that was made ahead, which the client would not have had by then.
func (s *session) unasked() error {
	switch st := s.up.Look(); {
	case s.up.Aborted(), s.prepared && st != loop.Quiet:
		s.hangUp()
		s.up = nil
	case st == loop.Broken:
		return errReset
	case st == loop.Ended, st == loop.Ready && s.count > 0:
		return io.EOF
	}
	return nil
}

// fill reads once from the client, behind what is there already. The error is
// loop.ErrAgain when nothing has come.
func (s *session) fill() error {
	s.sent = nil // it may move
	if s.buf == nil {
		s.buf = hold()
		s.in = s.buf[:0]
	}
	if cap(s.in)-len(s.in) == 0 {
		switch {
		case len(s.in) == 0:
			s.in = s.buf[:0]
		case len(s.in) < len(s.buf)/2:
			s.in = s.buf[:copy(s.buf, s.in)]
		default:
			n := copy(s.buf, s.in)
			s.buf = grow(s.buf)
			s.in = s.buf[:n]
		}
	}
	n, err := s.client.Read(s.in[len(s.in):cap(s.in)])
	s.in = s.in[:len(s.in)+n]
	if n == 0 && len(s.in) == 0 {
		release(s.buf)
		s.buf, s.in = nil, nil
	}
	return err
}

// readBody reads until an empty body is there, behind so many bytes. If the client owes it,
// the service may say something before, or end the connection: errAnswered.
func (s *session) readBody(behind int) error {
	deadline := time.Now().Add(headTimeout)
	for {
		if whole, err := http1.ParseBody(s.in[behind:]); whole || err != nil {
			return err
		}
		err := s.fill()
		if err == loop.ErrAgain {
			wait := [2]loop.Interest{s.fromClient(loop.In)}
			waits := 1
			if s.owed {
				if s.up.Stirred() {
					return errAnswered
				}
				wait[1], waits = s.fromUp(loop.In), 2
			}
			err = s.await(deadline, wait[:waits]...)
		}
		switch {
		case err == io.EOF, errors.Is(err, os.ErrDeadlineExceeded):
			return http1.Malformed("body without its end")
		case err != nil:
			return err
		}
	}
}

// errAnswered says that the service has not waited for the body.
var errAnswered = errors.New("the service has answered before the body")

// passBody passes on the body of a client that waited for 100 Continue, unless the service
// does not wait for it.
func (s *session) passBody(a *answer) error {
	switch err := s.readBody(0); {
	case err == errAnswered:
		return nil
	case err != nil:
		return err
	}
	if err := s.forward(s.in[:len(http1.EmptyBody)]); err != nil {
		s.broken(a, 0, err)
		return err
	}
	s.in = s.in[len(http1.EmptyBody):]
	s.owed = false
	return nil
}

// redial replaces a connection that the service has ended since it was made, or since
// its last answer. The client cannot know yet, and nothing of its request was sent.
func (s *session) redial() error {
	if s.up == nil {
		return s.connect()
	}
	if !s.looped.Swap(false) {
		if s.owed {
			return nil
		}
		if !s.up.Stirred() {
			return nil
		}
		// One that is refused, or that speaks first, is the client's to see.
		if st := s.up.Look(); st == loop.Quiet || st != loop.Ended && !s.old() && !s.up.Aborted() {
			return nil
		}
	}
	s.hangUp()
	return s.connect()
}

// maxLoops bounds the connections that are tried for one request because they came
// back to us. Each costs some 100 microseconds; fewer, and a user who prepares
// thousands of ports makes more requests of others fail.
const maxLoops = 8

// reach sends bytes of the client upstream, on another connection if ours came back
// to us, or was ended by the service at that moment.
func (s *session) reach(b []byte) error {
	for try := 1; ; try++ {
		err := s.redial()
		if err == nil {
			err = s.forward(b)
		}
		if err == nil || try == maxLoops || !s.looped.Load() && !s.stale(err) {
			return err
		}
	}
}

// lost reports whether a request has met ourselves instead of the service, or an old
// connection that the service was about to end, so that it may be sent again: as it
// was judged, and so only while nothing more was read.
func (s *session) lost(have int, err error) bool {
	return have == 0 && s.sent != nil && (s.looped.Load() || s.stale(err))
}

// stale reports once for each request whether it failed because the service had ended
// an old connection already, as it may at any moment (RFC 9112 section 9.3.1), or because
// we have aborted it ourselves, which had lost its port (iptables.Lost). The
// client would try again, and so do we: a second time would be more than it does.
func (s *session) stale(err error) bool {
	ended := s.old() && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE))
	if s.resent || !ended && !errors.Is(err, syscall.ECONNABORTED) {
		return false
	}
	s.resent = true
	return true
}

// forward sends bytes of the client upstream, waiting for the connection to be
// made.
func (s *session) forward(b []byte) error {
	silent := time.Now().Add(s.p.silence)
	for {
		if s.unread && s.p.engine.Mode() == policy.Enforce { // since it waits
			return loop.ErrCancelled
		}
		n, err := s.up.Write(b)
		if b = b[n:]; err != loop.ErrAgain {
			return err
		}
		if s.client.Gone() {
			switch s.client.Look() {
			case loop.Broken:
				return errClient
			case loop.Ended, loop.Ready: // or behind more that it has asked
				s.half.begin(s.p.half)
			}
		}
		err = s.await(s.half.until(silent), s.fromUp(loop.Out), s.fromClient(loop.Gone))
		if err := s.half.waited(err); err != nil {
			return err
		}
	}
}

// halfClosed is about a client that may only have said that it sends no more. The
// service has a while to answer it, and as long again after each byte.
type halfClosed struct {
	over time.Time
	told bool // the service knows
}

func (h *halfClosed) begin(lasts time.Duration) {
	if h.over.IsZero() {
		h.over = time.Now().Add(lasts)
	}
}

func (h *halfClosed) until(silent time.Time) time.Time {
	if !h.over.IsZero() && h.over.Before(silent) {
		return h.over
	}
	return silent
}

// waited tells what the end of a wait means.
func (h *halfClosed) waited(err error) error {
	switch {
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case !h.over.IsZero() && !time.Now().Before(h.over):
		return errClient
	}
	return errSilent
}

// answer is what was passed on to the client.
type answer struct {
	status int
	bytes  int64
	close  bool // the service ends the connection with it
	lost   bool // there was none, and the request may be sent again
	issued issued
	end    time.Time
}

// relay passes the answer to a request on, interim answers included, and reads what
// is handed out with it. The error is io.EOF when the connection ended where the
// answer did.
func (s *session) relay(r *http1.Request, class imds.Class) (a answer, err error) {
	defer func() { a.end = time.Now() }()
	s.owed = r.Expect
	have := 0 // bytes in s.out that were not passed on
	for {
		head, err := parseResponse(s.out[:have], r.Method)
		switch {
		case err != nil:
			a.close, s.owed = true, false
			if s.withheld() {
				return a, errWithheld
			}
			return a, s.opaque(&a, have)
		case head == nil:
			if have == len(s.out) {
				s.out = grow(s.out)
			}
			n, err := s.receive(s.out[have:])
			if err == errOwed {
				if err := s.passBody(&a); err != nil {
					return a, err
				}
				continue
			}
			if have += n; err != nil {
				s.broken(&a, have, err)
				return a, err
			}
			continue
		case head.status == 101:
			return a, errSwitched
		case head.interim():
			if err := s.send(&a, s.out[:head.headSize]); err != nil {
				return a, err
			}
			have = copy(s.out, s.out[head.headSize:have])
			if head.status == 100 && s.owed && have == 0 {
				if err := s.passBody(&a); err != nil {
					return a, err
				}
			}
			continue
		}
		// With an answer before the body, the body may come or not: the
		// connection cannot be used any more.
		a.status, a.close = head.status, head.close || s.owed
		s.owed = false
		if s.withheld() {
			return a, errWithheld
		}
		return a, s.relayBody(&a, head, have, hands(r, class, head))
	}
}

// errSwitched says that the service speaks another protocol, for which nobody has asked: a
// request that does is malformed.
var errSwitched = errors.New("the service switched protocols, which nobody asked for")

// errWithheld says that whoever asked is not whoever would get the answer.
var errWithheld = errors.New("the answer is withheld")

// withheld judges a request that policy may refuse again before the first byte of its
// answer leaves, if the connection has changed hands or programs since.
func (s *session) withheld() (withheld bool) {
	if s.guarded != nil {
		s.task.Away(func() { withheld = s.changedHands() })
	}
	return withheld
}

func (s *session) changedHands() bool {
	if !s.lookup.Changed() {
		return false
	}
	ev, before := s.guarded, *s.guarded
	s.judge(ev, AttributeIn, whole)
	if ev.Decision.Verdict == event.Deny {
		s.p.engine.ObserveAgain(ev, before.Decision)
		return true
	}
	*ev = before // what the rules saw when they observed it
	return false
}

// relayBody passes on the head that is in s.out, and the body behind it.
func (s *session) relayBody(a *answer, head *response, have int, what handout) error {
	b := newBody(head.length)
	b.kept = what.room(head)
	defer func() { a.issued = s.p.issued(what, head, &b) }()
	n := head.headSize + b.take(s.out[head.headSize:have])
	if err := s.send(a, s.out[:n]); err != nil {
		return err
	}
	if b.ended && n < have {
		a.close = true // more than it said: nothing of that is an answer
	}
	for !b.ended {
		n, err := s.receive(s.out)
		m := b.take(s.out[:n])
		if m < n || b.broken {
			a.close = true
		}
		if sendErr := s.send(a, s.out[:m]); sendErr != nil {
			return sendErr
		}
		switch {
		case err == io.EOF && (head.length == untilEOF || b.broken):
			return nil
		case err != nil:
			s.broken(a, 0, err)
			return err
		}
	}
	return nil
}

// opaque passes on what is no HTTP until the service ends it.
func (s *session) opaque(a *answer, have int) error {
	if err := s.send(a, s.out[:have]); err != nil {
		return err
	}
	for {
		n, err := s.receive(s.out)
		if sendErr := s.send(a, s.out[:n]); sendErr != nil {
			return sendErr
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			s.broken(a, 0, err)
			return err
		}
	}
}

// broken ends the client's connection at the byte and in the way in which the
// service ended its own.
func (s *session) broken(a *answer, have int, err error) {
	if a.lost = a.bytes == 0 && s.lost(have, err); a.lost {
		return
	}
	if have > 0 {
		s.send(a, s.out[:have])
	}
	switch {
	case errors.Is(err, errClient), s.task.Cancelled():
	case errors.Is(err, io.EOF):
		s.goodbye(false)
	default:
		s.client.Reset()
	}
}

// errOwed says that the client sends the body that it owes, without having been
// told to go on. Clients do, a second or two after the head (RFC 9110 section
// 10.1.1).
var errOwed = errors.New("the body has come")

// receive reads once from upstream, for as long as the client is there.
func (s *session) receive(b []byte) (int, error) {
	if s.task.Cancelled() && s.ends() {
		return 0, loop.ErrCancelled // an answer that has come may be of the mode before
	}
	silent := time.Now().Add(s.p.silence)
	for {
		n, err := s.up.Read(b)
		if err != loop.ErrAgain {
			s.half.over = time.Time{}
			return n, err
		}
		client := loop.Gone
		if s.owed {
			client = loop.In // it may come any moment
		}
		if s.owed || s.client.Gone() {
			switch s.client.Look() {
			case loop.Ready:
				if s.owed {
					return 0, errOwed
				}
				s.half.begin(s.p.half) // behind what it has asked it says that it asks no more
			case loop.Broken:
				return 0, errClient
			case loop.Ended:
				s.half.begin(s.p.half)
				if len(s.in) == 0 && !s.half.told {
					s.half.told = true
					s.up.CloseWrite()
				}
			}
		}
		err = s.task.Wait(s.half.until(silent), s.fromUp(loop.In), s.fromClient(client))
		if err := s.half.waited(err); err != nil {
			return 0, err
		}
	}
}

// send passes bytes on to the client. A client that takes nothing for so long
// that no real one would still be there is given up.
func (s *session) send(a *answer, b []byte) error {
	for until := (time.Time{}); len(b) > 0; {
		n, err := s.client.Write(b)
		a.bytes += int64(n)
		b = b[n:]
		if err == loop.ErrAgain {
			if n > 0 || until.IsZero() {
				until = time.Now().Add(s.p.silence)
			}
			err = s.task.Wait(until, s.fromClient(loop.Out))
		}
		if err != nil {
			return errClient
		}
	}
	return nil
}

// say sends an answer of our own.
func (s *session) say(b []byte) {
	var a answer
	s.send(&a, b) // a client that has left needs no answer
}

// goodbye ends the client's connection so that what was sent arrives: closing
// a socket with bytes that were not read resets it (RFC 9112 section 9.6). more
// says that such bytes may still be on their way.
func (s *session) goodbye(more bool) {
	if more || s.client.Look() == loop.Ready {
		s.linger()
	}
	s.client.Close()
}

// linger is for when more of the client's bytes are expected: it takes them for
// a while, so that they do not meet a closed socket.
func (s *session) linger() {
	s.client.CloseWrite()
	deadline := time.Now().Add(lingerFor)
	buf := hold()
	defer release(buf)
	for read := 0; read < 4*http1.MaxHead; {
		n, err := s.client.Read(buf)
		if read += n; err == loop.ErrAgain {
			err = s.task.Wait(deadline, s.fromClient(loop.In))
		}
		if err != nil {
			return
		}
	}
}

// lingerFor is how long it takes them: what a client sends without waiting comes at
// once.
const lingerFor = 250 * time.Millisecond

// odd deals with what cannot be read one way only. r is what can be read of it.
func (s *session) odd(why error, r *http1.Request) {
	if !s.known() {
		return
	}
	s.p.stats.Malformed.Add(1)
	ev := s.event()
	ev.Request = r.Readable()
	ev.Request.Malformed = why.Error()
	ev.Request.Bytes = int64(len(s.in))
	ev.Request.Read = time.Now()
	if ev.Decision.Mode == policy.Enforce.String() {
		s.task.Away(func() { s.decide(ev, AttributeIn, likely) })
		s.say(imds.AppendBadRequest(nil, time.Now()))
		ev.Response = event.Response{Status: 400, Refused: true}
		s.finish(ev)
		s.linger()
		return
	}
	// Nobody waits for this one, and the record does not wait for the end of the
	// tunnel.
	if !s.complete(ev, likely, func() { s.finish(ev) }) {
		s.task.Away(func() { s.decide(ev, 0, likely) })
		s.finish(ev)
	}
	if _, err := s.paced(imds.Unknown, false); err != nil {
		s.client.Reset()
		return
	}
	s.tunnel()
}

// tunnel passes bytes both ways until both ends have ended, or nothing has
// passed for long. In enforce mode nothing passes that cannot be read.
func (s *session) tunnel() {
	s.resent, s.unread = true, true // or must not be: nobody knows what it does
	if s.prepared && !s.owed {
		s.hangUp() // it might have ended
		s.up = nil
	}
	if s.reach(s.in) != nil {
		s.client.Reset()
		return
	}
	s.owed = false
	s.up.NoDelay()
	out, back := flow{from: s.client, to: s.up}, flow{from: s.up, to: s.client}
	defer out.release()
	defer back.release()
	var over halfClosed
	for silent := time.Now().Add(s.p.silence); ; {
		if s.reset = s.p.engine.Mode() == policy.Enforce; s.reset { // from now on
			return
		}
		// What the service has said is the client's, also if it takes no more.
		more, err := back.move()
		if s.reset = err != nil; s.reset || back.broken {
			return
		}
		moved, err := out.move()
		if err != nil || out.over && back.over {
			return
		}
		if moved || more {
			silent, over = time.Now().Add(s.p.silence), halfClosed{}
		}
		if out.over || back.over {
			over.begin(s.p.half)
		}
		if s.reset = !time.Now().Before(over.until(silent)); s.reset {
			return
		}
		if out.more || back.more {
			err = s.task.Yield()
		} else {
			err = s.task.Wait(over.until(silent), s.fromClient(loop.Gone|out.source()|back.sink()), s.fromUp(back.source()|out.sink()))
		}
		if s.reset = err != nil; s.reset || s.client.Gone() && s.client.Look() == loop.Broken {
			return
		}
	}
}

// flow is one direction of a tunnel.
type flow struct {
	from, to *loop.Conn
	buf      []byte // nil while nothing is on its way
	left     []byte // of buf
	over     bool   // there will be no more, and the other end knows
	broken   bool   // the other end takes no more
	more     bool   // there may be more now, after as much as one may move at a time
}

// move moves what there is and what there is room for. The error is one of reading.
func (f *flow) move() (moved bool, err error) {
	f.more = false
	for range maxMoves {
		if len(f.left) == 0 {
			if f.over {
				return moved, nil
			}
			if f.buf == nil {
				f.buf = hold()
			}
			n, err := f.from.Read(f.buf)
			if err != nil {
				f.release()
				switch err {
				case loop.ErrAgain:
					return moved, nil
				case io.EOF:
					f.over = true
					f.to.CloseWrite()
					return true, nil
				}
				return moved, err
			}
			f.left = f.buf[:n]
		}
		n, err := f.to.Write(f.left)
		f.left = f.left[n:]
		moved = moved || n > 0
		if err == loop.ErrAgain {
			return moved, nil
		}
		if err != nil {
			f.over, f.broken = true, true
			f.release()
			return moved, nil
		}
	}
	f.more = true
	return moved, nil
}

// maxMoves bounds what a tunnel moves before others have their turn, in buffers.
const maxMoves = 16

func (f *flow) source() loop.Events {
	if f.over || len(f.left) > 0 {
		return 0
	}
	return loop.In
}

func (f *flow) sink() loop.Events {
	if len(f.left) > 0 {
		return loop.Out
	}
	return 0
}

func (f *flow) release() {
	release(f.buf)
	f.buf, f.left = nil, nil
}
