package attribution

import (
	"context"
	"errors"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
)

// ErrNoWitness says that the kernel's witness saw nobody connect such a socket.
var ErrNoWitness = errors.New("nobody was seen to connect this socket")

// A Witness is asked what the kernel saw while it happened, of which /proc knows
// nothing later: who connected a socket, who wrote on it, what a process executed.
// Package attribution/witness has the one there is. Its methods may be called from
// any goroutine, and take microseconds unless they say otherwise. A method whose
// hook this kernel does not have answers with errors.ErrUnsupported.
type Witness interface {
	// Connectors names who connected the socket with this tuple in the network
	// namespace of the daemon or, if forwarded, in any other. There can be several
	// then, because namespaces may have the same addresses. Without any the error
	// is ErrNoWitness.
	Connectors(t diag.Tuple, forwarded bool) ([]Connector, error)
	// Writers names who else than the connector wrote on a connected socket. With
	// more of them than are kept, the error is ErrTooMany beside those that are.
	Writers(socketCookie uint64) ([]Actor, error)
	// Changes counts what may have changed about sockets that were seen to connect:
	// that they still are, and their writers. It is settled if nothing changes at this
	// moment. What was asked after it was settled is so for as long as the number is the
	// same. It takes nanoseconds.
	Changes() (n uint64, settled bool)
	// Executed is the last execve of a process since the witness was there, or with
	// the time 0 that of whoever forked it, if it has executed nothing itself; the
	// error is ErrNoWitness if there was none.
	Executed(pid int) (Execution, error)
	// Former is the execve before that or, of a process that has ended, the last one,
	// as long as that is remembered. Compare its time: the pid may have had several
	// owners.
	Former(pid int) (Execution, error)
	// Creator is who called clone for a process that has another parent by
	// CLONE_PARENT; the error is ErrNoWitness for every other process.
	Creator(pid int) (Actor, error)
	// Holding counts what refers to a socket, as far as one process goes. It takes as
	// long as the process has descriptors; ctx bounds that, to some 100 ms. The error is
	// ErrBusy if others have not let it begin by then.
	Holding(ctx context.Context, pid int, inode uint32) (Holding, error)
	// Holders goes through the descriptors of all threads of the host: a second for
	// some millions. It answers for all inodes in one pass.
	Holders(ctx context.Context, inodes []uint32) (map[uint32][]Descriptor, error)
	// Check makes a connection of its own and must find its witness, in each hook
	// that can be tried so. It takes milliseconds.
	Check(ctx context.Context) error
	// Arrived tells the witness that a connection from another network namespace came
	// through the redirect, and what Connectors answered for it.
	Arrived(t diag.Tuple, connectors []Connector)
}

// ErrBusy says that others are being asked about.
var ErrBusy = errors.New("others are being asked about")

// ErrTooMany says that there were more than are kept.
var ErrTooMany = errors.New("more than are kept")

// Actor is a process, as the kernel saw it act. Times are since boot and count
// suspends (CLOCK_BOOTTIME); what needs the kernel's type information (BTF) is 0
// without it.
type Actor struct {
	PID, TID int // in the initial pid namespace
	UID, GID uint32
	Start    time.Duration // of the process, to the nanosecond; with BTF
	ExecID   uint64        // changes at every execve of the process; with BTF
}

// Connector is who called connect(2) for a socket.
type Connector struct {
	Actor
	Parent      int           // real_parent at that moment; with BTF
	ParentStart time.Duration // with BTF
	Comm        string        // of the thread; with CAP_PERFMON

	Tuple        diag.Tuple
	SocketCookie uint64
	NetnsCookie  uint64        // SO_NETNS_COOKIE of the namespace in which the socket is
	CgroupID     uint64        // of the thread, in cgroup2
	At           time.Duration // of the connect, on CLOCK_MONOTONIC
	Unbound      bool          // the socket was bound to a device, and no longer is
}

// Execution is one execve(2), as the kernel did it.
type Execution struct {
	At            time.Duration // CLOCK_MONOTONIC
	ExecID        uint64
	Device, Inode uint64 // of the file that became the program
	Links         uint32
	Name          string // as the kernel opened it, cut to 127 bytes
}

// Holding is what one process has of a socket.
type Holding struct {
	Descriptors int // in the tables of its threads, each table once
	References  int // to the open file, by anybody
	FD          int // one of the descriptors
}

// Descriptor is one descriptor that refers to a socket.
type Descriptor struct{ PID, TID, FD int }
