package diag

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// timestampFile is that of the network namespace of the thread that opens it.
const timestampFile = "/proc/sys/net/netfilter/nf_conntrack_timestamp"

// A Conntrack is one kept netlink socket to the connection table of netfilter.
// Its methods may be called from any goroutine; they take turns.
//
// It needs CAP_NET_ADMIN when it is opened and at each question, but not root.
type Conntrack struct {
	mu    sync.Mutex // guards the following: one question is under way at a time
	ct    wire
	on    *os.File // the setting that makes conntrack note times
	clock func() clock
	steps steps

	untold error // why there is no such setting
}

// OpenConntrack opens a Conntrack in the network namespace of the calling
// thread, and asks it one question, which loads the kernel modules.
func OpenConntrack() (*Conntrack, error) {
	c := &Conntrack{ct: wire{fd: -1}, clock: newClock()}
	if err := c.ct.open(unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("open a socket to conntrack: %w", err)
	}
	c.steps.look(c.clock())
	probe := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	_, err := c.get(Tuple{probe, probe})
	if err != nil && !errors.Is(err, ErrNotFound) {
		c.Close()
		return nil, fmt.Errorf("%w (is the kernel module nf_conntrack_netlink there?)", err)
	}
	if c.on, err = os.Open(timestampFile); err != nil { // as without CONFIG_NF_CONNTRACK_TIMESTAMP
		c.on, c.untold = nil, err
	}
	return c, nil
}

// EnableTimestamps makes conntrack note when connections begin, in the network
// namespace of the calling thread and for those that begin from now on. It costs
// 16 bytes for each.
//
// It needs CAP_NET_ADMIN in the user namespace that owns the network namespace, or
// to be that one's root: either may write what its owner could write
// (net_ctl_permissions in net/sysctl_net.c), though ls(1) shows -rw-r--r-- root.
// Where /proc/sys is mounted read-only, as in containers and under systemd's
// ProtectKernelTunables=, it says EROFS to them, too.
func EnableTimestamps() error {
	err := os.WriteFile(timestampFile, []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		// Nobody has used conntrack yet; a question loads it.
		c, openErr := OpenConntrack()
		if openErr != nil {
			return openErr
		}
		c.Close()
		err = os.WriteFile(timestampFile, []byte("1"), 0)
	}
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w (it needs CAP_NET_ADMIN)", err)
	}
	if err != nil {
		return fmt.Errorf("make conntrack note times: %w", err)
	}
	return nil
}

// DisableTimestamps undoes EnableTimestamps.
func DisableTimestamps() error {
	if err := os.WriteFile(timestampFile, []byte("0"), 0); err != nil {
		return fmt.Errorf("make conntrack note no times: %w", err)
	}
	return nil
}

// Close releases the socket. It may be called twice.
func (c *Conntrack) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.ct.close()
	if c.on != nil {
		err = errors.Join(err, c.on.Close())
		c.on = nil
	}
	return err
}

// Began says when the connection with this tuple, in the direction in which it
// was opened and before any redirect, sent its first packet: on CLOCK_MONOTONIC,
// as bpf_ktime_get_ns and the proc connector count, to about a microsecond.
//
// It is the time of the entry. An earlier connection with the same ports has
// another one, since a new first packet replaces it once the earlier is closed. If
// the server's end of that was lost without a reset, the entry stays, and the time is
// too early. It is not too late for a redirected connection: when conntrack has
// lost the entry of an open one it makes a new one for the next packet, but only a
// first packet is redirected.
//
// Connections in a conntrack zone are not found.
//
// Errors are ErrNotFound, ErrMismatch, ErrTimestampsOff, ErrUntimed,
// ErrClockStepped, or what the netlink socket said. Steps of the clock are seen
// from OpenConntrack on, and one that is taken back between two calls is not, so
// call it or Look now and then.
func (c *Conntrack) Began(t Tuple) (time.Duration, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, err := c.get(t)
	if err != nil {
		return 0, err
	}
	if e.start == 0 {
		return 0, c.whyUntimed()
	}
	// After the question, so that a step before the entry is seen at the latest
	// now. One that is set meanwhile is seen, too, and costs an answer.
	c.steps.look(c.clock())
	began, err := c.steps.began(e.start)
	if err != nil {
		return 0, fmt.Errorf("%w: %v", err, t)
	}
	return began, nil
}

// Look notices whether the clock was set since the last call of it or of Began. It
// does not ask conntrack.
func (c *Conntrack) Look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.steps.look(c.clock())
}

// Timestamps reports whether conntrack notes times of connections that begin now.
func (c *Conntrack) Timestamps() (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.timestamps()
}

func (c *Conntrack) timestamps() (bool, error) {
	if c.on == nil {
		return false, fmt.Errorf("see whether conntrack notes times: %w", cmp.Or(c.untold, os.ErrClosed))
	}
	var b [1]byte
	if _, err := c.on.ReadAt(b[:], 0); err != nil {
		return false, fmt.Errorf("see whether conntrack notes times: %w", err)
	}
	return b[0] != '0', nil
}

func (c *Conntrack) whyUntimed() error {
	switch on, err := c.timestamps(); {
	case err != nil:
		return err
	case on:
		return ErrUntimed
	}
	return ErrTimestampsOff
}

// Origin is what a connection was before any redirect, by what it is for who accepted it:
// who opened it, and where it led. On its way the tracker may have given it another
// destination and, where the answers of two would look alike, another source port
// (nf_nat_used_tuple in net/netfilter/nf_nat_core.c).
//
// Errors are ErrNotFound, ErrMismatch, or what the netlink socket said.
func (c *Conntrack) Origin(accepted Tuple) (Tuple, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// It is looked for in either direction, and this is that of the answers.
	e, err := c.ask(accepted)
	if err == nil && (e.tuple == accepted || e.protocol != protoTCP) {
		err = fmt.Errorf("%w: asked conntrack who opened %v, got %v of protocol %d", ErrMismatch, accepted, e.tuple, e.protocol)
	}
	return e.tuple, err
}

// Accepted is the other way round: what a connection is for who accepts it, by what it is
// for who opened it. Errors are as above.
func (c *Conntrack) Accepted(origin Tuple) (Tuple, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, err := c.get(origin)
	return e.answers, err
}

// get asks for one entry by its original tuple.
func (c *Conntrack) get(t Tuple) (entry, error) {
	e, err := c.ask(t)
	if err != nil {
		return entry{}, err
	}
	return e, e.check(t)
}

// ask asks for the entry that has a tuple, in whichever direction.
func (c *Conntrack) ask(t Tuple) (entry, error) {
	const (
		ctGet = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1 // IPCTNL_MSG_CT_GET
		ctNew = unix.NFNL_SUBSYS_CTNETLINK << 8   // IPCTNL_MSG_CT_NEW
	)
	if l, r := t.Local.Addr(), t.Remote.Addr(); !l.IsValid() || l.BitLen() != r.BitLen() {
		return entry{}, ErrNotFound // and no question has room for it
	}
	var space [128]byte
	b := c.ct.header(space[:0], ctGet, unix.NLM_F_REQUEST, sizeofHeader+sizeofGet(t))
	b = appendConntrackGet(b, t)
	typ, payload, err := c.ct.ask(b)
	switch {
	case err == unix.ENOENT:
		return entry{}, ErrNotFound
	case err == unix.EPERM:
		return entry{}, fmt.Errorf("ask conntrack for %v: %w (it needs CAP_NET_ADMIN)", t, err)
	case err != nil:
		return entry{}, fmt.Errorf("ask conntrack for %v: %w", t, err)
	case typ != ctNew:
		return entry{}, fmt.Errorf("ask conntrack for %v: answer of type %d", t, typ)
	}
	e, err := parseEntry(payload)
	if err != nil {
		return entry{}, fmt.Errorf("read what conntrack says of %v: %w", t, err)
	}
	return e, nil
}

// newClock returns a function that reads both clocks.
//
// It goes by time.Now, which reads them in user space (vdso(7)): the system call takes
// 1.4 µs here and would make each look twice as long as the question. The time
// package counts from its own zero, so the distance to the kernel's is measured
// once.
func newClock() func() clock {
	zero := time.Now()
	var boot, width time.Duration // of zero on CLOCK_MONOTONIC
	for try := range 16 {
		before := time.Since(zero)
		var ts unix.Timespec
		unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
		after := time.Since(zero)
		if w := after - before; try == 0 || w < width {
			boot, width = time.Duration(ts.Nano())-before-w/2, w
		}
	}
	return func() clock {
		var best clock
		for try := range 4 { // something may come in between
			before := time.Since(zero)
			wall := time.Now() // reads the wall clock first
			after := wall.Sub(zero)
			now := time.Duration(wall.UnixNano())
			c := clock{now: boot + after, low: now - boot - after, high: now - boot - before}
			if try == 0 || c.high-c.low < best.high-best.low {
				best = c
			}
			if best.high-best.low < time.Microsecond {
				break
			}
		}
		return best
	}
}
