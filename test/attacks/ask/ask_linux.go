// Package ask is how the programs of the attack suite ask the metadata service:
// with bare descriptors, so that each attack decides itself who holds which one
// and when, and with a user agent by which the daemon's record of a request is
// found again.
package ask

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// What the harness tells its programs in their environment. A program that is
// executed by another has it, too.
const (
	Token   = "ATTACK_TOKEN"   // of IMDSv2
	Name    = "ATTACK_NAME"    // the user agent of the request that matters
	Granted = "ATTACK_GRANTED" // path of a program that has a grant
	Dir     = "ATTACK_DIR"     // where the ordinary user may write
)

const path = "/latest/meta-data/iam/security-credentials/imdsgate-lab-role"

// Request asks for credentials under a name. The connection is kept.
func Request(name string) []byte {
	return []byte("GET " + path + " HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: " + name + "\r\nX-aws-ec2-metadata-token: " + os.Getenv(Token) + "\r\nConnection: keep-alive\r\n\r\n")
}

// Mine is the request under the name that the harness gave.
func Mine() []byte { return Request(os.Getenv(Name)) }

// URL is what curl is given.
const URL = "http://169.254.169.254" + path

// A Client says how to connect. The zero Client does it over IPv4.
type Client struct {
	IPv6   bool // to the service's IPv6 address
	Mapped bool // to the IPv4 address by an IPv6 socket
	MPTCP  bool
	Device string         // to bind to
	Source netip.AddrPort // to connect from; the address may be unspecified
}

const timeout = 3 // seconds, for each system call

// Socket makes the socket, which executed programs inherit.
func (c Client) Socket() (int, error) {
	family, protocol := unix.AF_INET, 0
	if c.IPv6 || c.Mapped {
		family = unix.AF_INET6
	}
	if c.MPTCP {
		protocol = unix.IPPROTO_MPTCP
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM, protocol)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &unix.Timeval{Sec: timeout}); err != nil {
			return -1, fmt.Errorf("set a time-out: %w", err)
		}
	}
	if c.Device != "" {
		if err := unix.BindToDevice(fd, c.Device); err != nil {
			return -1, fmt.Errorf("bind to %s: %w", c.Device, err)
		}
	}
	if c.Source.IsValid() {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return -1, fmt.Errorf("SO_REUSEADDR: %w", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(c.Source.Port()), Addr: c.Source.Addr().As4()}); err != nil {
			return -1, fmt.Errorf("bind to %s: %w", c.Source, err)
		}
	}
	return fd, nil
}

// Address is that of the service, as the socket wants it.
func (c Client) Address() unix.Sockaddr {
	v4 := [4]byte{169, 254, 169, 254}
	switch {
	case c.Mapped:
		return &unix.SockaddrInet6{Port: 80, Addr: netip.AddrFrom4(v4).As16()}
	case c.IPv6:
		return &unix.SockaddrInet6{Port: 80, Addr: netip.MustParseAddr("fd00:ec2::254").As16()}
	}
	return &unix.SockaddrInet4{Port: 80, Addr: v4}
}

// Connect makes a socket and connects it.
func (c Client) Connect() (int, error) {
	fd, err := c.Socket()
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, c.Address()); err != nil {
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

// Port is the local one of a socket.
func Port(fd int) (int, error) {
	a, err := unix.Getsockname(fd)
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return a.Port, err
	case *unix.SockaddrInet6:
		return a.Port, err
	}
	return 0, errors.Join(err, errors.New("no port"))
}

// An Answer is what came back.
type Answer struct {
	Status int
	Secret bool // it has the key
	Err    error
}

func (a Answer) String() string {
	switch {
	case a.Err != nil:
		return "none: " + a.Err.Error()
	case a.Secret:
		return "secret"
	}
	return strconv.Itoa(a.Status)
}

// Tell prints the answer for the harness. The answer itself goes nowhere.
func (a Answer) Tell() { fmt.Println("result", a) }

// Read reads an answer from a descriptor.
func Read(fd int) Answer { return ReadBy(func(b []byte) (int, error) { return unix.Read(fd, b) }) }

// ReadBy reads an answer in some other way.
func ReadBy(read func([]byte) (int, error)) Answer {
	var got []byte
	buf := make([]byte, 4096)
	for {
		if a, whole := parse(got); whole {
			return a
		}
		n, err := read(buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return Answer{Err: fmt.Errorf("after %d bytes: %w", len(got), err)}
		case n == 0:
			return Answer{Err: fmt.Errorf("the end after %d bytes", len(got))}
		}
		got = append(got, buf[:n]...)
	}
}

func parse(got []byte) (a Answer, whole bool) {
	head, body, ok := bytes.Cut(got, []byte("\r\n\r\n"))
	if !ok || len(head) < len("HTTP/1.1 200") {
		return a, false
	}
	a.Status, a.Err = strconv.Atoi(string(head[9:12]))
	for line := range bytes.Lines(head) {
		if name, value, _ := bytes.Cut(line, []byte(":")); bytes.EqualFold(name, []byte("Content-Length")) {
			n, err := strconv.Atoi(string(bytes.TrimSpace(value)))
			if err != nil || len(body) < n {
				return a, err != nil
			}
		}
	}
	a.Secret = a.Status == 200 && bytes.Contains(body, []byte("SecretAccessKey"))
	return a, true
}

// Exchange writes a request and reads the answer.
func Exchange(fd int, request []byte) Answer {
	if _, err := unix.Write(fd, request); err != nil {
		return Answer{Err: fmt.Errorf("write: %w", err)}
	}
	return Read(fd)
}
