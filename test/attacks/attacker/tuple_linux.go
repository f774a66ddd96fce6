package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// from asks from an address and port, "172.31.0.11:40000".
func from(args []string) error {
	a, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	return asks(ask.Client{Source: a})
}

// listener asks from a port on which a program with a grant listens.
func listener([]string) error {
	c := ask.Client{Source: netip.AddrPortFrom(netip.IPv4Unspecified(), 0)}
	fd, err := c.Connect()
	if err != nil {
		return err
	}
	unix.CloseOnExec(fd)
	port, err := ask.Port(fd)
	if err != nil {
		return err
	}
	cmd := exec.Command(granted(), "listen", strconv.Itoa(port))
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	said := make([]byte, len("listens\n"))
	if _, err := io.ReadFull(out, said); err != nil || string(said) != "listens\n" {
		return fmt.Errorf("the listener said %q: %w", said, err)
	}
	try(fd)
	return errors.Join(in.Close(), cmd.Wait())
}

// device asks on a socket that is bound to a network device.
func device(args []string) error {
	c := ask.Client{Device: args[0]}
	fd, err := c.Socket()
	if err != nil {
		return err
	}
	ready()
	if err := unix.Connect(fd, c.Address()); err != nil {
		ask.Answer{Err: fmt.Errorf("connect: %w", err)}.Tell()
		return nil
	}
	ask.Exchange(fd, ask.Mine()).Tell()
	return nil
}

func multipath([]string) error { return asks(ask.Client{MPTCP: true}) }
func mapped([]string) error    { return asks(ask.Client{Mapped: true}) }
func ipv6([]string) error      { return asks(ask.Client{IPv6: true}) }

// fastopen connects by sending, without connect(2).
func fastopen([]string) error {
	var c ask.Client
	fd, err := c.Socket()
	if err != nil {
		return err
	}
	ready()
	if err := unix.Sendto(fd, ask.Mine(), unix.MSG_FASTOPEN, c.Address()); err != nil {
		return fmt.Errorf("send with MSG_FASTOPEN: %w", err)
	}
	ask.Read(fd).Tell()
	return nil
}

// reconnect asks on a socket that has been connected before.
func reconnect([]string) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	if err := again(fd); err != nil {
		return err
	}
	try(fd)
	return nil
}

// again ends the connection of a socket and makes another one.
func again(fd int) error {
	var unspecified unix.RawSockaddr // AF_UNSPEC
	if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified)); errno != 0 {
		return fmt.Errorf("disconnect: %w", errno)
	}
	if err := unix.Connect(fd, ask.Client{}.Address()); err != nil {
		return fmt.Errorf("connect again: %w", err)
	}
	return nil
}

// leave asks, and closes without waiting for the answer.
func leave([]string) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	ready()
	if _, err := unix.Write(fd, ask.Mine()); err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	ask.Answer{Err: errors.New("closed at once")}.Tell()
	_, err = io.Copy(io.Discard, os.Stdin) // so that the process is still there
	return err
}
