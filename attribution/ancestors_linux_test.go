package attribution

import (
	"fmt"
	"io"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Processes with the same ancestors are read at the same time: none may see one of them
// half read.
func TestAncestorsTogether(t *testing.T) {
	f := newLevel(t, Level1, Options{})
	parent := exec.Command("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 60 & echo $!; done; wait")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	pids := make([]int, 8)
	for i := range pids {
		if pids[i], err = number(out); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		for _, pid := range pids {
			kill(pid)
		}
		parent.Wait()
	}()
	f.host.table.Drain()
	for range 20 {
		f.host.mu.Lock()
		for _, p := range f.host.pins { // as after ancestorFor
			p.at = time.Time{}
		}
		f.host.mu.Unlock()
		var all sync.WaitGroup
		for _, pid := range pids {
			all.Go(func() {
				p, err := f.Process(pid)
				if err != nil || p.Parent == nil || p.Parent.Ancestry == Unknown || p.Parent.Parent == nil {
					t.Errorf("%+v, %v", p, err)
				}
			})
		}
		all.Wait()
	}
}

func number(r io.Reader) (n int, err error) { _, err = fmt.Fscan(r, &n); return n, err }

func kill(pid int) { syscall.Kill(pid, syscall.SIGKILL) }
