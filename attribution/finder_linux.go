package attribution

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/attribution/procwatch"
	"golang.org/x/sys/unix"
)

const (
	// hintBudget bounds the search of the youngest processes for one
	// connection, in descriptors, each of which takes about a microsecond.
	// Higher finds more short-lived clients without the full search; a flood of
	// connections then costs that much more of a core.
	hintBudget = 2000
	// scanPause is the least time between two full searches that nobody waits
	// for. Lower makes a flood of connections in audit mode cost more; higher
	// completes fewer events of short-lived clients.
	scanPause = 250 * time.Millisecond
	// laterFor is how long a search that nobody waits for is put off, and the time
	// in which a client that only wants one answer has left: its socket is gone
	// then, and nothing is left to search for. Longer completes fewer events;
	// shorter takes a core from clients that still wait for answers.
	laterFor = 30 * time.Millisecond
	// freshFor is how long what was read of a process serves for judging, while
	// its image is compared every time. Longer spares more reading when a client asks
	// again, and lets it change its command line, its directory or its user unseen for as
	// long.
	freshFor = 50 * time.Millisecond
	// toldFor is the same where the kernel tells of every execve: what may be different
	// unseen is then only what a program says or gives up itself. A connection may keep
	// what another has read, together for twice as long. Shorter, and one in a hundred
	// requests of a busy client waits for a reading.
	toldFor = time.Second
	// ancestorFor is that for the parents of those who ask, of whom nobody asks for
	// more than the program; it is the same program for as long as no execve was seen.
	// Shorter, and most clients wait until three or four parents are read anew.
	ancestorFor = time.Minute
	// checkedFor is how long a comparison with the present serves where nobody
	// is let through because of it. It spares asking the kernel twice for a
	// connection and a request that came at once, and lets a holder execute
	// another program for as long before the record of that request knows.
	checkedFor = time.Millisecond
	// maxHolders bounds the holders of one socket that are read, and maxEarlier the
	// images of theirs that are kept. Real sockets have one to a few dozen, when a
	// server forks with an open connection. Higher lets any user make one
	// connection cost more time and memory; lower leaves a pool of workers
	// unattributed.
	maxHolders = 64
	maxEarlier = 64
	// recentClients is how many processes are tried first, because they asked
	// before.
	recentClients = 8
)

// Options says where to look.
type Options struct {
	Proc string // where proc(5) is mounted; "" is /proc
	// Witness is what level 2 rests on. Nil for none, and then NoWitness says why.
	Witness   Witness
	NoWitness error
	// Connector is a socket for procwatch.Options; nil to open one.
	Connector *os.File
	// Executed is called for each program that is executed while level 1 is there,
	// one at a time, with what is known of it without another look: no working
	// directory, no groups, no cgroup. The function reads all of it, if it still
	// runs that program. When calls fall behind, some are left out.
	Executed func(p *Process, whole func() (*Process, bool))
	// Endpoints are what clients connect to. Their connections that are older than
	// the Witness are known by that, and attributed without it.
	Endpoints []netip.AddrPort
	// TimedNote is a file that is there while conntrack notes times because a Finder told
	// it to, so that those of one that was killed are known; "" for none. It must not
	// outlive the boot.
	TimedNote string
}

// Finder finds the owners of connections. Its methods may be called from any
// goroutine.
type Finder struct {
	host *host
	diag *diag.Conn

	conntrack *diag.Conntrack // nil where the witness tells the time
	timed     bool            // it notes times because we told it to, or one before us
	timedNote string          // see Options.TimedNote
	origins   *diag.Conntrack // nil without SharedPorts
	witness   Witness
	older     map[uint64]bool // cookies of sockets that were connected before the witness was there
	levels    []LevelState

	namespaces namespaces
	noWitness  atomic.Uint64
	slow       slow
	turns      *turns

	urgent, idle chan scanRequest
	stop         chan struct{}
	wg           sync.WaitGroup

	mu     sync.Mutex // guards recent
	recent []holder   // newest first

	scans scanStats
}

// New makes a Finder for the network namespace of the calling thread. It needs
// CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH to see other users' processes, and for
// level 1 CAP_NET_ADMIN, with CAP_SYS_ADMIN outside of the initial network
// namespace. What a higher level lacks is no error: see Levels.
func New(o Options) (*Finder, error) {
	f, err := open(o)
	if err != nil {
		return nil, err
	}
	f.probe1(o)
	f.probe2(o)
	if err := f.openOrigins(o.Endpoints); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if f.witness != nil && len(o.Endpoints) > 0 {
		older, err := f.diag.Connected(o.Endpoints)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		for _, s := range older {
			if _, err := f.witness.Connectors(s.Tuple, false); errors.Is(err, ErrNoWitness) {
				f.older[s.Cookie] = true
			}
		}
	}
	f.begin()
	return f, nil
}

// open makes a Finder of level 0, which does not search yet.
func open(o Options) (*Finder, error) {
	if o.Proc == "" {
		o.Proc = "/proc"
	}
	h, err := newHost(o.Proc)
	if err != nil {
		return nil, err
	}
	d, err := diag.Open()
	if err != nil {
		return nil, err
	}
	f := &Finder{host: h, diag: d, older: map[uint64]bool{}, turns: newTurns(), levels: []LevelState{{Level: Level0}},
		timedNote: o.TimedNote, urgent: make(chan scanRequest), idle: make(chan scanRequest), stop: make(chan struct{})}
	return f, nil
}

// begin begins to answer searches, when it is known by which means.
func (f *Finder) begin() {
	f.wg.Add(1)
	go f.scanLoop()
}

// LevelState says whether a level of evidence is there, and if not, why.
type LevelState struct {
	Level   Level
	Missing error // nil if it is there
}

// Levels are all levels, from the lowest. Each was tried when the Finder was made;
// none is concluded from a version. Later failures do not change them: they make
// connections unattributed, and Check an error.
func (f *Finder) Levels() []LevelState { return f.levels }

// Level is the highest level that is there with all below it.
func (f *Finder) Level() Level {
	top := Level0
	for _, l := range f.levels {
		if l.Missing != nil {
			break
		}
		top = l.Level
	}
	return top
}

// probe1 opens what level 1 rests on.
func (f *Finder) probe1(o Options) {
	told := procwatch.Options{Proc: f.host.proc, Socket: o.Connector}
	if o.Executed != nil {
		told.Exec = func(p procwatch.Process, i procwatch.Image) {
			started := f.host.started(p, i)
			if p.PID != f.host.self && started.Executable.Inode != 0 {
				o.Executed(started, func() (*Process, bool) {
					now, err := f.Process(p.PID)
					return now, err == nil && now.StartTicks == p.Start && now.Executable.Inode == i.Inode
				})
			}
		}
	}
	table, err := procwatch.Open(told)
	if err == nil {
		f.host.table = table
	}
	f.levels = append(f.levels, LevelState{Level1, err})
}

// probe2 takes the witness, and without one opens what tells the time of a connection.
func (f *Finder) probe2(o Options) {
	if f.witness = o.Witness; f.witness == nil {
		if err := f.openConntrack(); err != nil && f.levels[Level1].Missing == nil {
			f.levels[Level1].Missing = fmt.Errorf("when a connection began is not known: %w", err)
		}
		missing := o.NoWitness
		if missing == nil {
			missing = errors.New("no witness was given")
		}
		f.levels = append(f.levels, LevelState{Level2, missing}, LevelState{Level3, errors.New("needs L2")})
		return
	}
	f.host.witness = f.witness
	f.levels = append(f.levels, LevelState{Level: Level2}, LevelState{Level3, probeLevel3(f.witness, f.host.self)})
}

// openOrigins opens what Origin asks.
func (f *Finder) openOrigins(endpoints []netip.AddrPort) (err error) {
	four := 0
	for _, e := range endpoints {
		if e.Addr().Is4() {
			four++
		}
	}
	if four > 1 || len(endpoints)-four > 1 {
		f.origins, err = diag.OpenConntrack()
	}
	return err
}

// SharedPorts reports whether there are several endpoints of one family. Two clients may
// begin at one port then. The later one comes here from another port, since both are led to
// the same place, and it may be that of a third client.
func (f *Finder) SharedPorts() bool { return f.origins != nil }

// Origin is where the client of an accepted connection to an endpoint began, by both ends
// as the acceptor has them. It is for where there are SharedPorts, and takes microseconds.
func (f *Finder) Origin(local, peer, endpoint netip.AddrPort) (client netip.AddrPort, err error) {
	t, err := f.origins.Origin(diag.Tuple{Local: local, Remote: peer})
	if err == nil && t.Remote != endpoint {
		err = fmt.Errorf("%w: it led to %v", diag.ErrMismatch, t.Remote)
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("find out where the connection from %v to %v began: %w", peer, endpoint, err)
	}
	return t.Local, nil
}

func (f *Finder) openConntrack() error {
	c, err := diag.OpenConntrack()
	if err != nil {
		return err
	}
	f.conntrack = c
	if on, err := c.Timestamps(); on && err == nil {
		_, err := os.Lstat(f.timedNote)
		f.timed = err == nil
		return nil
	}
	return f.noteTimes()
}

// noteTimes has conntrack note when connections begin.
func (f *Finder) noteTimes() error {
	if f.timedNote != "" {
		note, err := os.OpenFile(f.timedNote, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err == nil {
			err = note.Close()
		}
		if err != nil {
			f.timedNote = "" // if we are killed, it stays as it is
		}
	}
	if err := diag.EnableTimestamps(); err != nil {
		os.Remove(f.timedNote)
		return err
	}
	f.timed = true
	return nil
}

// Untime has conntrack note no times any more if a Finder with this TimedNote told it to,
// and was killed. There must be none. It needs what diag.EnableTimestamps needs.
func Untime(note string) error {
	if _, err := os.Lstat(note); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return untime(note)
}

func untime(note string) error {
	if err := diag.DisableTimestamps(); err != nil && !errors.Is(err, fs.ErrNotExist) { // the tracker may be unloaded
		return err
	}
	if err := os.Remove(note); note != "" && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Check reports whether every level that is there still is: whether the kernel still
// tells of forks and execs, and still sees who connects. It takes milliseconds.
func (f *Finder) Check(ctx context.Context) error {
	var errs []error
	if f.host.table != nil {
		errs = append(errs, f.host.table.Check(ctx))
	}
	if f.conntrack != nil {
		f.conntrack.Look()
		if on, err := f.conntrack.Timestamps(); err == nil && !on { // somebody has switched it off
			errs = append(errs, f.noteTimes())
		}
	}
	f.namespaces.tidy()
	if f.witness != nil {
		errs = append(errs, f.witness.Check(ctx))
	}
	return errors.Join(errs...)
}

// History counts what the kernel has told of processes. It is false below level 1.
func (f *Finder) History() (procwatch.Stats, bool) {
	if f.host.table == nil {
		return procwatch.Stats{}, false
	}
	return f.host.table.Stats(), true
}

// Close ends the searches and waits for them. Every Lookup must have been
// closed before. The Witness is not closed.
func (f *Finder) Close() error {
	close(f.stop)
	f.wg.Wait()
	f.namespaces.close()
	f.host.close()
	var errs []error
	if f.host.table != nil {
		errs = append(errs, f.host.table.Close())
	}
	if f.timed {
		errs = append(errs, untime(f.timedNote))
	}
	for _, c := range []*diag.Conntrack{f.conntrack, f.origins} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(append(errs, f.diag.Close())...)
}

// Stats counts the full searches, and what the witness has missed.
func (f *Finder) Stats() Stats {
	s := f.scans.read()
	s.NoWitness = f.noWitness.Load()
	return s
}

// Direct lists the connections of this namespace whose remote end is one of the
// endpoints and that lead there. A redirected client sees the endpoint as its
// remote end just the same, but the other half of its connection is at one of
// our listeners, which are given; it may still wait there to be accepted, or be
// closed already. What belongs to our own user uid is left out, since the proxy
// may be at work, and so is a connection that no process holds, or of which the other
// end has closed: nobody can get an answer by it, and of a redirected one our half may be
// gone.
//
// Of one that is being made it cannot be told, and those are listed apart. It may wait for
// room in the backlog of a listener, which does not know it yet; or its SYN was sent
// before there were rules, and then it is direct if the answer comes before the SYN is
// sent again. It is being made, too, while a listener has its SYN and no more.
func (f *Finder) Direct(endpoints, listeners []netip.AddrPort, uid uint32) (direct, making []diag.Socket, err error) {
	all, err := f.diag.Connected(endpoints)
	if err != nil {
		return nil, nil, err
	}
	for _, s := range all {
		if s.Inode == 0 || s.UID == uid || slices.Contains([]diag.State{diag.CloseWait, diag.LastAck, diag.Closing}, s.State) {
			continue
		}
		if s.State == diag.SynSent {
			making = append(making, s)
			continue
		}
		redirected, half, from := false, false, s.Local
		if f.origins != nil {
			if a, err := f.origins.Accepted(s.Tuple); err == nil {
				if !slices.Contains(listeners, a.Local) { // whoever else begins at its port
					direct = append(direct, s)
					continue
				}
				from = a.Remote
			}
		}
		for _, l := range listeners {
			if l.Addr().Is4() != s.Local.Addr().Is4() {
				continue
			}
			other, err := f.diag.Find(diag.Tuple{Local: l, Remote: from}, 0)
			switch {
			case err == nil && other.State == diag.SynRecv:
				half = true
			case err == nil, errors.Is(err, diag.ErrGone):
				redirected = true
			case !errors.Is(err, diag.ErrNotFound) && !errors.Is(err, diag.ErrMismatch):
				return nil, nil, err
			}
		}
		switch {
		case half:
			making = append(making, s)
		case !redirected:
			direct = append(direct, s)
		}
	}
	return direct, making, nil
}

// Abort resets one connection that Direct listed.
func (f *Finder) Abort(s diag.Socket) error { return f.diag.Destroy(s) }

// AbortTuple resets the connection that has a tuple now, and nothing else that may have
// its port.
func (f *Finder) AbortTuple(t diag.Tuple) error {
	s, err := f.diag.Find(t, 0)
	if err != nil {
		return err
	}
	return f.diag.Destroy(s)
}

// Past are the programs that a process was before the present one, as far as it is
// known, the newest first. Below level 1 there are none.
func (f *Finder) Past(p *Process) []*Process {
	if f.host.table == nil {
		return nil
	}
	rec, ok := f.host.table.Process(p.PID, p.StartTicks)
	if !ok {
		return nil
	}
	var past []*Process
	for _, i := range slices.Backward(rec.Images[:len(rec.Images)-1]) {
		past = append(past, f.host.former(p.PID, p.StartTicks, &i))
	}
	return past
}

// Process reads one process by its pid, for a person who asks about it.
func (f *Finder) Process(pid int) (*Process, error) {
	p, st, err := f.host.pin(pid)
	if err != nil {
		return nil, err
	}
	defer f.host.unpin(p)
	proc, _, err := f.host.read(p, st, nil)
	return proc, err
}

// Acted reads the process that did something, as the kernel has told. It fails with
// [fs.ErrNotExist] if that has ended, also where another has its pid.
func (f *Finder) Acted(a Actor) (*Process, error) {
	p, err := f.Process(a.PID)
	if err == nil && a.Start != 0 && p.StartTicks != ticks(a.Start) {
		return nil, fmt.Errorf("read process %d: another has its pid: %w", a.PID, fs.ErrNotExist)
	}
	return p, err
}

func (f *Finder) recentHolders() []holder {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.recent)
}

func (f *Finder) remember(h holder) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := slices.IndexFunc(f.recent, func(r holder) bool { return r.pid == h.pid }); i >= 0 {
		f.recent = slices.Delete(f.recent, i, i+1)
	} else if len(f.recent) == recentClients {
		f.recent = f.recent[:recentClients-1]
	}
	f.recent = slices.Insert(f.recent, 0, h)
}

func (f *Finder) forgetRecent(h holder) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.recent = slices.DeleteFunc(f.recent, func(r holder) bool { return r.pid == h.pid })
}
