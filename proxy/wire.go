package proxy

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// Waiting for one side must not hide that the other has left. A wait is cut
// into slices, and between them a look is taken at the other side; this costs
// nothing as long as answers come within the first slice.
const (
	firstSlice = 250 * time.Millisecond
	longSlice  = 2 * time.Second
)

// patience cuts a wait into slices that grow.
type patience struct {
	begin time.Time
	slice time.Duration
}

func (p *patience) next() time.Time {
	now := time.Now()
	if p.slice = min(max(firstSlice, 2*p.slice), longSlice); p.begin.IsZero() {
		p.begin = now
	}
	return now.Add(p.slice)
}

// errSilent says that the service has neither answered nor ended the connection
// for so long that it will not.
var errSilent = errors.New("the service is silent")

// read reads until a request head is there.
func (s *session) read() (*request, error) {
	var wait patience
	deadline := time.Now().Add(s.p.silence)
	begun := false
	head := new(head)
	for {
		if len(s.in) > 0 {
			r, err := head.read(s.in)
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
		if err := s.fill(min2(wait.next(), deadline)); err != nil {
			switch {
			case errors.Is(err, io.EOF) && len(s.in) > 0:
				return nil, malformed("head without its end")
			case !errors.Is(err, os.ErrDeadlineExceeded):
				return nil, err
			case time.Now().After(deadline) && begun:
				return nil, malformed("head not sent within %v", headTimeout)
			case time.Now().After(deadline):
				return nil, err
			case begun:
			case s.p.stopping() && s.unused():
				s.goodbye(false)
				return nil, io.EOF
			case s.up == nil:
			default:
				// The service may have ended the connection, or say something that
				// nobody asked for.
				switch st := look(s.up.file); {
				case st == reset:
					s.reset()
					return nil, errClient
				case st == ended, st == ready && s.count > 0:
					return nil, io.EOF
				}
			}
		}
	}
}

func min2(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// fill reads once from the client, behind what is there already.
func (s *session) fill(deadline time.Time) error {
	s.sent = nil // it may move
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
	s.client.SetReadDeadline(deadline)
	n, err := s.client.Read(s.in[len(s.in):cap(s.in)])
	s.in = s.in[:len(s.in)+n]
	if n > 0 {
		return nil
	}
	return err
}

// readBody reads until an empty body is there, behind so many bytes.
func (s *session) readBody(behind int) error {
	deadline := time.Now().Add(headTimeout)
	for {
		if whole, err := parseBody(s.in[behind:]); whole || err != nil {
			return err
		}
		switch err := s.fill(deadline); {
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
			return malformed("body without its end")
		case err != nil:
			return err
		}
	}
}

// passBody passes on the body of a client that waited for 100 Continue.
func (s *session) passBody() error {
	if err := s.readBody(0); err != nil {
		return err
	}
	if err := s.forward(s.in[:len(emptyBody)]); err != nil {
		return err
	}
	s.in = s.in[len(emptyBody):]
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
		// One that is refused, or that speaks first, is the client's to see.
		if st := look(s.up.file); st == quiet || st != ended && s.count == 0 {
			return nil
		}
	}
	s.up.Close()
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

// lost reports whether a request has met ourselves instead of the service, or a kept
// connection that the service was about to end, so that it may be sent again: as it
// was judged, and so only while nothing more was read.
func (s *session) lost(have int, err error) bool {
	return have == 0 && s.sent != nil && (s.looped.Load() || s.stale(err))
}

// stale reports once for each request whether it failed because the service had ended
// a kept connection already, as it may at any moment (RFC 9112 section 9.3.1). The
// client would try again, and so do we: a second time would be more than it does.
func (s *session) stale(err error) bool {
	if s.count == 0 || s.resent || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return false
	}
	s.resent = true
	return true
}

// forward sends bytes of the client upstream, waiting for the connection to be
// made.
func (s *session) forward(b []byte) error {
	var wait patience
	var halfClosed time.Time
	for {
		s.up.SetWriteDeadline(wait.next())
		n, err := s.up.Write(b)
		b = b[n:]
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case time.Since(wait.begin) > s.p.silence:
			return errSilent
		}
		switch look(s.client) {
		case reset:
			return errClient
		case ended: // it may only have said that it sends no more
			if halfClosed.IsZero() {
				halfClosed = time.Now()
			} else if time.Since(halfClosed) > headTimeout {
				return errClient
			}
		}
	}
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
func (s *session) relay(r *request, class imds.Class) (a answer, err error) {
	defer func() { a.end = time.Now() }()
	s.owed = r.expect
	have := 0 // bytes in s.out that were not passed on
	for {
		head, err := parseResponse(s.out[:have], r.method)
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
				if err := s.passBody(); err != nil {
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
			return a, errors.New("the service switched protocols, which nobody asked for")
		case head.interim():
			if err := s.send(&a, s.out[:head.headSize]); err != nil {
				return a, err
			}
			have = copy(s.out, s.out[head.headSize:have])
			if head.status == 100 && s.owed {
				if err := s.passBody(); err != nil {
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

// errWithheld says that whoever asked is not whoever would get the answer.
var errWithheld = errors.New("the answer is withheld")

// withheld judges a guarded request again before the first byte of its answer leaves, if
// the connection has changed hands or programs since.
func (s *session) withheld() bool {
	if s.guarded == nil || !s.lookup.Changed() {
		return false
	}
	ev, before := s.guarded, *s.guarded
	s.judge(ev, AttributeIn, whole)
	if ev.Decision.Verdict == event.Deny {
		s.p.engine.Observe(ev)
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
	case errors.Is(err, errClient):
	case errors.Is(err, io.EOF):
		s.goodbye(false)
	default:
		s.reset()
	}
}

// errOwed says that the client sends the body that it owes, without having been
// told to go on. Clients do, a second or two after the head (RFC 9110 section
// 10.1.1).
var errOwed = errors.New("the body has come")

// receive reads once from upstream, for as long as the client is there.
func (s *session) receive(b []byte) (int, error) {
	var wait patience
	var halfClosed time.Time
	for {
		if s.owed {
			wait.slice = 0 // it may come any moment
		}
		s.up.SetReadDeadline(wait.next())
		n, err := s.up.Read(b)
		if n > 0 {
			return n, nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		switch look(s.client) {
		case ready:
			if s.owed {
				return 0, errOwed
			}
		case reset:
			return 0, errClient
		case ended:
			// It may only have said that it sends no more. The service is told
			// so, and has a while to answer.
			if halfClosed.IsZero() {
				halfClosed = time.Now()
				s.up.CloseWrite()
			} else if time.Since(halfClosed) > headTimeout {
				return 0, errClient
			}
		}
		if time.Since(wait.begin) > s.p.silence {
			return 0, errSilent
		}
	}
}

// send passes bytes on to the client. A client that takes nothing for so long
// that no real one would still be there is given up.
func (s *session) send(a *answer, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	s.client.SetWriteDeadline(time.Now().Add(s.p.silence))
	n, err := s.client.Write(b)
	a.bytes += int64(n)
	if err != nil {
		return errClient
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
	if more || look(s.client) == ready {
		s.linger()
	}
	s.client.Close()
}

// linger is for when more of the client's bytes are expected: it takes them for
// a while, so that they do not meet a closed socket.
func (s *session) linger() {
	s.client.CloseWrite()
	s.client.SetReadDeadline(time.Now().Add(firstSlice))
	for read := 0; read < 4*maxHead; {
		n, err := s.client.Read(s.buf)
		if read += n; err != nil {
			return
		}
	}
}

// odd deals with what cannot be read one way only. r is what can be read of it.
func (s *session) odd(why error, r *request) {
	s.p.stats.Malformed.Add(1)
	ev := s.event()
	ev.Request = readable(r)
	ev.Request.Malformed = why.Error()
	ev.Request.Bytes = int64(len(s.in))
	if s.p.engine.Mode() == policy.Enforce {
		s.decide(ev, AttributeIn, likely)
		s.say(imds.AppendBadRequest(nil, time.Now()))
		ev.Response = event.Response{Status: 400, Refused: true}
		s.finish(ev)
		s.linger()
		return
	}
	// Nobody waits for this one, and the record does not wait for the end of the
	// tunnel.
	if !s.complete(ev, likely, func() { s.finish(ev) }) {
		s.decide(ev, 0, likely)
		s.finish(ev)
	}
	s.paced()
	s.tunnel()
}

// tunnel passes bytes both ways until both ends have ended, or nothing has
// passed for long.
func (s *session) tunnel() {
	if s.reach(s.in) != nil {
		s.reset()
		return
	}
	s.owed = false
	var both sync.WaitGroup
	both.Add(1)
	go func() {
		defer both.Done()
		buf := hold()
		defer release(buf)
		for {
			s.client.SetReadDeadline(time.Now().Add(s.p.silence))
			n, err := s.client.Read(buf)
			if n > 0 {
				s.up.SetWriteDeadline(time.Now().Add(s.p.silence))
				if _, err := s.up.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				s.up.CloseWrite()
				return
			}
		}
	}()
	s.out = hold()
	defer func() { release(s.out) }()
	var a answer
	if err := s.opaque(&a, 0); err == nil {
		s.client.CloseWrite()
	}
	end := time.AfterFunc(headTimeout, func() { // for a client that goes on sending
		s.client.Close()
		s.up.Close()
	})
	both.Wait()
	end.Stop()
}
