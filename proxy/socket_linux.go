package proxy

import (
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"github.com/imdsgate/imdsgate/proxy/loop"
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
// know the connection. v4 is about the listener.
func originalDst(c *loop.Conn, v4 bool) (dst netip.AddrPort, err error) {
	level, size := unix.IPPROTO_IP, unsafe.Sizeof(unix.RawSockaddrInet4{})
	if !v4 {
		level, size = unix.IPPROTO_IPV6, unsafe.Sizeof(unix.RawSockaddrInet6{})
	}
	c.Control(func(fd int) {
		var sa unix.RawSockaddrAny
		if err = getsockopt(fd, level, unix.SO_ORIGINAL_DST, unsafe.Pointer(&sa), size); err == nil {
			dst = loop.AddrPort(&sa)
		}
	})
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("read the original destination: %w", err)
	}
	return dst, nil
}

func getsockopt(fd int, level, name int, value unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(value), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// dial begins a connection to the service and does not wait for it. It returns the
// socket, and the near end.
// The mark exempts the packets from our own redirect. With minTTL above 0 the
// kernel drops answers that have less time to live left (IP_MINTTL, ip(7);
// IPV6_MINHOPCOUNT, RFC 5082), as the hop to a container would have.
func dial(dst netip.AddrPort, mark uint32, minTTL int) (fd int, near netip.AddrPort, err error) {
	family, level, ttl := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MINTTL
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(dst.Port()), Addr: as4(dst.Addr())}
	if dst.Addr().Is6() {
		family, level, ttl = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT
		sa = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, near, fmt.Errorf("open a socket to %v: %w", dst, err)
	}
	if mark != 0 {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
	}
	if err == nil && minTTL > 0 {
		err = unix.SetsockoptInt(fd, level, ttl, minTTL)
	}
	if err == nil {
		if err = unix.Connect(fd, sa); err == unix.EINPROGRESS {
			err = nil
		}
	}
	if err == nil {
		near, err = nearEnd(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, near, fmt.Errorf("connect to %v: %w", dst, err)
	}
	return fd, near, nil
}

func nearEnd(fd int) (netip.AddrPort, error) {
	var sa unix.RawSockaddrAny
	size := uint32(unsafe.Sizeof(sa))
	_, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return netip.AddrPort{}, errno
	}
	return loop.AddrPort(&sa), nil
}

func as4(a netip.Addr) [4]byte {
	if a.Is4() {
		return a.As4()
	}
	return [4]byte{}
}
