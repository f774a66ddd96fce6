package ndjson

import (
	"github.com/imdsgate/imdsgate/policy/eql"
	"github.com/imdsgate/imdsgate/policy/eql/syntax"
)

// NewDecode is the decoder of a query by itself.
func NewDecode(tree *syntax.Query, known eql.Schema, roles Roles) func(line []byte) error {
	fs := newFields(tree, roles, known)
	fs.learn(tree, newSample())
	return newDecoder(fs, roles).decode
}
