package proxy

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/proxy/loop"
)

// slowKernel is a witness of level 2 that saw nobody connect, and takes as long to say so
// of some clients as a test likes.
type slowKernel struct {
	slow  func(client netip.Addr) bool
	goOn  chan struct{} // a value lets one go on
	all   func()        // lets all go on from now on
	asked atomic.Int32  // about clients that are slow, and not answered
	most  atomic.Int32  // that asked was
}

func newSlowKernel(slow func(netip.Addr) bool) *slowKernel {
	k := &slowKernel{slow: slow, goOn: make(chan struct{})}
	k.all = sync.OnceFunc(func() { close(k.goOn) })
	return k
}

func (k *slowKernel) Connectors(t diag.Tuple, _ bool) ([]attribution.Connector, error) {
	if k.slow(t.Local.Addr()) {
		n := k.asked.Add(1)
		for most := k.most.Load(); n > most && !k.most.CompareAndSwap(most, n); {
			most = k.most.Load()
		}
		<-k.goOn
		k.asked.Add(-1)
	}
	return nil, attribution.ErrNoWitness
}

func (k *slowKernel) Writers(uint64) ([]attribution.Actor, error) { return nil, errors.ErrUnsupported }
func (k *slowKernel) Changes() (uint64, bool)                     { return 0, false }
func (k *slowKernel) Creator(int) (attribution.Actor, error) {
	return attribution.Actor{}, errors.ErrUnsupported
}
func (k *slowKernel) Executed(int) (attribution.Execution, error) {
	return attribution.Execution{}, errors.ErrUnsupported
}
func (k *slowKernel) Former(int) (attribution.Execution, error) {
	return attribution.Execution{}, errors.ErrUnsupported
}
func (k *slowKernel) Holding(context.Context, int, uint32) (attribution.Holding, error) {
	return attribution.Holding{}, errors.ErrUnsupported
}
func (k *slowKernel) Holders(context.Context, []uint32) (map[uint32][]attribution.Descriptor, error) {
	return nil, errors.ErrUnsupported
}
func (k *slowKernel) Check(context.Context) error                 { return nil }
func (k *slowKernel) Arrived(diag.Tuple, []attribution.Connector) {}

// until waits until something is so.
func until(t testing.TB, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not %s", what)
		}
	}
}

// A turn that comes back between the try and the wait is not lost.
func TestTurnComesBack(t *testing.T) {
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	go l.Run()
	defer l.Close()
	var all turns
	o := owner{known: true, uid: 1}
	waited := make(chan bool, 1)
	task, _ := l.Start(func(task *loop.Task) {
		for range maxTurns {
			all.take(o)
		}
		if all.take(o) {
			t.Error("there are more turns than there are")
		}
		for range maxTurns {
			all.give(o)
		}
		s := &session{task: task}
		s.of.owner = o
		waited <- all.wait(s, o)
	})
	select {
	case had := <-waited:
		if !had || all.taken[o] != 1 {
			t.Errorf("%v, and %d are taken", had, all.taken[o])
		}
	case <-time.After(5 * time.Second):
		t.Error("it waits for what is there")
		task.Cancel()
		<-waited
	}
}
