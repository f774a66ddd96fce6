package ndjson

import (
	"bytes"
	"encoding/json"
	"unicode/utf8"

	"github.com/imdsgate/imdsgate/event/scan"
)

// maxDepth is that of encoding/json.
const maxDepth = 10_000

// walk begins at the front of a line. Most of it is of no interest to a query, so most of
// the time of a search goes into passing over it.
func walk(line []byte) scan.JSON { return scan.JSON{Line: line, MaxDepth: maxDepth} }

// unquote reads a JSON string, which is valid.
func unquote(raw []byte) string {
	if bytes.IndexByte(raw, '\\') >= 0 {
		var text string
		json.Unmarshal(raw, &text)
		return text
	}
	text := view(raw[1 : len(raw)-1])
	if !utf8.ValidString(text) {
		return string([]rune(text))
	}
	return text
}
