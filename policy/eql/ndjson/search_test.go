package ndjson_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/eql/ndjson"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// search makes a search of which the matches are ids.
func search(t testing.TB, query string, found *[]string, inputs ...ndjson.Input) *ndjson.Search {
	t.Helper()
	tree, err := syntax.Parse("query", query)
	if err != nil {
		t.Fatal(err)
	}
	s := &ndjson.Search{Query: tree, Schema: policy.Schema(), Roles: roles, Inputs: inputs}
	s.Roles.Tiebreaker, s.Roles.ID = "tie", "id"
	s.Found = func(m ndjson.Match) error {
		ids := make([]string, len(m))
		for i, e := range m {
			if ids[i] = "-"; e != nil {
				ids[i] = e.ID()
			}
		}
		*found = append(*found, strings.Join(ids, " "))
		return nil
	}
	s.Bad = func(l ndjson.BadLine) { t.Error(l) }
	s.Failed = func(name string, err error) { t.Error(name, err) }
	return s
}

func mustRun(t testing.TB, s *ndjson.Search) ndjson.Summary {
	t.Helper()
	plan, err := s.Plan(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Warnings) > 0 {
		t.Error(plan.Warnings)
	}
	sum, err := plan.Run(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// An optional field that no event has is null, and so can be compared with another, but
// not while some event that was not looked at may have it.
func TestAbsent(t *testing.T) {
	const query = `any where ?x == ?y and ?x.z != 3`
	var found []string
	mustRun(t, search(t, query, &found, input("a", []byte(`{"id":1,"@timestamp":1}`))))
	if !slices.Equal(found, []string{"1"}) {
		t.Errorf("found %v", found)
	}
	text := bytes.Repeat([]byte("{\"id\":1,\"@timestamp\":1}\n"), 1000)
	for _, text := range [][]byte{text, []byte(`{"x":"a","y":"a"}`)} {
		s := search(t, query, &found, input("b", text))
		if _, err := s.Plan(context.Background()); err == nil || !strings.Contains(err.Error(), "a field cannot be compared with another") {
			t.Error(err)
		}
	}
}

// Whatever the order of the events in the files and whatever fits into memory, they
// are judged by time, tiebreaker and arrival.
func TestOrder(t *testing.T) {
	defer goleak.VerifyNone(t)
	type ev struct {
		at, tie int // no tiebreaker: 99
		id      int
	}
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		files := make([][]ev, 1+rnd.IntN(4))
		id := 0
		for i := range files {
			for range 1 + rnd.IntN(60) {
				e := ev{at: 1_700_000_000 + rnd.IntN(30), tie: rnd.IntN(5), id: id}
				if e.tie == 4 {
					e.tie = 99
				}
				files[i] = append(files[i], e)
				id++
			}
		}
		var inputs []ndjson.Input
		for i, f := range files {
			var b bytes.Buffer
			for _, e := range f {
				tie := fmt.Sprintf(`,"tie":%d`, e.tie)
				if e.tie == 99 {
					tie = ""
				}
				fmt.Fprintf(&b, `{"@timestamp":%d,"id":%d%s}`+"\n", e.at, e.id, tie)
			}
			inputs = append(inputs, input(fmt.Sprint("file", i), b.Bytes()))
		}
		// The file that begins first arrives first.
		slices.SortStableFunc(files, func(a, b []ev) int { return cmp.Compare(a[0].at, b[0].at) })
		all := slices.Concat(files...)
		slices.SortStableFunc(all, func(a, b ev) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.tie, b.tie)) })
		want := make([]string, len(all))
		for i, e := range all {
			want[i] = strconv.Itoa(e.id)
		}
		for _, memory := range []int{0, 2000, 1} {
			var got []string
			s := search(t, "any where true", &got, inputs...)
			s.Memory = memory
			if sum := mustRun(t, s); sum.Events != uint64(len(all)) || sum.Late != 0 {
				t.Errorf("%+v", sum)
			}
			if !slices.Equal(got, want) {
				t.Fatalf("seed %d, memory %d\ngot  %v\nwant %v", seed, memory, got, want)
			}
		}
	}
}

// endless is lines that are made as they are read.
type endless struct {
	line func(i int) string
	n    int
	i    int
	rest string
}

func (e *endless) Read(p []byte) (n int, err error) {
	for n < len(p) {
		if e.rest == "" {
			if e.i == e.n {
				if n == 0 {
					return 0, io.EOF
				}
				return n, nil
			}
			e.rest = e.line(e.i)
			e.i++
		}
		m := copy(p[n:], e.rest)
		n, e.rest = n+m, e.rest[m:]
	}
	return n, nil
}

func made(name string, n int, line func(i int) string) ndjson.Input {
	size := int64(0)
	for i := range n {
		size += int64(len(line(i)))
	}
	return ndjson.Input{Name: name, Size: size, Open: func() (io.ReadCloser, error) {
		return io.NopCloser(&endless{line: line, n: n}), nil
	}}
}

// A large file needs no more memory than a small one, in order or not, and a temporary file
// only if it is not.
func TestMemory(t *testing.T) {
	const lines, padding = 60_000, 900
	pad := strings.Repeat("x", padding)
	for _, c := range []struct {
		name      string
		at        func(i int) int
		temporary bool
	}{
		{"in order", func(i int) int { return i }, false},
		{"now and then late", func(i int) int { return i - i%100*10 }, false},
		{"backwards", func(i int) int { return lines - i }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			temporary := t.TempDir()
			if !c.temporary {
				temporary += "/none"
			}
			t.Setenv("TMPDIR", temporary)
			in := made("file", lines, func(i int) string {
				return fmt.Sprintf(`{"@timestamp":%d,"id":%d,"pad":"%s"}`+"\n", 1_700_000_000_000+c.at(i), c.at(i), pad)
			})
			last, matches, peak := -1<<60, 0, uint64(0)
			var got []string
			s := search(t, "any where true", &got, in)
			s.Memory = 8 << 20
			s.Found = func(m ndjson.Match) error {
				id, _ := strconv.Atoi(m[0].ID())
				if id < last {
					t.Fatalf("%d after %d", id, last)
				}
				last = id
				matches++
				return nil
			}
			runtime.GC()
			var before runtime.MemStats
			runtime.ReadMemStats(&before)
			blocks := 0
			s.Progress = func(ndjson.Progress) {
				if blocks++; blocks%20 == 0 {
					var now runtime.MemStats
					runtime.ReadMemStats(&now)
					peak = max(peak, now.HeapAlloc-before.HeapAlloc)
				}
			}
			sum := mustRun(t, s)
			if matches != lines || sum.Late != 0 {
				t.Errorf("%d matches, %+v", matches, sum)
			}
			t.Logf("%d MB of events, %d MB of heap", in.Size>>20, peak>>20)
			if peak > 64<<20 {
				t.Errorf("%d MB of heap for %d MB of events", peak>>20, in.Size>>20)
			}
			if left, _ := os.ReadDir(temporary); len(left) > 0 {
				t.Errorf("%v was left behind", left)
			}
			if c.temporary {
				t.Setenv("TMPDIR", temporary+"/none")
				plan, err := s.Plan(context.Background())
				if err == nil {
					_, err = plan.Run(context.Background())
				}
				if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "TMPDIR") {
					t.Errorf("without a place for a temporary file: %v", err)
				}
			}
		})
	}
}

// What comes from a pipe is judged when nothing more comes for a while, and what
// is older than that is counted.
func TestStream(t *testing.T) {
	r, w := io.Pipe()
	var got []string
	s := search(t, "any where id > 0", &got, ndjson.Stream("pipe", r))
	seen := make(chan int)
	s.Progress = func(p ndjson.Progress) {
		if p.Matches == 3 {
			seen <- len(got)
			s.Progress = nil
		}
	}
	go func() {
		io.WriteString(w, `{"@timestamp":3,"id":3}`+"\n"+`{"@timestamp":1,"id":1}`+"\n"+`{"@timest`)
		time.Sleep(10 * time.Millisecond)
		io.WriteString(w, `amp":2,"id":2}`+"\n")
		<-seen // although the pipe is open
		io.WriteString(w, `{"@timestamp":2,"id":4}`+"\n"+`{"@timestamp":5,"id":5}`)
		w.Close()
	}()
	sum := mustRun(t, s)
	if want := []string{"1", "2", "3", "4", "5"}; !slices.Equal(got, want) || sum.Late != 1 || sum.Events != 5 {
		t.Errorf("%v, %+v", got, sum)
	}
}

// A stream that does not end needs no more memory than there is.
func TestStreamIsBounded(t *testing.T) {
	var got []string
	lines := &endless{n: 200_000, line: func(i int) string { return fmt.Sprintf(`{"@timestamp":%d,"id":%d}`+"\n", 1_700_000_000_000+i, i) }}
	s := search(t, "any where true", &got, ndjson.Stream("pipe", io.MultiReader(lines)))
	s.Memory = 1 << 20
	peak := 0
	s.Progress = func(p ndjson.Progress) { peak = max(peak, int(p.Events-p.Matches)) }
	if sum := mustRun(t, s); sum.Late != 0 || len(got) != lines.n || !slices.IsSortedFunc(got, func(a, b string) int {
		return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b))
	}) {
		t.Errorf("%d, %+v", len(got), sum)
	}
	if peak > 10_000 {
		t.Errorf("%d events waited", peak)
	}
}

func TestCancel(t *testing.T) {
	var got []string
	r, w := io.Pipe()
	defer w.Close()
	s := search(t, "any where true", &got, ndjson.Stream("pipe", r))
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.WriteString(w, "{\"id\":1,\"event\":{}}\n")
		cancel()
	}()
	plan, err := s.Plan(ctx)
	if err == nil {
		_, err = plan.Run(ctx)
	}
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestLongLines(t *testing.T) {
	long := func(n int) string { return `{"@timestamp":1,"id":1,"x":"` + strings.Repeat("y", n) + `"}` }
	text := `{"@timestamp":1,"id":0}` + "\n" + long(3<<20) + "\n" + long(17<<20) + "\n" + `{"@timestamp":1,"id":3}` + "\n" + long(17<<20)
	var got, bad []string
	s := search(t, "any where true", &got, input("file", []byte(text)))
	s.Bad = func(l ndjson.BadLine) { bad = append(bad, l.Error()) }
	sum := mustRun(t, s)
	if want := []string{"0", "1", "3"}; !slices.Equal(got, want) || sum.Bad != 2 {
		t.Errorf("%v, %+v", got, sum)
	}
	if want := []string{"file:3: longer than 16 MB", "file:5: longer than 16 MB"}; !slices.Equal(bad, want) {
		t.Errorf("%q", bad)
	}
}

// A file that is open is read from where it is.
func TestStreamOfFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("# events\n"+`{"@timestamp":2,"id":2}`+"\n"+`{"@timestamp":1,"id":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(9, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	var got []string
	mustRun(t, search(t, "any where true", &got, ndjson.Stream("f", f)))
	if want := []string{"1", "2"}; !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

// The names in the first lines are not remembered without bound, nor those of things
// inside of things inside of things.
func TestHostileSample(t *testing.T) {
	key := strings.Repeat("k", 1000)
	deep := strings.Repeat(`{"`+key+`":`, 9_000) + "1" + strings.Repeat("}", 9_000)
	var got []string
	s := search(t, "any where ?nonesuch == 1", &got, input("file", []byte(`{"@timestamp":1,"id":1,"x":`+deep+"}\n")))
	start := time.Now()
	if sum := mustRun(t, s); sum.Events != 1 || time.Since(start) > 5*time.Second {
		t.Errorf("%+v after %v", sum, time.Since(start))
	}
}
