package imdstest

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// setHopLimit sets the TTL of the packets that the connection sends from now on, retransmissions included; -1 is the
// system's default (ip(7), IP_TTL; ipv6(7), IPV6_UNICAST_HOPS).
func setHopLimit(nc *net.TCPConn, n int) error {
	level, option := unix.IPPROTO_IP, unix.IP_TTL
	if nc.LocalAddr().(*net.TCPAddr).IP.To4() == nil {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
	}
	raw, err := nc.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	err = raw.Control(func(fd uintptr) { opErr = unix.SetsockoptInt(int(fd), level, option, n) })
	if err != nil {
		return err
	}
	return opErr
}

// acknowledged waits until the peer has everything that was sent, at most until done is closed. While the hop limit
// keeps the answer from the peer, it does not return: lifting the limit would let the next retransmission through.
func acknowledged(nc *net.TCPConn, done <-chan struct{}) error {
	raw, err := nc.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var unsent int
		var opErr error
		err := raw.Control(func(fd uintptr) { unsent, opErr = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if err != nil {
			return err
		}
		if opErr != nil || unsent == 0 {
			return opErr
		}
		select {
		case <-time.After(time.Millisecond):
		case <-done:
			return net.ErrClosed
		}
	}
}
