package diag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// answerTimeout bounds one answer of the kernel. It answers sock_diag inside
// the write call, so a longer wait means that the answer was lost.
const answerTimeout = 100 // milliseconds

// A Conn is one kept netlink socket. Its methods may be called from any
// goroutine; they take turns.
type Conn struct {
	mu  sync.Mutex // guards all below: one question is under way at a time
	fd  int
	seq uint32
	buf [8192]byte
}

// Open opens a Conn in the network namespace of the calling thread, and asks
// it one question, so that a kernel without INET_DIAG (a module on some
// distributions) is found here and not at the first client.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open a sock_diag socket: %w", err)
	}
	c := &Conn{fd: fd}
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: answerTimeout * 1000})
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err == nil {
		probe := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
		if _, err = c.Find(Tuple{probe, probe}, 0); errors.Is(err, ErrNotFound) {
			err = nil
		}
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("ask sock_diag (is the kernel module tcp_diag there?): %w", err)
	}
	return c, nil
}

// Close releases the socket. It may be called twice.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	err := unix.Close(c.fd)
	c.fd = -1
	return err
}

// Find returns the socket with exactly this tuple, and with this cookie unless
// it is 0. IPv4 clients are found whether their socket is AF_INET or a
// v4-mapped AF_INET6 one. Errors are ErrNotFound, ErrGone, ErrMismatch, or
// what the netlink socket said.
func (c *Conn) Find(t Tuple, cookie uint64) (Socket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var req [sizeofHeader + sizeofReq]byte
	b := c.header(req[:0], unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_REQUEST, len(req))
	b = appendReq(b, family(t.Local.Addr()), ^uint32(0))
	appendSockid(b, t, cookie)
	if _, err := unix.Write(c.fd, req[:]); err != nil {
		return Socket{}, fmt.Errorf("ask sock_diag for %v: %w", t, err)
	}
	for {
		n, err := c.read()
		if err != nil {
			return Socket{}, fmt.Errorf("read what sock_diag says of %v: %w", t, err)
		}
		typ, seq, payload, _, err := next(c.buf[:n])
		if err != nil {
			return Socket{}, err
		}
		if seq != c.seq {
			continue // the late answer to a question that timed out
		}
		switch typ {
		case unix.NLMSG_ERROR:
			errno := errnoOf(payload)
			if errno == unix.ENOENT { // also when the cookie is another
				return Socket{}, ErrNotFound
			}
			return Socket{}, fmt.Errorf("ask sock_diag for %v: %w", t, errno)
		case unix.SOCK_DIAG_BY_FAMILY:
			s, err := parseMsg(payload)
			if err == nil {
				err = check(t, cookie, s)
			}
			return s, err
		default:
			return Socket{}, fmt.Errorf("ask sock_diag for %v: answer of type %d", t, typ)
		}
	}
}

// Connected lists the connections of this namespace whose remote end is one of
// the given addresses: those that were there before a redirect. It walks the
// whole table of the host, so it is for start-up, not for requests.
func (c *Conn) Connected(remotes []netip.AddrPort) ([]Socket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var found []Socket
	for _, fam := range []byte{familyIPv4, familyIPv6} {
		var req [sizeofHeader + sizeofReq]byte
		b := c.header(req[:0], unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, len(req))
		states := uint32(1<<Established | 1<<SynSent | 1<<FinWait1 | 1<<FinWait2 | 1<<CloseWait | 1<<LastAck | 1<<Closing)
		appendSockid(appendReq(b, fam, states), Tuple{}, 0)
		if _, err := unix.Write(c.fd, req[:]); err != nil {
			return nil, fmt.Errorf("list connections: %w", err)
		}
		for done := false; !done; {
			n, err := c.read()
			if err != nil {
				return nil, fmt.Errorf("list connections: %w", err)
			}
			for rest := c.buf[:n]; len(rest) > 0 && !done; {
				var typ uint16
				var seq uint32
				var payload []byte
				typ, seq, payload, rest, err = next(rest)
				if err != nil {
					return nil, err
				}
				switch {
				case seq != c.seq:
				case typ == unix.NLMSG_DONE:
					done = true
				case typ == unix.NLMSG_ERROR:
					return nil, fmt.Errorf("list connections: %w", errnoOf(payload))
				case typ == unix.SOCK_DIAG_BY_FAMILY:
					s, err := parseMsg(payload)
					if err != nil {
						return nil, err
					}
					for _, r := range remotes {
						if s.Remote == r {
							found = append(found, s)
						}
					}
				}
			}
		}
	}
	return found, nil
}

// Destroy aborts one connection, as `ss -K` does; both ends see a reset
// (SOCK_DESTROY, Linux 4.5, CONFIG_INET_DIAG_DESTROY). It needs CAP_NET_ADMIN.
func (c *Conn) Destroy(s Socket) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	const sockDestroy = 21
	fam := family(s.Local.Addr())
	tuple := s.Tuple
	if s.Mapped {
		fam = familyIPv6
		tuple.Local = mapped(tuple.Local)
		tuple.Remote = mapped(tuple.Remote)
	}
	var req [sizeofHeader + sizeofReq]byte
	b := c.header(req[:0], sockDestroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, len(req))
	appendSockid(appendReq(b, fam, ^uint32(0)), tuple, s.Cookie)
	if _, err := unix.Write(c.fd, req[:]); err != nil {
		return fmt.Errorf("destroy %v: %w", s.Tuple, err)
	}
	for {
		n, err := c.read()
		if err != nil {
			return fmt.Errorf("destroy %v: %w", s.Tuple, err)
		}
		typ, seq, payload, _, err := next(c.buf[:n])
		if err != nil {
			return err
		}
		if seq != c.seq || typ != unix.NLMSG_ERROR {
			continue
		}
		if errno := errnoOf(payload); errno != 0 {
			return fmt.Errorf("destroy %v: %w", s.Tuple, errno)
		}
		return nil
	}
}

func (c *Conn) header(b []byte, typ, flags uint16, size int) []byte {
	c.seq++
	b = binary.NativeEndian.AppendUint32(b, uint32(size))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, c.seq)
	return binary.NativeEndian.AppendUint32(b, 0)
}

func (c *Conn) read() (int, error) {
	for {
		n, err := unix.Read(c.fd, c.buf[:])
		if err != unix.EINTR {
			return n, err
		}
	}
}

func appendReq(b []byte, family byte, states uint32) []byte {
	b = append(b, family, protoTCP, 0, 0)
	return binary.NativeEndian.AppendUint32(b, states)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return familyIPv4
	}
	return familyIPv6
}

func mapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
}

// next splits the first netlink message off b.
func next(b []byte) (typ uint16, seq uint32, payload, rest []byte, err error) {
	if len(b) < sizeofHeader {
		return 0, 0, nil, nil, fmt.Errorf("netlink message of %d bytes", len(b))
	}
	size := int(binary.NativeEndian.Uint32(b))
	if size < sizeofHeader || size > len(b) {
		return 0, 0, nil, nil, fmt.Errorf("netlink message says %d bytes, has %d", size, len(b))
	}
	typ = binary.NativeEndian.Uint16(b[4:])
	seq = binary.NativeEndian.Uint32(b[8:])
	return typ, seq, b[sizeofHeader:size], b[min((size+3)&^3, len(b)):], nil
}

func errnoOf(payload []byte) unix.Errno {
	if len(payload) < 4 {
		return unix.EIO
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(payload)))
}
