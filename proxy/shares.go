package proxy

import (
	"cmp"
	"container/heap"
	"time"
)

// shares is a bounded table in which each entry is an owner's. When there is no
// room for one more, what is over goes first, and then the owner who has the most
// loses the one of his that is over first: who hoards entries takes them from
// himself. Clients of other network namespaces have a quarter of the room, apart,
// as they have of the connections. The caller locks.
type shares[K comparable, V any] struct {
	limit   [2]int // of the host's own, of forwarded clients
	entries map[K]*entry[K, V]
	count   [2]int
	owners  [2]map[owner]*queue[K, V]
	added   uint64

	forgotten uint64 // that were not over
}

type entry[K comparable, V any] struct {
	key   K
	value V
	over  time.Time
	order uint64
}

func newShares[K comparable, V any](limit int) *shares[K, V] {
	forwarded := max(limit/4, 1)
	return &shares[K, V]{limit: [2]int{max(limit-forwarded, 1), forwarded}, entries: map[K]*entry[K, V]{},
		owners: [2]map[owner]*queue[K, V]{{}, {}}}
}

func (s *shares[K, V]) get(key K) *entry[K, V] { return s.entries[key] }

// add adds an entry that is not there yet.
func (s *shares[K, V]) add(o owner, key K, value V, over, now time.Time) {
	kind := 0
	if o.peer.IsValid() {
		kind = 1
	}
	for s.count[kind] >= s.limit[kind] {
		s.makeRoom(kind, now)
	}
	q := s.owners[kind][o]
	if q == nil {
		q = &queue[K, V]{}
		s.owners[kind][o] = q
	}
	s.added++
	e := &entry[K, V]{key: key, value: value, over: over, order: s.added}
	heap.Push(q, e)
	s.entries[key] = e
	s.count[kind]++
}

// makeRoom looks at all owners. Of the host's own users who has subordinate uids
// (newuidmap(1)) can be many; those of containers share a quarter of the room.
func (s *shares[K, V]) makeRoom(kind int, now time.Time) {
	var most owner
	for o, q := range s.owners[kind] {
		if !(*q)[0].over.After(now) {
			most = o
			break
		}
		if m := s.owners[kind][most]; m == nil || q.Len() > m.Len() {
			most = o
		}
	}
	q := s.owners[kind][most]
	e := heap.Pop(q).(*entry[K, V])
	if e.over.After(now) {
		s.forgotten++
	}
	delete(s.entries, e.key)
	s.count[kind]--
	if q.Len() == 0 {
		delete(s.owners[kind], most)
	}
}

// queue is a heap of one owner's entries, the one that is over first, or else was
// added first, at its root.
type queue[K comparable, V any] []*entry[K, V]

func (q queue[K, V]) Len() int { return len(q) }
func (q queue[K, V]) Less(i, j int) bool {
	return cmp.Or(q[i].over.Compare(q[j].over), cmp.Compare(q[i].order, q[j].order)) < 0
}
func (q queue[K, V]) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue[K, V]) Push(e any)   { *q = append(*q, e.(*entry[K, V])) }
func (q *queue[K, V]) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return e
}
