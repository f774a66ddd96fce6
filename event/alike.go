package event

import (
	"bytes"
	"net/netip"
	"slices"
	"time"
)

// Most requests are like one before them: the same process has asked for the same thing
// again. Their documents are the same, byte for byte, but for when it was, what the
// document is called and the like. The reader knows the last documents with blanks in
// those places, and what it has made of each: of a line that is one of these it has to
// read what stands in the blanks, and nothing else. That takes a fifth of the time.
//
// What is known is a tree, so that what documents have in common from the beginning is
// there, and compared, once.

// novel is a field that is new in each document.
type novel uint8

const (
	nothingNovel novel = iota
	novelTime
	novelCreated
	novelDuration
	novelID
	novelSequence
	novelStart
	novelExpiration
	novelPort
	novelCookie
	novelLatency
	novelExpires
	novelIssued
)

// news are the values of those fields.
type news struct {
	at, issued, expires, expiration time.Time
	id, start                       []byte // parts of the line
	sequence                        uint64
	duration                        int64
	cookie, latency                 int64
	port                            uint16
}

// tell completes the record of a document.
func (n *news) tell(r *Record) {
	r.ID, r.Sequence, r.Duration = string(n.id), n.sequence, time.Duration(n.duration)
	r.Response.Expiration = n.expiration
	ev := &r.Event
	ev.Time, ev.Token.Issued, ev.Token.Expires = n.at, n.issued, n.expires
	ev.Attribution.Cookie, ev.Attribution.Took = uint64(n.cookie), time.Duration(n.latency)*time.Microsecond
	source := &ev.Connection.Source
	*source = netip.AddrPortFrom(source.Addr(), n.port)
}

// novelty is where one stands in a line.
type novelty struct {
	start, end int
	field      novel
}

// novel reads a field that is new in each document.
func (d *reading) novel(field novel) {
	first := d.Next()
	start := d.At
	d.value(field)
	if mayBeNovel(first) {
		d.novelties = append(d.novelties, novelty{start, d.At, field})
	}
}

// mayBeNovel tells by the first byte of a value whether it is a text or a number. With the
// text before it, that says whether it stands in a blank.
func mayBeNovel(first byte) bool { return first == '"' || '0' <= first && first <= '9' }

func (d *reading) value(of novel) {
	n := &d.news
	switch of {
	case novelTime:
		n.at = d.time()
	case novelCreated:
		d.Skip()
	case novelDuration:
		n.duration = d.Int()
	case novelID:
		n.id = d.Text()
	case novelSequence:
		n.sequence = uint64(d.Int())
	case novelStart:
		n.start = d.Text()
	case novelExpiration:
		n.expiration = d.time()
	case novelPort:
		n.port = d.port()
	case novelCookie:
		n.cookie = d.Int()
	case novelLatency:
		n.latency = d.Int()
	case novelExpires:
		n.expires = d.time()
	case novelIssued:
		n.issued = d.time()
	}
}

// knowledge is the documents that are known.
type knowledge struct {
	root node
	size int
	once map[outline]struct{} // what was read, and is not known yet
	// Where the line that was read last is none of them: in this node, whose text begins
	// there in the line, behind so many blanks.
	parted *node
	at     int
	filled int
}

const (
	// maxKnown is about how many bytes the tree takes: as many as the processes that live
	// at a time need, and few enough to stay near the processor. When it is full, all is
	// forgotten.
	maxKnown = 12 << 20
	// longestKnown bounds the lines, and mostNovelties what is new in one: documents have
	// a dozen.
	longestKnown, mostNovelties = 16 << 10, 32
	nodeCost, recordCost        = 128, 2 << 10
	stride                      = 32 // bytes that are compared at once
)

// outline is what tells most documents of a host apart. Many processes do a thing once, and
// what is read for the first time is not worth being known.
type outline struct {
	process  uint64
	document Document
	path     string
}

// node is a text that stands in documents, with what may come behind it: a blank, other
// texts, and the end.
type node struct {
	text  string
	blank novel
	after *node   // the blank
	first []byte  // of the texts in below
	below []*node // none of which begins as another
	known *Record // of the document that ends here, without news
}

// recognise reads a line that is a known document.
func (r *Reader) recognise(line []byte, to *Record) bool {
	d, k := &r.reading, &r.known
	d.Reader, d.news = r, news{}
	d.scanner = scannerOf(line)
	k.parted, k.at, k.filled = &k.root, 0, 0
	for {
		n := k.parted
		end := k.at + len(n.text)
		if end > len(line) || string(line[k.at:end]) != n.text {
			return false
		}
		if end == len(line) {
			break
		}
		if n.blank != nothingNovel && mayBeNovel(line[end]) {
			d.At = end
			if d.value(n.blank); d.Err != nil {
				return false // which is told by who reads the whole
			}
			k.parted, k.at = n.after, d.At
			k.filled++
			continue
		}
		i := bytes.IndexByte(n.first, line[end])
		if i < 0 {
			return false
		}
		k.parted, k.at = n.below[i], end
	}
	known := k.parted.known
	if known == nil {
		return false
	}
	subjects, roles := to.Event.Subjects[:0], to.Event.Roles[:0]
	*to = *known
	to.Event.Subjects, to.Event.Roles = append(subjects, known.Event.Subjects...), append(roles, known.Event.Roles...)
	d.news.tell(to)
	return true
}

// remember adds the line that was read to what is known, if it is not the first of its kind.
// Starts of processes do not come again, nor does the one document for many requests.
func (r *Reader) remember(line []byte) {
	d, k := &r.reading, &r.known
	if d.Document == ProcessStart || d.Event.Repeats.Requests > 0 || len(line) > longestKnown || len(d.novelties) > mostNovelties {
		return
	}
	of := outline{d.first.process.number, d.Document, d.Event.Request.Path}
	if _, again := k.once[of]; !again {
		if len(k.once) >= placesSeen || k.once == nil {
			k.once = map[outline]struct{}{}
		}
		k.once[of] = struct{}{}
		return
	}
	if k.size > maxKnown {
		k.root, k.size, k.at, k.filled = node{}, 0, 0, 0
		k.parted = &k.root
	}
	record := *d.Record
	record.Event.Subjects, record.Event.Roles = slices.Clone(record.Event.Subjects), slices.Clone(record.Event.Roles)
	k.add(line, d.novelties, &record)
}

// add adds a document to the tree, from where it is none of the known ones.
func (k *knowledge) add(line []byte, novelties []novelty, record *Record) {
	n, at := k.parted, k.at
	novelties = novelties[k.filled:]
	end := func() int {
		if len(novelties) > 0 {
			return novelties[0].start
		}
		return len(line)
	}
	common, most := 0, min(len(n.text), end()-at)
	for common+stride <= most && n.text[common:common+stride] == string(line[at+common:at+common+stride]) {
		common += stride
	}
	for common < most && n.text[common] == line[at+common] {
		common++
	}
	if common < len(n.text) {
		behind := *n
		behind.text = n.text[common:]
		*n = node{text: n.text[:common], first: []byte{behind.text[0]}, below: []*node{&behind}}
	}
	at += common
	from, rest := at, string(line[at:])
	chain := make([]node, 1+len(novelties))
	k.size += recordCost + len(line) + (2+len(chain))*nodeCost // whose texts the record has, too
	for at < end() || len(novelties) > 0 {
		grown := &chain[0]
		if at < end() {
			n.first, n.below = append(n.first, line[at]), append(n.below, grown)
		} else {
			n.blank, n.after, at, novelties = novelties[0].field, grown, novelties[0].end, novelties[1:]
		}
		grown.text = rest[at-from : end()-from]
		n, chain, at = grown, chain[1:], end()
	}
	n.known = record
}
