package diag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// A Conn is one kept netlink socket. Its methods may be called from any
// goroutine; they take turns.
type Conn struct {
	mu    sync.Mutex // guards the following: one question is under way at a time
	diag  wire
	links links
}

// Open opens a Conn in the network namespace of the calling thread, and asks
// it one question, so that a kernel without INET_DIAG (a module on some
// distributions) is found here and not at the first client.
func Open() (*Conn, error) {
	c := &Conn{diag: wire{fd: -1}, links: links{route: wire{fd: -1}}}
	if err := c.diag.open(unix.NETLINK_INET_DIAG); err != nil {
		return nil, fmt.Errorf("open a sock_diag socket: %w", err)
	}
	if err := c.links.route.open(unix.NETLINK_ROUTE); err != nil {
		c.Close()
		return nil, fmt.Errorf("open a socket that lists interfaces: %w", err)
	}
	probe := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	if _, err := c.exact(Tuple{probe, probe}, 0, 0); err != nil && !errors.Is(err, ErrNotFound) {
		c.Close()
		return nil, fmt.Errorf("ask sock_diag (is the kernel module tcp_diag there?): %w", err)
	}
	return c, nil
}

// OpenIn opens a Conn in the network namespace of the descriptor ns, which is
// that of a /proc/PID/ns/net, and leaves ns open. An open Conn keeps the
// namespace from being taken apart. It needs CAP_SYS_ADMIN, here and in the
// user namespace that owns the other one (setns(2)); using the Conn does not.
func OpenIn(ns int) (*Conn, error) {
	type opened struct {
		conn *Conn
		err  error
	}
	done := make(chan opened, 1)
	go func() {
		var o opened
		defer func() { done <- o }()
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			o.err = fmt.Errorf("open this thread's network namespace: %w", err)
			return
		}
		defer unix.Close(home)
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			if err == unix.EPERM {
				err = fmt.Errorf("%w (it needs CAP_SYS_ADMIN, here and in the user namespace of the other)", err)
			}
			o.err = fmt.Errorf("enter another network namespace: %w", err)
			return
		}
		o.conn, o.err = Open()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread() // otherwise the thread ends with this goroutine
		}
	}()
	o := <-done
	return o.conn, o.err
}

// Close releases the socket. It may be called twice.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.Join(c.diag.close(), c.links.route.close())
}

// NetnsCookie names the network namespace that the Conn answers for. A cookie is
// never reused before the next boot, other than the inode of a namespace
// (SO_NETNS_COOKIE, Linux 5.14; the same number as bpf_get_netns_cookie gives).
func (c *Conn) NetnsCookie() (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cookie, err := unix.GetsockoptUint64(c.diag.fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err == unix.ENOPROTOOPT {
		err = fmt.Errorf("%w: Linux has it since 5.14", errors.ErrUnsupported)
	}
	if err != nil {
		return 0, fmt.Errorf("read the cookie of a network namespace: %w", err)
	}
	return cookie, nil
}

// Find returns the socket with exactly this tuple, and with this cookie unless
// it is 0. IPv4 clients are found whether their socket is AF_INET or a
// v4-mapped AF_INET6 one, and those that are bound to an interface, too. Errors
// are ErrNotFound, ErrGone, ErrMismatch, or what the netlink socket said.
func (c *Conn) Find(t Tuple, cookie uint64) (Socket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.find(t, cookie)
}

// Again asks once more for a socket that was found before: the same tuple, cookie
// and interface. A socket that was bound to another interface since is found
// there. Errors are those of Find.
func (c *Conn) Again(s Socket) (Socket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.Interface != 0 {
		now, err := c.exact(s.Tuple, s.Cookie, s.Interface)
		if err == nil || !elsewhere(err) {
			return now, err
		}
	}
	return c.find(s.Tuple, s.Cookie)
}

// find asks for a socket that is bound to no interface. If there is none that a
// process connected, it asks for one per interface, since SO_BINDTODEVICE
// (socket(7)), which any user may set, hides a socket from the first question.
//
// While there is an unbound socket nobody can connect a bound one with the same
// tuple (__inet_check_established), so the first answer is the only one. But beside
// a bound one, which its process may have kept in CLOSE_WAIT, somebody may connect
// an unbound one and bind it to the same interface afterwards. Then the kernel
// answers with either. The client of a connection that was just accepted is
// ESTABLISHED, so a bound socket counts only in that state, or by its cookie.
func (c *Conn) find(t Tuple, cookie uint64) (Socket, error) {
	s, err := c.exact(t, cookie, 0)
	if err == nil || !elsewhere(err) {
		return s, err
	}
	indexes, listErr := c.links.list()
	if listErr != nil {
		return Socket{}, fmt.Errorf("look for %v on every interface: %w", t, listErr)
	}
	for _, index := range indexes {
		s, boundErr := c.exact(t, cookie, index)
		switch {
		case boundErr != nil && !elsewhere(boundErr):
			return Socket{}, boundErr
		case boundErr != nil:
		case cookie != 0 || s.State == Established:
			return s, nil
		default:
			err = fmt.Errorf("%w: %v on interface %d is in %v and may hide the one that was asked for", ErrMismatch, t, index, s.State)
		}
	}
	return Socket{}, err
}

// elsewhere reports whether the wanted socket may be bound to an interface that was
// not asked for.
func elsewhere(err error) bool {
	return errors.Is(err, ErrNotFound) || errors.Is(err, ErrMismatch) || errors.Is(err, ErrGone)
}

// exact asks one question.
func (c *Conn) exact(t Tuple, cookie uint64, index uint32) (Socket, error) {
	var req [sizeofHeader + sizeofReq]byte
	b := c.diag.header(req[:0], unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_REQUEST, len(req))
	b = appendReq(b, family(t.Local.Addr()), ^uint32(0))
	appendSockid(b, t, index, cookie)
	typ, payload, err := c.diag.ask(req[:])
	switch {
	case err == unix.ENOENT: // also when the cookie is another
		return Socket{}, ErrNotFound
	case err != nil:
		return Socket{}, fmt.Errorf("ask sock_diag for %v: %w", t, err)
	case typ != unix.SOCK_DIAG_BY_FAMILY:
		return Socket{}, fmt.Errorf("ask sock_diag for %v: answer of type %d", t, typ)
	}
	s, err := parseMsg(payload)
	if err == nil {
		err = check(t, cookie, index, s)
	}
	if err != nil {
		return Socket{}, err
	}
	return s, nil
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
		b := c.diag.header(req[:0], unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, len(req))
		states := uint32(1<<Established | 1<<SynSent | 1<<FinWait1 | 1<<FinWait2 | 1<<CloseWait | 1<<LastAck | 1<<Closing)
		appendSockid(appendReq(b, fam, states), Tuple{}, 0, 0)
		err := c.diag.dump(req[:], c.diag.buf[:], unix.SOCK_DIAG_BY_FAMILY, func(payload []byte) error {
			s, err := parseMsg(payload)
			if err != nil {
				return err
			}
			for _, r := range remotes {
				if s.Remote == r {
					found = append(found, s)
				}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list connections: %w", err)
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
	b := c.diag.header(req[:0], sockDestroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, len(req))
	appendSockid(appendReq(b, fam, ^uint32(0)), tuple, s.Interface, s.Cookie)
	if _, _, err := c.diag.ask(req[:]); err != nil {
		return fmt.Errorf("destroy %v: %w", s.Tuple, err)
	}
	return nil
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
