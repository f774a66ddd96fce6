package imdstest

import "time"

// A Fault is what goes wrong with one answer. The zero value is nothing.
type Fault struct {
	Delay   time.Duration // before the answer or what is put in its place
	Outcome Outcome

	// Status is an error to answer instead; 0 means the right answer. 417 is answered before the body is read and
	// without Delay or Outcome, as s3fs users saw the service do to "Expect: 100-continue" in 2021.
	Status int

	NoContinue bool // send no 100 Continue, whatever the client expects

	// Raw is sent in the place of the answer, and then the Outcome: the connection is kept if that is Answered.
	Raw []Segment
}

// A Segment is bytes that are sent in one go.
type Segment struct {
	After time.Duration // a pause; without one, the client may read a segment together with the one before
	Data  string
}

// An Outcome is how a request ends.
type Outcome uint8

const (
	// Answered is the right answer, or Fault.Status.
	Answered Outcome = iota
	// Silence never answers and keeps the connection until a while after the client has closed it. This is also what exceeding the
	// packet allowance of a network interface looks like, where packets are dropped and no status is sent
	// (ENA driver documentation, linklocal_allowance_exceeded).
	Silence
	// RST resets the connection, unanswered (SO_LINGER 0, socket(7)).
	RST
	// FIN closes the connection, unanswered.
	FIN
	// Truncated sends the head and the first half of the body, then closes.
	Truncated
)
