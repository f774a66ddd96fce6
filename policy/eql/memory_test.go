package eql_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/policy/eql"
)

// BenchmarkPending measures what a machine keeps for each chain that waits, beside
// the events, which others may keep too.
func BenchmarkPending(b *testing.B) {
	for _, c := range []struct{ name, src string }{
		{"seed", `sequence by host.id, process.parent.entity_id with maxspan=1s [process where true] [network where true]`},
		{"no key", `sequence [process where true] with runs=100 [network where true]`},
		{"two events", `sequence by process.parent.entity_id with maxspan=1s [process where true] [process where true] [network where true]`},
		{"missing between", `sequence by process.parent.entity_id with maxspan=1s [process where true] ![file where true] [network where true]`},
		{"missing at the end", `sequence by process.parent.entity_id with maxspan=1s [process where true] ![network where true]`},
		{"missing at the beginning", `sequence by process.parent.entity_id with maxspan=1s ![process where true] [network where true]`},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				bytes, kept := retained(compile(b, host, c.src))
				b.ReportMetric(bytes, "B/chain")
				b.ReportMetric(float64(kept), "chains")
			}
		})
	}
}

// retained is how many bytes a full machine keeps for each chain, and how many it
// has. Each event comes twice.
func retained(q *eql.Query) (bytes float64, chains int) {
	const n = 8192
	events := make([]*event, n)
	for i := range events {
		events[i] = newEvent(host, map[string][]any{
			"event.category": {"process"}, "host.id": {"i-0123456789abcdef0"}, "process.parent.entity_id": {fmt.Sprintf("%032d", i)},
		})
		events[i].at = epoch.Add(time.Duration(i) * time.Microsecond)
	}
	before := heap()
	m := q.NewMachine(n)
	for _, e := range events {
		m.Observe(e)
		m.Observe(e)
	}
	after := heap()
	runtime.KeepAlive(m)
	runtime.KeepAlive(events)
	chains = m.Pending()
	return float64(after-before) / float64(max(chains, n)), chains
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

// TestMemory holds the figure in Machine's documentation.
func TestMemory(t *testing.T) {
	q := compile(t, host, `sequence by host.id, process.parent.entity_id with maxspan=1s [process where true] [network where true]`)
	if bytes, chains := retained(q); chains != 8192 || bytes > 500 {
		t.Errorf("%d chains with %.0f bytes each", chains, bytes)
	}
}
