package attribution

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/attribution/procwatch"
	"golang.org/x/sys/unix"
)

// What the kernel was seen to do, beside what /proc shows now.
//
// Who connected a socket is a subject for as long as the connection lives, whether
// he still holds it or not. At level 1, where nobody saw the connect, everybody who
// had the socket at that moment takes that place: for a holder that has executed
// another program since, its images from then on; for one that was born since, the
// process that forked it, and so on up. Who wrote on the socket is a subject,
// and so is who made another one his brother (clone(2), CLONE_PARENT).

// witnessed asks who connected the socket. It is called before the Lookup is shared.
func (l *Lookup) witnessed() {
	w := l.f.witness
	if w == nil {
		return
	}
	l.level = l.f.Level()
	tuple := diag.Tuple{Local: l.conn.Client, Remote: l.conn.Endpoint}
	found, err := w.Connectors(tuple, l.conn.Forwarded)
	if err != nil && !errors.Is(err, ErrNoWitness) {
		l.reason, l.err = Failed, err
		return
	}
	if l.conn.Forwarded && l.conn.Arrived {
		w.Arrived(tuple, found)
	}
	l.connectors = found
	for _, c := range found {
		l.began = max(l.began, c.At)
	}
}

// identified compares what the witness saw with the socket that there is, or finds
// out in another way when a connection began that is older than the witness. It is
// called before the Lookup is shared.
func (l *Lookup) identified() {
	switch {
	case l.f.witness == nil, len(l.connectors) == 0 && l.f.older[l.socket.Cookie]: // and not connected again since
		l.connectors, l.level = nil, min(l.f.Level(), Level1)
		l.beganAt()
	case len(l.connectors) == 0, !l.conn.Forwarded && l.connectors[0].SocketCookie != l.socket.Cookie: // of another socket that had this tuple
		l.reason = NoWitness
		l.f.noWitness.Add(1)
	}
}

// beganAt asks connection tracking when the connection began. Not knowing it is a
// reason to allow nothing, at level 1.
func (l *Lookup) beganAt() {
	if l.level < Level1 {
		return
	}
	if l.f.conntrack == nil { // the connection is older than the witness
		l.missing = EvidenceLost
		return
	}
	var err error
	if l.began, err = l.f.conntrack.Began(diag.Tuple{Local: l.conn.Client, Remote: l.conn.Endpoint}); err != nil {
		l.missing, l.err = EvidenceLost, err
	}
}

// connected adds those who connected the socket. It reports whether it is known who
// they are. It is called before the Lookup is shared.
func (l *Lookup) connected() bool {
	for _, c := range l.connectors {
		s := &subject{holder: holder{pid: c.PID, tid: c.PID, fd: -1}, role: RoleConnector}
		if !l.act(s, c.Actor) {
			continue
		}
		l.by("witness")
		if l.level == Level3 {
			continue // the kernel tells whether he holds it when that is asked
		}
		if h, ok := l.descriptor(s); ok {
			s.holder = h
			l.f.remember(h)
		}
	}
	return len(l.connectors) > 0
}

// descriptor finds the one by which a subject refers to the socket.
func (l *Lookup) descriptor(s *subject) (holder, bool) {
	for _, r := range l.f.recentHolders() {
		if r.pid != s.pid {
			continue
		}
		if is, _ := l.f.holds(s.pin, r, l.socket.Inode); is {
			return r, true
		}
	}
	return l.f.probe(s.holder, l.socket.Inode)
}

// act adds the process that did something, if it is there, or else what is known of
// it. Without either, nothing may be allowed. It reports whether it is read.
func (l *Lookup) act(s *subject, a Actor) bool {
	s.acted = &a
	p, st, err := l.f.host.pinSubject(a.PID)
	if err == nil && l.acted(a, st) {
		s.pin = p
		if l.add(s, st) {
			return true
		}
	}
	if err == nil {
		l.f.host.unpin(p)
	}
	if denied(err) { // it has not ended, and may be another program soon
		l.missing = AccessDenied
		return false
	}
	l.ended(s.role, a)
	return false
}

// ended adds what is known of somebody who has acted and ended: the programs that he
// was since the connection began.
func (l *Lookup) ended(role Role, a Actor) {
	h := l.f.host
	if h.table == nil {
		l.missing = ClientGone
		return
	}
	h.table.Drain()
	rec, ok := h.table.Process(a.PID, ticks(a.Start))
	if !ok || rec.Born > l.began && role == RoleConnector {
		l.missing = ClientGone
		return
	}
	if p, ok := l.forked(rec, a); ok {
		if !l.keep(role, p) {
			l.missing = Crowd
		}
		return
	}
	for i := range rec.Images {
		if i+1 < len(rec.Images) && rec.Images[i+1].Since <= l.began {
			continue
		}
		p := h.former(rec.PID, rec.Start, &rec.Images[i])
		if rec.Execs == 0 && h.witness != nil {
			if e, err := h.witness.Former(a.PID); err == nil && e.At == 0 && e.ExecID == a.ExecID && e.Inode != p.Executable.Inode {
				h.became(p, e) // its parent did not fork it
				p.Args = nil
			}
		}
		p.Parent, p.Ancestry = h.chain(rec, maxAncestors)
		if !l.was(role, p) {
			return
		}
	}
}

// forked is a process that has ended and was never another program than the subject
// that forked it: what it did, that one's code did.
func (l *Lookup) forked(rec procwatch.Process, a Actor) (*Process, bool) {
	if rec.Execs > 0 || !rec.Complete() || len(rec.Ancestors) == 0 {
		return nil, false
	}
	parent := &rec.Ancestors[0]
	s := l.subject(parent.PID)
	if s == nil || s.lost || s.pin.start != parent.Start || s.image.mark.Execs != parent.Image.Seq || !l.sameProgram(s, a) {
		return nil, false
	}
	p := *s.judged()
	p.PID, p.StartTicks, p.Parent, p.ParentNow, p.Ancestry = rec.PID, rec.Start, s.proc, nil, Birth
	p.Start, p.EntityID = time.Time{}, ""
	if rec.Start != 0 {
		p.Start, p.EntityID = l.f.host.wall(rec.Start), entityID(l.f.host.bootID, rec.PID, rec.Start)
	}
	return &p, true
}

// worker adds a holder that has ended before it was read, if it was no more than a fork
// of a subject, as servers have that make a process for each job. Only at level 3 is
// that known: below it, somebody may have made another one's child of it.
func (l *Lookup) worker(pid int) bool {
	t := l.f.host.table
	if l.level < Level3 || len(l.connectors) == 0 {
		return false
	}
	t.Drain()
	rec, ok := t.Process(pid, 0)
	if !ok {
		return false
	}
	p, ok := l.forked(rec, Actor{PID: pid})
	return ok && l.keep(RoleHolder, p)
}

// sameProgram reports whether a process that has ended and executed nothing was the
// program that a subject is. The one that is its parent need not have forked it
// (clone(2), CLONE_PARENT): it was the program of whoever did.
func (l *Lookup) sameProgram(s *subject, a Actor) bool {
	w := l.f.witness
	if w == nil {
		return true
	}
	now, nowErr := w.Executed(s.pid)
	was, err := w.Former(a.PID)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return true
	case nowErr == nil && err == nil:
		return was.At == 0 && was.ExecID == now.ExecID && was.Inode == now.Inode && was.Device == now.Device
	case errors.Is(nowErr, ErrNoWitness) && errors.Is(err, ErrNoWitness): // older than the witness
		return s.acted != nil && s.acted.ExecID == a.ExecID
	}
	return false
}

// acted reports whether a process is the one that acted, and no later owner of its pid.
func (l *Lookup) acted(a Actor, st stat) bool {
	if a.Start != 0 || l.f.host.table == nil {
		return a.Start == 0 || ticks(a.Start) == st.start
	}
	l.f.host.table.Drain() // its fork may not have been read yet
	rec, ok := l.f.host.table.Process(a.PID, st.start)
	return ok && rec.Born <= l.began
}

// ticks is a time since boot as field 22 of /proc/PID/stat has it.
func ticks(boot time.Duration) uint64 { return uint64(boot / (time.Second / ticksPerSecond)) }

// written adds those who wrote on the socket, and reports whether it is known that
// nobody has. It is called with l.mu held.
func (l *Lookup) written() (nobody bool) {
	w := l.f.witness
	if w == nil || len(l.connectors) == 0 {
		return false
	}
	nobody = true
	for _, c := range l.connectors {
		writers, err := w.Writers(c.SocketCookie)
		switch {
		case err == nil:
		case !errors.Is(err, errors.ErrUnsupported):
			l.missing = Crowd
		case l.level == Level3:
			l.unseen = true // of this socket alone: MPTCP
		}
		nobody = nobody && err == nil && len(writers) == 0
		for _, a := range writers {
			l.actor(RoleWriter, a)
		}
	}
	return nobody
}

// created adds who made a subject another's child. It is called with l.mu held, or
// before the Lookup is shared.
func (l *Lookup) created(s *subject) {
	if w := l.f.witness; w != nil && len(l.connectors) > 0 {
		if a, err := w.Creator(s.pid); err == nil {
			l.actor(RoleCreator, a)
		}
	}
}

// actor adds somebody who is not known yet.
func (l *Lookup) actor(role Role, a Actor) {
	same := func(start uint64) bool { return a.Start == 0 || start == ticks(a.Start) }
	if s := l.subject(a.PID); s != nil && same(s.pin.start) ||
		slices.ContainsFunc(l.earlier, func(p past) bool { return p.proc.PID == a.PID && p.role == role && same(p.proc.StartTicks) }) {
		return
	}
	if len(l.subjects) >= maxHolders && !l.forgetLost() {
		l.missing = Crowd
		return
	}
	if l.act(&subject{holder: holder{pid: a.PID, tid: a.PID, fd: -1}, role: role}, a) {
		l.by("writers")
	}
}

// nobodyElse reports whether every reference to the socket is a descriptor of those
// who connected it, or that of a system call in which they are: poll(2) and select(2)
// keep the file from going away meanwhile, and read(2) does in a process of several
// threads. It is called with l.mu held.
func (l *Lookup) nobodyElse(ctx context.Context) bool {
	for _, c := range l.connectors {
		s := l.subject(c.PID)
		if s == nil || s.lost {
			return false
		}
		h, ok := l.f.holding(ctx, c, l.socket.Inode)
		if !ok || h.Descriptors == 0 {
			return false
		}
		if extra := h.References - h.Descriptors; extra < 0 || extra > 0 && extra > l.f.host.inCalls(s.pin, h.FD, extra, c.TID) {
			return false
		}
	}
	return true
}

const (
	// holdingIn bounds the count of one process's references. It takes 15 µs for a
	// usual one, and more than this with some hundred thousand descriptors. Shorter takes
	// a busy machine for that; longer, and who keeps so many makes others wait.
	holdingIn = 50 * time.Millisecond
	// slowFor is how long nothing is counted for a user with whom that took longer.
	slowFor = 10 * time.Second
	maxSlow = 1024
)

// slow remembers the users whose processes take long to go through. The zero value is
// ready.
type slow struct {
	mu    sync.Mutex // guards users
	users map[uint32]time.Time
}

func (s *slow) has(uid uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.users[uid]
	return ok && time.Since(at) < slowFor
}

func (s *slow) add(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users == nil || len(s.users) >= maxSlow {
		s.users = map[uint32]time.Time{}
	}
	s.users[uid] = time.Now()
}

// perUser is how many of the processes that are asked about at the same time may be one
// user's, and ordinary how many those of all but root. It is less than the witness has
// room for, so that who makes it take long, with processes of as many users as some are
// given (subuid(5)), leaves room to root.
const (
	perUser  = 2
	ordinary = 3
)

// turns are the places for them. Users whose numbers differ by a multiple of their
// number share theirs, but for root.
type turns struct {
	users [256]chan struct{}
	all   chan struct{} // of all but root
}

func newTurns() *turns {
	t := &turns{all: make(chan struct{}, ordinary)}
	for i := range t.users {
		t.users[i] = make(chan struct{}, perUser)
	}
	return t
}

// take waits for a place. It reports false when ctx ended first.
func (t *turns) take(ctx context.Context, uid uint32) (done func(), ok bool) {
	if uid == 0 {
		return func() {}, true
	}
	own := t.users[uid%uint32(len(t.users))]
	for i, places := range []chan struct{}{own, t.all} {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			if i > 0 {
				<-own
			}
			return nil, false
		}
	}
	return func() { <-t.all; <-own }, true
}

// holding asks the kernel what a connector has of its socket, unless that takes long.
func (f *Finder) holding(ctx context.Context, c Connector, inode uint32) (Holding, bool) {
	ctx, cancel := context.WithTimeout(ctx, holdingIn)
	defer cancel()
	done, ok := f.turns.take(ctx, c.UID)
	if !ok {
		return Holding{}, false
	}
	defer done()
	if f.slow.has(c.UID) {
		return Holding{}, false
	}
	begin := time.Now()
	h, err := f.witness.Holding(ctx, c.PID, inode)
	if time.Since(begin) > holdingIn && !errors.Is(err, ErrBusy) {
		f.slow.add(c.UID)
	}
	return h, err == nil
}

// inCalls counts the threads of a process that are in a system call which holds a
// reference to the descriptor: one that was given it, or one that waits for many. Which
// those many are is not asked: a reference that somebody else hides at that moment is
// one that only his writing shows, as it would be with a descriptor. It stops at enough:
// each thread takes 4 µs, and the one that connected is mostly the one that waits. Of a
// process that does not let it be asked there is none.
func (h *host) inCalls(p *pin, fd, enough, connector int) int {
	count := 0
	if h.lockable.Do(p.pid, func() { count = inCalls(p, fd, enough, connector) }) != nil {
		return 0
	}
	return count
}

func inCalls(p *pin, fd, enough, connector int) int {
	count := 0
	if inCall(p.dir, "task/"+strconv.Itoa(connector), fd) {
		count = 1
	}
	if count == enough {
		return count
	}
	bp := bufs.Get().(*[]byte)
	defer bufs.Put(bp)
	tasks, err := unix.Openat(p.dir, "task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return count
	}
	defer unix.Close(tasks)
	n, err := unix.ReadDirent(tasks, *bp)
	if err != nil {
		return count
	}
	for tid := range numbers((*bp)[:n]) {
		if tid != connector && inCall(tasks, strconv.Itoa(tid), fd) {
			if count++; count == enough {
				break
			}
		}
	}
	return count
}

// inCall is inCalls for one thread, of which the directory is given.
func inCall(at int, thread string, fd int) bool {
	var text [128]byte
	b, err := readAt(at, thread+"/syscall", text[:])
	if err != nil {
		return false
	}
	// "0 0x3 0x7ffd… …": the number and its arguments (proc_pid_syscall(5)), or
	// "running"
	number, rest, ok := bytes.Cut(b, []byte(" "))
	call, err := strconv.Atoi(string(number))
	if !ok || err != nil {
		return false
	}
	first, _, _ := bytes.Cut(rest, []byte(" "))
	return slices.Contains(pollCalls, call) || slices.Contains(ioCalls, call) && string(first) == "0x"+strconv.FormatInt(int64(fd), 16)
}

// since adds those who had the socket when the connection began, as far as one
// subject tells: the programs it was, and the processes it comes from.
func (l *Lookup) since(s *subject) {
	t := l.f.host.table
	if t == nil || l.began == 0 {
		return
	}
	m := s.image.mark
	if !m.Known || m.CompleteSince > l.began && m.CompleteSince != m.Born {
		l.missing = EvidenceLost
		return
	}
	if m.Since <= l.began {
		return // it is what it was then
	}
	rec, ok := t.Process(s.pid, s.pin.start)
	if !ok {
		l.missing = EvidenceLost
		return
	}
	if rec.ImagesCut && rec.Images[1].Since > l.began {
		l.missing = EvidenceLost
		return
	}
	for i := range rec.Images[:len(rec.Images)-1] {
		if rec.Images[i+1].Since <= l.began {
			continue
		}
		p := l.f.host.former(rec.PID, rec.Start, &rec.Images[i])
		p.Parent, p.Ancestry, p.Earlier = s.proc.Parent, s.proc.Ancestry, true
		if !l.was(s.role, p) {
			return
		}
	}
	if s.role != RoleHolder || rec.Born <= l.began {
		return
	}
	for i, a := range rec.Ancestors {
		if a.Doubtful {
			break
		}
		if l.subject(a.PID) == nil && !l.was(RoleAncestor, l.f.host.ancestors(rec.Ancestors[i:], rec.End, maxAncestors)) {
			return
		}
		if a.Born <= l.began {
			return
		}
	}
	l.missing = EvidenceLost
}

// was adds an image of the past once. It reports false if it cannot be told what it
// was.
func (l *Lookup) was(role Role, p *Process) bool {
	if p.Executable.Inode == 0 {
		l.missing = EvidenceLost
		return false
	}
	for _, e := range l.earlier {
		if e.proc.PID == p.PID && e.proc.Executable.Inode == p.Executable.Inode && e.proc.Executable.Device == p.Executable.Device && slices.Equal(e.proc.Args, p.Args) {
			return true
		}
	}
	if !l.keep(role, p) {
		l.reason = ExecRace
		return false
	}
	return true
}

// probeLevel3 asks the witness for what only level 3 has, and says what it lacks.
func probeLevel3(w Witness, self int) error {
	_, execErr := w.Executed(self)
	_, forkErr := w.Creator(self)
	_, writeErr := w.Writers(0)
	_, holdErr := w.Holding(context.Background(), self, 0)
	_, allErr := w.Holders(context.Background(), nil)
	var lacks []string
	var first error
	for _, probe := range []struct {
		what string
		err  error
	}{{"execve", execErr}, {"clone", forkErr}, {"writes", writeErr}, {"references to a socket", holdErr}, {"all descriptors", allErr}} {
		if errors.Is(probe.err, errors.ErrUnsupported) {
			lacks = append(lacks, probe.what)
			first = cmp.Or(first, probe.err)
		}
	}
	if first == nil {
		return nil
	}
	return fmt.Errorf("the kernel does not tell of %s: %w", strings.Join(lacks, ", "), first)
}

// Calls that wait for many descriptors, and calls whose first argument is one.
var (
	pollCalls = append([]int{unix.SYS_PPOLL, unix.SYS_PSELECT6}, oldPollCalls...)
	ioCalls   = []int{unix.SYS_READ, unix.SYS_READV, unix.SYS_RECVFROM, unix.SYS_RECVMSG, unix.SYS_RECVMMSG,
		unix.SYS_WRITE, unix.SYS_WRITEV, unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_SENDMMSG}
)
