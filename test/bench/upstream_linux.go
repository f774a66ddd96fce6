package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

// upstream is the metadata service of all labs, in a process of its own.
type upstream struct {
	cmd      *exec.Cmd
	commands io.WriteCloser
	answers  *bufio.Scanner
}

// startUpstream gives the child the listeners, which are closed here. It thinks for so long before each answer.
func startUpstream(listeners []net.Listener, think time.Duration) (*upstream, error) {
	u := &upstream{cmd: exec.Command("/proc/self/exe", "upstream", strconv.Itoa(len(listeners)), think.String())}
	for _, ln := range listeners {
		defer ln.Close()
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			return nil, err
		}
		defer f.Close()
		u.cmd.ExtraFiles = append(u.cmd.ExtraFiles, f)
	}
	u.cmd.Stderr = os.Stderr
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setsid: true}
	out, err := u.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	u.answers = bufio.NewScanner(out)
	if u.commands, err = u.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := u.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the metadata service: %w", err)
	}
	return u, nil
}

// persist says whether connections are kept after an answer from now on.
func (u *upstream) persist(p imdstest.Persistence) error {
	if _, err := fmt.Fprintln(u.commands, int(p)); err != nil {
		return fmt.Errorf("tell the metadata service: %w", err)
	}
	if !u.answers.Scan() {
		return fmt.Errorf("the metadata service has ended: %w", io.ErrUnexpectedEOF)
	}
	return nil
}

func (u *upstream) close() error {
	u.commands.Close()
	return u.cmd.Wait()
}

// serveUpstream is the child, with the arguments that startUpstream gives it. It ends with its standard input.
func serveUpstream(args []string, commands io.Reader) error {
	signal.Ignore(unix.SIGINT) // of a terminal, which is for the parent
	if len(args) != 2 {
		return errors.New("upstream: want the number of listeners, and the time to think")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	think, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	var listeners []net.Listener
	for i := range n {
		ln, err := net.FileListener(os.NewFile(uintptr(3+i), "listener"))
		if err != nil {
			return err
		}
		listeners = append(listeners, ln)
	}
	s := imdstest.Serve(imdstest.Config{NoTranscript: true, HopLimit: 64, Persistence: imdstest.AlwaysClose,
		Fault: func(*imdstest.Request) imdstest.Fault { return imdstest.Fault{Delay: think} }}, listeners...)
	for lines := bufio.NewScanner(commands); lines.Scan(); {
		p, err := strconv.Atoi(lines.Text())
		if err != nil {
			return err
		}
		s.Update(func(c *imdstest.Config) { c.Persistence = imdstest.Persistence(p) })
		fmt.Println("done")
	}
	return s.Close()
}
