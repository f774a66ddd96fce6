//go:build !linux

package imdstest

import (
	"errors"
	"net"
)

func setHopLimit(*net.TCPConn, int) error { return errors.ErrUnsupported }

func acknowledged(*net.TCPConn, <-chan struct{}) error { return nil }
