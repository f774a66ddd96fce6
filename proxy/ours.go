package proxy

import (
	"net/netip"
	"sync"
)

// ours are the connections to the service that sessions have, by their near ends. Its
// methods may be called from any goroutine.
type ours struct {
	mu   sync.Mutex // guards the following
	near map[netip.AddrPort]*session
}

func (o *ours) add(near netip.AddrPort, s *session) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.near == nil {
		o.near = map[netip.AddrPort]*session{}
	}
	o.near[near] = s
}

// remove is called before the connection is closed: then somebody else may get its port.
// It may be called again.
func (o *ours) remove(near netip.AddrPort, s *session) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.near[near] == s {
		delete(o.near, near)
	}
}

// find is the session whose connection begins there, or nil.
func (o *ours) find(near netip.AddrPort) *session {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.near[near]
}
