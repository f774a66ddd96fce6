package imdstest

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"net"
	"strings"
	"time"
)

// maxHead bounds a request's head; a longer one is answered 400 (a guess).
const maxHead = 16 << 10

// A conn serves one client connection at a time, on one goroutine.
type conn struct {
	s       *Server
	nc      net.Conn
	record  *record // nil without a transcript
	in      []byte  // received and not yet consumed; its space is fixed
	space   []byte  // all of in's space
	out     []byte  // the answer being rendered
	req     Request
	limited bool // the socket's hop limit is that of a token answer
}

func newConn(s *Server) *conn {
	return &conn{s: s, space: make([]byte, maxHead), out: make([]byte, 0, 2048)}
}

func (c *conn) start(nc net.Conn) {
	c.nc, c.record, c.in, c.limited = nc, c.s.log.open(nc), c.space[:0], false
}

// errEnd ends a connection whose last answer was given.
var errEnd = errors.New("end of connection")

// serve answers requests until the connection is to be closed; the caller closes it.
func (c *conn) serve() {
	for n := 1; ; n++ {
		if err := c.exchange(n); err != nil {
			return
		}
	}
}

// exchange reads and answers one request. Its error only says that there will be no other.
func (c *conn) exchange(onConn int) error {
	size, err := c.head()
	if err != nil {
		return err
	}
	i, now := c.s.now()
	if size == 0 || !c.req.parse(string(c.in[:size]), i.Reading) {
		return c.refuse(i, now, 400)
	}
	c.consume(size)
	r := &c.req
	p, readable := i.Reading.place(r.Target)
	if readable {
		r.Path = p.path
	}
	r.Number, r.OnConn = c.s.requests.Add(1), onConn
	var f Fault
	if i.Fault != nil {
		r.Remote = addrPort(c.nc.RemoteAddr())
		f = i.Fault(r)
	}

	if f.Status == 417 {
		return c.refuse(i, now, 417)
	}
	frame, ok := r.framing(i.Reading)
	if !ok {
		return c.refuse(i, now, 400)
	}
	if !frame.none() {
		if !f.NoContinue && r.names("Expect", "100-continue") {
			if err := c.send([]byte("HTTP/1.1 100 Continue\r\n\r\n")); err != nil {
				return err
			}
		}
		if err := c.skip(frame); err != nil {
			return err
		}
	}

	if err := c.pause(f.Delay); err != nil {
		return err
	}
	for _, s := range f.Raw {
		if err := c.pause(s.After); err != nil {
			return err
		}
		if err := c.send([]byte(s.Data)); err != nil {
			return err
		}
	}
	switch f.Outcome {
	case Silence:
		err := c.drain()
		if err == io.EOF {
			err = cmp.Or(c.pause(halfClosedFor), err)
		}
		return err
	case RST:
		if tcp, ok := c.nc.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		return errEnd
	case FIN:
		return errEnd
	}
	if f.Raw != nil {
		return nil
	}

	a := i.answer(r, p, readable, now, r.Number)
	if f.Status != 0 {
		a = answer{status: f.Status, headOnly: a.headOnly}
	}
	a.keep = f.Outcome == Answered && !a.old && i.keeps(r)
	c.out = i.append(c.out[:0], &a, now)
	if f.Outcome == Truncated {
		end := bytes.Index(c.out, []byte("\r\n\r\n")) + 4
		c.out = c.out[:end+(len(c.out)-end)/2]
	}
	if err := c.reply(i, &a); err != nil {
		return err
	}
	if !a.keep {
		return errEnd
	}
	return nil
}

// pause waits, but not beyond the end of the server.
func (c *conn) pause(d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-c.s.done:
		return net.ErrClosed
	}
}

func (i *instance) keeps(r *Request) bool {
	switch {
	case i.Persistence == AlwaysClose:
		return false
	case i.Persistence == AlwaysKeep && r.Proto == "HTTP/1.1":
		return !r.names("Connection", "close")
	default:
		return r.names("Connection", "keep-alive")
	}
}

// reply sends the rendered answer; the hop limit applies to tokens alone.
func (c *conn) reply(i *instance, a *answer) error {
	if !a.token || i.HopLimit == 64 {
		return c.send(c.out)
	}
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		if err := setHopLimit(tcp, i.HopLimit); err != nil {
			return err
		}
		c.limited = true
	}
	return c.write(c.out)
}

// refuse answers a request that was not read to its end. What the client still sends is read afterwards: closing with
// unread bytes would reset the connection and might take the answer along.
func (c *conn) refuse(i *instance, now time.Time, status int) error {
	c.out = i.append(c.out[:0], &answer{status: status}, now)
	if err := c.send(c.out); err != nil {
		return err
	}
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		tcp.CloseWrite()
		tcp.SetReadDeadline(time.Now().Add(time.Second))
		return c.drain()
	}
	return errEnd
}

// send writes with the system's own hop limit.
func (c *conn) send(b []byte) error {
	if c.limited {
		tcp := c.nc.(*net.TCPConn)
		if err := acknowledged(tcp, c.s.done); err != nil {
			return err
		}
		if err := setHopLimit(tcp, -1); err != nil {
			return err
		}
		c.limited = false
	}
	return c.write(b)
}

func (c *conn) write(b []byte) error {
	// Recorded first: who has the answer finds it in the transcript.
	c.record.add(true, b)
	n, err := c.nc.Write(b)
	c.record.unsent(len(b) - n)
	return err
}

// head reads until a whole head is there and returns its length, 0 if it is too long.
func (c *conn) head() (int, error) {
	for {
		// An empty line before the request line is ignored (RFC 9112, 2.2).
		for len(c.in) >= 2 && c.in[0] == '\r' && c.in[1] == '\n' {
			c.consume(2)
		}
		if n := headEnd(c.in); n > 0 {
			return n, nil
		}
		if len(c.in) == cap(c.in) {
			return 0, nil
		}
		if err := c.read(); err != nil {
			return 0, err
		}
	}
}

// skip consumes a request's body.
func (c *conn) skip(f framing) error {
	if !f.chunked {
		return c.discard(f.length)
	}
	for {
		line, err := c.line()
		if err != nil {
			return err
		}
		size, _, _ := strings.Cut(line, ";")
		var n int64
		for _, d := range []byte(strings.Trim(size, " \t")) {
			v := unhex(d)
			if v == 16 || n > 1<<32 {
				return errEnd
			}
			n = n<<4 | int64(v)
		}
		if size == "" {
			return errEnd
		}
		if n == 0 {
			for line != "" { // the trailer
				if line, err = c.line(); err != nil {
					return err
				}
			}
			return nil
		}
		if err := c.discard(n); err != nil {
			return err
		}
		if line, err = c.line(); err != nil || line != "" {
			return errEnd
		}
	}
}

func (c *conn) line() (string, error) {
	for {
		if end := bytes.IndexByte(c.in, '\n'); end >= 0 {
			line := strings.TrimSuffix(string(c.in[:end]), "\r")
			c.consume(end + 1)
			return line, nil
		}
		if len(c.in) == cap(c.in) {
			return "", errEnd
		}
		if err := c.read(); err != nil {
			return "", err
		}
	}
}

func (c *conn) discard(n int64) error {
	for n > int64(len(c.in)) {
		n -= int64(len(c.in))
		c.in = c.in[:0]
		if err := c.read(); err != nil {
			return err
		}
	}
	c.consume(int(n))
	return nil
}

// halfClosedFor is how long silence goes on when the client has said that it sends no more, which is all that is
// seen of one that has left, too.
const halfClosedFor = 3 * time.Second

// drain reads until the client closes.
func (c *conn) drain() error {
	for {
		c.in = c.in[:0]
		if err := c.read(); err != nil {
			return err
		}
	}
}

func (c *conn) read() error {
	n, err := c.nc.Read(c.in[len(c.in):cap(c.in)])
	c.record.add(false, c.in[len(c.in):len(c.in)+n])
	c.in = c.in[:len(c.in)+n]
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

func (c *conn) consume(n int) {
	c.in = c.space[:copy(c.space, c.in[n:])]
}
