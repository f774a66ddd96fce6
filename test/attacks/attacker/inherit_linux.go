package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// execs connects and becomes a program that has a grant, which asks.
func execs([]string) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	return ask.Exec(granted(), "relay", strconv.Itoa(fd))
}

// delayedExec does so when the daemon, which does not run just now, cannot have
// seen it before; a line on standard input says when to go on.
func delayedExec([]string) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	// Only what standard input said is read, so that it is the program's then.
	fmt.Println("connected")
	if _, err := unix.Read(0, make([]byte, 1)); err != nil {
		return err
	}
	return ask.Exec(granted(), "relay", strconv.Itoa(fd))
}

// vfork hands its connection to a program that has a grant and that it starts as
// posix_spawn(3) does, and closes its own descriptor.
func vfork([]string) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	own := os.NewFile(uintptr(fd), "socket")
	cmd := exec.Command(granted(), "relay", "3")
	cmd.Stdout, cmd.ExtraFiles = os.Stdout, []*os.File{own}
	if err := cmd.Start(); err != nil { // CLONE_VFORK and CLONE_VM
		return err
	}
	if err := own.Close(); err != nil {
		return err
	}
	return cmd.Wait()
}

// launder connects, lets an orphan that is a program with a grant ask on the
// connection, and hides its own descriptor meanwhile.
func launder([]string) error { return laundered(func() error { return nil }) }

// evict does so after many connections that were made since.
func evict([]string) error {
	return laundered(func() error {
		n, err := flood(10_000, time.Now().Add(3*time.Second))
		if err == nil && n < 1000 {
			err = fmt.Errorf("only %d connections", n)
		}
		return err
	})
}

func laundered(between func() error) error {
	fd, err := ask.Client{}.Connect()
	if err != nil {
		return err
	}
	if err := between(); err != nil {
		return err
	}
	o, err := newOrphan(fd)
	if err != nil {
		return err
	}
	h, err := hide(fd)
	if err != nil {
		return err
	}
	ready()
	if err := o.ask(); err != nil {
		return err
	}
	if fd, err = h.back(); err != nil {
		return err
	}
	ask.Read(fd).Tell()
	return nil
}

// launderUring gives the orphan the socket before it connects it, and has no
// descriptor of its own by then.
func launderUring([]string) error {
	fd, err := ask.Client{}.Socket()
	if err != nil {
		return err
	}
	o, err := newOrphan(fd)
	if err != nil {
		return err
	}
	r, err := newRing(fd)
	if err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	if err := r.connect(); err != nil {
		return err
	}
	ready()
	if err := o.ask(); err != nil {
		return err
	}
	ask.ReadBy(r.receive).Tell()
	return nil
}

// orphaned is a program with a grant that has a socket and no parent, and does
// what it is told.
type orphaned struct {
	in   int
	says io.Reader
}

// newOrphan starts it and waits until it runs.
func newOrphan(fd int) (*orphaned, error) {
	var in, out [2]int
	if err := errors.Join(unix.Pipe2(in[:], unix.O_CLOEXEC), unix.Pipe2(out[:], unix.O_CLOEXEC)); err != nil {
		return nil, err
	}
	sender, err := ask.Execute(granted(), "send", strconv.Itoa(fd))
	if err != nil {
		return nil, err
	}
	middle, err := ask.Fork(0, ask.Again, ask.Dup(in[0], 0), ask.Dup(out[1], 1), sender)
	if err != nil {
		return nil, err
	}
	if err := ask.Wait(middle); err != nil {
		return nil, err
	}
	unix.Close(out[1])
	o := &orphaned{in[1], os.NewFile(uintptr(out[0]), "orphan")}
	return o, o.expect('r')
}

// ask makes it ask, and returns when there is an answer to read.
func (o *orphaned) ask() error {
	if _, err := unix.Write(o.in, []byte{'g'}); err != nil {
		return err
	}
	return o.expect('a')
}

func (o *orphaned) expect(word byte) error {
	said := make([]byte, 1)
	if _, err := io.ReadFull(o.says, said); err != nil || said[0] != word {
		return fmt.Errorf("the orphan said %q instead of %q: %v", said, word, err)
	}
	return nil
}

// child starts a program that may ask unless this one is its parent.
func child(args []string) error {
	cmd := exec.Command(args[0], "ask")
	cmd.Stdout = os.Stdout
	return cmd.Run()
}

// orphan does so by way of a child that ends before the program asks.
func orphan(args []string) error {
	program, err := ask.Execute(args[0], "ask")
	if err != nil {
		return err
	}
	var parents [2]int
	if err := unix.Pipe2(parents[:], 0); err != nil {
		return err
	}
	middle, err := ask.Fork(0, ask.Again, ask.Close(parents[1]), ask.ReadByte(parents[0]), program)
	if err != nil {
		return err
	}
	return ask.Wait(middle) // and end, upon which it goes on
}

// sibling starts it as a child of its own parent.
func sibling(args []string) error {
	program, err := ask.Execute(args[0], "ask")
	if err != nil {
		return err
	}
	_, err = ask.Fork(unix.CLONE_PARENT, program)
	return err
}
