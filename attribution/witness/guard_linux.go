package witness

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// guard is one program at the cgroup. Whoever may can detach it again
// (BPF_LINK_DETACH), and its link then stays without effect.
type guard struct {
	name    string
	attach  ebpf.AttachType
	program *ebpf.Program
	link    link.Link // nil while it is not attached
}

func (g *guard) mount(cgroup *os.File) (err error) {
	g.link, err = link.AttachCgroup(link.CgroupOptions{
		Path: fmt.Sprintf("/proc/self/fd/%d", cgroup.Fd()), Attach: g.attach, Program: g.program,
	})
	return err
}

// attached asks the kernel. A program without a link (before Linux 5.7) is believed to
// be where it was put.
func (g *guard) attached() bool {
	if g.link == nil {
		return false
	}
	info, err := g.link.Info()
	if errors.Is(err, ebpf.ErrNotSupported) {
		return true
	}
	if err != nil {
		return false
	}
	at := info.Cgroup()
	return at != nil && at.CgroupId != 0
}

func (g *guard) close() error {
	var err error
	if g.link != nil {
		err = g.link.Close()
	}
	return errors.Join(err, g.program.Close())
}

// Reattach puts back those programs at the cgroup that somebody has detached, and names
// them. Sockets that were connected meanwhile have no witness and get none. If it was
// the one that forgets sockets, those that the witness knows may be gone, and their
// names others': then all are forgotten.
func (w *Witness) Reattach() (names []string, err error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed {
		return nil, errClosed
	}
	w.attaching.Lock()
	defer w.attaching.Unlock()
	var errs []error
	forget := false
	for _, g := range w.guards {
		if g.attached() {
			continue
		}
		if g.link != nil {
			g.link.Close() // of a program that is not there
			g.link = nil
		}
		if err := g.mount(w.cgroup); err != nil {
			errs = append(errs, fmt.Errorf("attach %s again: %w", g.name, err))
			continue
		}
		names = append(names, g.name)
		forget = forget || g.attach == ebpf.AttachCgroupInetSockRelease || g.attach == ebpf.AttachCGroupSockOps
	}
	if forget {
		errs = append(errs, w.forget())
	}
	return names, errors.Join(errs...)
}

// forget empties what is known of sockets. A program that stores one at this moment
// may leave half of it, which answers nothing.
func (w *Witness) forget() error {
	var errs []error
	w.shared.add(&w.shared.forgetting)
	for _, name := range []string{"tuples", "connectors", "writers"} {
		m := w.maps[name]
		var keys [][]byte
		key := make([]byte, m.KeySize())
		value := make([]byte, m.ValueSize())
		for all := m.Iterate(); all.Next(&key, &value); {
			keys = append(keys, append([]byte(nil), key...))
		}
		for _, key := range keys {
			if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs = append(errs, fmt.Errorf("empty the BPF map of %s: %w", name, err))
			}
		}
	}
	for i := range w.users {
		w.shared.set(&w.users[i].sockets, 0)
	}
	w.shared.set(&w.shared.live, 0)
	w.shared.add(&w.shared.forgotten)
	return errors.Join(errs...)
}
