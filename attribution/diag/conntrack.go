package diag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// ErrTimestampsOff says that conntrack does not note when connections begin.
// EnableTimestamps makes it, for connections that begin afterwards.
var ErrTimestampsOff = errors.New("conntrack notes no times: net.netfilter.nf_conntrack_timestamp is 0")

// ErrUntimed says that the connection is older than the setting that makes
// conntrack note times.
var ErrUntimed = errors.New("conntrack noted no time for this connection")

// ErrClockStepped says that the wall clock, by which conntrack notes times, was set
// after the connection began, or that this cannot be excluded.
var ErrClockStepped = errors.New("the clock was set since the connection began")

// An entry is what conntrack said about one connection.
type entry struct {
	tuple    Tuple // in the direction in which the connection was opened
	answers  Tuple // in the other one, with what was translated
	protocol byte
	zone     bool   // in a zone of its own (the CT target of iptables)
	start    uint64 // nanoseconds of CLOCK_REALTIME; 0 when not noted
}

// Attributes of ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const (
	sizeofNfgen = 4 // struct nfgenmsg

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaZone       = 18
	ctaTimestamp  = 20

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaTupleZone  = 3

	ctaIPv4Src = 1
	ctaIPv4Dst = 2
	ctaIPv6Src = 3
	ctaIPv6Dst = 4

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaTimestampStart = 1
)

// sizeofGet is the length of what appendConntrackGet appends.
func sizeofGet(t Tuple) int {
	const protocol = sizeofAttr + 3*8
	address := 2 * (sizeofAttr + t.Local.Addr().BitLen()/8)
	return sizeofNfgen + sizeofAttr + sizeofAttr + address + protocol
}

// appendConntrackGet appends the body of a question: the family, and the tuple in
// the original direction.
func appendConntrackGet(b []byte, t Tuple) []byte {
	const nested = 1 << 15 // NLA_F_NESTED
	fam, src, dst := byte(familyIPv4), uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
	if !t.Local.Addr().Is4() {
		fam, src, dst = familyIPv6, ctaIPv6Src, ctaIPv6Dst
	}
	size := t.Local.Addr().BitLen() / 8
	b = append(b, fam, 0, 0, 0)
	b = appendAttr(b, ctaTupleOrig|nested, sizeofGet(t)-sizeofNfgen-sizeofAttr)
	b = appendAttr(b, ctaTupleIP|nested, 2*(sizeofAttr+size))
	b = appendBare(appendAttr(b, src, size), t.Local.Addr())
	b = appendBare(appendAttr(b, dst, size), t.Remote.Addr())
	b = appendAttr(b, ctaTupleProto|nested, 3*8)
	b = append(appendAttr(b, ctaProtoNum, 1), protoTCP, 0, 0, 0)
	b = append(binary.BigEndian.AppendUint16(appendAttr(b, ctaProtoSrcPort, 2), t.Local.Port()), 0, 0)
	return append(binary.BigEndian.AppendUint16(appendAttr(b, ctaProtoDstPort, 2), t.Remote.Port()), 0, 0)
}

// appendAttr begins an attribute with a value of size bytes.
func appendAttr(b []byte, typ uint16, size int) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(sizeofAttr+size))
	return binary.NativeEndian.AppendUint16(b, typ)
}

// appendBare appends an address in its own length.
func appendBare(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		v4 := a.As4()
		return append(b, v4[:]...)
	}
	v6 := a.As16()
	return append(b, v6[:]...)
}

// parseEntry reads one struct nfgenmsg with the attributes of a conntrack entry.
func parseEntry(b []byte) (entry, error) {
	if len(b) < sizeofNfgen {
		return entry{}, fmt.Errorf("nfgenmsg of %d bytes, want %d", len(b), sizeofNfgen)
	}
	var e entry
	err := attrs(b[sizeofNfgen:], func(typ uint16, value []byte) (err error) {
		switch typ {
		case ctaTupleOrig:
			e.tuple, err = e.parseTuple(value)
		case ctaTupleReply:
			e.answers, err = new(entry).parseTuple(value)
		case ctaZone:
			e.zone = true // zone 0 is not mentioned
		case ctaTimestamp:
			err = attrs(value, func(typ uint16, value []byte) error {
				if typ == ctaTimestampStart && len(value) == 8 {
					e.start = binary.BigEndian.Uint64(value)
				}
				return nil
			})
		}
		return err
	})
	return e, err
}

func (e *entry) parseTuple(b []byte) (Tuple, error) {
	var src, dst netip.Addr
	var srcPort, dstPort uint16
	err := attrs(b, func(typ uint16, value []byte) error {
		switch typ {
		case ctaTupleIP:
			return attrs(value, func(typ uint16, value []byte) error {
				switch typ {
				case ctaIPv4Src, ctaIPv6Src:
					src, _ = netip.AddrFromSlice(value)
				case ctaIPv4Dst, ctaIPv6Dst:
					dst, _ = netip.AddrFromSlice(value)
				}
				return nil
			})
		case ctaTupleProto:
			return attrs(value, func(typ uint16, value []byte) error {
				switch {
				case typ == ctaProtoNum && len(value) == 1:
					e.protocol = value[0]
				case typ == ctaProtoSrcPort && len(value) == 2:
					srcPort = binary.BigEndian.Uint16(value)
				case typ == ctaProtoDstPort && len(value) == 2:
					dstPort = binary.BigEndian.Uint16(value)
				}
				return nil
			})
		case ctaTupleZone:
			e.zone = true
		}
		return nil
	})
	return Tuple{netip.AddrPortFrom(src, srcPort), netip.AddrPortFrom(dst, dstPort)}, err
}

// check compares an answer with the question. The kernel looks for the tuple in
// either direction, so it may answer with the connection that goes the other way.
func (e *entry) check(t Tuple) error {
	switch {
	case e.tuple != t || e.protocol != protoTCP:
		return fmt.Errorf("%w: asked conntrack for %v, got %v of protocol %d", ErrMismatch, t, e.tuple, e.protocol)
	case e.zone:
		return fmt.Errorf("%w: asked conntrack for %v, got it in another zone", ErrMismatch, t)
	}
	return nil
}

// A clock says what CLOCK_REALTIME minus CLOCK_MONOTONIC was, between low and
// high, at the monotonic time now.
//
// That difference is a constant of the kernel (wall_to_monotonic in
// kernel/time/timekeeping.c), which only setting the clock changes:
// clock_settime(2), ADJ_SETOFFSET, a leap second, and waking up from a suspend,
// during which CLOCK_MONOTONIC stands still. NTP's slewing changes both clocks
// alike, so it is never taken for a step, however long it goes on.
type clock struct {
	now       time.Duration
	low, high time.Duration
}

// stepSlack is how far two looks may be apart without the clock having been set. Their
// difference is only that of rounding, once each look is known to be between low and high.
// Lower than a few nanoseconds sees steps where there are none, after which no time
// is known until older connections have ended; higher lets a step of that size move
// the beginning of a connection by as much, and a program is executed in half a
// millisecond.
const stepSlack = time.Microsecond

// steps remembers when the clock was set. The zero value has not looked yet.
type steps struct {
	last   clock
	looked bool
	// unusable is the end of the times, on CLOCK_MONOTONIC as computed now, at which a
	// connection may seem to have begun that began under another setting of the
	// clock.
	unusable time.Duration
}

// look compares the clock with how it was.
func (s *steps) look(c clock) {
	switch back := s.last.low - c.high; {
	case !s.looked:
	case back > stepSlack:
		// Set back: what began before the step at t seems to have begun at t+back.
		s.unusable = max(c.now, s.unusable) + (s.last.high - c.low)
	case c.low-s.last.high > stepSlack:
		// Set forward: what began before the step seems older than it is.
		s.unusable = max(c.now, s.unusable)
	}
	s.last, s.looked = c, true
}

// began converts the wall-clock time at which an entry began.
func (s *steps) began(start uint64) (time.Duration, error) {
	began := time.Duration(start) - (s.last.low+s.last.high)/2
	switch {
	case s.unusable != 0 && began <= s.unusable:
		return 0, ErrClockStepped
	case began < 0 || began > s.last.now+stepSlack:
		// Before the boot, or in the future: set before the first look.
		return 0, ErrClockStepped
	}
	return began, nil
}
