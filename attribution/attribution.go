// Package attribution says which processes hold the client end of an accepted
// connection.
//
// A Finder is asked once per connection, right after accept, and answers with
// an Owner: every process that holds the socket, in every program image it was
// seen to have since then, each with its parents. Either the Owner is known,
// with the evidence that says so, or it is unattributed, with a Reason; there
// is no third answer and no guess. Nothing that the process itself can write
// (its name, its arguments, its port) is ever used to find it.
//
// What this package can promise depends on the Level of the host. Level 0, the
// one built here, is one exact sock_diag question for the socket (package
// attribution/diag) and a search of /proc for the descriptors that refer to
// it. It sees who holds a socket now. It does not see who connected it, who
// holds it in a message in flight, or which process was the parent before a
// reaper took over: SECURITY.md lists what that misses.
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
}

// Level is how much of the evidence a host can give.
type Level uint8

const (
	// Level0 is the exact socket and the holders found in /proc.
	Level0 Level = iota
)

func (l Level) String() string { return fmt.Sprintf("L%d", uint8(l)) }

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
	// Remote: the client is outside this network namespace, where level 0 does not look.
	Remote
	// Partial: only the likely processes were searched, as was asked.
	Partial
	// Late: the search was not over when the answer had to be given.
	Late
	// Failed: the kernel could not be asked; Owner.Err has the error.
	Failed
)

var reasonNames = [...]string{
	Attributed: "", NoSocket: "no_socket", ClientGone: "client_gone", NoHolder: "no_holder",
	AccessDenied: "access_denied", Churn: "churn", Crowd: "crowd", ExecRace: "exec_race", Remote: "remote", Partial: "partial", Late: "late", Failed: "failed",
}

func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Owner is the answer about one connection. It is a value: later findings make
// a new one.
type Owner struct {
	// Subjects are the images to judge: each holder as it is now, and as it
	// was when the connection was accepted if it has executed another program
	// since. Empty when unattributed.
	Subjects []*Process
	// Complete says that every process of the host was searched after the
	// question was asked, so that nobody else holds the socket. Without it
	// Subjects may lack somebody, and nothing may be allowed because of it.
	Complete bool
	// Reason is Attributed when Complete; with subjects and without
	// completeness it says what is missing.
	Reason Reason
	Err    error

	Level      Level
	Via        string // which searches found the subjects: "sock_diag,recent", "sock_diag,scan"
	Socket     diag.Socket
	Unreadable []int // processes of root that could not be searched; see SECURITY.md
	Took       time.Duration
}

// Attributed reports whether anybody is known to hold the socket.
func (o Owner) Attributed() bool { return len(o.Subjects) > 0 }
