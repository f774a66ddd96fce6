package attribution

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
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
	// its image is compared every time. Longer spares more reading when a client
	// asks again, and lets it change its directory or its user unseen for as
	// long.
	freshFor = 50 * time.Millisecond
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
}

// Finder finds the owners of connections. Its methods may be called from any
// goroutine.
type Finder struct {
	host *host
	diag *diag.Conn

	urgent, idle chan scanRequest
	stop         chan struct{}
	wg           sync.WaitGroup

	mu     sync.Mutex // guards recent
	recent []holder   // newest first

	scans scanStats
}

// New makes a Finder for the network namespace of the calling thread. It needs
// CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH to see other users' processes.
func New(o Options) (*Finder, error) {
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
	f := &Finder{host: h, diag: d, urgent: make(chan scanRequest), idle: make(chan scanRequest), stop: make(chan struct{})}
	f.wg.Add(1)
	go f.scanLoop()
	return f, nil
}

// Close ends the searches and waits for them. Every Lookup must have been
// closed before.
func (f *Finder) Close() error {
	close(f.stop)
	f.wg.Wait()
	f.host.close()
	return f.diag.Close()
}

// Level is the level of evidence of this host.
func (f *Finder) Level() Level { return Level0 }

// Stats counts the full searches.
func (f *Finder) Stats() Stats { return f.scans.read() }

// Direct lists the connections of this namespace whose remote end is one of the
// endpoints and that lead there. A redirected client sees the endpoint as its
// remote end just the same, but the other half of its connection is at one of
// our listeners, which are given; it may still wait there to be accepted, or be
// closed already. What belongs to our own user uid is left out, since the proxy
// may be at work, and so is a connection that no process holds: nobody can read
// an answer from it.
func (f *Finder) Direct(endpoints, listeners []netip.AddrPort, uid uint32) ([]diag.Socket, error) {
	all, err := f.diag.Connected(endpoints)
	if err != nil {
		return nil, err
	}
	var direct []diag.Socket
	for _, s := range all {
		if s.Inode == 0 || s.UID == uid {
			continue
		}
		redirected := false
		for _, l := range listeners {
			if l.Addr().Is4() != s.Local.Addr().Is4() {
				continue
			}
			_, err := f.diag.Find(diag.Tuple{Local: l, Remote: s.Local}, 0)
			switch {
			case err == nil, errors.Is(err, diag.ErrGone):
				redirected = true
			case !errors.Is(err, diag.ErrNotFound) && !errors.Is(err, diag.ErrMismatch):
				return nil, err
			}
		}
		if !redirected {
			direct = append(direct, s)
		}
	}
	return direct, nil
}

// Abort resets one connection that Direct listed.
func (f *Finder) Abort(s diag.Socket) error { return f.diag.Destroy(s) }

// Process reads one process by its pid, for a person who asks about it.
func (f *Finder) Process(pid int) (*Process, error) {
	p, st, err := f.host.pin(pid)
	if err != nil {
		return nil, err
	}
	defer f.host.unpin(p)
	proc, _, err := f.host.read(p, st)
	return proc, err
}

// Lookup is the search for the owner of one connection, and what it knows so
// far. Its methods may be called from any goroutine. It holds descriptors until
// it is closed.
type Lookup struct {
	f     *Finder
	conn  Conn
	first chan struct{} // closed when the hinted search is over
	uid   uint32        // of the socket that Find was told of
	found bool          // it was told of one

	mu      sync.Mutex // guards the following
	socket  diag.Socket
	reason  Reason
	err     error
	held    []*held
	earlier []*Process
	checked time.Time
	via     string
	took    time.Duration
	closed  bool
}

// held is one holder with its process.
type held struct {
	holder
	pin   *pin
	image image
	proc  *Process
	at    time.Time // when proc was read
	lost  bool      // does not hold the socket any longer
}

// Find asks the kernel for the client's socket before it returns, which takes
// microseconds, and begins the search for its holders. Call it right after
// accept, and Close the Lookup when the connection ends.
func (f *Finder) Find(c Conn) *Lookup {
	l := &Lookup{f: f, conn: c, first: make(chan struct{})}
	if c.Forwarded {
		l.reason = Remote
		close(l.first)
		return l
	}
	begin := time.Now()
	l.ask(0)
	if l.reason != Attributed {
		close(l.first)
		return l
	}
	l.uid, l.found = l.socket.UID, true
	// A client that asked before is found by one link; everything else takes
	// longer, and must not hold up the request.
	if l.guess() {
		l.took = time.Since(begin)
		close(l.first)
		return l
	}
	go func() {
		defer close(l.first)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.hint()
		l.took = time.Since(begin)
	}()
	return l
}

// UID is the user who created the client's socket, as the kernel told Find. It is
// false if the kernel told of no such socket. It does not wait.
func (l *Lookup) UID() (uint32, bool) { return l.uid, l.found }

// guess looks whether a process that held a connection before has this one, at
// the descriptor that it used then: a client that comes back gets the same number
// again. It is called before the Lookup is shared.
func (l *Lookup) guess() bool {
	for _, r := range l.f.recentHolders() {
		p, st, err := l.f.host.pin(r.pid)
		if err != nil {
			l.f.forgetRecent(r)
			continue
		}
		if l.f.holds(p, r, l.socket.Inode) && l.add(r, p, st) {
			l.via = "recent"
			return true
		}
		l.f.host.unpin(p)
	}
	return false
}

// ask sets socket, reason and err. It is called before the Lookup is shared,
// or with l.mu held.
func (l *Lookup) ask(cookie uint64) {
	s, err := l.f.diag.Find(diag.Tuple{Local: l.conn.Client, Remote: l.conn.Endpoint}, cookie)
	switch {
	case err == nil:
		l.socket, l.reason, l.err = s, Attributed, nil
	case errors.Is(err, diag.ErrGone) || cookie != 0 && errors.Is(err, diag.ErrNotFound):
		l.reason = ClientGone
	case errors.Is(err, diag.ErrNotFound), errors.Is(err, diag.ErrMismatch):
		l.reason = NoSocket
	default:
		l.reason, l.err = Failed, err
	}
}

// Close releases what the Lookup holds. It may be called twice.
func (l *Lookup) Close() {
	<-l.first
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	for _, h := range l.held {
		l.f.host.unpin(h.pin)
	}
}

// Owner answers with what is known without a search of the whole host: the
// holders that the hints led to, as they were within the last millisecond. ctx
// bounds the wait.
func (l *Lookup) Owner(ctx context.Context) Owner {
	select {
	case <-l.first:
	case <-ctx.Done():
		return Owner{Reason: Late, Level: Level0, Via: "sock_diag"}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.checked) > checkedFor {
		l.check()
	}
	return l.owner(nil, Partial)
}

// Complete answers after a search of every process that began after this call.
// One search serves all that wait for it. ctx bounds the wait; what is known by
// then comes back with the Reason Late. With urgent unset the search is put
// off a little, and further if need be, so that searches disturb nobody and do
// not take more than a small part of a core.
func (l *Lookup) Complete(ctx context.Context, urgent bool) Owner {
	if !urgent {
		select {
		case <-time.After(laterFor):
		case <-ctx.Done():
		case <-l.f.stop:
		}
	}
	o := l.Owner(ctx)
	inode, settled := l.wanted()
	if o.Reason == Late && !o.Attributed() || settled {
		return o
	}
	begin := time.Now()
	for try := 1; ; try++ {
		result := l.f.scan(ctx, inode, urgent)
		if o, again := l.conclude(ctx, result, begin); !again || try == maxTries {
			return o
		}
	}
}

// conclude answers with what a search of the host has found. It wants another one
// if a holder ended before it was read: it may have passed the socket on to a
// child that the search did not see with it.
func (l *Lookup) conclude(ctx context.Context, result *scanResult, begin time.Time) (o Owner, again bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if result != nil {
		if reason := l.merge(ctx, result.holders, "scan"); result.reason == Attributed {
			result.reason = reason
		}
	}
	l.check()
	l.took += time.Since(begin)
	o = l.owner(result, Late)
	return o, o.Reason == Churn
}

// wanted is the socket to search for. settled says that no search can change the
// answer.
func (l *Lookup) wanted() (inode uint32, settled bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.socket.Inode, l.closed || l.reason != Attributed
}

// owner renders what is known. It is called with l.mu held; result is nil
// when no full search was done, for the reason given as without.
func (l *Lookup) owner(result *scanResult, without Reason) Owner {
	o := Owner{Level: Level0, Via: "sock_diag", Socket: l.socket, Reason: l.reason, Err: l.err, Took: l.took}
	holding := 0
	for _, h := range l.held {
		if h.lost {
			o.Subjects = append(o.Subjects, earlier(h.proc))
			continue
		}
		holding++
		o.Subjects = append(o.Subjects, h.proc)
	}
	o.Subjects = append(o.Subjects, l.earlier...)
	if l.via != "" {
		o.Via += "," + l.via
	}
	if result != nil {
		o.Unreadable = result.unreadable
	}
	switch {
	case o.Reason != Attributed:
	case result == nil:
		o.Reason = without
	case result.reason != Attributed:
		o.Reason, o.Err = result.reason, result.err
	case holding == 0:
		o.Reason = NoHolder
	default:
		o.Complete = true
	}
	return o
}

func earlier(p *Process) *Process {
	q := *p
	q.Earlier = true
	return &q
}

// hint searches where the holder most likely is: processes that asked before,
// the socket's cgroup, and the youngest processes.
func (l *Lookup) hint() {
	inode := l.socket.Inode
	for _, r := range l.f.recentHolders() {
		if h, ok := l.f.probe(r, inode); ok {
			l.merge(context.Background(), []holder{h}, "recent")
			return
		}
	}
	s := newSearch(l.f.host, inode)
	s.first, s.budget = true, hintBudget
	if members := l.f.host.cgroupMembers(l.socket.CgroupID); members != nil {
		for _, pid := range members {
			if !s.process(pid) {
				break
			}
		}
		if len(s.wanted[inode]) > 0 {
			l.merge(context.Background(), s.wanted[inode], "cgroup")
			return
		}
	}
	s.budget = s.seen + hintBudget
	pids, err := l.f.host.pids(s.dirents)
	if err != nil {
		return
	}
	for _, pid := range pids {
		if !s.process(pid) {
			break
		}
	}
	l.merge(context.Background(), s.wanted[inode], "youngest")
}

// merge adds holders that are not known yet and reads them. The Reason says why
// one of them is missing. It is called with l.mu held.
func (l *Lookup) merge(ctx context.Context, found []holder, via string) Reason {
	if l.closed {
		return Late
	}
	missing := Attributed
	for _, f := range found {
		i := slices.IndexFunc(l.held, func(h *held) bool { return h.pid == f.pid })
		if i >= 0 {
			l.held[i].holder, l.held[i].lost = f, false
			continue
		}
		switch {
		case len(l.held) >= maxHolders && !l.forgetLost():
			return Crowd
		case ctx.Err() != nil:
			return Late
		}
		p, st, err := l.f.host.pin(f.pid)
		if err != nil {
			missing = Churn
			continue
		}
		if !l.add(f, p, st) {
			missing = Churn
			l.f.host.unpin(p)
			continue
		}
		if l.via == "" {
			l.via = via
		}
	}
	return missing
}

// forgetLost makes room among the holders. It is called with l.mu held.
func (l *Lookup) forgetLost() bool {
	l.held = slices.DeleteFunc(l.held, func(h *held) bool {
		if !h.lost || len(l.earlier) == maxEarlier {
			return false
		}
		l.earlier = append(l.earlier, earlier(h.proc))
		l.f.host.unpin(h.pin)
		return true
	})
	return len(l.held) < maxHolders
}

// add reads one holder. The Lookup has its pin from then on.
func (l *Lookup) add(f holder, p *pin, st stat) bool {
	proc, image, err := l.f.host.read(p, st)
	if err != nil {
		if !gone(err) && !errors.Is(err, errExecRace) {
			l.reason, l.err = Failed, err
		}
		return false
	}
	now := time.Now()
	l.held = append(l.held, &held{holder: f, pin: p, image: image, proc: proc, at: now})
	l.checked = now
	l.f.remember(f)
	return true
}

// check compares everything that is known with the present: the socket, the
// descriptors, the program images. It is called with l.mu held.
func (l *Lookup) check() {
	if l.closed || l.reason != Attributed {
		return
	}
	l.checked = time.Now()
	if l.ask(l.socket.Cookie); l.reason != Attributed {
		return
	}
	for _, h := range l.held {
		if h.lost {
			continue
		}
		if !l.f.holds(h.pin, h.holder, l.socket.Inode) {
			h.lost = true
			continue
		}
		st, err := l.f.host.stat(h.pin)
		if err != nil {
			h.lost = true
			continue
		}
		l.f.host.identify(h.pin, &st.image)
		if st.image == h.image && time.Since(h.at) < freshFor {
			continue
		}
		proc, image, err := l.f.host.read(h.pin, st)
		if err != nil {
			h.lost = true
			continue
		}
		if image != h.image || !slices.Equal(proc.Args, h.proc.Args) {
			if len(l.earlier) == maxEarlier {
				l.reason = ExecRace
				return
			}
			l.earlier = append(l.earlier, earlier(h.proc))
		}
		h.proc, h.image, h.at = proc, image, time.Now()
	}
}

// holds reports whether a descriptor still refers to the socket.
func (f *Finder) holds(p *pin, h holder, inode uint32) bool {
	path := "fd/" + strconv.Itoa(h.fd)
	if h.tid != h.pid {
		path = "task/" + strconv.Itoa(h.tid) + "/" + path
	}
	var buf, want [64]byte
	n, err := unix.Readlinkat(p.dir, path, buf[:])
	if err != nil {
		return false
	}
	text := append(strconv.AppendUint(append(want[:0], "socket:["...), uint64(inode), 10), ']')
	return bytes.Equal(buf[:n], text)
}

// probe looks for the socket in the whole table of a process that held one
// before, if that is not too large.
func (f *Finder) probe(r holder, inode uint32) (holder, bool) {
	s := newSearch(f.host, inode)
	s.first, s.budget = true, hintBudget/4
	s.process(r.pid)
	if found := s.wanted[inode]; len(found) > 0 {
		return found[0], true
	}
	return holder{}, false
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
