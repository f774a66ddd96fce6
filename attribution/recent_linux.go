package attribution

import (
	"sync"
	"time"
)

// recent remembers answers of the file system for a moment: many clients run the same
// program in the same cgroup, and only root can change what is asked. The zero value
// is ready.
type recent[V any] struct {
	mu    sync.Mutex // guards the following
	known map[string]answer[V]
}

type answer[V any] struct {
	value V
	at    time.Time
}

const (
	// recentFor is how long an answer serves. Longer spares little; it is how long a
	// change of root's is not seen.
	recentFor = time.Second
	maxRecent = 256
)

// get returns what is remembered or else what ask returns, which is remembered if it is
// an answer.
func (r *recent[V]) get(key string, ask func() (value V, answered bool)) V {
	r.mu.Lock()
	a, ok := r.known[key]
	r.mu.Unlock()
	if ok && time.Since(a.at) < recentFor {
		return a.value
	}
	value, answered := ask()
	if !answered {
		return value
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil || len(r.known) >= maxRecent {
		r.known = map[string]answer[V]{}
	}
	r.known[key] = answer[V]{value, time.Now()}
	return value
}
