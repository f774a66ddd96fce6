package attribution

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
	"golang.org/x/sys/unix"
)

// Lookup is the search for the owner of one connection, and what it knows so
// far. Its methods may be called from any goroutine. It holds descriptors until
// it is closed.
type Lookup struct {
	f     *Finder
	conn  Conn
	first chan struct{} // closed when the hinted search is over
	uid   uint32        // of the socket that Find was told of
	group uint64        // its cgroup
	found bool          // it was told of one

	mu         sync.Mutex // guards the following
	socket     diag.Socket
	level      Level
	connectors []Connector
	began      time.Duration // of the connection, on CLOCK_MONOTONIC; 0 when unknown
	reason     Reason
	err        error
	subjects   []*subject
	earlier    []past
	missing    Reason // why somebody who is known to be a subject could not be read
	checked    time.Time
	via        []string
	took       time.Duration
	changes    int  // of who is a subject, or in which image
	unseen     bool // nobody sees who writes on the socket
	closed     bool
	searched   bool // Search was called
	settled    bool // the witness still had the connection, and no writers, at so many changes
	at         uint64
}

// subject is one process to judge.
type subject struct {
	holder // fd is -1 when no descriptor of the process is known to refer to the socket
	role   Role
	pin    *pin
	image  image
	proc   *Process
	at     time.Time // when proc was read
	lost   bool      // has ended, or is a holder that does not hold the socket any longer
	acted  *Actor    // as whom, if the kernel saw it; nil for a holder
}

// judged is the process as which a subject is judged. Threads may have credentials of
// their own (setresuid(2) is about the thread; the C library makes it about all): what
// the thread had that acted counts, not what the process has.
func (s *subject) judged() *Process {
	if s.acted == nil || s.acted.UID == s.proc.UID[0] && s.acted.GID == s.proc.GID[0] {
		return s.proc
	}
	p := *s.proc
	p.UID[0], p.GID[0] = s.acted.UID, s.acted.GID
	return &p
}

// past is a subject that is not read again.
type past struct {
	role Role
	proc *Process
}

// Find is Ask and Search.
func (f *Finder) Find(c Conn) *Lookup {
	l := f.Ask(c)
	l.Search()
	return l
}

// Ask asks the kernel for the client's socket, and for who connected it, which takes
// microseconds. Call it right after accept, and Close the Lookup when the connection
// ends.
func (f *Finder) Ask(c Conn) *Lookup {
	l := &Lookup{f: f, conn: c, first: make(chan struct{}), level: min(f.Level(), Level1)}
	begin := time.Now()
	l.witnessed()
	if l.ask(); l.reason == Attributed {
		l.uid, l.group, l.found = l.socket.UID, l.socket.CgroupID, true
		l.identified()
	}
	l.took = time.Since(begin)
	return l
}

// Search begins to look for who holds the socket: soon, since the client may leave. It
// reads processes, who can make that take some 100 milliseconds (procwatch.Lockable), so
// that one of whom there are too many is turned away before. It is called before the
// Lookup is shared, and does nothing the second time.
func (l *Lookup) Search() {
	if l.searched {
		return
	}
	l.searched = true
	if l.reason != Attributed {
		close(l.first)
		return
	}
	begin := time.Now().Add(-l.took)
	// A client that was seen to connect, or that asked before, is found by one
	// link; everything else takes longer, and must not hold up the request.
	if l.connected() || l.guess() {
		l.took = time.Since(begin)
		close(l.first)
		return
	}
	go func() {
		defer close(l.first)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.hint()
		l.took = time.Since(begin)
	}()
}

// Searched reports whether what Search began is over, so that neither Owner nor Close
// waits for it.
func (l *Lookup) Searched() bool {
	select {
	case <-l.first:
		return true
	default:
		return false
	}
}

// UID is the user who created the client's socket, as the kernel told Find. It is
// false if the kernel told of no such socket. It does not wait.
func (l *Lookup) UID() (uint32, bool) { return l.uid, l.found }

// CgroupID is the cgroup2 in which the client's socket was made, 0 if the kernel told
// Find of none. It does not wait.
func (l *Lookup) CgroupID() uint64 { return l.group }

// guess looks whether a process that held a connection before has this one, at
// the descriptor that it used then: a client that comes back gets the same number
// again. It is called before the Lookup is shared.
func (l *Lookup) guess() bool {
	for _, r := range l.f.recentHolders() {
		p, st, err := l.f.host.pinSubject(r.pid)
		if err != nil {
			l.f.forgetRecent(r)
			continue
		}
		is, locked := l.f.holds(p, r, l.socket.Inode)
		if is && l.add(&subject{holder: r, pin: p}, st) {
			l.by("recent")
			return true
		}
		l.f.host.unpin(p)
		if locked {
			l.f.forgetRecent(r) // or all who ask wait for it
		}
	}
	return false
}

// by notes which search has found somebody.
func (l *Lookup) by(via string) {
	if !slices.Contains(l.via, via) {
		l.via = append(l.via, via)
	}
}

// ask sets socket, reason and err, and reports whether the witness knew without the
// kernel. It is called before the Lookup is shared, or with l.mu held.
func (l *Lookup) ask() (still bool) {
	if l.reason != Attributed {
		return false
	}
	t := diag.Tuple{Local: l.conn.Client, Remote: l.conn.Endpoint}
	again := l.socket.Inode != 0
	var s diag.Socket
	var err error
	switch {
	case again && l.still(t):
		return true
	case l.conn.Forwarded:
		s, err = l.elsewhere(t)
	case again:
		s, err = l.f.diag.Again(l.socket)
	default:
		s, err = l.f.diag.Find(t, 0)
	}
	switch {
	case err == nil && again && s.Inode != l.socket.Inode:
		l.reason = ClientGone
	case err == nil:
		l.socket = s
	case errors.Is(err, diag.ErrGone) || again && errors.Is(err, diag.ErrNotFound):
		l.reason = ClientGone
	case errors.Is(err, errRemote):
		l.reason = Remote
	case errors.Is(err, errAmbiguous):
		// All who connected are judged, and none may be allowed.
		l.socket, l.missing = s, AmbiguousNetns
	case errors.Is(err, diag.ErrNotFound), errors.Is(err, diag.ErrMismatch):
		l.reason = NoSocket
	default:
		l.reason, l.err = Failed, err
	}
	return false
}

// still reports whether the witness has the connection as it was: its socket was not
// closed, and not connected again.
func (l *Lookup) still(t diag.Tuple) bool {
	if len(l.connectors) != 1 {
		return false
	}
	now, err := l.f.witness.Connectors(t, l.conn.Forwarded)
	was := &l.connectors[0]
	return err == nil && len(now) == 1 && now[0].SocketCookie == was.SocketCookie && now[0].NetnsCookie == was.NetnsCookie && now[0].At == was.At
}

// Close releases what the Lookup holds. It may be called twice.
func (l *Lookup) Close() {
	if !l.searched {
		l.searched = true
		close(l.first)
	}
	<-l.first
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	for _, s := range l.subjects {
		l.f.host.unpin(s.pin)
	}
}

// Owner answers with what is known without a search of the whole host: who
// connected the socket, and the holders that the hints led to, as they were within
// the last millisecond. ctx bounds the wait.
func (l *Lookup) Owner(ctx context.Context) Owner {
	select {
	case <-l.first:
	case <-ctx.Done():
		return Owner{Reason: Late, Level: min(l.f.Level(), Level1), Via: "sock_diag"}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.checked) > checkedFor {
		l.check()
	}
	return l.owner(nil, Partial)
}

// Complete answers after a search of every process that began after this call. One
// search serves all that wait for it. ctx bounds the wait; what is known by then
// comes back with the Reason Late. With urgent unset the search is put off a
// little, and further if need be, so that searches disturb nobody and do not take
// more than a small part of a core.
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
		o, again := l.conclude(ctx, result, begin)
		if !again || try == maxTries {
			if l.unseen && o.Reason == EvidenceLost {
				return l.afterCalls(ctx, o)
			}
			return o
		}
	}
}

const (
	// callFor is how long a thread may be in a system call and run: which one it is the
	// kernel does not tell, and so it counts as somebody else's reference. Too low, and
	// on a busy machine clients that nobody sees write (MPTCP) are refused; higher lets
	// those wait longer that somebody else has.
	callFor = 100 * time.Millisecond
	// callEvery is how often it is looked whether the call has ended.
	callEvery = 2 * time.Millisecond
)

// afterCalls waits until every reference to the socket is known, or answers o.
func (l *Lookup) afterCalls(ctx context.Context, o Owner) Owner {
	ctx, cancel := context.WithTimeout(ctx, callFor)
	defer cancel()
	for {
		select {
		case <-time.After(callEvery):
		case <-ctx.Done():
			return o
		}
		if known, ok := l.Accounted(ctx); ok {
			return known
		}
	}
}

// Accounted answers completely and without a search, if it can: at level 3, when
// every reference to the socket that the kernel counts is one that is known. ctx
// bounds the wait.
func (l *Lookup) Accounted(ctx context.Context) (Owner, bool) {
	select {
	case <-l.first:
	case <-ctx.Done():
		return Owner{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.reason != Attributed || len(l.connectors) == 0 {
		return Owner{}, false
	}
	begin := time.Now()
	l.check()
	if l.reason != Attributed || !l.nobodyElse(ctx) {
		return Owner{}, false
	}
	l.by("references")
	l.took += time.Since(begin)
	return l.owner(&scanResult{accounted: true}, Attributed), true
}

// Changed compares what is known with the present, and reports whether somebody has
// become a subject, has executed another program or has ended since the last answer.
// It takes microseconds.
func (l *Lookup) Changed() bool {
	<-l.first
	l.mu.Lock()
	defer l.mu.Unlock()
	before, missing := l.changes, l.missing
	l.check()
	return l.changes != before || l.missing != missing || l.reason != Attributed
}

// conclude answers with what a search of the host has found. It wants another one
// if a holder ended before it was read: it may have passed the socket on to a
// child that the search did not see with it. Likewise if the only one that was known
// could not be read again: it may have been in the middle of an execve.
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
	return o, o.Reason == Churn || o.Reason == NoHolder && slices.ContainsFunc(l.subjects, func(s *subject) bool { return s.lost })
}

// wanted is the socket to search for. settled says that no search can change the
// answer.
func (l *Lookup) wanted() (inode uint32, settled bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.socket.Inode, l.closed || l.reason != Attributed
}

// owner renders what is known. It is called with l.mu held; result is nil
// when it is not known whether anybody else holds the socket, for the reason given
// as without.
func (l *Lookup) owner(result *scanResult, without Reason) Owner {
	o := Owner{Level: l.level, Via: "sock_diag", Socket: l.socket, Reason: l.reason, Err: l.err, Took: l.took}
	known := len(l.connectors) > 0
	for _, s := range l.subjects {
		proc := s.judged()
		switch {
		case s.lost && !l.f.host.unchanged(s):
			proc = earlier(proc)
		case !s.lost && s.role == RoleHolder:
			known = true
		}
		o.Subjects, o.Roles = append(o.Subjects, proc), append(o.Roles, s.role)
		if l.level >= Level1 && proc.Ancestry == Unknown && l.missing == Attributed {
			l.missing = EvidenceLost // a rule about its parent could not be asked
		}
		if proc.Denied && l.missing == Attributed {
			l.missing = AccessDenied // nor one about its arguments
		}
	}
	for _, p := range l.earlier {
		o.Subjects, o.Roles = append(o.Subjects, p.proc), append(o.Roles, p.role)
	}
	for _, via := range l.via {
		o.Via += "," + via
	}
	if result != nil {
		o.Unreadable = result.unreadable
	}
	switch {
	case o.Reason != Attributed:
	case l.missing != Attributed:
		o.Reason = l.missing
	case result == nil:
		o.Reason = without
	case result.reason != Attributed:
		o.Reason, o.Err = result.reason, result.err
	case l.unseen && !result.accounted: // he may have a reference that is hidden
		o.Reason = EvidenceLost
	case !known:
		o.Reason = NoHolder
	default:
		o.Complete = true
	}
	return o
}

func earlier(p *Process) *Process {
	if p.Earlier {
		return p
	}
	q := *p
	q.Earlier = true
	return &q
}

// hint searches where the holder most likely is: the socket's cgroup, first those
// there that asked before, and the youngest processes.
func (l *Lookup) hint() {
	inode := l.socket.Inode
	members := l.f.host.cgroupMembers(l.socket.CgroupID)
	for _, r := range l.f.recentHolders() {
		if members != nil && !slices.Contains(members, r.pid) {
			continue
		}
		if h, ok := l.f.probe(r, inode); ok {
			l.merge(context.Background(), []holder{h}, "recent")
			return
		}
		members = slices.DeleteFunc(members, func(pid int) bool { return pid == r.pid })
	}
	s := newSearch(l.f.host, inode)
	s.first, s.budget = true, hintBudget
	for _, pid := range members {
		if !s.process(pid, false) {
			break
		}
	}
	if len(s.wanted[inode]) > 0 {
		l.merge(context.Background(), s.wanted[inode], "cgroup")
		return
	}
	s.budget = s.seen + hintBudget
	pids, err := l.f.host.pids(s.dirents)
	if err != nil {
		return
	}
	for _, pid := range pids {
		if !s.process(pid, false) {
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
		if s := l.subject(f.pid); s != nil {
			if _, err := l.f.host.stat(s.pin); err == nil {
				s.holder, s.lost = f, false
				continue
			} // it has ended, and this is who got its pid
		}
		switch {
		case len(l.subjects) >= maxHolders && !l.forgetLost():
			return Crowd
		case ctx.Err() != nil:
			return Late
		}
		p, st, err := l.f.host.pinSubject(f.pid)
		read := err == nil && l.add(&subject{holder: f, pin: p}, st)
		if err == nil && !read {
			l.f.host.unpin(p)
		}
		if denied(err) {
			missing = AccessDenied
			continue
		}
		if !read {
			if !l.worker(f.pid) {
				missing = Churn
			}
			continue
		}
		l.by(via)
	}
	return missing
}

// subject is the one with this pid, if there is one; of several, which had it one
// after the other, the last.
func (l *Lookup) subject(pid int) *subject {
	for _, s := range slices.Backward(l.subjects) {
		if s.pid == pid {
			return s
		}
	}
	return nil
}

// forgetLost makes room among the subjects. It is called with l.mu held.
func (l *Lookup) forgetLost() bool {
	l.subjects = slices.DeleteFunc(l.subjects, func(s *subject) bool {
		if !s.lost {
			return false
		}
		proc := s.judged()
		if !l.f.host.unchanged(s) {
			proc = earlier(proc)
		}
		if !l.keep(s.role, proc) {
			return false
		}
		l.f.host.unpin(s.pin)
		return true
	})
	return len(l.subjects) < maxHolders
}

// keep remembers a subject that is not read again. It reports false if there is no
// room.
func (l *Lookup) keep(role Role, p *Process) bool {
	if len(l.earlier) == maxEarlier {
		return false
	}
	l.earlier = append(l.earlier, past{role, p})
	l.changes++
	return true
}

// add reads one subject. The Lookup has its pin from then on.
func (l *Lookup) add(s *subject, st stat) bool {
	var err error
	s.proc, s.image, err = l.f.host.read(s.pin, st, func(p *Process) bool { return l.asUser(s, p) })
	if err != nil {
		switch {
		case denied(err):
			l.reason, l.err = AccessDenied, err
		case !gone(err) && !errors.Is(err, errExecRace):
			l.reason, l.err = Failed, err
		}
		return false
	}
	s.at = time.Now()
	l.subjects = append(l.subjects, s)
	l.changes++
	l.checked = s.at
	if s.fd >= 0 {
		l.f.remember(s.holder)
	}
	l.since(s)
	l.created(s)
	return true
}

// asUser reports whether a subject was read as the user who made the socket, and who acted:
// the kernel tells of no setresuid(2). Others hold sockets, too, and are read for each
// connection.
func (l *Lookup) asUser(s *subject, p *Process) bool {
	a := s.acted
	return p.UID[3] == l.socket.UID && (a == nil || a.UID == p.UID[0] && a.GID == p.GID[0])
}

// check compares everything that is known with the present: the socket, the
// descriptors, the program images, and who has written. It is called with l.mu
// held.
func (l *Lookup) check() {
	if l.closed || l.reason != Attributed {
		return
	}
	l.checked = time.Now()
	if l.f.host.table != nil {
		l.f.host.table.Drain() // what is lost changes the marks, too
	}
	at, settled := l.changed()
	if !l.settled {
		still := l.ask()
		if l.reason != Attributed {
			return
		}
		settled = settled && still
	}
	for _, s := range slices.Clone(l.subjects) {
		if s.lost {
			continue
		}
		if s.fd >= 0 {
			// One that does not let that be asked holds it for all that is known.
			if is, locked := l.f.holds(s.pin, s.holder, l.socket.Inode); !is && !locked {
				s.fd = -1
				l.changes++
				s.lost = s.role == RoleHolder
				if s.lost {
					continue
				}
			}
		}
		if l.f.host.fresh(s.at) && l.f.host.same(s) {
			continue
		}
		st, err := l.f.host.stat(s.pin)
		if err == nil {
			err = l.f.host.identify(s.pin, &st.image)
		}
		if denied(err) { // it holds the socket for all that is known, and may be another program soon
			l.reason, l.err = AccessDenied, err
			return
		}
		if err != nil {
			s.lost = true
			l.changes++
			continue
		}
		if st.image == s.image && l.f.host.fresh(s.at) {
			continue
		}
		proc, image, err := l.f.host.read(s.pin, st, nil)
		if denied(err) {
			l.reason, l.err = AccessDenied, err
			return
		}
		if err != nil {
			s.lost = true
			l.changes++
			continue
		}
		if image != s.image || !slices.Equal(proc.Args, s.proc.Args) {
			if !l.keep(s.role, earlier(s.proc)) {
				l.reason = ExecRace
				return
			}
		}
		s.proc, s.image, s.at = proc, image, time.Now()
		l.since(s)
	}
	if !l.settled {
		l.settled, l.at = l.written() && settled, at
	}
}

// changed asks the witness for its changes, and whether it is settled, and notes if what
// it was asked before may have changed. It is called with l.mu held.
func (l *Lookup) changed() (at uint64, settled bool) {
	if len(l.connectors) == 1 {
		at, settled = l.f.witness.Changes()
	}
	l.settled = l.settled && settled && at == l.at
	return at, settled
}

// holds reports whether a descriptor refers to the socket, or the process does not let
// that be asked.
func (f *Finder) holds(p *pin, h holder, inode uint32) (is, locked bool) {
	path := "fd/" + strconv.Itoa(h.fd)
	if h.tid != h.pid {
		path = "task/" + strconv.Itoa(h.tid) + "/" + path
	}
	equal := false
	if f.host.lockable.Do(p.pid, func() {
		var buf, want [64]byte
		n, err := unix.Readlinkat(p.dir, path, buf[:])
		text := append(strconv.AppendUint(append(want[:0], "socket:["...), uint64(inode), 10), ']')
		equal = err == nil && bytes.Equal(buf[:n], text)
	}) != nil {
		return false, true
	}
	return equal, false
}

// probe looks for the socket in the whole table of a process that held one
// before, if that is not too large.
func (f *Finder) probe(r holder, inode uint32) (holder, bool) {
	s := newSearch(f.host, inode)
	s.first, s.budget = true, hintBudget/4
	s.process(r.pid, false)
	if found := s.wanted[inode]; len(found) > 0 {
		return found[0], true
	}
	return holder{}, false
}
