package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/attribution/witness"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

var (
	endpoint = netip.MustParseAddrPort("169.254.169.254:80") // what clients connect to
	beside   = netip.MustParseAddrPort("127.0.0.1:8080")     // what has nothing to do with it
)

// proxyPort is where the redirect leads.
const proxyPort = 254

// stage is where attribution is measured: an instance with a redirect, and this process in the place of the daemon.
type stage struct {
	lab      *netlab.Lab
	sleepers *sleepers
	inside   bool // this process is in the lab's cgroup
	proxy    net.Listener
	other    net.Listener
	witness  *witness.Witness // nil while it is not attached
	finder   *attribution.Finder
}

// newStage builds it. On error nothing is left.
func newStage() (_ *stage, err error) {
	s := new(stage)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	// Before this process is in the lab's cgroup, so that they are not: the clients are a service of their own.
	if s.sleepers, err = startSleepers(0); err != nil {
		return nil, err
	}
	if s.lab, err = netlab.New(netlab.Options{NoIMDS: true}); err != nil {
		return nil, err
	}
	if err := s.lab.Cgroup.Enter(); err != nil {
		return nil, err
	}
	s.inside = true
	redirect := exec.Command("iptables", "-w", "-t", "nat", "-A", "OUTPUT", "-d", endpoint.Addr().String(), "-p", "tcp",
		"--dport", fmt.Sprint(endpoint.Port()), "-j", "REDIRECT", "--to-ports", fmt.Sprint(proxyPort))
	redirect.Stderr = os.Stderr
	if err := s.lab.Instance.Run(redirect); err != nil {
		return nil, fmt.Errorf("redirect: %w", err)
	}
	err = s.lab.Instance.Do(func() error { return errors.Join(manyConnections(), shortMemory(), diag.EnableTimestamps()) })
	if err != nil {
		return nil, err
	}
	if s.proxy, err = s.lab.Instance.Listen(context.Background(), nil, "tcp", fmt.Sprintf("127.0.0.1:%d", proxyPort)); err != nil {
		return nil, err
	}
	if s.other, err = s.lab.Instance.Listen(context.Background(), nil, "tcp", beside.String()); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *stage) close() error {
	errs := []error{s.forget(), s.unwatch()}
	for _, ln := range []net.Listener{s.proxy, s.other} {
		if ln != nil {
			errs = append(errs, ln.Close())
		}
	}
	if s.sleepers != nil {
		errs = append(errs, s.sleepers.close())
	}
	if s.inside {
		errs = append(errs, s.lab.Cgroup.Leave())
	}
	if s.lab != nil {
		errs = append(errs, s.lab.Close())
	}
	return errors.Join(errs...)
}

// watch attaches the witness.
func (s *stage) watch() error {
	if s.witness != nil {
		return nil
	}
	return s.lab.Instance.Do(func() (err error) {
		s.witness, err = witness.Open(witness.Options{Endpoints: []netip.AddrPort{endpoint}, Cgroup: s.lab.Cgroup.Path()})
		return err
	})
}

func (s *stage) unwatch() error {
	if s.witness == nil {
		return nil
	}
	err := s.witness.Close()
	s.witness = nil
	return err
}

// level2 is a witness on a kernel that has no type information.
type level2 struct{ *witness.Witness }

func (level2) Writers(uint64) ([]attribution.Actor, error) { return nil, errors.ErrUnsupported }
func (level2) Creator(int) (attribution.Actor, error) {
	return attribution.Actor{}, errors.ErrUnsupported
}
func (level2) Executed(int) (attribution.Execution, error) {
	return attribution.Execution{}, errors.ErrUnsupported
}
func (level2) Holding(context.Context, int, uint32) (attribution.Holding, error) {
	return attribution.Holding{}, errors.ErrUnsupported
}
func (level2) Holders(context.Context, []uint32) (map[uint32][]attribution.Descriptor, error) {
	return nil, errors.ErrUnsupported
}

// find makes a Finder of exactly this level, in place of the one that there is.
func (s *stage) find(level attribution.Level) error {
	if err := s.forget(); err != nil {
		return err
	}
	o := attribution.Options{NoWitness: errors.New("left out")}
	switch level {
	case attribution.Level0:
		null, err := os.Open(os.DevNull) // which is no socket of the proc connector
		if err != nil {
			return err
		}
		defer null.Close()
		o.Connector = null
	case attribution.Level2:
		o.Witness = level2{s.witness}
	case attribution.Level3:
		o.Witness = s.witness
	}
	err := s.lab.Instance.Do(func() (err error) {
		s.finder, err = attribution.New(o)
		return err
	})
	if err != nil {
		return err
	}
	if got := s.finder.Level(); got != level {
		return fmt.Errorf("attribution is at level %s, want %s: %v", got, level, s.finder.Levels())
	}
	return nil
}

// forget closes the Finder.
func (s *stage) forget() error {
	if s.finder == nil {
		return nil
	}
	err := s.finder.Close()
	s.finder = nil
	return err
}

// accepted is one connection of a client, as the daemon has it.
type accepted struct {
	net.Conn
	who attribution.Conn
	at  time.Time
}

// accept takes the next connection.
func (s *stage) accept() (accepted, error) {
	s.proxy.(*net.TCPListener).SetDeadline(time.Now().Add(patience * time.Second))
	c, err := s.proxy.Accept()
	if err != nil {
		return accepted{}, err
	}
	return accept(c), nil
}

func accept(c net.Conn) accepted {
	at := time.Now()
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	return accepted{c, attribution.Conn{Client: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), Endpoint: endpoint}, at}
}

// asks has a client connect, and gives its connection to f before it is answered.
func (s *stage) asks(a *asker, f func(accepted) error) error {
	if err := a.tell(orderAsk); err != nil {
		return err
	}
	c, err := s.accept()
	if err != nil {
		return err
	}
	err = f(c)
	c.Read(make([]byte, 16)) // what is not read would make the client see a reset
	c.Close()
	_, doneErr := a.done()
	return errors.Join(err, doneErr)
}

// drain accepts and closes until the listener is told to stop.
func drain(ln net.Listener) (stop func()) {
	done := make(chan struct{})
	ln.(*net.TCPListener).SetDeadline(time.Time{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return func() {
		ln.(*net.TCPListener).SetDeadline(time.Unix(1, 0))
		<-done
	}
}

// owned says what is wrong with an answer about a client.
func owned(o attribution.Owner, pid int, complete bool) error {
	if len(o.Subjects) == 0 || complete && !o.Complete {
		return fmt.Errorf("process %d: %d subjects, complete %v, reason %q, level %s via %s: %w", pid, len(o.Subjects), o.Complete, o.Reason, o.Level, o.Via, errors.Join(o.Err, errWrong))
	}
	for _, p := range o.Subjects {
		if p.PID != pid {
			return fmt.Errorf("process %d is said to be %d (%s): %w", pid, p.PID, p.Name, errWrong)
		}
	}
	return nil
}

// errWrong is an answer that is not right. It is counted, where another error ends the run.
var errWrong = errors.New("wrong owner")

// cpuOfThis is the CPU time of this process.
func cpuOfThis() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano())
}
