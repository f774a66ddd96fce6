package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
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
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// attempt is one try. Its request asks for a name that the service does not have, with a
// nonce of its own, so that an answer can be looked for among the events.
type attempt struct {
	Way     string
	Nonce   string
	To      netip.AddrPort
	Direct  bool   // To is where the daemon listens, not an endpoint
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

// maxAnswer bounds what is read of an answer, which may be anybody's.
const maxAnswer = 64 << 10

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
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxAnswer)), nil)
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

// nonces makes those of one run, which have a beginning in common.
type nonces struct {
	begin string
	last  int
}

func newNonces() *nonces {
	var seed [5]byte
	rand.Read(seed[:])
	return &nonces{begin: fmt.Sprintf("%s%x-", nonceIn, seed)}
}

func (n *nonces) next() string {
	n.last++
	return n.begin + strconv.Itoa(n.last) + "-"
}

// in calls found with each of them that a line has.
func (n *nonces) in(line []byte, found func(string)) {
	for {
		_, rest, ok := bytes.Cut(line, []byte(n.begin))
		if !ok {
			return
		}
		if number, _, ends := bytes.Cut(rest, []byte("-")); ends {
			found(n.begin + string(number) + "-")
		}
		line = rest
	}
}

// recorded asks the daemon for the lines that tell of what was answered.
func (n *nonces) recorded(ctx context.Context, client *control.Client, answered []string) map[string]bool {
	seen := map[string]bool{}
	for end := time.Now().Add(3 * time.Second); ; {
		err := client.Stream(ctx, "events", url.Values{"last": {"5000"}}, func(line []byte) error {
			n.in(line, func(one string) { seen[one] = true })
			return nil
		})
		missing := slices.ContainsFunc(answered, func(one string) bool { return !seen[one] })
		if err != nil || !missing || time.Now().After(end) {
			return seen
		}
		select {
		case <-ctx.Done():
			return seen
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// batch are the attempts that are made in one place, at once.
type batch struct {
	place
	attempts []attempt
	out      []outcome
	err      error
}

const (
	// placesAtOnce bounds how long silence takes: each batch that nobody answers takes attemptTakes.
	placesAtOnce = 8
	// attemptEvery bounds what the attempts take from everybody else: the network card drops
	// what goes beyond 1,024 packets a second to link-local addresses, and each is about five.
	attemptEvery = 10 * time.Millisecond
)

// tryAll makes the attempts of all batches.
func tryAll(ctx context.Context, all []batch) {
	room := make(chan struct{}, placesAtOnce)
	var wait sync.WaitGroup
	for i := range all {
		b := &all[i]
		room <- struct{}{}
		wait.Go(func() {
			b.out, b.err = b.try(ctx, b.attempts)
			<-room
		})
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(len(b.attempts)) * attemptEvery):
		}
	}
	wait.Wait()
}

// request asks for a path, in which NONCE stands for a nonce.
func request(path, host, nonce string) string {
	return "GET " + strings.ReplaceAll(path, "NONCE", nonce) + " HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: imdsgate-doctor\r\nConnection: close\r\n\r\n"
}

// unspelled is the path as clients write it.
const unspelled = "/latest/meta-data/NONCE"

func hostOf(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]"
	}
	return a.String()
}

// ways are the attempts on an endpoint: plainly, past what the routing of this host has in mind for it, unless device
// is "", with a mark, unless it is 0, and by each spelling.
func ways(to netip.AddrPort, device string, mark uint32, spelled bool, n *nonces) []attempt {
	host := hostOf(to.Addr())
	var all []attempt
	add := func(way, path, host string, change func(*attempt)) {
		a := attempt{Way: fmt.Sprintf("%v %s", to, way), Nonce: n.next(), To: to}
		a.Request = request(path, host, a.Nonce)
		if change != nil {
			change(&a)
		}
		all = append(all, a)
	}
	add("plainly", unspelled, host, nil)
	if device != "" {
		add("bound to "+device, unspelled, host, func(a *attempt) { a.Device = device })
	}
	if mark != 0 {
		add("with the mark of the daemon", unspelled, host, func(a *attempt) { a.Mark = mark })
	}
	if !spelled {
		return all
	}
	for _, s := range []struct{ what, path string }{
		{"doubled slashes", "//latest//meta-data//NONCE"}, {"a dot", "/latest/./meta-data/NONCE"}, {"dots", "/latest/x/../meta-data/NONCE"},
		{"an escape", "/latest/meta%2ddata/NONCE"}, {"a slash at the end", unspelled + "/"}, {"a dot at the end", unspelled + "."}, {"capitals", "/LATEST/META-DATA/NONCE"},
		{"a query", unspelled + "?a=b"}, {"the whole URL", "http://" + host + unspelled}, {"a date as version", "/2021-03-23/meta-data/NONCE"},
	} {
		add("path with "+s.what, s.path, host, nil)
	}
	if to.Addr().Is4() {
		add("in an IPv6 socket (::ffff:)", unspelled, host, func(a *attempt) { a.Mapped = true })
		b := to.Addr().As4()
		n := uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8 | uint64(b[3])
		for _, name := range []string{
			strconv.FormatUint(n, 10), fmt.Sprintf("0x%x", n), fmt.Sprintf("0%o.0%o.0%o.0%o", b[0], b[1], b[2], b[3]),
			fmt.Sprintf("[::ffff:%x:%x]", n>>16, n&0xffff), host + ".", "instance-data",
		} {
			add("host spelled "+name, unspelled, name, nil)
		}
	}
	return all
}

// straight are the attempts on where the daemon listens. Who asks there was not redirected.
func straight(to netip.AddrPort, n *nonces) []attempt {
	all := []attempt{{Way: fmt.Sprintf("%v straight", to), To: to}}
	if to.Addr().Is4() {
		all = append(all, attempt{Way: fmt.Sprintf("%v straight in an IPv6 socket (::ffff:)", to), To: to, Mapped: true})
	}
	for i := range all {
		a := &all[i]
		a.Direct, a.Nonce = true, n.next()
		a.Request = request(unspelled, "169.254.169.254", a.Nonce)
	}
	return all
}

// listeners are where the daemon listens: for clients of this host, and for those of other
// network namespaces. Addresses that this host does not have are left out.
func listeners(rules iptables.Config) (host, forwarded []netip.AddrPort) {
	for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		host = append(host, netip.AddrPortFrom(a, rules.HostPort))
	}
	for _, a := range rules.ForwardedAddrs {
		if routes, err := netlink.RouteGet(a.AsSlice()); err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			forwarded = append(forwarded, netip.AddrPortFrom(a, rules.ForwardedPort))
		}
	}
	return host, forwarded
}
