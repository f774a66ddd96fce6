package loop

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Events are what may happen to a connection.
type Events uint32

const (
	// Gone is that the other side has ended the connection or its half of it.
	Gone Events = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
	// In is that there may be something to read; Gone, too.
	In = unix.EPOLLIN | Gone
	// Out is that there may be room for more to write, or that the connection is
	// made; or Gone.
	Out = unix.EPOLLOUT | Gone
)

// ErrAgain says that nothing can be read or written now.
var ErrAgain = errors.New("would block")

// Conn is a socket. Its methods must be called on the Loop, and never wait; those
// that read and write may return ErrAgain, and after Close they return
// net.ErrClosed.
type Conn struct {
	loop   *Loop
	fd     int
	level  bool   // it is reported again for as long as it is not dealt with
	place  int32  // by which epoll knows it; negative if it does not
	seen   Events // and not dealt with
	gone   bool
	broken bool  // as Look says from then on
	ended  bool  // by this side, as Aborted says
	unread bool  // something has come that was not read
	dry    bool  // nothing is there to read, and epoll tells when something is
	urgent bool  // a read may end before what is there does (tcp(7))
	task   *Task // that waits for it
	want   Events
}

// Adopt takes a socket, which must be non-blocking and have no other descriptor.
func (t *Task) Adopt(fd int) *Conn { return &Conn{loop: t.loop, fd: fd, place: -1} }

// Watch has events be noticed from now on. Wait does so when it first waits for the
// connection, which for many is never.
func (c *Conn) Watch() error {
	if c.place >= 0 {
		return nil
	}
	if c.fd < 0 {
		return net.ErrClosed
	}
	l := c.loop
	if len(l.free) > 0 {
		c.place = int32(l.free[len(l.free)-1])
		l.free = l.free[:len(l.free)-1]
	} else {
		c.place = int32(len(l.places))
		l.places = append(l.places, place{})
	}
	p := &l.places[c.place]
	p.conn = c
	what := uint32(unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET)
	if c.level {
		what = unix.EPOLLIN
	}
	err := l.control(unix.EPOLL_CTL_ADD, c.fd, &unix.EpollEvent{Events: what, Fd: c.place, Pad: p.generation})
	if err != nil {
		c.leave()
	}
	return err
}

// leave gives the place to others, under another generation.
func (c *Conn) leave() {
	p := &c.loop.places[c.place]
	p.conn = nil
	p.generation++
	c.loop.free = append(c.loop.free, uint32(c.place))
	c.place, c.dry = -1, false
}

// unwatch stops events until somebody waits again.
func (c *Conn) unwatch() {
	if c.place >= 0 {
		c.loop.control(unix.EPOLL_CTL_DEL, c.fd, nil)
		c.leave()
	}
}

func (c *Conn) happened(what uint32) {
	c.seen |= Events(what)
	c.gone = c.gone || c.seen&Gone != 0
	c.unread = c.unread || c.seen&unix.EPOLLIN != 0
	c.dry = c.dry && what&uint32(In) == 0
	c.urgent = c.urgent || what&unix.EPOLLPRI != 0
	if c.task != nil && c.seen&c.want != 0 {
		c.loop.makeReady(c.task)
	}
}

// Read reads what is there, or was when a wait last looked. The error is io.EOF when
// the other side sends no more.
func (c *Conn) Read(b []byte) (int, error) {
	if c.fd < 0 {
		return 0, net.ErrClosed
	}
	if c.dry {
		return 0, ErrAgain
	}
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(c.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			c.seen &^= In
			c.drained()
			return 0, ErrAgain
		case errno != 0:
			c.failed(errno)
			return 0, errno
		case n == 0 && len(b) > 0:
			c.gone = true
			return 0, io.EOF
		default:
			if int(n) < len(b) && !c.gone { // that was all; more is another event, but for the end that was seen
				c.seen &^= unix.EPOLLIN
				c.drained()
			}
			return int(n), nil
		}
	}
}

// drained is called when there is no more to read.
func (c *Conn) drained() { c.unread, c.dry = false, c.place >= 0 && !c.gone && !c.urgent }

// Write writes as much as there is room for: less than all of it comes with
// ErrAgain. On a connection that is being made it is ErrAgain, too.
func (c *Conn) Write(b []byte) (int, error) {
	if c.fd < 0 {
		return 0, net.ErrClosed
	}
	for done := 0; ; {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(c.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			c.seen &^= Out
			return done, ErrAgain
		case errno != 0:
			c.failed(errno)
			return done, errno
		default:
			done += int(n)
			if b = b[n:]; len(b) == 0 {
				return done, nil
			}
		}
	}
}

// CloseWrite says that no more will be written.
func (c *Conn) CloseWrite() error {
	if c.fd < 0 {
		return net.ErrClosed
	}
	return unix.Shutdown(c.fd, unix.SHUT_WR)
}

// Close ends the connection, as close(2) does: with a reset if there is something
// that was not read. It may be called twice.
func (c *Conn) Close() {
	if c.fd < 0 {
		return
	}
	if c.place >= 0 {
		c.leave() // epoll forgets what is closed
	}
	if c.task != nil { // it waits in vain
		c.loop.makeReady(c.task)
	}
	unix.RawSyscall(unix.SYS_CLOSE, uintptr(c.fd), 0, 0)
	c.fd = -1
}

// Reset ends the connection with a reset.
func (c *Conn) Reset() {
	if c.fd >= 0 {
		unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		c.Close()
	}
}

// failed notes what the kernel tells only once. EPIPE is no such thing: this side may
// have said itself that it writes no more.
func (c *Conn) failed(errno unix.Errno) {
	c.gone, c.dry = true, false
	c.broken = c.broken || errno != unix.EPIPE
	c.ended = c.ended || errno == unix.ECONNABORTED
}

// Aborted reports whether somebody on this side has ended the connection, with
// SOCK_DESTROY (sock_diag(7)), as far as a read, a write or Look has found out.
func (c *Conn) Aborted() bool { return c.ended }

// Gone reports whether the other side has ended the connection, or its half of it,
// as far as a wait, a read or a write has found out.
func (c *Conn) Gone() bool { return c.gone }

// Stirred reports whether something has happened to the connection since it was last
// read from, as far as is known.
func (c *Conn) Stirred() bool { return c.fd < 0 || c.gone || c.unread }

// NoDelay has small pieces be sent at once (TCP_NODELAY, tcp(7)).
func (c *Conn) NoDelay() {
	if c.fd >= 0 {
		unix.SetsockoptInt(c.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
}

// Control calls a function with the descriptor, which it must not keep.
func (c *Conn) Control(f func(fd int)) {
	if c.fd >= 0 {
		f(c.fd)
	}
}

// State is what the other side has done, as far as it can be seen without taking a
// byte.
type State uint8

// States of a connection.
const (
	Quiet State = iota // nothing to read, and it is still there
	Ready              // something to read
	Ended              // it will send no more
	Broken
)

// Look tells the state of a connection. Waits end when it changes.
func (c *Conn) Look() State {
	c.seen &^= In
	if c.fd < 0 || c.broken {
		return Broken
	}
	var one [1]byte
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(c.fd), uintptr(unsafe.Pointer(&one)), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return Quiet
	case errno != 0:
		c.failed(errno)
		return Broken
	}
	c.dry = false
	if n > 0 {
		return Ready
	}
	return Ended
}

// Listener accepts connections. Its methods must be called on the Loop.
type Listener struct {
	conn   *Conn
	waited bool // for the connection that was accepted last
}

// Listen takes the socket of a listener, which it closes. What is accepted has the
// listener's socket options (tcp(7)), and is sent without delay.
func (t *Task) Listen(ln *net.TCPListener) (*Listener, error) {
	defer ln.Close()
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	ctlErr := raw.Control(func(old uintptr) {
		if err = unix.SetsockoptInt(int(old), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err == nil {
			fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
		}
	})
	if err = errors.Join(ctlErr, err); err != nil {
		return nil, err
	}
	c := t.Adopt(fd)
	c.level = true
	return &Listener{conn: c}, nil
}

// Accept waits for the next connection, and tells where it comes from. Other tasks have
// their turn after one that was waited for; those that came with it are returned one
// after the other. Its error is one of Wait, of accept4(2), or ErrAgain if there is none
// after all.
func (t *Task) Accept(ln *Listener) (*Conn, netip.AddrPort, error) {
	if ln.waited {
		ln.waited = false
		if err := t.Yield(); err != nil {
			return nil, netip.AddrPort{}, err
		}
	}
	c, from, err := t.accept(ln)
	if err != ErrAgain {
		return c, from, err
	}
	if err := t.Wait(time.Time{}, Interest{ln.conn, In}); err != nil {
		return nil, netip.AddrPort{}, err
	}
	ln.waited = true
	return t.accept(ln)
}

func (t *Task) accept(ln *Listener) (*Conn, netip.AddrPort, error) {
	if t.cancelled.Load() {
		return nil, netip.AddrPort{}, ErrCancelled
	}
	return t.AcceptLeft(ln)
}

// AcceptLeft returns a connection that has come, or ErrAgain if there is none, also to a
// task that is cancelled. Other tasks do not run meanwhile.
func (t *Task) AcceptLeft(ln *Listener) (*Conn, netip.AddrPort, error) {
	ln.conn.seen = 0 // it is told again
	var from unix.RawSockaddrAny
	size := uint32(unsafe.Sizeof(from))
	fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(ln.conn.fd), uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	switch errno {
	case 0:
		return t.Adopt(int(fd)), AddrPort(&from), nil
	case unix.EAGAIN, unix.EINTR:
		return nil, netip.AddrPort{}, ErrAgain
	}
	return nil, netip.AddrPort{}, errno
}

// Pause lets connections wait in the backlog until Accept is called again.
func (ln *Listener) Pause() { ln.conn.unwatch() }

// Close gives the listener up. If nobody else has its socket, its backlog is reset;
// if somebody has, as the service manager does, epoll would go on to tell of it.
func (ln *Listener) Close() {
	ln.conn.unwatch()
	ln.conn.Close()
}

// AddrPort is an address of the Internet as the kernel writes it (ip(7), ipv6(7)). The
// zero AddrPort stands for any other.
func AddrPort(sa *unix.RawSockaddrAny) netip.AddrPort {
	switch sa.Addr.Family {
	case unix.AF_INET:
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), port(&v4.Port))
	case unix.AF_INET6:
		v6 := (*unix.RawSockaddrInet6)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom16(v6.Addr), port(&v6.Port))
	}
	return netip.AddrPort{}
}

func port(networkOrder *uint16) uint16 {
	return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(networkOrder))[:])
}
