package witness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
)

var _ attribution.Witness = (*Witness)(nil)

// DefaultMaxSockets is how many connected sockets can have a witness at the same time.
// Too low, and clients of a busy host are unattributed; higher costs about 350 bytes
// for each that is connected, and nothing for those that are not.
const DefaultMaxSockets = 65536

// Options say what is watched. Endpoints are needed; zero is good for the rest.
type Options struct {
	// Endpoints of the metadata service: 169.254.169.254:80, [fd00:ec2::254]:80.
	Endpoints []netip.AddrPort
	// Mark of the daemon's own upstream sockets (SO_MARK), which exempts them from the
	// redirect. Another process that connects to an endpoint with it is a Sighting.
	// 0 looks for none.
	Mark uint32
	// Deny refuses (EPERM) what is only reported otherwise. SetDeny changes it.
	Deny bool
	// DenyUncovered refuses, while denying, what comes from a network namespace that
	// is known not to go through the redirect. False reports it.
	DenyUncovered bool
	// MaxSockets is DefaultMaxSockets when 0. One user other than root gets a
	// quarter of it.
	MaxSockets int
	// Report is called from one goroutine for each sighting. While it runs, further
	// ones wait and then are dropped and counted. Nil drops them.
	Report func(Sighting)
	// Cgroup is the directory of cgroup2 whose processes are watched; "" is the root,
	// with all of them.
	Cgroup string
}

// Hook is one place in the kernel that a program of ours is attached to.
type Hook struct {
	Name     string // as libbpf writes it: "cgroup/connect4", "tp_btf/sched_process_exec"
	Attached bool
	Err      error // why it is not
}

// Stats are counters since Open, and how full the witness is.
type Stats struct {
	Connects     uint64 // to an endpoint, that were not refused
	Live         uint64 // sockets that have a witness now
	MaxSockets   uint64
	Full         uint64 // sockets without a witness, as a map was full
	OverShare    uint64 // sockets without a witness, as their user had too many
	Ambiguous    uint64 // sockets without a witness, as another had the same tuple
	Namespaces   uint64 // connects in a namespace for which there was no room
	StillBound   uint64 // sockets bound to a device that could not be unbound
	Dropped      uint64 // events for Report that were lost
	Executions   uint64 // of execve, seen
	LostExecs    uint64 // and not kept
	LostCreators uint64
	Writes       uint64 // on connected sockets, by their connectors
	LostWriters  uint64 // foreign writers that were not kept; their sockets say ErrTooMany
}

// A Witness is attached to the kernel until Close. Its methods may be called from
// any goroutine.
type Witness struct {
	opts  Options
	plan  plan
	hooks []Hook

	maps   map[string]*ebpf.Map
	cgroup *os.File
	links  []link.Link
	pages  [2][]byte // memory of these two
	shared *shared
	users  *[1 << usersBits]user
	limit  uint64 // MaxSockets

	probe      *probe
	namespaces namespaceList
	watch      *watch
	iterators  iterators

	// why a method is not supported
	noExec, noFork, noWriter, noHolders, noHolding error

	mu     sync.RWMutex // held for reading by what uses descriptors, for writing by Close alone
	closed bool

	attaching sync.Mutex // guards the links of the guards
	guards    []*guard
}

// Open attaches to the kernel and convinces itself that it works. An error says
// which privilege or feature is missing; it wraps fs.ErrPermission or
// errors.ErrUnsupported where it is that. What is only missing for BTF, tracepoints and
// iterators is no error: see Hooks.
func Open(o Options) (*Witness, error) {
	if len(o.Endpoints) == 0 {
		return nil, errors.New("witness: no endpoints to watch")
	}
	if o.MaxSockets == 0 {
		o.MaxSockets = DefaultMaxSockets
	}
	if o.MaxSockets < 4 || o.MaxSockets > 1<<24 {
		return nil, fmt.Errorf("witness: %d sockets, want 4 to %d", o.MaxSockets, 1<<24)
	}
	w := &Witness{opts: o, limit: uint64(o.MaxSockets)}
	err := w.open()
	if err == nil {
		err = w.Check(context.Background())
	}
	if err != nil {
		w.Close()
		return nil, fmt.Errorf("witness: %w", explain(err))
	}
	return w, nil
}

// explain adds what an operator can do.
func explain(err error) error {
	switch {
	case errors.As(err, new(lack)):
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; the witness needs CAP_BPF and CAP_NET_ADMIN (Linux before 5.8: CAP_SYS_ADMIN)", err)
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w; the witness needs Linux 5.10 or later with CONFIG_CGROUP_BPF (%w)", err, errors.ErrUnsupported)
	}
	return err
}

func (w *Witness) open() error {
	// Linux before 5.11 charges maps to RLIMIT_MEMLOCK; raising it may be refused, and
	// then it is the map that says so.
	_ = rlimit.RemoveMemlock()
	var err error
	if w.cgroup, err = openCgroup(w.opts.Cgroup); err != nil {
		return fmt.Errorf("open the root of cgroup2: %w", err)
	}
	netns, err := ownNetns()
	if err != nil {
		return err
	}
	if w.probe, err = newProbe(); err != nil {
		return err
	}
	w.maps = map[string]*ebpf.Map{}
	for name, spec := range mapSpecs(uint32(w.opts.MaxSockets)) {
		if w.maps[name], err = ebpf.NewMap(spec); err != nil {
			return fmt.Errorf("create the BPF map of %s: %w", name, privilege(err, unix.CAP_BPF, "CAP_BPF and CAP_NET_ADMIN"))
		}
	}
	for i, name := range []string{"shared", "users"} {
		m := w.maps[name]
		size := int(m.ValueSize() * m.MaxEntries())
		if w.pages[i], err = unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return fmt.Errorf("map the counters of the programs (Linux 5.5): %w", err)
		}
	}
	w.shared = (*shared)(unsafe.Pointer(&w.pages[0][0]))
	w.users = (*[1 << usersBits]user)(unsafe.Pointer(&w.pages[1][0]))
	w.SetDeny(w.opts.Deny)

	fd := func(name string) int { return w.maps[name].FD() }
	w.plan = plan{
		probes: w.probe.addrs(), pid: os.Getpid(), netns: netns, mark: w.opts.Mark,
		share: uint64(w.opts.MaxSockets) / 4, factor: rand.Uint32() | 1,
		connectors: fd("connectors"), tuples: fd("tuples"), users: fd("users"), namespaces: fd("namespaces"),
		coverage: fd("coverage"), events: fd("events"), shared: fd("shared"), writers: fd("writers"),
		execs: fd("execs"), former: fd("former"), creators: fd("creators"), wanted: fd("wanted"),
	}
	for _, e := range w.opts.Endpoints {
		w.plan.endpoints = append(w.plan.endpoints, netip.AddrPortFrom(e.Addr().Unmap(), e.Port()))
	}
	if w.watch, err = startWatch(w); err != nil {
		return err
	}
	l, noLayout := readLayout()
	w.hooks = append(w.hooks, Hook{"btf/task_struct", noLayout == nil, noLayout})
	// What ends entries comes before what makes them.
	p := &w.plan
	for _, h := range []struct {
		name   string
		typ    ebpf.ProgramType
		attach ebpf.AttachType
		ins    func(sight) asm.Instructions
	}{
		{"cgroup/sock_release", ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease, func(sight) asm.Instructions { return p.release() }},
		{"sockops", ebpf.SockOps, ebpf.AttachCGroupSockOps, func(see sight) asm.Instructions { return p.sockOps(see.layout) }},
		{"cgroup/connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, func(see sight) asm.Instructions { return p.connect(false, see) }},
		{"cgroup/connect6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect, func(see sight) asm.Instructions { return p.connect(true, see) }},
	} {
		spec := &ebpf.ProgramSpec{Name: "imdsgate", Type: h.typ, AttachType: h.attach, License: license}
		var prog *ebpf.Program
		for _, see := range []sight{{true, l}, {true, nil}, {}} {
			spec.Instructions = h.ins(see)
			if prog, err = ebpf.NewProgram(spec); err == nil {
				break
			}
			if w.hooks[0].Err == nil {
				w.hooks[0].Attached, w.hooks[0].Err = false, fmt.Errorf("read the process in %s: %w", h.name, err)
			}
		}
		if err == nil {
			g := &guard{name: h.name, attach: h.attach, program: prog}
			w.guards = append(w.guards, g)
			err = g.mount(w.cgroup)
		}
		err = privilege(err, unix.CAP_BPF, "CAP_BPF and CAP_NET_ADMIN")
		w.hooks = append(w.hooks, Hook{h.name, err == nil, err})
		if err != nil {
			return fmt.Errorf("attach %s: %w", h.name, err)
		}
	}
	w.tracing(l, noLayout)
	// The kernel's types took some 30 MB while they were read, and would stay in our
	// resident set for minutes.
	debug.FreeOSMemory()
	return nil
}

// license lets the programs call helpers that the kernel keeps for such
// (bpf_probe_read_kernel, bpf_seq_write); the GPL is one of two for these instructions.
const license = "Dual MIT/GPL"

// Close detaches everything and waits for its goroutine; so it must not be called from
// Report. Twice is fine.
func (w *Witness) Close() error {
	w.mu.Lock()
	closed := w.closed
	w.closed = true
	w.mu.Unlock() // whoever used descriptors has finished, and nobody begins
	if closed {
		return nil
	}
	var errs []error
	for i := len(w.links) - 1; i >= 0; i-- {
		errs = append(errs, w.links[i].Close())
	}
	for i := len(w.guards) - 1; i >= 0; i-- {
		errs = append(errs, w.guards[i].close())
	}
	if w.cgroup != nil {
		errs = append(errs, w.cgroup.Close())
	}
	if w.watch != nil {
		errs = append(errs, w.watch.close())
	}
	errs = append(errs, w.iterators.close())
	for _, m := range w.maps {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	for _, page := range w.pages {
		if page != nil {
			errs = append(errs, unix.Munmap(page))
		}
	}
	if w.probe != nil {
		errs = append(errs, w.probe.close())
	}
	return errors.Join(errs...)
}

// errClosed is what a closed Witness answers.
var errClosed = errors.New("witness is closed")

// unsupported is what a method answers whose hook is not attached, for the reason that
// the hook has.
func unsupported(why error) error { return notThere{why} }

type notThere struct{ error }

func (n notThere) Unwrap() []error { return []error{errors.ErrUnsupported, n.error} }

// Hooks says what is attached. Each was tried; nothing is inferred from the version
// of the kernel.
func (w *Witness) Hooks() []Hook { return append([]Hook(nil), w.hooks...) }

// SetDeny begins or ends to refuse what Options.Deny says. It takes effect at the
// next connect.
func (w *Witness) SetDeny(deny bool) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return
	}
	b := func(b bool) uint64 {
		if b {
			return 1
		}
		return 0
	}
	w.shared.set(&w.shared.denyMarked, b(deny))
	w.shared.set(&w.shared.denyUncovered, b(deny && w.opts.DenyUncovered))
}

// SetMarkUser says who may connect with the mark of the daemon, unseen and not refused, beside it: 0, as at first, is
// nobody. Who it is must not be able to become the daemon's user, for whom the mark is an exemption from the redirect.
func (w *Witness) SetMarkUser(uid uint32) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return
	}
	user := uint64(uid)
	if user != 0 {
		user++
	}
	w.shared.set(&w.shared.markUser, user)
}

// Stats reads the counters. It is zero after Close.
func (w *Witness) Stats() Stats {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return Stats{}
	}
	s := w.shared
	return Stats{
		Connects: s.count(&s.connects), Live: s.count(&s.live), MaxSockets: w.limit,
		Full: s.count(&s.full), OverShare: s.count(&s.overShare), Ambiguous: s.count(&s.ambiguous),
		Namespaces: s.count(&s.namespaces), StillBound: s.count(&s.bound), Dropped: s.count(&s.dropped),
		Executions: s.count(&s.execs), LostExecs: s.count(&s.execsLost), LostCreators: s.count(&s.forksLost),
		Writes: s.count(&s.writes), LostWriters: s.count(&s.writersLost),
	}
}

// Connectors implements attribution.Witness. It takes a lookup: one in our
// own namespace, or one for each other that is known. Where several have the tuple,
// those count that are not known to be uncovered: anybody can build himself a
// namespace with the addresses of a container, and from there nothing arrives.
func (w *Witness) Connectors(t diag.Tuple, forwarded bool) ([]attribution.Connector, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return nil, errClosed
	}
	l := lookups.Get().(*lookup)
	defer lookups.Put(l)
	l.tuple = tupleOf(w.plan.netns, t)
	var found []attribution.Connector
	if !forwarded {
		var err error
		if found, err = w.connector(l, found); err != nil {
			return nil, err
		}
	} else {
		others, err := w.namespaces.list(w)
		if err != nil {
			return nil, err
		}
		for _, netns := range others {
			l.tuple.netns = netns
			if found, err = w.connector(l, found); err != nil {
				return nil, err
			}
		}
	}
	if len(found) > 1 {
		found = w.watch.passing(found)
	}
	if len(found) == 0 {
		return nil, attribution.ErrNoWitness
	}
	return found, nil
}

// Changes implements attribution.Witness. It reads memory. A removal counts before it
// begins, and a writer after he is noted, and before he can write: in that order for
// everybody where an atomic addition is a barrier. On arm64 it is none (STADD), so that
// nothing is settled there.
func (w *Witness) Changes() (n uint64, settled bool) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return 0, false
	}
	s := w.shared
	forgotten := s.count(&s.forgotten)
	forgetting := s.count(&s.forgetting)
	return forgetting + s.count(&s.foreign), forgotten == forgetting && runtime.GOARCH == "amd64"
}

// connector appends who connected l.tuple: see program_linux.go. While somebody else
// removes entries all the time, what is the same twice counts, too: both copies would
// have to be torn at the same place.
func (w *Witness) connector(l *lookup, found []attribution.Connector) ([]attribution.Connector, error) {
	var last record
	for try := 0; ; try++ {
		forgotten := w.shared.count(&w.shared.forgotten)
		forgetting := w.shared.count(&w.shared.forgetting)
		ok, err := l.get(w.plan.tuples, unsafe.Pointer(&l.tuple), unsafe.Pointer(&l.record))
		if !ok {
			return found, err
		}
		if forgotten == forgetting && w.shared.count(&w.shared.forgetting) == forgetting ||
			try > 0 && l.record == last {
			break
		}
		last = l.record
	}
	if l.record.cookie == 0 || l.record.key != l.tuple {
		return found, nil
	}
	return append(found, l.record.connector()), nil
}

// ownNetns is the cookie of the network namespace that the calling thread is in.
func ownNetns() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("ask for the cookie of our network namespace (SO_NETNS_COOKIE, Linux 5.14): %w", err)
	}
	return cookie, nil
}
