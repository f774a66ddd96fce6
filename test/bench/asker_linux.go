package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// asker is a client process of its own, whose connections are to be attributed. It does what it is told, one thing
// after the other.
type asker struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startAsker starts one in a namespace and in the lab's cgroup, with as many descriptors as everybody has.
func startAsker(ns *netlab.Namespace) (*asker, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	a := &asker{cmd: exec.Command("/proc/self/exe", "asker")}
	for range descriptors - 3 {
		a.cmd.ExtraFiles = append(a.cmd.ExtraFiles, null)
	}
	a.cmd.Stderr = os.Stderr
	a.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	a.out = bufio.NewReader(out)
	if err := ns.Start(a.cmd); err != nil {
		return nil, fmt.Errorf("start a client: %w", err)
	}
	return a, nil
}

func (a *asker) pid() int { return a.cmd.Process.Pid }

// tell gives it an order, without waiting for it.
func (a *asker) tell(order ...any) error {
	if _, err := fmt.Fprintln(a.in, order...); err != nil {
		return fmt.Errorf("tell client %d: %w", a.pid(), err)
	}
	return nil
}

// done waits until an order is carried out, and returns the numbers that it says.
func (a *asker) done() ([]int, error) {
	line, err := a.out.ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("client %d has ended: %w", a.pid(), err)
	}
	var all []int
	for f := range strings.FieldsSeq(line) {
		n, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("client %d says %q", a.pid(), line)
		}
		all = append(all, n)
	}
	return all, nil
}

func (a *asker) close() error {
	a.in.Close()
	return a.cmd.Wait()
}

// Orders to an asker.
const (
	orderHold    = "hold"    // connect to the endpoint, and keep that instead of what was kept before
	orderAsk     = "ask"     // connect to the endpoint, and wait in read(2) until the other end closes
	orderMeasure = "measure" // ADDRESS N: the median of N connects, in nanoseconds
	orderLoad    = "load"    // RATE SECONDS: ask so often, and say how often, and how often it failed
)

// beAsked is the child.
func beAsked(in io.Reader) error {
	signal.Ignore(unix.SIGINT)
	held := -1
	for lines := bufio.NewScanner(in); lines.Scan(); {
		words := strings.Fields(lines.Text())
		says := ""
		var err error
		switch words[0] {
		case orderHold:
			if held >= 0 {
				unix.Close(held)
			}
			held, err = connectTo(endpoint)
		case orderAsk:
			err = askOnce()
		case orderMeasure:
			var ns int64
			ns, err = medianConnect(words[1], words[2])
			says = strconv.FormatInt(ns, 10)
		case orderLoad:
			says, err = askOften(words[1], words[2])
		}
		if err != nil {
			return fmt.Errorf("%s: %w", words[0], err)
		}
		fmt.Println(says)
	}
	return nil
}

// connectTo blocks in the kernel, as a client without an event loop does.
func connectTo(to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for {
		err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
		if err == nil {
			return fd, nil
		}
		if err != unix.EINTR {
			unix.Close(fd)
			return -1, err
		}
	}
}

// reset closes a socket so that nothing of it stays behind.
func reset(fd int) {
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}

// askOnce says who it is, which is compared with what is found out without it.
func askOnce() error {
	fd, err := connectTo(endpoint)
	if err != nil {
		return err
	}
	defer reset(fd)
	wait := unix.Timeval{Sec: patience}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	if _, err := unix.Write(fd, fmt.Appendln(nil, os.Getpid())); err != nil {
		return err
	}
	var b [1]byte
	for {
		if _, err := unix.Read(fd, b[:]); err != unix.EINTR {
			return err
		}
	}
}

func medianConnect(address, count string) (int64, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(count)
	if err != nil {
		return 0, err
	}
	all := make([]time.Duration, n)
	for i := range all {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		a := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		from := time.Now()
		err = unix.Connect(fd, a)
		all[i] = time.Since(from)
		reset(fd)
		if err != nil {
			return 0, err
		}
	}
	slices.Sort(all)
	return all[n/2].Nanoseconds(), nil
}

// askOften does not wait for its place in time when it is late, so that it keeps the rate if it can.
func askOften(perSecond, seconds string) (string, error) {
	rate, err1 := strconv.Atoi(perSecond)
	length, err2 := strconv.Atoi(seconds)
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	done, failed := 0, 0
	begin := time.Now()
	for i := range rate * length {
		at := time.Duration(i) * time.Second / time.Duration(rate)
		time.Sleep(at - time.Since(begin))
		if time.Since(begin) > time.Duration(length)*time.Second {
			break
		}
		if done++; askOnce() != nil {
			failed++
		}
	}
	return fmt.Sprint(done, failed), nil
}
