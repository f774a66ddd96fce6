// Manager starts jobs as a service manager does, and in the lab stands for it: it is root's
// own program, is older than the daemon, and has nobody above it but the host's init.
//
// Each connection to its Unix socket is a job: a line that says which, and then what is its
// standard input and output. It ends with its own standard input.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/vishvananda/netns"
)

// job is what the test says of one: see job there.
type job struct {
	Cgroup  string // directory
	User    uint32
	Root    string
	Network string // file of a namespace; "" for that of the manager
	Args    []string
	Env     []string
}

func main() {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: os.Args[1]})
	if err != nil {
		fmt.Fprintln(os.Stderr, "manager:", err)
		os.Exit(1)
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		conn, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		if err := start(conn); err != nil {
			fmt.Fprintln(conn, "manager:", err)
		}
		conn.Close()
	}
}

// start starts the job of a connection.
func start(conn *net.UnixConn) error {
	line, err := readLine(conn)
	if err != nil {
		return err
	}
	var j job
	if err := json.Unmarshal(line, &j); err != nil {
		return err
	}
	stdio, err := conn.File()
	if err != nil {
		return err
	}
	defer stdio.Close()
	group, err := os.Open(j.Cgroup)
	if err != nil {
		return err
	}
	defer group.Close()
	cmd := exec.Command(j.Args[0], j.Args[1:]...)
	cmd.Dir, cmd.Env = "/", j.Env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio, stdio, stdio
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Chroot: j.Root, Setsid: true,
		Credential: &syscall.Credential{Uid: j.User, Gid: j.User}}
	if err := within(j.Network, cmd.Start); err != nil {
		return err
	}
	go cmd.Wait() // what becomes of it is for the other end to see
	return nil
}

// readLine reads no more than a line: what follows is the job's.
func readLine(r io.Reader) ([]byte, error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := r.Read(b); err != nil {
			return nil, err
		}
		if b[0] == '\n' {
			return line, nil
		}
		line = append(line, b[0])
	}
}

// within calls f in a network namespace.
func within(network string, f func() error) error {
	if network == "" {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		return err
	}
	defer home.Close()
	to, err := netns.GetFromPath(network)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := netns.Set(to); err != nil {
		return err
	}
	err = f()
	if back := netns.Set(home); back != nil {
		panic(back) // or the next job is in the wrong one
	}
	return err
}
