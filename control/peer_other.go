//go:build !linux

package control

import (
	"errors"
	"net"
)

// The daemon runs on Linux. Elsewhere there is the command, for files.
func peerOf(net.Conn) (Peer, error) { return Peer{}, errors.ErrUnsupported }
