// Package syntax reads queries written in EQL, the Event Query Language of
// Elasticsearch, and prints them.
//
// Parse turns the text of a query into a tree, or says what is wrong with it:
// every fault that its author can mend in one sitting, each with its line, a
// caret under it and, where one can be guessed, what was meant. It takes the
// whole grammar: event queries, sequences, samples and pipes. What parses may
// still make no sense: names of fields and functions, types and arity are the
// business of package eql, which compiles a tree.
//
// Format prints a tree in the one canonical way; what it prints parses to an
// equal tree, positions aside.
//
// Text from anywhere may be given to Parse: it is bounded in size and depth.
// Dialects other than Elasticsearch's (single-quoted strings, joins, lineage,
// array indices, pipes beyond head and tail) are recognised only to be refused
// with a reason.
package syntax

import (
	"strconv"
	"time"
)

// Pos is a place in the text of a query. Lines and columns count from 1, columns
// in characters.
type Pos struct{ Line, Col int }

// Position makes whatever embeds a Pos a Node.
func (p Pos) Position() Pos { return p }

func (p Pos) String() string { return strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Col) }

func (p Pos) before(q Pos) bool { return p.Line < q.Line || p.Line == q.Line && p.Col < q.Col }

// A Node is a part of a query.
type Node interface {
	// Position is where the part begins.
	Position() Pos
}

// Query is the root of a tree.
type Query struct {
	Pos
	File   string // as given to Parse
	Source string // as given to Parse
	Body   Body
	Pipes  []*Pipe
}

// Body is an *Event, a *Sequence or a *Sample.
type Body interface {
	Node
	body()
}

// Event is "process where X": one event of a category that satisfies a condition.
type Event struct {
	Pos
	Any      bool   // "any where": whatever the category, or without one
	Category string // if not Any
	Where    Expr
}

// Sequence is events in order of time with equal keys.
type Sequence struct {
	Pos
	By      []*Field
	MaxSpan time.Duration // from the first event to the last, inclusive; zero: no limit
	SpanPos Pos           // of MaxSpan
	Items   []*Item
	Until   *Item // nil if absent
}

// Sample is events in any order with equal keys.
type Sample struct {
	Pos
	By    []*Field
	Items []*Item
}

// Item is one bracketed event of a sequence or a sample.
type Item struct {
	Pos
	Missing bool // "![...]"
	Event   *Event
	By      []*Field
	Runs    int // 1 unless "with runs=N" says more
}

// Pipe is "| head 3" or "| tail 3".
type Pipe struct {
	Pos
	Name  string
	Count int
}

// An Expr is a condition or a part of one.
type Expr interface {
	Node
	expr()
}

// Logic is a chain of two or more operands joined by And, or by Or.
type Logic struct {
	Pos
	Op Op
	X  []Expr
}

// Not is "not X".
type Not struct {
	Pos
	X Expr
}

// Binary is a comparison or an arithmetic operation.
type Binary struct {
	Pos
	Op    Op
	OpPos Pos
	X, Y  Expr
}

// Unary is a sign, Add or Sub, before a number.
type Unary struct {
	Pos
	Op Op
	X  Expr
}

// In is "X in (...)" with its three variants.
type In struct {
	Pos
	OpPos Pos
	X     Expr
	Not   bool // "not in"
	Fold  bool // "in~"
	List  []Expr
}

// Match is a comparison of a string with patterns: Colon, Like, LikeFold, Regex
// or RegexFold. It holds if any of the patterns does.
type Match struct {
	Pos
	Op       Op
	OpPos    Pos
	X        Expr
	Patterns []*Literal
}

// Call is a call of a function.
type Call struct {
	Pos
	Name string // as written; functions are found whatever its case
	Fold bool   // "name~(...)"
	Args []Expr
}

// Field is a field of the event.
type Field struct {
	Pos
	Name     string // the path, dots included, without backquotes
	Optional bool   // "?name"
}

// Literal is a constant: string, int64, float64, bool, or nil for null.
type Literal struct {
	Pos
	Value any
}

func (*Event) body()    {}
func (*Sequence) body() {}
func (*Sample) body()   {}

func (*Logic) expr()   {}
func (*Not) expr()     {}
func (*Binary) expr()  {}
func (*Unary) expr()   {}
func (*In) expr()      {}
func (*Match) expr()   {}
func (*Call) expr()    {}
func (*Field) expr()   {}
func (*Literal) expr() {}

// Op is an operator.
type Op uint8

// The operators. A sign is an Add or a Sub.
const (
	Or Op = 1 + iota
	And
	Eq
	Ne
	Lt
	Le
	Gt
	Ge
	Add
	Sub
	Mul
	Div
	Mod
	Colon
	Like
	LikeFold
	Regex
	RegexFold
)

func (op Op) String() string {
	return [...]string{"?", "or", "and", "==", "!=", "<", "<=", ">", ">=", "+", "-", "*", "/", "%",
		":", "like", "like~", "regex", "regex~"}[op]
}

// Walk calls f for n and then, if f returns true, for the parts of n, from left
// to right.
func Walk(n Node, f func(Node) bool) {
	if !f(n) {
		return
	}
	switch n := n.(type) {
	case *Query:
		Walk(n.Body, f)
		walk(n.Pipes, f)
	case *Event:
		Walk(n.Where, f)
	case *Sequence:
		walk(n.By, f)
		walk(n.Items, f)
		if n.Until != nil {
			Walk(n.Until, f)
		}
	case *Sample:
		walk(n.By, f)
		walk(n.Items, f)
	case *Item:
		Walk(n.Event, f)
		walk(n.By, f)
	case *Logic:
		walk(n.X, f)
	case *Not:
		Walk(n.X, f)
	case *Binary:
		Walk(n.X, f)
		Walk(n.Y, f)
	case *Unary:
		Walk(n.X, f)
	case *In:
		Walk(n.X, f)
		walk(n.List, f)
	case *Match:
		Walk(n.X, f)
		walk(n.Patterns, f)
	case *Call:
		walk(n.Args, f)
	}
}

func walk[N Node](ns []N, f func(Node) bool) {
	for _, n := range ns {
		Walk(n, f)
	}
}
