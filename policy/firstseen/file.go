package firstseen

import (
	"cmp"
	"container/list"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	// flushEvery is how often changes are written: so much is lost in a crash. A
	// shorter time costs more syncs of a small disk.
	flushEvery = 5 * time.Second
	// lockWait is how long another process may have the file when we open it.
	lockWait = time.Second
	// maxRules bounds what a file may make us read.
	maxRules = 10_000
)

// file is where a store is written.
type file struct {
	path   string
	report func(error)

	writing sync.Mutex // guards db; taken before the store's lock
	db      *bolt.DB   // nil while it cannot be opened

	stop    chan struct{}
	done    sync.WaitGroup
	closing sync.Once
}

// Open takes up the store that is in a file, or begins one there. A damaged file is
// put aside, with ".damaged" behind its name. report is told when the file begins to
// fail, and nil when it works again. The caller must Close the store.
func Open(path string, report func(error)) *Store {
	s := New()
	s.dropped = map[string]struct{}{}
	s.file = &file{path: path, report: report, stop: make(chan struct{})}
	s.outcome(s.open())
	s.file.done.Go(s.keepWriting)
	return s
}

// Close writes what is left. It may be called twice.
func (s *Store) Close() error {
	if s.file == nil {
		return nil
	}
	var err error
	s.file.closing.Do(func() {
		close(s.file.stop)
		s.file.done.Wait()
		err = s.flush()
		if s.file.db != nil {
			err = errors.Join(err, s.file.db.Close())
		}
	})
	return err
}

func (s *Store) keepWriting() {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.file.stop:
			return
		case <-tick.C:
			s.outcome(s.flush())
		}
	}
}

// outcome remembers whether the file works, and reports when that changes.
func (s *Store) outcome(err error) {
	s.mu.Lock()
	before := s.failure
	s.failure = err
	s.mu.Unlock()
	if (err == nil) != (before == nil) {
		s.file.report(err)
	}
}

var errDamaged = errors.New("the file is damaged")

// open opens the database and reads it. A damaged one is put aside.
func (s *Store) open() error {
	err := s.read()
	if errors.Is(err, errDamaged) {
		return s.renew(err)
	}
	return err
}

// renew puts a damaged file aside and begins a new one, to which everything is yet to
// be written. The old database may be in any state, locks held, so that it is left
// alone.
func (s *Store) renew(damage error) error {
	s.file.db = nil
	aside := s.file.path + ".damaged"
	if err := os.Rename(s.file.path, aside); err != nil {
		return errors.Join(damage, err)
	}
	s.file.report(fmt.Errorf("%w; it was put aside as %s, and a new one begins", damage, aside))
	s.mu.Lock()
	for _, h := range s.rules {
		clear(h.gone)
		for k, e := range h.terms {
			e.Value.(*term).written = 0
			h.changed[k] = struct{}{}
		}
	}
	s.mu.Unlock()
	return s.read()
}

// guarded runs what uses the database, and takes for damage what is none of the
// system's errors. It panics on pages that make no sense, and so does its memory map
// on those that are not there.
func guarded(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	err = f()
	path, number := (*fs.PathError)(nil), syscall.Errno(0)
	if err == nil || errors.Is(err, errDamaged) || errors.Is(err, berrors.ErrTimeout) || errors.As(err, &path) || errors.As(err, &number) {
		return err
	}
	return fmt.Errorf("%w: %w", errDamaged, err)
}

// read opens the database and adds what it has to what is here.
func (s *Store) read() error {
	if err := os.MkdirAll(filepath.Dir(s.file.path), 0o750); err != nil {
		return fmt.Errorf("make the directory of what rules have seen: %w", err)
	}
	found := map[string]map[Key]int64{}
	err := guarded(func() error {
		db, err := bolt.Open(s.file.path, 0o600, &bolt.Options{Timeout: lockWait})
		if err != nil {
			return err
		}
		s.file.db = db
		return db.View(func(tx *bolt.Tx) error { return load(tx, found) })
	})
	if err != nil {
		if s.file.db != nil && !errors.Is(err, errDamaged) {
			err = errors.Join(err, s.file.db.Close())
		}
		s.file.db = nil
		return fmt.Errorf("read what rules have seen from %s: %w", s.file.path, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for rule, terms := range found {
		s.take(rule, terms)
	}
	if s.windows != nil {
		s.apply()
	}
	return nil
}

func load(tx *bolt.Tx, found map[string]map[Key]int64) error {
	return tx.ForEach(func(rule []byte, b *bolt.Bucket) error {
		terms := map[Key]int64{}
		if len(found) == maxRules || b == nil {
			return fmt.Errorf("%w: it has something else than rules, or too many", errDamaged)
		}
		found[string(rule)] = terms
		return b.ForEach(func(k, v []byte) error {
			if len(k) != len(Key{}) || len(v) != 8 || len(terms) == 2*MaxTerms {
				return fmt.Errorf("%w: rule %q has something else than terms, or too many", errDamaged, rule)
			}
			terms[Key(k)] = int64(binary.BigEndian.Uint64(v))
			return nil
		})
	})
}

// take adds what a file has of one rule.
func (s *Store) take(rule string, terms map[Key]int64) {
	h := s.history(rule)
	for k, last := range terms {
		if e, ok := h.terms[k]; ok {
			e.Value.(*term).written = last
			continue
		}
		h.terms[k] = h.order.PushFront(&term{k, last, last})
	}
	sorted := slices.SortedFunc(maps.Values(h.terms), func(a, b *list.Element) int {
		return cmp.Compare(b.Value.(*term).last, a.Value.(*term).last)
	})
	for i, e := range sorted {
		if h.order.MoveToBack(e); i >= MaxTerms {
			h.forget(e)
		}
	}
}

// flush writes what has changed.
func (s *Store) flush() error {
	s.file.writing.Lock()
	defer s.file.writing.Unlock()
	if s.file.db == nil {
		if err := s.open(); s.file.db == nil {
			return err
		}
	}
	for {
		if more, err := s.writeBatch(); !more || err != nil {
			return err
		}
	}
}

func (s *Store) writeBatch() (more bool, err error) {
	batch, dropped, more := s.changes()
	if len(batch) == 0 && len(dropped) == 0 {
		return false, nil
	}
	err = guarded(func() error {
		return s.file.db.Update(func(tx *bolt.Tx) error {
			for rule := range dropped {
				if err := tx.DeleteBucket([]byte(rule)); err != nil && !errors.Is(err, berrors.ErrBucketNotFound) {
					return err
				}
			}
			for rule, changes := range batch {
				if err := changes.write(tx, rule); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err == nil {
		return more, nil
	}
	s.restore(batch, dropped)
	err = fmt.Errorf("write what rules have seen to %s: %w", s.file.path, err)
	if errors.Is(err, errDamaged) {
		return false, s.renew(err)
	}
	return false, err
}

// changes is what is to be written of one rule.
type changes struct {
	terms map[Key]int64
	gone  map[Key]struct{}
}

// maxBatch bounds how many terms are looked at while rules wait: a quarter of a
// millisecond.
const maxBatch = 256

// changes takes them out of the store, and reports whether there are more.
func (s *Store) changes() (batch map[string]changes, dropped map[string]struct{}, more bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	batch = map[string]changes{}
	left := maxBatch
	for rule, h := range s.rules {
		if len(h.changed)+len(h.gone) == 0 {
			continue
		}
		c := changes{map[Key]int64{}, h.gone}
		h.gone = map[Key]struct{}{}
		for k := range h.changed {
			if left == 0 {
				more = true
				break
			}
			left--
			t := h.terms[k].Value.(*term)
			t.written = t.last
			c.terms[k] = t.last
			delete(h.changed, k)
		}
		batch[rule] = c
	}
	dropped, s.dropped = s.dropped, map[string]struct{}{}
	return batch, dropped, more
}

// restore puts back what could not be written.
func (s *Store) restore(batch map[string]changes, dropped map[string]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.Copy(s.dropped, dropped)
	for rule, c := range batch {
		h := s.rules[rule]
		if h == nil {
			continue
		}
		for k := range c.gone {
			if _, again := h.terms[k]; !again {
				h.gone[k] = struct{}{}
			}
		}
		for k := range c.terms {
			if _, still := h.terms[k]; still {
				h.changed[k] = struct{}{}
			}
		}
	}
}

func (c changes) write(tx *bolt.Tx, rule string) error {
	b, err := tx.CreateBucketIfNotExists([]byte(rule))
	if err != nil {
		return err
	}
	for k := range c.gone {
		if err := b.Delete(k[:]); err != nil {
			return err
		}
	}
	for k, last := range c.terms {
		if err := b.Put(k[:], binary.BigEndian.AppendUint64(nil, uint64(last))); err != nil {
			return err
		}
	}
	return nil
}
