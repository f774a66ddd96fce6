package event

import "hash/maphash"

// seen has the objects that were read last, each in the place that the beginning of its
// text and a salt say. Most of a document is as it was in one before: then the whole
// of an object is known from a comparison, without looking for its end. What makes an
// object another stands behind its beginning, and so it takes the salt: who it is about.
type seen struct {
	seed   maphash.Seed
	places [placesSeen]seenObject
	number uint64 // of the last one
}

// placesSeen is how many there are. With fewer than there are processes at a time, they
// drive each other out, and are looked through each time.
const placesSeen = 1 << 12

type seenObject struct {
	text   string
	number uint64
}

// beginning is how much of an object says its place, and longestSeen how much is kept.
const (
	beginning   = 64
	longestSeen = 16 << 10
)

// part is an object of a document with a number that is its own, or 0.
type part struct {
	raw    []byte
	number uint64
}

// part reads a value as it stands.
func (r *Reader) part(salt uint64) part {
	if r.next() != '{' {
		return part{raw: r.raw()}
	}
	start := r.at
	h := maphash.Bytes(r.seen.seed, r.scanner.text[start:min(start+beginning, len(r.scanner.text))]) ^ salt*0x9e3779b97f4a7c15
	place := &r.seen.places[h>>(64-12)]
	if end := start + len(place.text); place.text != "" && end <= len(r.scanner.text) && string(r.scanner.text[start:end]) == place.text {
		r.at = end
		return part{r.scanner.text[start:end], place.number}
	}
	raw := r.raw()
	if len(raw) > longestSeen || r.err != nil {
		return part{raw: raw}
	}
	r.seen.number++
	*place = seenObject{string(raw), r.seen.number}
	return part{raw, place.number}
}
