// Package attribution says which processes hold the client end of an accepted
// connection.
//
// A Finder is asked once per connection, right after accept, and answers with
// an Owner: every process that has a part in the connection, in every program
// image it was since the connection began, each with its parents and its Role.
// Either the Owner is known, with the evidence that says so, or it is
// unattributed, with a Reason; there is no third answer and no guess. Nothing
// that the process itself can write (its name, its arguments, its port) is ever
// used to find it.
//
// What is promised depends on the Level of the host, and each has all that is
// below it:
//
//   - Level 0 asks sock_diag for exactly this socket (package attribution/diag) and
//     searches /proc for the descriptors that refer to it. It sees who holds the
//     socket now, and as parent the present one, which may be a reaper.
//   - Level 1 hears of each fork, execve and exit (package attribution/procwatch).
//     Parents are those at birth, programs that a process has left are known, and
//     whoever had the socket when the connection began is a subject.
//   - Level 2 has a Witness (package attribution/witness) that saw who called
//     connect(2). He is a subject whether he still holds the socket or not, and
//     a socket that nobody was seen to connect is unattributed.
//   - Level 3 knows from the kernel what was executed, who wrote on the socket, who
//     made whom his brother, and how many references to the socket there are, so
//     that an answer is mostly complete without a search.
//
// Each level is tried when the Finder is made, and a level that is there never
// goes down: what it lacks later makes connections unattributed. SECURITY.md lists
// what each level misses.
//
// It is the wrong tool for anything but TCP clients on this host.
package attribution

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/imdsgate/imdsgate/attribution/diag"
)

// Conn is one accepted connection, as the acceptor saw it.
type Conn struct {
	Client    netip.AddrPort // peer address of the accepted socket
	Endpoint  netip.AddrPort // original destination, before the redirect
	Forwarded bool           // the client is in another network namespace, or on another host
	Arrived   bool           // it came through the redirect, and is not only asked about
}

// Level is how much of the evidence a host can give.
type Level uint8

const (
	// Level0 is the exact socket and the holders found in /proc.
	Level0 Level = iota
	// Level1 adds the proc connector: who forked whom, and when a program was
	// executed, compared with the time of the connection from conntrack.
	Level1
	// Level2 adds the witness of connect(2).
	Level2
	// Level3 adds what needs the kernel's type information: executions, writers,
	// every descriptor of the host in one pass.
	Level3
)

func (l Level) String() string { return fmt.Sprintf("L%d", uint8(l)) }

// MarshalText writes what UnmarshalText reads.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads "L0" to "L3".
func (l *Level) UnmarshalText(text []byte) error {
	for level := Level0; level <= Level3; level++ {
		if string(text) == level.String() {
			*l = level
			return nil
		}
	}
	return fmt.Errorf("unknown level %q; there are L0, L1, L2, L3", text)
}

// Reason says why an Owner is unattributed, or why its evidence is incomplete.
type Reason uint8

const (
	// Attributed is the absence of a reason.
	Attributed Reason = iota
	// NoSocket: the kernel has no client socket with this tuple.
	NoSocket
	// ClientGone: the client closed its socket before it could be examined.
	ClientGone
	// NoHolder: the socket exists, and no descriptor of any process refers to it.
	NoHolder
	// AccessDenied: a process that may hold the socket could not be read.
	AccessDenied
	// Churn: processes were born, or ended with the socket, faster than they
	// could be searched.
	Churn
	// Crowd: more processes hold the socket than are read.
	Crowd
	// ExecRace: the holder kept changing its program while it was being read.
	ExecRace
	// Remote: no process of this host has the client's end of the connection.
	Remote
	// NoWitness: the kernel's witness saw nobody connect the socket.
	NoWitness
	// AmbiguousNetns: sockets of several network namespaces have the tuple, and not
	// all of their holders are known.
	AmbiguousNetns
	// EvidenceLost: events that may be about a subject were lost.
	EvidenceLost
	// Partial: only the likely processes were searched, as was asked.
	Partial
	// Late: the search was not over when the answer had to be given.
	Late
	// Failed: the kernel could not be asked; Owner.Err has the error.
	Failed
)

var reasonNames = [...]string{
	Attributed: "", NoSocket: "no_socket", ClientGone: "client_gone", NoHolder: "no_holder",
	AccessDenied: "access_denied", Churn: "churn", Crowd: "crowd", ExecRace: "exec_race", Remote: "remote",
	NoWitness: "no_witness", AmbiguousNetns: "ambiguous_netns", EvidenceLost: "evidence_lost", Partial: "partial", Late: "late", Failed: "failed",
}

func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Reasons lists why an Owner can be unattributed or incomplete.
func Reasons() (all []Reason) {
	for r := range reasonNames[1:] {
		all = append(all, Reason(r+1))
	}
	return all
}

// Owner is the answer about one connection. It is a value: later findings make
// a new one.
type Owner struct {
	// Subjects are the images to judge: each process that has a part in the
	// connection, as it is now, and as each program that it was meanwhile. Empty
	// when unattributed.
	Subjects []*Process
	Roles    []Role // of Subjects, one for each
	// Complete says that nobody else holds the socket, as far as the Level can tell:
	// every process of the host was searched after the question was asked, or every
	// reference that the kernel counts is known. Without it Subjects may lack
	// somebody, and nothing may be allowed because of it.
	Complete bool
	// Reason is Attributed when Complete; with subjects and without
	// completeness it says what is missing.
	Reason Reason
	Err    error

	Level      Level
	Via        string // what found the subjects: "sock_diag,recent", "sock_diag,scan", "sock_diag,witness,references"
	Socket     diag.Socket
	Unreadable []int         // processes of root that could not be searched; see SECURITY.md
	Took       time.Duration // to ask, to read and to wait for a search
}

// Role is what makes a process a subject of a connection.
type Role uint8

const (
	// RoleHolder: a descriptor of the process refers to the socket.
	RoleHolder Role = iota
	// RoleConnector: it called connect(2).
	RoleConnector
	// RoleWriter: it wrote on the socket, and did not connect it.
	RoleWriter
	// RoleAncestor: it had the socket before it forked the holder.
	RoleAncestor
	// RoleCreator: it made another subject the child of its own parent (clone(2), CLONE_PARENT).
	RoleCreator
)

var roleNames = [...]string{"holder", "connector", "writer", "ancestor", "creator"}

func (r Role) String() string { return roleNames[r] }

// Confidence is how much an attacker could do about the evidence.
type Confidence uint8

const (
	// None: nobody is known.
	None Confidence = iota
	// Low: somebody is known, and others may have been missed; or it is level 0,
	// where a process can hide.
	Low
	// Medium: level 1, complete; or it is known who connected, and it was not asked who
	// else holds the socket.
	Medium
	// High: level 2 or 3, complete.
	High
)

var confidenceNames = [...]string{"none", "low", "medium", "high"}

func (c Confidence) String() string { return confidenceNames[c] }

// Confidence of the answer.
func (o Owner) Confidence() Confidence {
	switch {
	case !o.Attributed():
		return None
	case o.Complete && o.Level >= Level2:
		return High
	case o.Complete && o.Level == Level1, o.Reason == Partial && o.Level >= Level2:
		return Medium
	}
	return Low
}

// Attributed reports whether anybody is known to hold the socket.
func (o Owner) Attributed() bool { return len(o.Subjects) > 0 }
