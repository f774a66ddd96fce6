package procwatch

import (
	"cmp"
	"container/list"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unique"
)

// How the table works.
//
// An entry is one life of one pid. A fork makes an entry with a link to the entry of
// the parent and to the image which that has at the moment; a child that does not
// execute has no image of its own. An exec appends an image. An exit only notes the
// time: entries stay for keepDead, and while they have children in the table.
//
// The table is filled from two sources that run at the same time, events and /proc,
// in that order of belief. An event about an unknown pid makes an entry that knows
// nothing but that ("stranger"); what is read of /proc later completes it. So the
// first reading of /proc, and each one after a loss, is merged into a table that
// goes on taking events, and nothing has to wait.
//
// A reading of /proc is merged after a drain that came after the reading: so if
// the table then has no exec of that process after the reading began, the reading
// was of the image that the table has. One hole is left: the kernel sends the event
// at the end of execve, and /proc shows the new program some 100 µs before. A reading
// in between is of the next image, and nothing says so until the event comes. So an
// image that was read less than execTakes before the next exec counts as not read,
// unless the next image turns out to be of another file.

const (
	// keepDead is how long a process is known after its end: connections outlive
	// the process that passed them on by this much. Longer takes 300 bytes for each
	// process that the host runs in that time.
	keepDead = 60 * time.Second
	// maxImages bounds the images of one process: the first one and the newest are
	// kept. Real ones have two or three.
	maxImages = 32
	// maxAncestors bounds the chain that is told.
	maxAncestors = 32
	// execTakes bounds the time from a new program in /proc to the event of its
	// exec. Shorter believes a reading on a loaded host that may be of the next
	// program; longer forgets what wrappers like env(1) were.
	execTakes = 100 * time.Millisecond
	// slack is how many ticks the start of a process may be before its fork event:
	// clone takes both times (copy_process in kernel/fork.c), and can be preempted in
	// between.
	slack = 2
	// tick is what field 22 of /proc/PID/stat counts in: USER_HZ is 100 on every
	// architecture that we build for.
	tick = 10 * time.Millisecond

	// shortText is what is always kept of paths and of arguments; maxText bounds all
	// that is longer. Without it, 200,000 processes with long arguments would take
	// 800 MB.
	shortText = 256
	maxText   = 16 << 20
	// recentActs is how many forks and execs Active can look back on.
	recentActs = 2048
)

// content is what was read of an image.
type content struct {
	file     unique.Handle[File]
	cmdline  string
	cut      bool
	denied   bool
	locked   bool // when it began: what is read later may be exchanged
	uid, gid uint32
}

type image struct {
	since  time.Duration
	seq    uint32
	missed bool
	kernel bool // a thread of the kernel
	read   bool
	risky  bool // read so shortly before the next exec that it may be of that
	readAt time.Duration
	content
}

type entry struct {
	pid      int32
	born     time.Duration // of the fork event
	limit    uint64        // the start tick is this at most: that of the first event
	ticks    uint64        // exact start tick; 0 if unknown
	seen     time.Duration // no event is missing since; born, if all were seen
	exitAt   time.Duration
	verified uint64 // the epoch in which the present image is known to be so

	parent      *entry
	parentImage *image
	images      []*image
	execs       uint32
	children    int32 // entries that have this one as parent

	snapshot  bool // found in /proc
	cut       bool // images are missing after the first
	truncated bool // the parent had to make room
	origin    bool // has no parent
	left      bool // its first thread has ended
	owed      bool // the exit event of the pid's previous life may still come
	gone      bool // taken out of the table
	held      bool // dead for long enough, but with children
	doubtful  bool // see Ancestor.Doubtful, about the parent's image

	older *entry // previous life of the same pid
	dead  *list.Element
}

// image is what the process runs now, or ran last.
func (e *entry) image() *image {
	if n := len(e.images); n > 0 {
		return e.images[n-1]
	}
	return e.parentImage
}

// lastExec is when the present image began.
func (e *entry) lastExec() time.Duration {
	if n := len(e.images); n > 0 {
		return e.images[n-1].since
	}
	return e.born
}

// distance is how far the start tick of an entry can be from the given one, and
// whether they may be the same life.
func (e *entry) distance(ticks uint64) (uint64, bool) {
	switch {
	case ticks == 0:
		return 0, true
	case e.ticks != 0:
		return 0, e.ticks == ticks
	case ticks > e.limit:
		return 0, false
	case e.born != 0:
		return e.limit - ticks, ticks+slack >= e.limit
	}
	return e.limit - ticks, true
}

// gap is a time in which events were lost.
type gap struct{ from, to time.Duration }

// table is not safe for concurrent use. It does no system calls but through alive.
type table struct {
	max    int
	offset time.Duration // CLOCK_BOOTTIME less CLOCK_MONOTONIC
	joined time.Duration // when the events began
	// alive reads the start tick of a process of which some thread still runs.
	alive func(pid int) (ticks uint64, ok bool)

	byPID  map[int32]*entry // newest life
	count  int              // entries
	images int
	dead   *list.List // of *entry: ended, oldest first, but for those held
	full   bool       // nothing could be evicted, and nobody has ended since
	gaps   []gap
	text   *atomic.Int64
	acts   [recentActs]int32
	nacts  int
	actAt  [recentActs]time.Duration

	stats Stats
}

func newTable(max int, alive func(int) (uint64, bool)) *table {
	return &table{max: max, alive: alive, byPID: map[int32]*entry{}, dead: list.New(), text: new(atomic.Int64)}
}

func (t *table) ticksOf(mono time.Duration) uint64 { return uint64((mono + t.offset) / tick) }

// apply takes one event. For an exec it returns the image to read.
func (t *table) apply(ev event) (*entry, *image) {
	switch ev.what {
	case evFork:
		t.stats.Forks++
		t.fork(ev)
	case evExec:
		t.stats.Execs++
		return t.exec(ev)
	case evExit:
		t.stats.Exits++
		t.exit(ev)
	}
	return nil, nil
}

func (t *table) fork(ev event) {
	var e *entry
	if old := t.byPID[ev.tgid]; old != nil && !old.left && old.born == 0 && old.ticks != 0 && ev.parent != ev.tgid {
		// Either its exit event is late, or this is the event of the same process,
		// which /proc showed before it came: a reading in the middle of the fork.
		if ticks, ok := t.alive(int(ev.tgid)); ok && ticks == old.ticks {
			e = old
			t.orphan(e)
			e.snapshot, e.origin = false, false
			if len(e.images) > 0 && e.images[0].seq == 0 { // the parent's
				e.images = slices.Delete(e.images, 0, 1)
				t.images--
			}
		}
	}
	parent := t.byPID[ev.parent]
	if parent == nil {
		parent = t.stranger(ev.parent, ev.time)
	}
	if e == nil || e.gone {
		if e = t.add(ev.tgid, ev.time); e == nil {
			return
		}
	}
	e.born, e.seen, e.limit = ev.time, ev.time, t.ticksOf(ev.time)
	if parent == nil || parent.gone { // to make room for this one, for instance
		e.truncated = true
		t.own(e, &image{since: ev.time})
	} else {
		e.adopt(parent)
		e.doubtful = parent.verified != t.stats.Epoch
	}
	t.act(ev.tgid, ev.time)
}

// adopt links to the parent and to its present image.
func (e *entry) adopt(parent *entry) {
	e.parent, e.parentImage = parent, parent.image()
	parent.children++
}

func (t *table) exec(ev event) (*entry, *image) {
	e := t.byPID[ev.tgid]
	if e == nil {
		if e = t.stranger(ev.tgid, ev.time); e == nil {
			return nil, nil
		}
	}
	// A thread that is not the first takes the place and the pid of the first one,
	// which the kernel makes exit before (de_thread in fs/exec.c).
	t.revive(e)
	if last := e.image(); last != nil && len(e.images) > 0 && last.read && ev.time-last.readAt < execTakes {
		last.risky = true
	}
	e.verified = t.stats.Epoch
	e.execs++
	img := &image{since: ev.time, seq: e.execs}
	t.own(e, img)
	t.act(ev.tgid, ev.time)
	return e, img
}

// own appends an image.
func (t *table) own(e *entry, img *image) {
	e.images = append(e.images, img)
	t.images++
	keep := maxImages
	if t.images > 2*t.max {
		keep = 4
	}
	if n := len(e.images); n > keep {
		cut := n - keep
		e.images = slices.Delete(e.images, 1, 1+cut)
		t.images -= cut
		e.cut = true
	}
}

func (t *table) exit(ev event) {
	e := t.byPID[ev.tgid]
	if e == nil {
		e = t.stranger(ev.tgid, ev.time)
		if e == nil {
			return
		}
	}
	if e.owed {
		e.owed = false
		if ticks, ok := t.alive(int(ev.tgid)); ok {
			if _, same := e.distance(ticks); same {
				return // the event of the life before
			}
		}
	}
	t.leave(e, ev.time)
}

func (t *table) leave(e *entry, at time.Duration) {
	if e.left {
		return
	}
	e.left, e.exitAt = true, at
	e.dead = t.dead.PushBack(e)
	t.full = false
}

// revive is for a process whose first thread has ended and that runs on.
func (t *table) revive(e *entry) {
	if !e.left {
		return
	}
	e.left, e.held, e.exitAt = false, false, 0
	if e.dead != nil {
		t.dead.Remove(e.dead)
		e.dead = nil
	}
}

// stranger enters a process of which an event told, and whose fork we do not know.
func (t *table) stranger(pid int32, at time.Duration) *entry {
	t.stats.Strangers++
	e := t.add(pid, at)
	if e != nil {
		e.seen, e.limit = at, t.ticksOf(at)
		t.own(e, &image{})
	}
	return e
}

// add enters a new life of a pid. It is nil if there is no room.
func (t *table) add(pid int32, at time.Duration) *entry {
	if t.count >= t.max && !t.makeRoom() {
		t.stats.Refused++
		return nil
	}
	e := &entry{pid: pid, older: t.byPID[pid], verified: t.stats.Epoch}
	if old := e.older; old != nil && !old.left {
		// Its exit event is late: the kernel frees the pid before it sends it, when
		// nobody waits for the process (do_exit in kernel/exit.c).
		e.owed = true
		t.leave(old, at)
	}
	t.byPID[pid] = e
	t.count++
	return e
}

// makeRoom takes out at least one entry.
func (t *table) makeRoom() bool {
	if t.full {
		return false
	}
	for el := t.dead.Front(); el != nil; el = t.dead.Front() {
		e := el.Value.(*entry)
		if t.retire(e) {
			t.stats.Evicted++
			return true
		}
	}
	// Only ancestors are left. They go by the batch, because finding those who refer
	// to them takes a pass through the table.
	var ancestors []*entry
	t.each(func(e *entry) {
		if e.held {
			ancestors = append(ancestors, e)
		}
	})
	if len(ancestors) == 0 {
		t.full = true
		return false
	}
	slices.SortFunc(ancestors, func(a, b *entry) int { return cmp.Compare(a.exitAt, b.exitAt) })
	ancestors = ancestors[:min(len(ancestors), max(1, t.max/16))]
	for _, e := range ancestors {
		e.gone = true
	}
	var orphans []*entry
	t.each(func(e *entry) {
		if e.parent != nil && e.parent.gone {
			orphans = append(orphans, e)
		}
	})
	for _, e := range orphans {
		e.parent, e.truncated = nil, true
	}
	for _, e := range ancestors {
		e.children = 0
		t.unlink(e)
		t.stats.Evicted++
	}
	return true
}

func (t *table) each(f func(*entry)) {
	for _, e := range t.byPID {
		for ; e != nil; e = e.older {
			f(e)
		}
	}
}

// retire takes a dead process out, or holds it if it has children.
func (t *table) retire(e *entry) bool {
	if e.dead != nil {
		t.dead.Remove(e.dead)
		e.dead = nil
	}
	if e.children > 0 {
		e.held = true
		return false
	}
	t.unlink(e)
	return true
}

// unlink takes an entry without children out of the table.
func (t *table) unlink(e *entry) {
	if e.dead != nil {
		t.dead.Remove(e.dead)
		e.dead = nil
	}
	e.gone = true
	t.count--
	t.images -= len(e.images)
	if first := t.byPID[e.pid]; first == e {
		if e.older != nil {
			t.byPID[e.pid] = e.older
		} else {
			delete(t.byPID, e.pid)
		}
	} else {
		for p := first; p != nil; p = p.older {
			if p.older == e {
				p.older = e.older
				break
			}
		}
	}
	t.orphan(e)
}

// orphan takes an entry from its parent.
func (t *table) orphan(e *entry) {
	if p := e.parent; p != nil && !p.gone {
		p.children--
		if p.children == 0 && p.held {
			p.held = false
			p.dead = t.dead.PushFront(p) // it has waited longest
		}
	}
	e.parent = nil
}

// expire takes out some of what has been dead for keepDead, and reports whether there
// is more. Of each it first asks whether only the first thread has ended.
func (t *table) expire(now time.Duration) bool {
	for range 16 { // some microseconds each, during which nobody else is answered
		el := t.dead.Front()
		if el == nil {
			return false
		}
		e := el.Value.(*entry)
		if now-e.exitAt < keepDead {
			return false
		}
		if t.byPID[e.pid] == e {
			if ticks, ok := t.alive(int(e.pid)); ok {
				if _, same := e.distance(ticks); same {
					e.exitAt = now
					t.dead.MoveToBack(el)
					continue
				}
			}
		}
		t.retire(e)
	}
	return true
}

// act notes a fork or an exec for Active.
func (t *table) act(pid int32, at time.Duration) {
	t.acts[t.nacts%recentActs], t.actAt[t.nacts%recentActs] = pid, at
	t.nacts++
}

// active appends the pids that forked into being or executed since, newest first.
func (t *table) active(since time.Duration, pids []int) []int {
	for i := t.nacts - 1; i >= 0 && i >= t.nacts-recentActs && t.actAt[i%recentActs] >= since; i-- {
		pid := t.acts[i%recentActs]
		if e := t.byPID[pid]; e == nil || e.left || e.lastExec() != t.actAt[i%recentActs] {
			continue // over, or it comes again
		}
		pids = append(pids, int(pid))
	}
	return pids
}

// lost notes that events between two moments are missing.
func (t *table) lost(from, to time.Duration, n uint64) {
	t.stats.Lost += n
	t.stats.Overruns++
	t.stats.Epoch++
	if len(t.gaps) == 64 {
		// The oldest two become one, which says less and nothing false.
		t.gaps[1].from = t.gaps[0].from
		t.gaps = slices.Delete(t.gaps, 0, 1)
	}
	t.gaps = append(t.gaps, gap{from, to})
}

// completeSince is from when on no event of an entry is missing.
func (t *table) completeSince(e *entry) time.Duration {
	since := e.seen
	for _, g := range t.gaps {
		if g.to > since && (!e.left || e.exitAt == 0 || e.exitAt >= g.from) {
			since = g.to
		}
	}
	return since
}

// fill gives an image what was read while it ran.
func (t *table) fill(e *entry, img *image, c content, at time.Duration) {
	long := 0
	for _, s := range []string{c.cmdline, c.file.Value().Path} {
		if len(s) > shortText {
			long += len(s)
		}
	}
	if long > 0 {
		if text := t.text; text.Add(int64(long)) <= maxText {
			runtime.AddCleanup(img, func(n int) { text.Add(int64(-n)) }, long)
		} else {
			text.Add(int64(-long))
			c = c.short()
		}
	}
	c.locked = img.locked
	img.content, img.read, img.readAt = c, true, at
	if n := len(e.images); n > 1 && e.images[n-1] == img {
		if prev := e.images[n-2]; prev.risky && !prev.denied && !img.denied && prev.file != img.file {
			prev.risky = false
		}
	}
}

// short is what is kept when there is no room for long text. Half a path would be
// another path.
func (c content) short() content {
	if len(c.cmdline) > shortText {
		c.cmdline, c.cut = strings.Clone(c.cmdline[:shortText]), true
	}
	if f := c.file.Value(); len(f.Path) > shortText {
		f.Path = ""
		c.file = unique.Make(f)
	}
	return c
}

// record is a process as /proc showed it, between two moments.
type record struct {
	pid, ppid    int32
	ticks        uint64
	kernel       bool
	began, ended time.Duration
	readable     bool // there is content
	dead         bool // a zombie
	content
}

// snapshot is one reading of all of /proc, which is merged piece by piece.
type snapshot struct {
	t     *table
	began time.Duration // before the pids were listed
	first bool          // nothing was lost before it
	seen  map[*entry]bool
	links []link
}

type link struct {
	child *entry
	ppid  int32
}

func (t *table) snapshot(began time.Duration) *snapshot {
	return &snapshot{t: t, began: began, first: t.stats.Epoch == 0, seen: map[*entry]bool{}}
}

// merge adds what was read of one process. The events must have been drained after
// the reading.
func (s *snapshot) merge(r record) {
	t := s.t
	e := t.find(r.pid, r.ticks)
	if e == nil {
		if now := t.byPID[r.pid]; now != nil && (now.ticks > r.ticks || now.ticks == 0 && now.limit > r.ticks) {
			return // it has ended since, and the pid is another's
		}
		if e = t.add(r.pid, r.ended); e == nil {
			return
		}
		e.limit, e.seen = r.ticks, r.ended
		t.own(e, &image{})
	}
	s.seen[e] = true
	e.ticks = r.ticks
	if e.born == 0 && !e.snapshot {
		e.snapshot = true
		if s.first && len(t.gaps) == 0 {
			e.seen = t.joined
		}
		if e.parent == nil {
			s.links = append(s.links, link{e, r.ppid})
		}
	}
	if r.kernel && e.lastExec() < r.began {
		e.image().kernel, e.verified = true, t.stats.Epoch
		return
	}
	if r.dead {
		t.leave(e, r.ended)
	}
	if !r.readable || e.left || e.lastExec() >= r.began {
		return // nothing to see, or an event of it comes after what was seen
	}
	img := e.image()
	sure := t.completeSince(e) <= max(e.lastExec(), e.seen) // no exec was lost since
	switch {
	case !img.read && sure:
		t.fill(e, img, r.content, r.ended)
	case !sure && (!img.read || img.file != r.file):
		e.execs++
		missed := &image{since: r.ended, seq: e.execs, missed: true, content: content{locked: img.locked}}
		t.own(e, missed)
		t.fill(e, missed, r.content, r.ended)
	}
	e.verified = t.stats.Epoch
}

// done links those that were found to their parents, and takes for dead what was
// not found.
func (s *snapshot) done(now time.Duration) {
	t := s.t
	for _, l := range s.links {
		parent := t.byPID[l.ppid]
		switch {
		case l.ppid == 0:
			l.child.origin = l.child.born == 0
		case parent == nil || parent == l.child || l.child.gone || l.child.born != 0:
		case parent.ticks > l.child.ticks || parent.ticks == 0 && parent.born != 0 && parent.limit > l.child.ticks+slack:
			// The parent that /proc named has ended, and its pid is another's.
		default:
			l.child.adopt(parent)
		}
	}
	t.each(func(e *entry) {
		if !e.left && !s.seen[e] && e.born < s.began && (e.born != 0 || e.seen < s.began) {
			t.leave(e, now)
		}
	})
}

// find is the life of a pid that began at a tick. 0 is the newest.
func (t *table) find(pid int32, ticks uint64) *entry {
	var best *entry
	var least uint64
	for e := t.byPID[pid]; e != nil; e = e.older {
		if d, ok := e.distance(ticks); ok && (best == nil || d < least) {
			best, least = e, d
			if ticks == 0 {
				break
			}
		}
	}
	return best
}

func (t *table) mark(e *entry) Mark {
	return Mark{
		Known: true, Born: e.born, Since: e.lastExec(), Execs: int(e.execs), Exited: e.left, Epoch: t.stats.Epoch, CompleteSince: t.completeSince(e),
	}
}

// process is the public form of an entry.
func (t *table) process(e *entry) Process {
	p := Process{
		PID: int(e.pid), Start: e.ticks, Born: e.born, Exited: e.left, ExitedAt: e.exitAt,
		ImagesCut: e.cut, Execs: int(e.execs), FromSnapshot: e.snapshot, CompleteSince: t.completeSince(e),
	}
	inherited := 0
	if e.parentImage != nil && e.inherits() {
		inherited = 1
	}
	p.Images = make([]Image, 0, len(e.images)+inherited)
	if inherited == 1 {
		p.Images = append(p.Images, e.inherited())
	}
	for _, i := range e.images {
		p.Images = append(p.Images, i.public())
	}
	depth := 0
	for a := e; a.parent != nil && depth < maxAncestors; a = a.parent {
		depth++
	}
	if depth > 0 {
		p.Ancestors = make([]Ancestor, 0, depth)
	}
	a := e
	for range depth {
		parent := a.parent
		img := a.parentImage.public()
		if len(parent.images) == 0 || a.parentImage == parent.parentImage && parent.inherits() {
			img = parent.inherited()
		}
		p.Ancestors = append(p.Ancestors, Ancestor{
			PID: int(parent.pid), Start: parent.ticks, Born: parent.born, Image: img,
			Guess: a.snapshot, Doubtful: a.doubtful, Exited: parent.left,
		})
		a = parent
	}
	switch {
	case a.parent != nil || a.truncated:
		p.End = Truncated
	case a.origin:
		p.End = Origin
	}
	return p
}

// inherits reports whether the first image of an entry is that of its parent. Of
// what was found in /proc it was read.
func (e *entry) inherits() bool { return e.born != 0 && e.parentImage != nil }

func (e *entry) inherited() Image {
	img := e.parentImage.public()
	img.Since, img.Seq, img.Missed = e.born, 0, false
	return img
}

func (i *image) public() Image {
	img := Image{Since: i.since, Seq: int(i.seq), Missed: i.missed, Kernel: i.kernel, Locked: i.locked}
	if i.read && !i.risky {
		img.Read, img.Denied = true, i.denied
		img.File, img.Cmdline, img.CmdlineCut, img.UID, img.GID = i.file.Value(), i.cmdline, i.cut, i.uid, i.gid
	}
	return img
}
