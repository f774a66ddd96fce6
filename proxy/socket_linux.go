package proxy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// freebind lets a socket be bound to an IPv6 address that this host does not
// have now. Linux before 4.15 knows no such option, and there the bind fails.
func freebind(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1) })
}

// originalDst is where a redirected connection was going (SO_ORIGINAL_DST,
// linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h). For one that
// was not redirected it is our own address, or an error when conntrack does not
// know the connection.
func originalDst(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	var dst netip.AddrPort
	ctlErr := raw.Control(func(fd uintptr) {
		if local.Addr().Unmap().Is4() {
			var sa unix.RawSockaddrInet4
			if err = getsockopt(fd, unix.IPPROTO_IP, unix.SO_ORIGINAL_DST, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err == nil {
				dst = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), port(sa.Port))
			}
			return
		}
		var sa unix.RawSockaddrInet6
		if err = getsockopt(fd, unix.IPPROTO_IPV6, unix.SO_ORIGINAL_DST, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err == nil {
			dst = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port(sa.Port))
		}
	})
	if err = errors.Join(ctlErr, err); err != nil {
		return netip.AddrPort{}, fmt.Errorf("read the original destination: %w", err)
	}
	return dst, nil
}

func port(networkOrder uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&networkOrder))
	return uint16(b[0])<<8 | uint16(b[1])
}

func getsockopt(fd uintptr, level, name int, value unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name),
		uintptr(value), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// upstream is our connection to the metadata service. It belongs to one client
// connection and ends with it.
type upstream struct{ file *os.File }

// dial begins a connection and does not wait for it: the first Write does.
// The mark exempts the packets from our own redirect. With minTTL above 0 the
// kernel drops answers that have less time to live left (IP_MINTTL, ip(7);
// IPV6_MINHOPCOUNT, RFC 5082), as the hop to a container would have.
func dial(dst netip.AddrPort, mark uint32, minTTL int) (*upstream, error) {
	family, level, ttl := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MINTTL
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(dst.Port()), Addr: as4(dst.Addr())}
	if dst.Addr().Is6() {
		family, level, ttl = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT
		sa = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, fmt.Errorf("open a socket to %v: %w", dst, err)
	}
	if mark != 0 {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
	}
	if err == nil && minTTL > 0 {
		err = unix.SetsockoptInt(fd, level, ttl, minTTL)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err == nil {
		if err = unix.Connect(fd, sa); err == unix.EINPROGRESS {
			err = nil
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %v: %w", dst, err)
	}
	return &upstream{os.NewFile(uintptr(fd), "upstream")}, nil
}

// local is the near end of the connection.
func (u *upstream) local() netip.AddrPort {
	var local netip.AddrPort
	raw, err := u.file.SyscallConn()
	if err != nil {
		return local
	}
	raw.Control(func(fd uintptr) {
		switch sa, _ := unix.Getsockname(int(fd)); sa := sa.(type) {
		case *unix.SockaddrInet4:
			local = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			local = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
		}
	})
	return local
}

func as4(a netip.Addr) [4]byte {
	if a.Is4() {
		return a.As4()
	}
	return [4]byte{}
}

func (u *upstream) Read(b []byte) (int, error)         { return u.file.Read(b) }
func (u *upstream) Write(b []byte) (int, error)        { return u.file.Write(b) }
func (u *upstream) Close() error                       { return u.file.Close() }
func (u *upstream) SetReadDeadline(t time.Time) error  { return u.file.SetReadDeadline(t) }
func (u *upstream) SetWriteDeadline(t time.Time) error { return u.file.SetWriteDeadline(t) }

// CloseWrite may meet a Close, after which the number of the descriptor is
// another's: so it goes through the file.
func (u *upstream) CloseWrite() error {
	raw, err := u.file.SyscallConn()
	if err != nil {
		return err
	}
	ctlErr := raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) })
	return errors.Join(ctlErr, err)
}

// state is what the other end of a connection has done, as far as we can see
// without taking a byte.
type state uint8

const (
	quiet state = iota // nothing to read, still there
	ready              // something to read
	ended              // it will send no more
	reset
)

// look tells the state of a connection without waiting.
func look(c syscall.Conn) state {
	raw, err := c.SyscallConn()
	if err != nil {
		return reset
	}
	st := reset
	var one [1]byte
	err = raw.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case err == unix.EAGAIN || err == unix.EINTR:
			st = quiet
		case err == nil && n > 0:
			st = ready
		case err == nil:
			st = ended
		}
	})
	if err != nil {
		return reset
	}
	return st
}
