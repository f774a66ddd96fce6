package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/control"
	"github.com/spf13/cobra"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// attempt is one try. Its request asks for a name that the service does not have, with a
// nonce of its own, so that an answer can be looked for among the events.
type attempt struct {
	Way     string
	Nonce   string
	To      netip.AddrPort
	Mapped  bool   // the IPv4 address in an IPv6 socket
	Mark    uint32 // SO_MARK
	Device  string // SO_BINDTODEVICE
	Request string
}

// outcome is what came of it.
type outcome struct {
	Status int
	Behind time.Duration // the clock here, behind that of whoever answered; 0 if he said no time
	Error  string
}

// attemptTakes bounds each part of a try; they run beside each other.
const attemptTakes = 2 * time.Second

// make connects as the attempt says, and asks.
func (a attempt) make() outcome {
	o, err := a.ask()
	if err != nil {
		o.Error = err.Error()
	}
	return o
}

func (a attempt) ask() (o outcome, err error) {
	fd, err := a.connect()
	if err != nil {
		return o, err
	}
	conn := os.NewFile(uintptr(fd), "probe")
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(attemptTakes)); err != nil {
		return o, err
	}
	if _, err := io.WriteString(conn, a.Request); err != nil {
		return o, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return o, err
	}
	o.Status = resp.StatusCode
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		o.Behind = time.Until(date)
	}
	return o, nil
}

// connect returns a socket that does not block. Package net would turn a mapped address
// into one of IPv4.
func (a attempt) connect() (fd int, err error) {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(a.To.Port()), Addr: a.To.Addr().As16()})
	if a.To.Addr().Is4() && !a.Mapped {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Port: int(a.To.Port()), Addr: a.To.Addr().As4()}
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if a.Mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(a.Mark)); err != nil {
			return fd, os.NewSyscallError("SO_MARK", err)
		}
	}
	if a.Device != "" {
		if err := unix.BindToDevice(fd, a.Device); err != nil {
			return fd, os.NewSyscallError("SO_BINDTODEVICE", err)
		}
	}
	if err := unix.Connect(fd, to); err != nil && err != unix.EINPROGRESS {
		return fd, os.NewSyscallError("connect", err)
	}
	for end := time.Now().Add(attemptTakes); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, max(int(time.Until(end).Milliseconds()), 0))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fd, os.NewSyscallError("poll", err)
		case n == 0:
			return fd, errors.New("connect: no answer")
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = syscall.Errno(code)
		}
		return fd, os.NewSyscallError("connect", err)
	}
}

// newAttempt is the child in which attempts are made, as another user and in another
// namespace than doctor itself.
func newAttempt() *cobra.Command {
	return &cobra.Command{
		Use:    "attempt",
		Hidden: true, // it is for doctor
		Short:  "Make the attempts that standard input has",
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var all []attempt
			if err := json.NewDecoder(cmd.InOrStdin()).Decode(&all); err != nil {
				return fmt.Errorf("read attempts: %w", err)
			}
			out := make([]outcome, len(all))
			var wait sync.WaitGroup
			for i, a := range all {
				wait.Go(func() { out[i] = a.make() })
			}
			wait.Wait()
			return json.NewEncoder(cmd.OutOrStdout()).Encode(out)
		},
	}
}

// place is from where and as whom attempts are made.
type place struct {
	as, from string
	uid      int    // -1: as who runs doctor
	userns   bool   // as root of a user namespace that is made for them
	netns    string // path; "" is this one
}

// try makes attempts in a place.
func (p place) try(ctx context.Context, all []attempt) ([]outcome, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	in, err := json.Marshal(all)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*attemptTakes)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "doctor", "attempt")
	cmd.Dir = "/"
	cmd.SysProcAttr = new(syscall.SysProcAttr)
	cmd.Stdin = bytes.NewReader(in)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if p.uid >= 0 && !p.userns {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.uid)}
	}
	if p.netns == newNamespace {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	}
	if p.userns {
		uid, gid := p.uid, p.uid
		if uid < 0 {
			uid, gid = os.Geteuid(), os.Getegid()
		}
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.Credential = &syscall.Credential{NoSetGroups: true}
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: gid, Size: 1}}
	}
	if err := p.within(cmd.Start); err != nil {
		return nil, fmt.Errorf("try as %s from %s: %w", p.as, p.from, err)
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("try as %s from %s: %w: %s", p.as, p.from, err, strings.TrimSpace(stderr.String()))
	}
	var out []outcome
	if err := json.Unmarshal(stdout.Bytes(), &out); err != nil || len(out) != len(all) {
		return nil, fmt.Errorf("try as %s from %s: read the outcomes: %w", p.as, p.from, err)
	}
	return out, nil
}

// newNamespace stands for one that is made for the attempts and has neither links nor
// routes. It is gone with the child.
const newNamespace = "new"

// within starts something in the namespace of the place.
func (p place) within(start func() error) error {
	if p.netns == "" || p.netns == newNamespace {
		return start()
	}
	there, err := netns.GetFromPath(p.netns)
	if err != nil {
		return err
	}
	defer there.Close()
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // which ends with the goroutine: it is not in our namespace any more
		err := netns.Set(there)
		if err == nil {
			err = start()
		}
		failed <- err
	}()
	return <-failed
}

// recorded asks the daemon for the lines that tell of what was tried.
func recorded(ctx context.Context, client *control.Client, nonces []string) map[string]bool {
	seen := map[string]bool{}
	for end := time.Now().Add(3 * time.Second); ; {
		err := client.Stream(ctx, "events", url.Values{"last": {"5000"}}, func(line []byte) error {
			for _, n := range nonces {
				if !seen[n] && bytes.Contains(line, []byte(n)) {
					seen[n] = true
				}
			}
			return nil
		})
		if err != nil || len(seen) == len(nonces) || time.Now().After(end) {
			return seen
		}
		select {
		case <-ctx.Done():
			return seen
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// ways are the attempts on an endpoint: plainly, by each spelling, and past what the
// routing of this host has in mind for it.
func ways(to netip.AddrPort, mark uint32, device string, privileged bool, nonce func() string) []attempt {
	host := to.Addr().String()
	if to.Addr().Is6() {
		host = "[" + host + "]"
	}
	var all []attempt
	add := func(way, path, host string, change func(*attempt)) {
		n := nonce()
		a := attempt{Way: fmt.Sprintf("%v %s", to, way), Nonce: n, To: to, Request: "GET " + strings.ReplaceAll(path, "NONCE", n) + " HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: imdsgate-doctor\r\nConnection: close\r\n\r\n"}
		if change != nil {
			change(&a)
		}
		all = append(all, a)
	}
	const plain = "/latest/meta-data/NONCE"
	add("plainly", plain, host, nil)
	if device != "" {
		add("bound to "+device, plain, host, func(a *attempt) { a.Device = device })
	}
	if privileged {
		add("with the mark of the daemon", plain, host, func(a *attempt) { a.Mark = mark })
		return all
	}
	for _, s := range []struct{ what, path string }{
		{"doubled slashes", "//latest//meta-data//NONCE"}, {"a dot", "/latest/./meta-data/NONCE"}, {"dots", "/latest/x/../meta-data/NONCE"},
		{"an escape", "/latest/meta%2ddata/NONCE"}, {"a slash at the end", plain + "/"}, {"a dot at the end", plain + "."}, {"capitals", "/LATEST/META-DATA/NONCE"},
		{"a query", plain + "?a=b"}, {"the whole URL", "http://" + host + plain}, {"a date as version", "/2021-03-23/meta-data/NONCE"},
	} {
		add("path with "+s.what, s.path, host, nil)
	}
	if to.Addr().Is4() {
		add("in an IPv6 socket (::ffff:)", plain, host, func(a *attempt) { a.Mapped = true })
		b := to.Addr().As4()
		n := uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8 | uint64(b[3])
		for _, name := range []string{
			strconv.FormatUint(n, 10), fmt.Sprintf("0x%x", n), fmt.Sprintf("0%o.0%o.0%o.0%o", b[0], b[1], b[2], b[3]),
			fmt.Sprintf("[::ffff:%x:%x]", n>>16, n&0xffff), host + ".", "instance-data",
		} {
			add("host spelled "+name, plain, name, nil)
		}
	}
	return all
}
