package firstseen

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var noon = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

func key(n int) Key { return Key{byte(n), byte(n >> 8), byte(n >> 16)} }

const week = 7 * 24 * time.Hour

func only(rules ...string) map[string]time.Duration {
	windows := map[string]time.Duration{}
	for _, r := range rules {
		windows[r] = week
	}
	return windows
}

func open(t *testing.T, path string) (*Store, *[]error) {
	t.Helper()
	var reports []error
	s := Open(path, func(err error) { reports = append(reports, err) })
	t.Cleanup(func() { s.Close() })
	return s, &reports
}

func TestWindow(t *testing.T) {
	s := New()
	s.Rules(only("r"))
	if s.Seen("r", key(1), noon) {
		t.Error("seen before it was")
	}
	if s.See("r", key(1), noon) || !s.See("r", key(1), noon) {
		t.Error("not one of two is the first")
	}
	for _, c := range []struct {
		after time.Duration
		want  bool
	}{{0, true}, {week, true}, {week + time.Second, false}, {-time.Hour, true}} {
		if got := s.Seen("r", key(1), noon.Add(c.after)); got != c.want {
			t.Errorf("%v later: %v", c.after, got)
		}
	}
	s.See("r", key(1), noon.Add(week)) // each time begins the window anew
	s.See("r", key(1), noon)           // and none that was before
	if !s.Seen("r", key(1), noon.Add(2*week)) {
		t.Error("forgotten within the window")
	}
	if s.Seen("other", key(1), noon) || s.Seen("r", key(2), noon) {
		t.Error("seen by another rule, or with another key")
	}
	s.See("other", key(1), noon) // no such rule
	if st := s.Stats(); st.Terms != 1 || st.Rules != 1 {
		t.Errorf("%+v", st)
	}
}

func TestRulesComeAndGo(t *testing.T) {
	s := New()
	s.Rules(only("a", "b"))
	s.See("a", key(1), noon)
	s.See("b", key(1), noon)
	s.Rules(only("b", "c"))
	s.Rules(only("a", "b", "c"))
	if s.Seen("a", key(1), noon) || !s.Seen("b", key(1), noon) {
		t.Error("a rule keeps its history as long as it is there, and no longer")
	}
}

func TestBound(t *testing.T) {
	s := New()
	s.Rules(only("r"))
	for i := range MaxTerms {
		s.See("r", key(i), noon.Add(time.Duration(i)*time.Second))
	}
	s.See("r", key(0), noon.Add(MaxTerms*time.Second))
	s.See("r", key(MaxTerms), noon.Add(MaxTerms*time.Second))
	if st := s.Stats(); st.Terms != MaxTerms || st.Forgotten != 1 {
		t.Errorf("%+v", st)
	}
	if now := noon.Add(MaxTerms * time.Second); !s.Seen("r", key(0), now) || s.Seen("r", key(1), now) || !s.Seen("r", key(MaxTerms), now) {
		t.Error("not the one that was seen the longest time ago made room")
	}
	s.See("r", key(MaxTerms+1), noon.Add(3*week))
	if st := s.Stats(); st.Terms != 1 || st.Forgotten != 1 {
		t.Errorf("what is out of the window: %+v", st)
	}
}

func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "first-seen.db")
	s, _ := open(t, path)
	s.Rules(only("a", "b"))
	s.See("a", key(1), noon)
	s.See("b", key(2), noon)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s, reports := open(t, path)
	s.Rules(only("a"))
	if !s.Seen("a", key(1), noon.Add(week)) || s.Seen("a", key(1), noon.Add(week+time.Second)) || s.Seen("a", key(2), noon) {
		t.Error("not as it was")
	}
	s.See("a", key(3), noon.Add(time.Hour))
	if err := s.flush(); err != nil { // and no Close: the process is killed
		t.Fatal(err)
	}
	s.See("a", key(4), noon.Add(time.Hour))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	killed := filepath.Join(t.TempDir(), "x.db")
	if err := os.WriteFile(killed, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = open(t, killed)
	s.Rules(only("a", "b"))
	for n, want := range map[int]bool{1: true, 3: true, 4: false} {
		if got := s.Seen("a", key(n), noon.Add(time.Hour)); got != want {
			t.Errorf("%d: %v", n, got)
		}
	}
	if s.Seen("b", key(2), noon) {
		t.Error("a rule that was away has a history")
	}
	if len(*reports) > 0 {
		t.Errorf("reports %v", *reports)
	}
}

// TestFileFollows: what made room, or is out of its window, leaves the file, too.
func TestFileFollows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	s, _ := open(t, path)
	s.Rules(only("r"))
	for i := range MaxTerms + 100 {
		s.See("r", key(i), noon.Add(time.Duration(i)*time.Second))
		if i == MaxTerms/2 {
			if err := s.flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	if n := countTerms(t, s); n != MaxTerms {
		t.Errorf("%d terms in the file", n)
	}
	s.See("r", key(-1), noon.Add(10*week))
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	if n := countTerms(t, s); n != 1 {
		t.Errorf("%d terms in the file", n)
	}
	if st := s.Stats(); st.Unwritten != 0 {
		t.Errorf("%+v", st)
	}
}

func countTerms(t *testing.T, s *Store) (n int) {
	t.Helper()
	err := s.file.db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
			n += b.Stats().KeyN
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestFewWrites: a request each second of the same program is no write each second.
func TestFewWrites(t *testing.T) {
	s, _ := open(t, filepath.Join(t.TempDir(), "x.db"))
	s.Rules(only("r"))
	writes := 0
	for i := range 24 * 60 {
		s.See("r", key(1), noon.Add(time.Duration(i)*time.Minute))
		if s.Stats().Unwritten > 0 {
			writes++
			if err := s.flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if writes < 2 || writes > 20 {
		t.Errorf("%d writes in a day", writes)
	}
}

// TestDamaged breaks a file in many ways. The store serves all the same, writes again,
// and does not lose what it has seen since.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.db")
	s, _ := open(t, good)
	s.Rules(only("r"))
	for i := range 2000 {
		s.See("r", key(i), noon)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	broken := [][]byte{[]byte("no database"), data[:1000], data[:5000], data[:len(data)/2], make([]byte, len(data)), []byte(fmt.Sprintf("%40000d", 0))}
	for page := range 10 {
		b := append([]byte(nil), data...)
		for i := page * 4096; i < min(len(b), (page+1)*4096); i++ {
			b[i] = byte(r.Uint32())
		}
		broken = append(broken, b)
	}
	for i, b := range broken {
		path := filepath.Join(dir, fmt.Sprintf("%d.db", i))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, reports := open(t, path)
		s.Rules(only("r"))
		s.See("r", key(5000), noon)
		if !s.Seen("r", key(5000), noon) {
			t.Fatalf("case %d: does not serve", i)
		}
		s.outcome(s.flush())
		s.outcome(s.flush()) // the first may find the damage
		if st := s.Stats(); st.Error != "" {
			t.Errorf("case %d: %+v", i, st)
		}
		// A page that nobody reads may be anything.
		_, err := os.Stat(path + ".damaged")
		if (err == nil) != (len(*reports) > 0) {
			t.Errorf("case %d: put aside: %v, told: %v", i, err == nil, *reports)
		}
		if i < 6 && i != 3 && err != nil { // half of it may be all that is used
			t.Errorf("case %d: taken for good", i)
		}
		s.Close()
		s, _ = open(t, path)
		s.Rules(only("r"))
		if !s.Seen("r", key(5000), noon) {
			t.Errorf("case %d: not written", i)
		}
	}
}

func TestUnwritable(t *testing.T) {
	dir := t.TempDir()
	blocker := filepath.Join(dir, "state")
	if err := os.WriteFile(blocker, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(blocker, "x.db")
	s, reports := open(t, path)
	s.Rules(only("r"))
	s.See("r", key(1), noon)
	if len(*reports) != 1 || (*reports)[0] == nil || s.Stats().Error == "" {
		t.Fatalf("%v, %+v", *reports, s.Stats())
	}
	s.outcome(s.flush())
	if len(*reports) != 1 {
		t.Errorf("told again: %v", *reports)
	}
	if !s.Seen("r", key(1), noon) {
		t.Error("does not serve")
	}
	if err := os.Remove(blocker); err != nil {
		t.Fatal(err)
	}
	s.outcome(s.flush())
	if len(*reports) != 2 || (*reports)[1] != nil || s.Stats().Error != "" {
		t.Errorf("%v, %+v", *reports, s.Stats())
	}
	s.Close()
	s, _ = open(t, path)
	s.Rules(only("r"))
	if !s.Seen("r", key(1), noon) {
		t.Error("not written once it could be")
	}
}

func TestTwoProcesses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	first, _ := open(t, path)
	first.Rules(only("r", "gone"))
	first.See("r", key(1), noon)
	first.See("gone", key(1), noon)
	second, reports := open(t, path)
	second.Rules(only("r"))
	second.See("r", key(2), noon)
	if len(*reports) != 1 || !second.Seen("r", key(2), noon) {
		t.Errorf("%v", *reports)
	}
	if _, err := os.Stat(path + ".damaged"); !errors.Is(err, os.ErrNotExist) {
		t.Error("another's file was put aside")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second.Rules(only("r", "s"))
	second.outcome(second.flush())
	if !second.Seen("r", key(1), noon) || second.Stats().Error != "" || second.Stats().Rules != 2 {
		t.Errorf("what the other has written is not taken up: %+v", second.Stats())
	}
}

func TestConcurrent(t *testing.T) {
	s, _ := open(t, filepath.Join(t.TempDir(), "x.db"))
	s.Rules(only("r"))
	var all sync.WaitGroup
	for n := range 4 {
		all.Go(func() {
			for i := range 2000 {
				s.See("r", key(i*n), noon)
				s.Seen("r", key(i), noon)
				if i%500 == 0 {
					s.Stats()
					s.Rules(only("r", fmt.Sprint(i)))
				}
			}
		})
	}
	for range 5 {
		if err := s.flush(); err != nil {
			t.Error(err)
		}
	}
	all.Wait()
}

func BenchmarkSeen(b *testing.B) {
	s := New()
	s.Rules(only("r"))
	for i := range MaxTerms {
		s.See("r", key(i), noon)
	}
	b.ReportAllocs()
	for b.Loop() {
		if !s.Seen("r", key(77), noon) {
			b.Fatal("not seen")
		}
	}
}

// BenchmarkChanges is how long rules wait, at most, for what is written.
func BenchmarkChanges(b *testing.B) {
	s := New()
	s.file = &file{}
	s.Rules(only("r"))
	at := noon
	for b.Loop() {
		b.StopTimer()
		at = at.Add(24 * time.Hour)
		for i := range MaxTerms {
			s.See("r", key(i), at)
		}
		b.StartTimer()
		s.changes()
	}
}

// BenchmarkMemory is what one combination takes.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s := New()
		s.Rules(only("r"))
		for i := range MaxTerms {
			s.See("r", key(i), noon)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/MaxTerms, "B/term")
		runtime.KeepAlive(s)
	}
}
