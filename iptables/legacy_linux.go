package iptables

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyInterval is how often the tables of legacy rules are asked whether they have changed: a system call each.
const legacyInterval = 250 * time.Millisecond

// A legacyTable is what the kernel tells of one without printing it (struct ipt_getinfo,
// include/uapi/linux/netfilter_ipv4/ip_tables.h; ip6t_getinfo is the same).
type legacyTable struct {
	name       [32]byte
	hooks      uint32
	hookEntry  [5]uint32
	underflow  [5]uint32
	entries    uint32
	sizeOfThem uint32
}

// getInfo is IPT_SO_GET_INFO, and IP6T_SO_GET_INFO.
const getInfo = 64

// A legacyPoll sees changes of legacy rules, of which the kernel notifies nobody. One that leaves the number of rules
// and their size as they were is left to the interval of Watch.
type legacyPoll struct {
	sockets map[Family]int
	tables  []legacyOf
}

type legacyOf struct {
	family Family
	table  legacyTable
}

// openLegacyPoll looks at the tables that there are in the network namespace of the calling thread: to ask for one
// that is not there would make it.
func openLegacyPoll() (p *legacyPoll, err error) {
	p = &legacyPoll{sockets: make(map[Family]int)}
	for f, of := range [...]struct {
		domain int
		names  string
	}{IPv4: {unix.AF_INET, "ip_tables_names"}, IPv6: {unix.AF_INET6, "ip6_tables_names"}} {
		names, err := os.ReadFile(procNet + of.names)
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(names) == 0 {
			continue
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("list legacy tables: %w", err), p.close())
		}
		fd, err := unix.Socket(of.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("watch legacy rules: %w", err), p.close())
		}
		p.sockets[Family(f)] = fd
		for name := range strings.FieldsSeq(string(names)) {
			t := legacyOf{family: Family(f)}
			copy(t.table.name[:], name)
			p.tables = append(p.tables, t)
		}
	}
	p.changed()
	return p, nil
}

func (p *legacyPoll) close() error {
	var errs []error
	for _, fd := range p.sockets {
		errs = append(errs, unix.Close(fd))
	}
	return errors.Join(errs...)
}

// changed reports whether a table is another than it was the last time.
func (p *legacyPoll) changed() (changed bool) {
	for i := range p.tables {
		of := &p.tables[i]
		level := unix.SOL_IP
		if of.family == IPv6 {
			level = unix.SOL_IPV6
		}
		now := legacyTable{name: of.table.name}
		size := uint32(unsafe.Sizeof(now))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(p.sockets[of.family]), uintptr(level), getInfo,
			uintptr(unsafe.Pointer(&now)), uintptr(unsafe.Pointer(&size)), 0)
		if errno == 0 && now != of.table {
			of.table, changed = now, true
		}
	}
	return changed
}

// run polls until ended is closed.
func (p *legacyPoll) run(changed chan<- struct{}, ended <-chan struct{}) {
	tick := time.NewTicker(legacyInterval)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
		}
		if p.changed() {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}
}
