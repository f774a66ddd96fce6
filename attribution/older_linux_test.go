package attribution

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// blind is a witness that came after everything.
type blind struct{ Witness }

func (blind) Connectors(diag.Tuple, bool) ([]Connector, error) { return nil, ErrNoWitness }
func (blind) Writers(uint64) ([]Actor, error)                  { return nil, ErrNoWitness }
func (blind) Executed(int) (Execution, error)                  { return Execution{}, ErrNoWitness }
func (blind) Former(int) (Execution, error)                    { return Execution{}, ErrNoWitness }
func (blind) Creator(int) (Actor, error)                       { return Actor{}, ErrNoWitness }
func (blind) Holding(context.Context, int, uint32) (Holding, error) {
	return Holding{}, errors.ErrUnsupported
}
func (blind) Check(context.Context) error { return nil }
func (blind) Holders(context.Context, []uint32) (map[uint32][]Descriptor, error) {
	return nil, errors.ErrUnsupported
}

// A connection that is older than the witness, as one in the backlog of the listeners
// after a restart, is attributed without it and allows nothing: when it began is not known.
func TestOlderThanWitness(t *testing.T) {
	labtest.RequireRoot(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	endpoint := ln.Addr().(*net.TCPAddr).AddrPort()
	f, err := New(Options{Witness: blind{}, Endpoints: []netip.AddrPort{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Level() < Level1 {
		t.Fatal(f.Levels())
	}
	l := f.Find(Conn{Client: c.LocalAddr().(*net.TCPAddr).AddrPort(), Endpoint: endpoint})
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if o := l.Complete(ctx, true); o.Complete || o.Reason != EvidenceLost {
		t.Errorf("%+v", o)
	}
}
