//go:build !linux

package control

import (
	"errors"
	"net"
)

// peerOf is for the daemon, which runs on Linux. Elsewhere there is the client alone,
// for the operator's command.
func peerOf(net.Conn) (Peer, error) { return Peer{}, errors.ErrUnsupported }
