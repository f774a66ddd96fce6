package event

import (
	"bytes"
	"unicode/utf8"

	"github.com/imdsgate/imdsgate/event/scan"
)

// scanner reads what is in documents. Most of one is as it was in a document before, and
// is recognised by its bytes.
type scanner struct{ scan.JSON }

// maxDepth bounds objects in objects. Documents have five.
const maxDepth = 64

func scannerOf(text []byte) scanner { return scanner{scan.JSON{Line: text, MaxDepth: maxDepth}} }

// whole reports whether a text in a document is what it was when it was observed:
// nothing in it was redacted, cut, or no UTF-8.
func whole(text []byte) bool {
	if len(text) > maxText-utf8.UTFMax {
		return false
	}
	return !bytes.Contains(text, []byte(redacted)) && !bytes.Contains(text, []byte("\uFFFD"))
}
