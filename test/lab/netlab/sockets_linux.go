package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socketsTimeout is how long openSockets waits for goroutines that are about to close theirs. Too short, and an
// orderly test fails on a busy machine; longer only delays the report of a real leak.
const socketsTimeout = time.Second

// openSockets returns an error naming this process's sockets that belong to one of the namespaces.
func openSockets(in []*Namespace) error {
	deadline := time.Now().Add(socketsTimeout)
	for {
		var errs []error
		links, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			return err
		}
		for _, link := range links {
			target, err := os.Readlink(link)
			if err != nil || !strings.HasPrefix(target, "socket:") {
				continue
			}
			fd, err := strconv.Atoi(filepath.Base(link))
			if err != nil {
				return err
			}
			if n := socketIn(fd, in); n != nil {
				errs = append(errs, fmt.Errorf("namespace %s: descriptor %d is still open: %s", n, fd, describe(fd)))
			}
		}
		if len(errs) == 0 || time.Now().After(deadline) {
			return errors.Join(errs...)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// socketIn returns the namespace of a socket if it is one of these (SIOCGSKNS, linux/sockios.h).
func socketIn(fd int, in []*Namespace) *Namespace {
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return nil
	}
	defer unix.Close(ns)
	var st unix.Stat_t
	if unix.Fstat(ns, &st) != nil {
		return nil
	}
	for _, n := range in {
		if n.inode == st.Ino {
			return n
		}
	}
	return nil
}

func describe(fd int) string {
	local, _ := unix.Getsockname(fd)
	remote, _ := unix.Getpeername(fd)
	return "socket from " + show(local) + " to " + show(remote)
}

func show(a unix.Sockaddr) string {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port)).String()
	}
	return "nowhere"
}

// destroyOrphans ends the TCP connections of the calling thread's namespace that no process has open any more. One
// whose peer's packets are dropped, as the hop limit does, holds the namespace for 106 s of retransmissions. It takes a
// kernel with "tcp: fix forever orphan socket caused by tcp_abort" of August 2024; older ones leave them half alive.
func destroyOrphans() error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return fmt.Errorf("list TCP sockets: %w", err)
		}
		for _, s := range sockets {
			if s.INode != 0 || s.State == netlink.TCP_TIME_WAIT {
				continue
			}
			req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
			req.AddRawData(destroyRequest(s))
			_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("destroy TCP socket %v:%d: %w", s.ID.Source, s.ID.SourcePort, err)
			}
		}
	}
	return nil
}

// destroyRequest renders a struct inet_diag_req_v2 (linux/inet_diag.h) that names one socket by its cookie.
func destroyRequest(s *netlink.Socket) []byte {
	source, destination := s.ID.Source, s.ID.Destination
	if s.Family == unix.AF_INET {
		source, destination = source.To4(), destination.To4()
	}
	b := make([]byte, 56)
	b[0], b[1] = s.Family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 1<<s.State)
	binary.BigEndian.PutUint16(b[8:], s.ID.SourcePort)
	binary.BigEndian.PutUint16(b[10:], s.ID.DestinationPort)
	copy(b[12:28], source)
	copy(b[28:44], destination)
	binary.NativeEndian.PutUint32(b[44:], s.ID.Interface)
	binary.NativeEndian.PutUint32(b[48:], s.ID.Cookie[0])
	binary.NativeEndian.PutUint32(b[52:], s.ID.Cookie[1])
	return b
}
