package control

import (
	"net"
	"sync"
)

// maxLooking bounds the connections of those who may look but not change: without a bound
// any member of the group could take the descriptors that the daemon needs for clients.
// Too low, and some who follow the events keep others from it.
const maxLooking = 64

// listener knows who is at the other end of its connections, and closes those of members
// of the group that are too many. Those who may change something are not kept out by them.
type listener struct {
	net.Listener
	looking chan struct{}
}

type conn struct {
	net.Conn
	peer Peer
	left func()
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := peerOf(c)
		if err == nil && peer.mayChange() {
			return &conn{c, peer, func() {}}, nil
		}
		if err == nil {
			select {
			case l.looking <- struct{}{}:
				return &conn{c, peer, sync.OnceFunc(func() { <-l.looking })}, nil
			default:
			}
		}
		c.Close()
	}
}

func (c *conn) Close() error {
	defer c.left()
	return c.Conn.Close()
}
