package witness

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
)

// The structs of this file are read and written by the programs, too: they have no
// padding, and the programs take every offset from here.

// tuple is the key under which a socket is found. An IPv4 address is in it as
// ::ffff:a.b.c.d, whatever the family of the socket: on the wire it is the same
// connection, and no other IPv6 address can be mistaken for it. Ports are in the
// order of the host.
type tuple struct {
	netns         uint64
	local, remote [16]byte
	lport, rport  uint16
	_             uint32
}

func tupleOf(netns uint64, t diag.Tuple) tuple {
	return tuple{
		netns: netns, local: t.Local.Addr().As16(), remote: t.Remote.Addr().As16(),
		lport: t.Local.Port(), rport: t.Remote.Port(),
	}
}

func (t *tuple) diag() diag.Tuple {
	return diag.Tuple{
		Local:  netip.AddrPortFrom(netip.AddrFrom16(t.local).Unmap(), t.lport),
		Remote: netip.AddrPortFrom(netip.AddrFrom16(t.remote).Unmap(), t.rport),
	}
}

// record is one connect(2). It is stored twice: under the cookie, and when its tuple is
// complete a copy under that.
type record struct {
	cookie      uint64 // in the copy 0: two sockets claimed the tuple, and it is nobody's
	key         tuple  // complete when the source port is chosen
	at, boot    uint64
	cgroup      uint64
	pid, tid    uint32
	uid, gid    uint32
	comm        [16]byte
	flags       uint32
	parent      uint32
	start       uint64
	parentStart uint64
	exec        uint64
	writers     uint32 // in the map of that name
	_           uint32
}

// flags of a record
const (
	flagUnbound     = 1 << iota // was bound to a device
	flagMarked                  // a sighting: had the daemon's mark
	flagRefused                 // a sighting: and was refused
	flagMPTCP                   // its writes do not pass the writer hook
	flagMoreWriters             // than are kept
	flagUncovered               // a sighting: its namespace is uncovered
)

func (r *record) actor() attribution.Actor {
	return attribution.Actor{
		PID: int(r.pid), TID: int(r.tid), UID: r.uid, GID: r.gid,
		Start: time.Duration(r.start), ExecID: r.exec,
	}
}

func (r *record) connector() attribution.Connector {
	return attribution.Connector{
		Actor: r.actor(), Parent: int(r.parent), ParentStart: time.Duration(r.parentStart),
		Comm: text(r.comm[:]), Tuple: r.key.diag(), SocketCookie: r.cookie, NetnsCookie: r.key.netns,
		CgroupID: r.cgroup, At: time.Duration(r.at), Unbound: r.flags&flagUnbound != 0,
	}
}

// text is what stands before the first zero.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// namespace is a network namespace other than ours. Only the programs write it.
type namespace struct {
	last    uint64 // connect, CLOCK_MONOTONIC
	live    uint64 // tuples
	asked   uint64 // when it was last reported as not known to be covered
	refused uint64 // when it was last reported as refused
	uid     uint64 // who has it in his share
}

// user is what the sockets of one user take. The programs add to it, and tidy takes
// namespaces off.
type user struct{ sockets, namespaces uint64 }

// coverage of a network namespace, as the proxy knows it. Only Go writes it.
type coverage struct {
	until     uint64 // known to go through the redirect, CLOCK_MONOTONIC
	uncovered uint64 // 1: known not to
}

// shared is a page that the programs and this process both have mapped, so that
// neither a setting nor a counter costs a system call.
type shared struct {
	// written here
	denyMarked    uint64
	denyUncovered uint64
	markUser      uint64           // who may have the mark, by his uid + 1
	wanted        [holdings]uint64 // inodes of Holding

	// written by the programs
	forgetting  uint64 // counts when entries begin to be removed
	forgotten   uint64 // and when they are
	generation  uint64 // changes with every new namespace
	connects    uint64
	live        uint64
	full        uint64
	overShare   uint64
	ambiguous   uint64
	dropped     uint64
	namespaces  uint64 // that did not fit
	execs       uint64
	execsLost   uint64
	forks       uint64
	forksLost   uint64
	writes      uint64 // by connectors
	writersLost uint64
	foreign     uint64 // writers that were noted, or could not be
	bound       uint64 // that could not be unbound
}

// count reads a field that the programs add to.
func (*shared) count(field *uint64) uint64 { return atomic.LoadUint64(field) }

func (*shared) set(field *uint64, value uint64) { atomic.StoreUint64(field, value) }

func (*shared) add(field *uint64) { atomic.AddUint64(field, 1) }

// offsets in record, for the programs
const (
	recordSize = int16(unsafe.Sizeof(record{}))

	offCookie      = int16(unsafe.Offsetof(record{}.cookie))
	offKey         = int16(unsafe.Offsetof(record{}.key))
	offNetns       = offKey + int16(unsafe.Offsetof(tuple{}.netns))
	offLocal       = offKey + int16(unsafe.Offsetof(tuple{}.local))
	offRemote      = offKey + int16(unsafe.Offsetof(tuple{}.remote))
	offLport       = offKey + int16(unsafe.Offsetof(tuple{}.lport))
	offRport       = offKey + int16(unsafe.Offsetof(tuple{}.rport))
	offAt          = int16(unsafe.Offsetof(record{}.at))
	offBoot        = int16(unsafe.Offsetof(record{}.boot))
	offCgroup      = int16(unsafe.Offsetof(record{}.cgroup))
	offPID         = int16(unsafe.Offsetof(record{}.pid))
	offTID         = int16(unsafe.Offsetof(record{}.tid))
	offUID         = int16(unsafe.Offsetof(record{}.uid))
	offGID         = int16(unsafe.Offsetof(record{}.gid))
	offComm        = int16(unsafe.Offsetof(record{}.comm))
	offFlags       = int16(unsafe.Offsetof(record{}.flags))
	offParent      = int16(unsafe.Offsetof(record{}.parent))
	offStart       = int16(unsafe.Offsetof(record{}.start))
	offParentStart = int16(unsafe.Offsetof(record{}.parentStart))
	offExec        = int16(unsafe.Offsetof(record{}.exec))
	offWriters     = int16(unsafe.Offsetof(record{}.writers))
)

// mapped is the second word of an IPv4 address in a tuple, as the kernel stores it.
var mapped = int64(int32(binary.NativeEndian.Uint32([]byte{0, 0, 0xff, 0xff})))

// word is four bytes of an address, as the kernel stores them, for a comparison.
func word(b []byte) int32 { return int32(binary.NativeEndian.Uint32(b)) }

// netPort is a port as the kernel stores it.
func netPort(port uint16) int32 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], port)
	return int32(binary.NativeEndian.Uint16(b[:]))
}
