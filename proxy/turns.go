package proxy

import (
	"slices"

	"github.com/imdsgate/imdsgate/proxy/loop"
)

// turns bound how many questions about the clients of one forwarded owner are asked at a
// time. Where we may not enter a container's network namespace, such a question reads the
// table of its connections; who lives there can make that so long that it takes half a
// second, and nothing ends it early. So it is asked about who has a slot already, and who
// waits for his turn can be told to go: or else the clients of one container take all
// places of those that arrive, and nobody of another one is accepted. It is used on the
// loop.
type turns struct {
	taken   map[owner]int
	waiting []*session // who came first is first
}

// maxTurns is for each owner. More, and one with a long table takes more of the processor;
// fewer, and one question that is slow keeps up all others of its owner.
const maxTurns = 2

func (t *turns) take(o owner) bool {
	if t.taken[o] == maxTurns {
		return false
	}
	if t.taken == nil {
		t.taken = map[owner]int{}
	}
	t.taken[o]++
	return true
}

// wait waits for a turn. It reports false if the session is cancelled before, or its client
// has left: what resets the connection, or closes it without having asked. One who has
// asked and then ended his half, and cannot be told from one who has closed, waits behind all
// others, and no longer than such a client is ever waited for.
func (t *turns) wait(s *session, o owner) bool {
	if s.turn = t.take(o); !s.turn { // one may have come back since it was tried
		t.waiting = append(t.waiting, s)
	}
	var half halfClosed
	for !s.turn {
		if s.client.Gone() {
			if st := s.client.Look(); st == loop.Broken || st == loop.Ended && len(s.in) == 0 {
				break
			}
			half.begin(s.p.half)
		}
		if s.task.Wait(half.over, s.fromClient(loop.Gone)) != nil {
			break
		}
	}
	if s.turn && s.task.Cancelled() {
		t.give(o)
		return false
	}
	if !s.turn {
		i := slices.Index(t.waiting, s)
		t.waiting = slices.Delete(t.waiting, i, i+1)
	}
	return s.turn
}

// give gives a turn to who has waited longest for one of this owner's, if somebody has,
// and of those whose client may have left only if there is none other.
func (t *turns) give(o owner) {
	next := -1
	for i, s := range t.waiting {
		if s.of.owner == o && (next < 0 || t.waiting[next].client.Gone() && !s.client.Gone()) {
			next = i
		}
	}
	if next >= 0 {
		s := t.waiting[next]
		t.waiting = slices.Delete(t.waiting, next, next+1)
		s.turn = true
		s.task.Wake()
		return
	}
	if t.taken[o]--; t.taken[o] == 0 {
		delete(t.taken, o)
	}
}
