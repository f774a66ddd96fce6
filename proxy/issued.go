package proxy

import (
	"time"

	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/proxy/http1"
	"github.com/imdsgate/imdsgate/proxy/imds"
)

// handout is what an answer may hand out.
type handout uint8

const (
	nothing handout = iota
	aToken
	credentials
)

// maxIssued bounds what is kept of an answer to find the key in it that is handed
// out. Credentials take 1.5 KiB.
const maxIssued = 16 << 10

// hands says what the answer to a request may hand out. A path that is in no
// catalogue may lead anywhere, and who asks for a document in parts gets the whole.
func hands(r *http1.Request, class imds.Class, head *response) handout {
	whole, part := head.status == 200, head.status == 206
	switch {
	case whole && (class == imds.Token || class == imds.Unknown && r.Method == "PUT"):
		return aToken
	case (whole || part) && (class == imds.Credentials || class == imds.Unknown):
		return credentials
	}
	return nothing
}

// room is where an answer's content is kept until it has been read.
func (h handout) room(head *response) []byte {
	size := int64(0)
	switch h {
	case aToken:
		size = maxToken
	case credentials:
		size = maxIssued
	}
	if head.length >= 0 {
		size = min(size, head.length)
	}
	return make([]byte, 0, size)
}

// issued is what may be known of what an answer has handed out.
type issued struct {
	imds.Issued
	part  bool // of a document, in which the id is not
	token tokenSum
	lives time.Duration // of the token; 0 if there is none
}

// issued reads what an answer has handed out, and forgets the answer.
func (p *Proxy) issued(what handout, head *response, b *body) (i issued) {
	defer clear(b.kept)
	switch what {
	case aToken:
		if b.cut || !b.ended && head.length != untilEOF {
			break
		}
		if sum, ok := p.tokens.sum(b.kept); ok {
			i.token, i.lives = sum, maxTokenAge
			if head.ttl > 0 {
				i.lives = min(i.lives, time.Duration(head.ttl)*time.Second)
			}
		}
	case credentials:
		var ok bool
		if i.Issued, ok = imds.ParseIssued(b.kept); !ok {
			// Half of a document has the key, too, if it is the right half.
			i.Issued, ok = imds.FindIssued(b.kept)
		}
		i.part = !ok && head.status == 206
	}
	return i
}

// remember keeps whom an answer has handed something out to.
func (p *Proxy) remember(o owner, ev *event.Event, a answer) {
	if a.issued.lives > 0 {
		p.tokens.issued(o, a.issued.token, ev, a.end, a.issued.lives)
	}
	if a.issued.AccessKeyID != "" || a.issued.part && ev.Request.Class == imds.Credentials.String() {
		p.ledger.add(o, ev, a.end)
	}
}
