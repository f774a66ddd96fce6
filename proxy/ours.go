package proxy

import (
	"net/netip"
	"sync"
)

// ends are those of a connection of ours. Another one may begin at the same address and
// port, if it leads to another endpoint, and so may a client's (inet_hash_connect in
// net/ipv4/inet_hashtables.c).
type ends struct{ near, far netip.AddrPort }

// ours are the connections to the service that sessions have. Its methods may be called
// from any goroutine.
type ours struct {
	mu   sync.Mutex // guards the following
	have map[ends]*session
}

func (o *ours) add(e ends, s *session) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.have == nil {
		o.have = map[ends]*session{}
	}
	o.have[e] = s
}

// remove is called before the connection is closed: then somebody else may get its port.
// It may be called again.
func (o *ours) remove(e ends, s *session) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.have[e] == s {
		delete(o.have, e)
	}
}

// find is the session whose connection that is, or nil.
func (o *ours) find(e ends) *session {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.have[e]
}
