package attribution

import (
	"context"
	"sync/atomic"
	"time"
)

// scanRequest asks for the holders of one socket in the next full search.
type scanRequest struct {
	inode uint32
	reply chan *scanResult // with room for one
}

type scanResult struct {
	holders    []holder
	unreadable []int
	denied     bool
}

// Stats counts full searches since the start.
type Stats struct {
	Scans    uint64
	Answered uint64        // questions that those searches answered
	Last     time.Duration // what the last one took
}

type scanStats struct{ scans, answered, last atomic.Uint64 }

func (s *scanStats) read() Stats {
	return Stats{s.scans.Load(), s.answered.Load(), time.Duration(s.last.Load())}
}

// scan takes part in the next full search. It returns nil when ctx or the
// Finder ended first.
func (f *Finder) scan(ctx context.Context, inode uint32, urgent bool) *scanResult {
	queue := f.idle
	if urgent {
		queue = f.urgent
	}
	r := scanRequest{inode, make(chan *scanResult, 1)}
	select {
	case queue <- r:
	case <-ctx.Done():
		return nil
	case <-f.stop:
		return nil
	}
	select {
	case result := <-r.reply:
		return result
	case <-ctx.Done():
		return nil
	case <-f.stop:
		return nil
	}
}

// scanLoop is the one goroutine that searches the whole host. A question that
// arrives while a search is under way waits for the next one: the search may
// have passed its holder already.
func (f *Finder) scanLoop() {
	defer f.wg.Done()
	pause := time.NewTimer(0)
	defer pause.Stop()
	ready := false
	var last time.Time
	for {
		var waiting []scanRequest
		idle := f.idle
		if !ready {
			idle = nil
		}
		select {
		case <-f.stop:
			return
		case <-pause.C:
			ready = true
			continue
		case r := <-f.urgent:
			waiting = append(waiting, r)
		case r := <-idle:
			waiting = append(waiting, r)
		}
		for more := true; more; {
			select {
			case r := <-f.urgent:
				waiting = append(waiting, r)
			case r := <-f.idle:
				waiting = append(waiting, r)
			default:
				more = false
			}
		}
		last = time.Now()
		f.search(waiting)
		f.scans.last.Store(uint64(time.Since(last)))
		ready = false
		pause.Reset(scanPause)
	}
}

func (f *Finder) search(waiting []scanRequest) {
	inodes := make([]uint32, len(waiting))
	for i, r := range waiting {
		inodes[i] = r.inode
	}
	s := newSearch(f.host, inodes...)
	err := s.all()
	for _, r := range waiting {
		r.reply <- &scanResult{holders: s.wanted[r.inode], unreadable: s.unreadable, denied: s.denied || err != nil}
	}
	f.scans.scans.Add(1)
	f.scans.answered.Add(uint64(len(waiting)))
}
