package attribution

import (
	"errors"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
	"golang.org/x/sys/unix"
)

var (
	// errRemote says that no process of this host has the client's end.
	errRemote = errors.New("no process of another network namespace has this connection")
	// errAmbiguous says that sockets of several network namespaces have the tuple.
	errAmbiguous = errors.New("several network namespaces have this connection")
)

// namespaces remembers one process of each network namespace, for a moment: finding
// them takes a link to be read for every process of the host. It also keeps sockets
// that answer for other namespaces, where we may open them. The zero value is ready.
type namespaces struct {
	mu    sync.Mutex // guards the following
	pids  map[string]int
	since time.Time

	conns  map[uint64]*netnsConn // by the inode of the namespace
	closed bool                  // to us: setns(2) is not permitted

	tables tables // of those that are not kept
}

type netnsConn struct {
	*diag.Conn
	used time.Time
}

const (
	// freshNamespaces is how long the list of namespaces serves, and staleNamespaces how
	// long if a connection is in none of them. Longer makes a client in a container
	// that was just started wait; shorter spends more on a flood of connections.
	freshNamespaces = 250 * time.Millisecond
	staleNamespaces = 10 * time.Millisecond
	// maxNetnsConns bounds the sockets that are kept, and idleNetnsConn how long one is
	// that nobody asks: it keeps its namespace from being taken apart.
	maxNetnsConns = 64
	idleNetnsConn = time.Minute
)

// conn is a socket that answers exactly for the namespace of a process, which may be one
// of many, without its table being read. Without CAP_SYS_ADMIN there is none.
func (n *namespaces) conn(h *host, pid int, among bool) (*diag.Conn, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, false
	}
	ns, err := h.openNet(pid, among)
	if err != nil {
		return nil, false
	}
	defer unix.Close(ns)
	var st unix.Stat_t
	if unix.Fstat(ns, &st) != nil {
		return nil, false
	}
	if c := n.conns[st.Ino]; c != nil {
		c.used = time.Now()
		return c.Conn, true
	}
	c, err := diag.OpenIn(ns)
	if err != nil {
		n.closed = denied(err)
		return nil, false
	}
	n.forget(maxNetnsConns - 1)
	if n.conns == nil {
		n.conns = map[uint64]*netnsConn{}
	}
	n.conns[st.Ino] = &netnsConn{c, time.Now()}
	return c, true
}

// openNet opens the network namespace of a process, which may be one of many.
func (h *host) openNet(pid int, among bool) (int, error) {
	const none, left = 0, -1
	var fd atomic.Int64 // plus one; what comes when we have left is closed
	var failed error
	open := func() {
		ns, err := unix.Open(filepath.Join(h.proc, strconv.Itoa(pid), "ns/net"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			failed = err
		} else if !fd.CompareAndSwap(none, int64(ns)+1) {
			unix.Close(ns)
		}
	}
	var locked error
	if among {
		locked = h.lockable.DoAmong(pid, nil, open)
	} else {
		locked = h.lockable.Do(pid, open)
	}
	if locked == nil && failed != nil {
		return -1, failed
	}
	if ns := fd.Swap(left); ns > 0 {
		return int(ns - 1), nil
	}
	return -1, locked
}

// forget closes the sockets that are idle, and so many others that at most keep are
// left. It is called with n.mu held.
func (n *namespaces) forget(keep int) {
	for inode, c := range n.conns {
		if time.Since(c.used) > idleNetnsConn || len(n.conns) > keep {
			c.Close()
			delete(n.conns, inode)
		}
	}
}

// tidy closes the sockets that are idle.
func (n *namespaces) tidy() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forget(maxNetnsConns)
}

func (n *namespaces) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forget(0)
}

// others are all network namespaces but ours, with a process in each, as they were so
// long ago at most. One that cannot be asked is where it was.
func (n *namespaces) others(h *host, age time.Duration) (map[string]int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if time.Since(n.since) < age {
		return n.pids, nil
	}
	pids, err := h.pids(make([]byte, 32<<10))
	if err != nil {
		return nil, err
	}
	was := make(map[int]string, len(n.pids))
	for link, pid := range n.pids {
		was[pid] = link
	}
	n.pids = map[string]int{}
	for _, pid := range pids {
		var now string
		link := was[pid]
		if h.lockable.DoAmong(pid, nil, func() {
			now, _ = linkAt(unix.AT_FDCWD, filepath.Join(h.proc, strconv.Itoa(pid), "ns/net"))
		}) == nil {
			link = now
		}
		if link != "" && link != h.net {
			n.pids[link] = pid
		}
	}
	n.since = time.Now()
	return n.pids, nil
}

// wait waits until a list that was made before a time is stale: a client in a container
// that was just started is not in it.
func (n *namespaces) wait(asked time.Time) {
	n.mu.Lock()
	made := n.since
	n.mu.Unlock()
	if made.Before(asked) {
		time.Sleep(time.Until(made.Add(staleNamespaces)))
	}
}

// elsewhere finds a client's socket in another network namespace: in that of the
// process which was seen to connect it or, at levels without a witness, in all there
// are. It may read the namespace's table.
func (l *Lookup) elsewhere(t diag.Tuple) (diag.Socket, error) {
	var found []diag.Socket
	var err error
	switch {
	case len(l.connectors) > 0:
		candidates := map[string]int{}
		for _, c := range l.connectors {
			candidates[strconv.FormatUint(c.NetnsCookie, 10)] = c.PID
		}
		found, err = l.f.connections(candidates, t, false)
	case l.f.witness != nil:
		return diag.Socket{}, errRemote
	default:
		asked := time.Now()
		for _, age := range []time.Duration{freshNamespaces, staleNamespaces} {
			if age == staleNamespaces {
				l.f.namespaces.wait(asked)
			}
			candidates, listErr := l.f.namespaces.others(l.f.host, age)
			if listErr != nil {
				return diag.Socket{}, listErr
			}
			if found, err = l.f.connections(candidates, t, true); len(found) > 0 || err != nil {
				break
			}
		}
	}
	switch {
	case err != nil:
		return diag.Socket{}, err
	case len(found) > 1 && len(l.connectors) > 0:
		found[0].Cookie = l.connectors[0].SocketCookie
		return found[0], errAmbiguous
	case len(found) > 1:
		return found[0], errAmbiguous
	case len(found) == 1 && len(l.connectors) == 1:
		found[0].Cookie = l.connectors[0].SocketCookie
		return found[0], nil
	case len(found) == 1:
		return found[0], nil
	case len(l.connectors) > 0:
		return diag.Socket{}, diag.ErrGone
	}
	return diag.Socket{}, errRemote
}

// connections finds the sockets with a tuple in the namespaces of some processes, or of all
// there are.
func (f *Finder) connections(candidates map[string]int, t diag.Tuple, all bool) (found []diag.Socket, err error) {
	for _, pid := range candidates {
		var s diag.Socket
		if c, ok := f.namespaces.conn(f.host, pid, all); ok {
			s, err = c.Find(t, 0)
		} else {
			s, err = f.namespaces.tables.find(f.host, pid, t)
		}
		switch {
		case err == nil:
			found = append(found, s)
		case !errors.Is(err, diag.ErrNotFound) && !errors.Is(err, diag.ErrMismatch) && !errors.Is(err, diag.ErrGone) && !gone(err):
			return nil, err
		}
	}
	return found, nil
}
