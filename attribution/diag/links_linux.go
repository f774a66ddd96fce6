package diag

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxLinks is how many interfaces are asked about for one client that is
	// not found otherwise, at 4 µs each. Higher makes every client that has
	// closed its socket early cost more on a host with many containers; lower
	// misses a client that is bound to one of many interfaces.
	maxLinks = 32
	// linksFreshFor is how old the list of interfaces may be. Shorter makes a
	// flood of clients that are gone cost more where there are many interfaces,
	// since reading a thousand takes 2 to 4 ms; longer leaves a client
	// that is bound to a new interface unfound for as long.
	linksFreshFor = time.Second
)

// links are the interfaces of a namespace to which a client may be bound.
type links struct {
	route   wire
	indexes []uint32
	read    time.Time
}

// A link is one interface.
type link struct {
	index uint32
	kind  string // "veth", "bridge", "vlan"; "" for hardware and for lo
}

// list returns the first maxLinks interfaces: hardware and lo, then what is built
// upon them, and veth last. Clients on the host that are bound to one of the host's
// ends of its containers do not get anywhere; in a container the veth is among the
// few that there are.
func (l *links) list() ([]uint32, error) {
	if !l.read.IsZero() && time.Since(l.read) < linksFreshFor {
		return l.indexes, nil
	}
	var req [sizeofHeader + sizeofIfinfo + 8]byte
	b := l.route.header(req[:0], unix.RTM_GETLINK, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, len(req))
	b = append(b, make([]byte, sizeofIfinfo)...)
	b = binary.NativeEndian.AppendUint16(b, 8)
	b = binary.NativeEndian.AppendUint16(b, unix.IFLA_EXT_MASK)
	binary.NativeEndian.AppendUint32(b, rtextFilterSkipStats)
	var all []link
	// An answer with many virtual functions of a card is longer than wire.buf.
	err := l.route.dump(req[:], make([]byte, 32<<10), unix.RTM_NEWLINK, func(payload []byte) error {
		one, err := parseLink(payload)
		all = append(all, one)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	l.indexes, l.read = likely(all), time.Now()
	return l.indexes, nil
}

// likely puts interfaces in the order of list, and cuts them.
func likely(all []link) []uint32 {
	rank := func(l link) int {
		switch l.kind {
		case "":
			return 0
		case "veth":
			return 2
		}
		return 1
	}
	slices.SortFunc(all, func(a, b link) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.index, b.index))
	})
	var indexes []uint32
	for _, l := range all[:min(len(all), maxLinks)] {
		indexes = append(indexes, l.index)
	}
	return indexes
}

const (
	sizeofIfinfo         = 16     // struct ifinfomsg
	rtextFilterSkipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS: half of what there is to read
)

// parseLink reads one struct ifinfomsg with its attributes (rtnetlink(7)).
func parseLink(b []byte) (link, error) {
	if len(b) < sizeofIfinfo {
		return link{}, fmt.Errorf("ifinfomsg of %d bytes, want %d", len(b), sizeofIfinfo)
	}
	l := link{index: binary.NativeEndian.Uint32(b[4:])}
	err := attrs(b[sizeofIfinfo:], func(typ uint16, info []byte) error {
		if typ != unix.IFLA_LINKINFO {
			return nil
		}
		return attrs(info, func(typ uint16, kind []byte) error {
			if typ == unix.IFLA_INFO_KIND {
				l.kind = unix.ByteSliceToString(kind)
			}
			return nil
		})
	})
	return l, err
}
