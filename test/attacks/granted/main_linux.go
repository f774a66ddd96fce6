// Command granted is the program that has a grant in the attack suite: it asks
// as programs do that may, and does for others what such programs can be brought
// to do.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

func main() {
	debug.SetGCPercent(-1) // see ask.Fork
	ways := map[string]func([]string) error{
		"ask": asks, "relay": relay, "send": send, "keep": keep, "serve": serve, "listen": listen, "fork": fork, "orphan": orphan, "thread": thread, "reap": reap, "keep-and-start": keepAndStart,
	}
	if len(os.Args) < 2 || ways[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "no such way")
		os.Exit(2)
	}
	if err := ways[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Println("failed", os.Args[1], err)
		os.Exit(1)
	}
}

// asks connects and asks.
func asks(args []string) error {
	var c ask.Client
	f := flag.NewFlagSet("ask", flag.ContinueOnError)
	f.BoolVar(&c.IPv6, "ipv6", false, "")
	f.BoolVar(&c.Mapped, "mapped", false, "")
	f.BoolVar(&c.MPTCP, "mptcp", false, "")
	f.StringVar(&c.Device, "device", "", "")
	port := f.Uint("port", 0, "local port")
	times := f.Int("times", 1, "requests on the connection")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *port != 0 {
		c.Source = netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(*port))
	}
	fmt.Println("ready")
	fd, err := c.Connect()
	if err != nil {
		ask.Answer{Err: err}.Tell()
		return nil
	}
	for range *times {
		ask.Exchange(fd, ask.Mine()).Tell()
	}
	return nil
}

// relay asks on a descriptor that it was given.
func relay(args []string) error {
	fd, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	ask.Exchange(fd, ask.Mine()).Tell()
	return nil
}

// send asks on a descriptor that it was given when it is told to on standard
// input, and leaves the answer to others. On standard output it says when it is
// ready and when there is an answer.
func send(args []string) error {
	fd, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	in := make([]byte, 1)
	if _, err := os.Stdout.Write([]byte{'r'}); err != nil {
		return err
	}
	if _, err := io.ReadFull(os.Stdin, in); err != nil {
		return err
	}
	if _, err := unix.Write(fd, ask.Mine()); err != nil {
		return err
	}
	if err := readable(fd); err != nil {
		return err
	}
	if _, err := os.Stdout.Write([]byte{'a'}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func readable(fd int) error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return errors.New("no answer")
		default:
			return nil
		}
	}
}

// served connects and asks once. It says so and gives a negative descriptor if the
// answer is a refusal.
func served(name string) (fd int, err error) {
	if fd, err = (ask.Client{}).Connect(); err != nil {
		return -1, err
	}
	switch a := ask.Exchange(fd, ask.Request(name)); {
	case a.Status == 403:
		fmt.Println("refused")
		return -1, nil
	case !a.Secret:
		return -1, fmt.Errorf("its own first request: %s", a)
	}
	return fd, nil
}

// keep has a connection, asks once, and then again under the names that it is
// given on standard input: "ask NAME", or "write NAME" without reading the
// answer.
func keep(args []string) error {
	fd, err := served(args[0])
	if err != nil || fd < 0 {
		return err
	}
	port, err := ask.Port(fd)
	if err != nil {
		return err
	}
	fmt.Println("keeps", fd, port)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch verb, name, _ := strings.Cut(lines.Text(), " "); verb {
		case "ask":
			ask.Exchange(fd, ask.Request(name)).Tell()
		case "write":
			if _, err := unix.Write(fd, ask.Request(name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// serve takes connections to the service from others on a socket, asks on them
// under the name that comes along, and tells what came back.
func serve(args []string) error {
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(l, &unix.SockaddrUnix{Name: args[0]}); err != nil {
		return err
	}
	if err := unix.Listen(l, 16); err != nil {
		return err
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println("serves")
	for {
		c, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		answer, err := one(c)
		if err != nil {
			answer = ask.Answer{Err: err}
		}
		unix.Write(c, []byte(answer.String()))
		unix.Close(c)
	}
}

func one(c int) (ask.Answer, error) {
	name, oob := make([]byte, 200), make([]byte, 64)
	n, m, _, _, err := unix.Recvmsg(c, name, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return ask.Answer{}, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:m])
	if err != nil || len(messages) != 1 {
		return ask.Answer{}, fmt.Errorf("%d messages, %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return ask.Answer{}, err
	}
	defer unix.Close(fds[0])
	if _, err := unix.Write(c, []byte{'r'}); err != nil {
		return ask.Answer{}, err
	}
	if _, err := unix.Read(c, make([]byte, 1)); err != nil {
		return ask.Answer{}, err
	}
	return ask.Exchange(fds[0], ask.Request(string(name[:n]))), nil
}

// listen listens on a port where somebody may have connected from.
func listen(args []string) error {
	port, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	fmt.Println("listens")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// fork has a child that asks on its connection, as a server with workers. Unless it
// "ends" the child is there as long as this process.
func fork(args []string) error {
	var c ask.Client
	fd, err := c.Connect()
	if err != nil {
		return err
	}
	var parent [2]int
	if err := unix.Pipe2(parent[:], 0); err != nil {
		return err
	}
	fmt.Println("ready")
	request := ask.Mine()
	calls := []ask.Call{ask.Write(fd, request), ask.Close(parent[1]), ask.ReadByte(parent[0])}
	if len(args) > 0 && args[0] == "ends" {
		calls = calls[:1]
	}
	pid, err := ask.Fork(0, calls...)
	if err != nil {
		return err
	}
	ask.Read(fd).Tell()
	unix.Close(parent[1])
	return ask.Wait(pid)
}

// orphan asks in a grandchild whose parent has ended, as a daemon does.
func orphan([]string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	again, err := ask.Execute(self, "ask")
	if err != nil {
		return err
	}
	var parents [2]int
	if err := unix.Pipe2(parents[:], 0); err != nil {
		return err
	}
	pid, err := ask.Fork(0, ask.Call{Trap: unix.SYS_SETSID}, ask.Again, ask.Close(parents[1]), ask.ReadByte(parents[0]), again)
	if err != nil {
		return err
	}
	unix.Close(parents[1])
	return ask.Wait(pid)
}

// thread asks in a thread with a descriptor table of its own.
func thread([]string) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_FILES)
		if err == nil {
			err = asks(nil)
		}
		done <- err
	}()
	return <-done
}

// reap starts a program and becomes the parent of what that leaves behind.
func reap(args []string) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); errors.Is(err, unix.ECHILD) {
			return nil
		}
	}
}

// keepAndStart has a connection, asks once, and starts a program that it tells the
// descriptor.
func keepAndStart(args []string) error {
	fd, err := served(args[0])
	if err != nil || fd < 0 {
		return err
	}
	cmd := exec.Command(args[1], append(args[2:], strconv.Itoa(fd))...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}
