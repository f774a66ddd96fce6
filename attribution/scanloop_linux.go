package attribution

import (
	"context"
	"sync"
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
	reason     Reason // why it is not complete
	err        error
	accounted  bool // every reference is known
}

// Stats counts full searches since the start.
type Stats struct {
	Scans       uint64
	Answered    uint64        // questions that those searches answered
	Last        time.Duration // what the last one took
	Descriptors int           // and how many it looked at
	Longest     Search        // of the last half an hour at least, and an hour at most

	NoWitness uint64 // connections that nobody was seen to make
}

// Search is one full search.
type Search struct {
	Ended       time.Time
	Took        time.Duration
	Descriptors int   // that it looked at
	Largest     Table // among them
}

// Table is the descriptors of one process.
type Table struct{ PID, Descriptors int }

type scanStats struct {
	mu             sync.Mutex // guards the following
	last           Stats
	recent, before Search    // the longest of this half hour, and of the one before
	since          time.Time // of recent
}

func (s *scanStats) read() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := s.last
	for _, one := range []Search{s.before, s.recent} {
		if time.Since(one.Ended) < 2*halfHour && one.Took >= stats.Longest.Took {
			stats.Longest = one
		}
	}
	return stats
}

const halfHour = 30 * time.Minute

func (s *scanStats) count(done *search, answered int, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Sub(s.since) > halfHour {
		s.before, s.recent, s.since = s.recent, Search{}, now
	}
	if took >= s.recent.Took {
		s.recent = Search{now, took, done.seen, done.largest}
	}
	s.last = Stats{Scans: s.last.Scans + 1, Answered: s.last.Answered + uint64(answered), Last: took, Descriptors: done.seen}
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
	f.search(nil) // so that it is known what a search takes before one is needed
	pause := time.NewTimer(0)
	defer pause.Stop()
	ready := false
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
		f.search(waiting)
		ready = false
		pause.Reset(scanPause)
	}
}

func (f *Finder) search(waiting []scanRequest) {
	inodes := make([]uint32, len(waiting))
	for i, r := range waiting {
		inodes[i] = r.inode
	}
	begin := time.Now()
	s := newSearch(f.host, inodes...)
	if !s.byKernel(f.witness) {
		s.all()
	}
	for _, r := range waiting {
		r.reply <- &scanResult{holders: s.wanted[r.inode], unreadable: s.unreadable, reason: s.reason, err: s.err}
	}
	f.scans.count(s, len(waiting), time.Since(begin))
}
