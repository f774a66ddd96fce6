package attribution

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/imdsgate/imdsgate/attribution/diag"
)

// tables read the connections of network namespaces that we may not enter
// (proc_pid_net(5)). Whoever lives in one can make its table so long that to read it
// takes half a second, and has as many questions asked about it as he has requests. So it
// is read once for all who have asked before that began, and once at a time. The zero
// value is ready.
type tables struct {
	mu sync.Mutex // guards the following, and what they have
	of map[int]*table
}

// table is that of one process's namespace.
type table struct {
	reading sync.Mutex
	next    *pass // has not begun; nil if nobody waits for it
	users   int
}

// pass is one reading of a table.
type pass struct {
	wanted map[string]*entry // by both ends, as a line has them
	left   int               // of those
	four   bool              // one of them speaks IPv4
	err    error             // of all that were not found
	done   chan struct{}
}

// entry is what the table has of one socket.
type entry struct {
	tuple  diag.Tuple
	socket diag.Socket
	err    error
	found  bool
}

// find finds one socket in the table of a process's network namespace.
func (a *tables) find(h *host, pid int, t diag.Tuple) (diag.Socket, error) {
	a.mu.Lock()
	if a.of == nil {
		a.of = map[int]*table{}
	}
	of := a.of[pid]
	if of == nil {
		of = new(table)
		a.of[pid] = of
	}
	of.users++
	p := of.next
	begins := p == nil
	if begins {
		p = &pass{wanted: map[string]*entry{}, done: make(chan struct{})}
		of.next = p
	}
	e := p.want(t)
	a.mu.Unlock()
	if begins {
		of.reading.Lock()
		a.mu.Lock()
		of.next = nil
		a.mu.Unlock()
		p.err = p.read(h, pid)
		of.reading.Unlock()
		close(p.done)
	}
	<-p.done
	a.mu.Lock()
	if of.users--; of.users == 0 {
		delete(a.of, pid)
	}
	a.mu.Unlock()
	switch {
	case e.found:
		return e.socket, e.err
	case p.err != nil:
		return diag.Socket{}, p.err
	}
	return diag.Socket{}, diag.ErrNotFound
}

// want is called before the pass begins.
func (p *pass) want(t diag.Tuple) *entry {
	text := ends(t, false)
	e := p.wanted[text]
	if e != nil {
		return e
	}
	e = &entry{tuple: t}
	p.wanted[text] = e
	if t.Local.Addr().Is4() { // a socket may speak IPv4 through IPv6
		p.wanted[ends(t, true)], p.four = e, true
	}
	p.left++
	return e
}

// read finds what is wanted.
func (p *pass) read(h *host, pid int) error {
	for _, name := range []string{"net/tcp", "net/tcp6"} {
		if name == "net/tcp" && !p.four {
			continue
		}
		file, err := os.Open(filepath.Join(h.proc, strconv.Itoa(pid), name))
		if err != nil {
			return err
		}
		err = p.lines(file, name == "net/tcp6")
		file.Close()
		if err != nil || p.left == 0 {
			return err
		}
	}
	return nil
}

// lines reads one table. Lines that are about others are not parsed.
func (p *pass) lines(r io.Reader, six bool) error {
	bp := bufs.Get().(*[]byte)
	defer bufs.Put(bp)
	lines := bufio.NewScanner(r)
	lines.Buffer(*bp, len(*bp))
	size := len("0100007F:0050 0100007F:0050")
	if six {
		size += 2 * 24
	}
	for p.left > 0 && lines.Scan() {
		_, line, _ := bytes.Cut(lines.Bytes(), []byte(": "))
		if len(line) < size {
			continue
		}
		e := p.wanted[string(line[:size])]
		if e == nil || e.found {
			continue
		}
		e.found = true
		p.left--
		e.socket, e.err = parseLine(string(line), e.tuple, six && e.tuple.Local.Addr().Is4())
	}
	return lines.Err()
}

// parseLine reads a line from behind its number.
func parseLine(line string, t diag.Tuple, mapped bool) (diag.Socket, error) {
	fields := strings.Fields(line)
	if len(fields) < 9 {
		return diag.Socket{}, errors.New("not the format of /proc/net/tcp")
	}
	state, err1 := strconv.ParseUint(fields[2], 16, 8)
	uid, err2 := strconv.ParseUint(fields[6], 10, 32)
	inode, err3 := strconv.ParseUint(fields[8], 10, 32)
	if err := errors.Join(err1, err2, err3); err != nil {
		return diag.Socket{}, fmt.Errorf("not the format of /proc/net/tcp: %w", err)
	}
	if inode == 0 || !diag.State(state).Connected() {
		return diag.Socket{}, diag.ErrGone
	}
	return diag.Socket{Tuple: t, State: diag.State(state), Inode: uint32(inode), UID: uint32(uid), Mapped: mapped}, nil
}

// ends writes both ends as the kernel does there.
func ends(t diag.Tuple, mapped bool) string {
	var buf [75]byte
	return string(appendHex(append(appendHex(buf[:0], t.Local, mapped), ' '), t.Remote, mapped))
}

// appendHex writes an address as numbers of 32 bits, in the byte order of the machine
// (net/ipv4/tcp_ipv4.c, get_tcp4_sock).
func appendHex(text []byte, a netip.AddrPort, mapped bool) []byte {
	all := a.Addr().As16()
	b := all[:]
	if a.Addr().Is4() && !mapped {
		b = b[12:]
	}
	for ; len(b) > 0; b = b[4:] {
		text = fmt.Appendf(text, "%08X", binary.NativeEndian.Uint32(b))
	}
	return fmt.Appendf(text, ":%04X", a.Port())
}
