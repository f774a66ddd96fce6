// Package diag asks the kernel about one TCP socket at a time.
//
// The question is always exact: one SOCK_DIAG_BY_FAMILY request without the
// dump flag, for one complete tuple (sock_diag(7), net/ipv4/inet_diag.c). It
// costs about 4 µs whatever the number of sockets on the host. The answer is
// always compared with the question, because the kernel, when the wanted
// socket is gone, answers with a listener that happens to be on the port, or
// with a TIME_WAIT row that belongs to nobody. The SocketGet function of
// vishvananda/netlink filters a dump by ports and returns the first row; under
// two sockets that share their ports it names the wrong process half of the
// time, so it is not used here.
//
// A Conntrack says when a connection began, by the same kind of question to the
// connection table of netfilter.
//
// Both answer for the network namespace in which they were opened, from
// whatever thread they are used later.
package diag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// ErrNotFound says that the kernel has no socket with the asked tuple, or
// conntrack no entry.
var ErrNotFound = errors.New("no such connection")

// ErrGone says that the tuple exists but that no process can hold it any
// longer: it is an orphan or in TIME_WAIT. Its uid says nothing.
var ErrGone = errors.New("socket closed by its process")

// ErrMismatch says that the kernel answered with another socket or entry than the
// one that was asked for.
var ErrMismatch = errors.New("kernel answered for another connection")

// Tuple names one end of a TCP connection as the process that owns that end
// sees it: Local is its own address.
type Tuple struct {
	Local, Remote netip.AddrPort
}

func (t Tuple) String() string { return t.Local.String() + "->" + t.Remote.String() }

// State is a TCP state with the kernel's numbers (include/net/tcp_states.h).
type State uint8

const (
	Established State = iota + 1
	SynSent
	SynRecv
	FinWait1
	FinWait2
	TimeWait
	Close
	CloseWait
	LastAck
	Listen
	Closing
	NewSynRecv
)

var stateNames = [...]string{
	Established: "ESTABLISHED", SynSent: "SYN_SENT", SynRecv: "SYN_RECV",
	FinWait1: "FIN_WAIT1", FinWait2: "FIN_WAIT2", TimeWait: "TIME_WAIT",
	Close: "CLOSE", CloseWait: "CLOSE_WAIT", LastAck: "LAST_ACK",
	Listen: "LISTEN", Closing: "CLOSING", NewSynRecv: "NEW_SYN_RECV",
}

func (s State) String() string {
	if int(s) < len(stateNames) && stateNames[s] != "" {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Connected reports whether a socket in this state is one that a process
// connected and may still hold.
func (s State) Connected() bool {
	switch s {
	case Established, FinWait1, FinWait2, CloseWait, LastAck, Closing:
		return true
	}
	return false
}

// Socket is what the kernel said about one socket.
type Socket struct {
	Tuple
	State     State
	Inode     uint32 // of the socket in sockfs, as in /proc/PID/fd: "socket:[INODE]"
	UID       uint32 // of the process that created the socket, which need not be the one that holds it
	Cookie    uint64 // names the socket, not the connection: connect(AF_UNSPEC) and a new connect keep it
	CgroupID  uint64 // cgroup2 in which the socket was created; 0 when not reported
	Interface uint32 // index of the interface to which the socket is bound now (SO_BINDTODEVICE); 0 for none
	Mapped    bool   // an AF_INET6 socket that speaks IPv4
}

const (
	sizeofHeader = 16 // struct nlmsghdr
	sizeofReq    = 56 // struct inet_diag_req_v2
	sizeofMsg    = 72 // struct inet_diag_msg
	sizeofID     = 48 // struct inet_diag_sockid
	sizeofAttr   = 4  // struct nlattr

	familyIPv4 = 2
	familyIPv6 = 10
	protoTCP   = 6

	attrCgroupID = 21 // INET_DIAG_CGROUP_ID, since Linux 5.9
)

// appendSockid appends struct inet_diag_sockid (include/uapi/linux/inet_diag.h).
// A cookie of 0 asks for any (INET_DIAG_NOCOOKIE). An interface of 0 asks for a
// socket that is bound to none, any other also for one that is bound to it.
func appendSockid(b []byte, t Tuple, index uint32, cookie uint64) []byte {
	if cookie == 0 {
		cookie = ^uint64(0)
	}
	b = binary.BigEndian.AppendUint16(b, t.Local.Port())
	b = binary.BigEndian.AppendUint16(b, t.Remote.Port())
	b = appendAddr(b, t.Local.Addr())
	b = appendAddr(b, t.Remote.Addr())
	b = binary.NativeEndian.AppendUint32(b, index)
	b = binary.NativeEndian.AppendUint32(b, uint32(cookie))
	return binary.NativeEndian.AppendUint32(b, uint32(cookie>>32))
}

func appendAddr(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		v4 := a.As4()
		return append(append(b, v4[:]...), make([]byte, 12)...)
	}
	v6 := a.As16()
	return append(b, v6[:]...)
}

// parseMsg reads one struct inet_diag_msg with its attributes. Addresses come
// back unmapped, so that they compare with those of the question.
func parseMsg(b []byte) (Socket, error) {
	if len(b) < sizeofMsg {
		return Socket{}, fmt.Errorf("inet_diag_msg of %d bytes, want %d", len(b), sizeofMsg)
	}
	family := b[0]
	s := Socket{State: State(b[1])}
	id := b[4:]
	local, err := addr(family, id[4:20])
	if err != nil {
		return Socket{}, err
	}
	remote, _ := addr(family, id[20:36])
	s.Mapped = local.Is4In6() || remote.Is4In6()
	s.Local = netip.AddrPortFrom(local.Unmap(), binary.BigEndian.Uint16(id[0:]))
	s.Remote = netip.AddrPortFrom(remote.Unmap(), binary.BigEndian.Uint16(id[2:]))
	s.Interface = binary.NativeEndian.Uint32(id[36:])
	s.Cookie = uint64(binary.NativeEndian.Uint32(id[40:])) | uint64(binary.NativeEndian.Uint32(id[44:]))<<32
	s.UID = binary.NativeEndian.Uint32(b[64:])
	s.Inode = binary.NativeEndian.Uint32(b[68:])
	err = attrs(b[sizeofMsg:], func(typ uint16, value []byte) error {
		if typ == attrCgroupID && len(value) >= 8 {
			s.CgroupID = binary.NativeEndian.Uint64(value)
		}
		return nil
	})
	if err != nil {
		return Socket{}, err
	}
	return s, nil
}

func addr(family byte, b []byte) (netip.Addr, error) {
	switch family {
	case familyIPv4:
		return netip.AddrFrom4([4]byte(b)), nil
	case familyIPv6:
		return netip.AddrFrom16([16]byte(b)), nil
	}
	return netip.Addr{}, fmt.Errorf("inet_diag_msg of address family %d", family)
}

// attrs calls each with every netlink attribute in b, in their order. The flags of
// a type, NLA_F_NESTED and NLA_F_NET_BYTEORDER, are taken off.
func attrs(b []byte, each func(typ uint16, value []byte) error) error {
	for len(b) >= sizeofAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < sizeofAttr || size > len(b) {
			return fmt.Errorf("netlink attribute of %d bytes in the last %d", size, len(b))
		}
		if err := each(binary.NativeEndian.Uint16(b[2:])&0x3fff, b[sizeofAttr:size]); err != nil {
			return err
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil
}

// check compares an answer with the question.
func check(t Tuple, cookie uint64, index uint32, s Socket) error {
	switch {
	case s.Tuple != t:
		return fmt.Errorf("%w: asked for %v, got %v in %v", ErrMismatch, t, s.Tuple, s.State)
	case cookie != 0 && s.Cookie != cookie:
		return fmt.Errorf("%w: asked for cookie %#x, got %#x", ErrMismatch, cookie, s.Cookie)
	case s.Interface != 0 && s.Interface != index:
		return fmt.Errorf("%w: asked for interface %d, got %d", ErrMismatch, index, s.Interface)
	case !s.State.Connected():
		return fmt.Errorf("%w: %v is in %v", ErrGone, t, s.State)
	case s.Inode == 0:
		return fmt.Errorf("%w: %v is in %v without an inode", ErrGone, t, s.State)
	}
	return nil
}
