package event

import "hash/maphash"

// seen has the objects that were read last, each in the place that the beginning of its
// text and a salt say. Most of a document is as it was in one before: then the whole
// of an object is known from a comparison, without looking for its end. What begins alike
// on one host, as the workers of a server do, shares a place.
type seen struct {
	seed   maphash.Seed
	places [placesSeen][sharePlace]seenObject // those that were used last come first
	size   int                                // of the texts
	number uint64                             // of the last one
}

const (
	// placesSeen is how many there are, and sharePlace how many each has. With fewer than
	// there are processes at a time, they drive each other out, and are looked through
	// each time.
	placesSeen, sharePlace = 1 << 11, 4
	// beginning is how much of an object says its place: as much as tells most apart, and
	// no more than most have. Programs with the same arguments differ behind these.
	beginning, beginningOfURL, beginningOfProcess = 64, 128, 384
	// longestSeen is how much of one is kept, and maxSeen of all.
	longestSeen, maxSeen = 16 << 10, 16 << 20
	// longestRecalled bounds those of which is kept what they say.
	longestRecalled = 2 << 10
)

type seenObject struct {
	text   string
	number uint64
}

// part is an object of a document with a number that is its own, or 0.
type part struct {
	raw    []byte
	number uint64
}

// part reads a value as it stands.
func (r *reading) part(salt uint64, beginning int) part {
	if r.Next() != '{' {
		return part{raw: r.Raw()}
	}
	rest := r.Line[r.At:]
	h := maphash.Bytes(r.seen.seed, rest[:min(beginning, len(rest))]) ^ salt*0x9e3779b97f4a7c15
	place := &r.seen.places[(h^h>>32)%placesSeen]
	for i := range place {
		o := &place[i]
		if n := len(o.text); n > 0 && n <= len(rest) && string(rest[:n]) == o.text {
			r.At += n
			number := o.number
			if i > 0 {
				found := *o
				copy(place[1:i+1], place[:i])
				place[0] = found
			}
			return part{rest[:n], number}
		}
	}
	raw := r.Raw()
	if len(raw) > longestSeen || r.Err != nil {
		return part{raw: raw}
	}
	if r.seen.size += len(raw) - len(place[sharePlace-1].text); r.seen.size > maxSeen {
		clear(r.seen.places[:])
		r.seen.size = len(raw)
	}
	r.seen.number++
	copy(place[1:], place[:])
	place[0] = seenObject{string(raw), r.seen.number}
	return part{raw, r.seen.number}
}

// memo has what was read of objects, by their numbers.
type memo[V any] map[uint64]remark[V]

type remark[V any] struct {
	value V
	gaps  Gaps
}

// recall is what an object says: what was read of it before, or what is read now.
func recall[V any](d *reading, m memo[V], beginning int, read func(*reading) V) V {
	start := d.At
	o := d.part(0, beginning)
	if known, ok := m[o.number]; ok && o.number != 0 {
		d.Event.Gaps |= known.gaps
		return known.value
	}
	if d.Err != nil {
		var none V
		return none
	}
	end, gaps := d.At, d.Event.Gaps
	d.At, d.Event.Gaps = start, 0
	r := remark[V]{value: read(d)}
	r.gaps = d.Event.Gaps
	if d.Event.Gaps |= gaps; d.Err != nil {
		return r.value
	}
	d.At = end
	if o.number != 0 && len(o.raw) <= longestRecalled {
		if len(m) >= placesSeen {
			clear(m)
		}
		m[o.number] = r
	}
	return r.value
}
