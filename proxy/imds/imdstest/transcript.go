package imdstest

import (
	"bytes"
	"net"
	"net/netip"
	"sync"
)

// A Transcript is what has crossed the wire since Serve or Reset.
type Transcript struct {
	Connections []Connection // in the order in which they were accepted
	Lost        int64        // bytes and connections that are missing because TranscriptLimit was reached
}

// A Connection is one client connection, byte for byte.
type Connection struct {
	Local, Remote netip.AddrPort
	Chunks        []Chunk // in order; neighbours go in opposite directions
	Closed        bool    // the emulator has closed its socket
}

// A Chunk is bytes that went in one direction.
type Chunk struct {
	Sent bool // by the emulator
	Data []byte
}

// Received returns everything that the client sent.
func (c *Connection) Received() []byte { return c.direction(false) }

// Sent returns everything that the emulator sent.
func (c *Connection) Sent() []byte { return c.direction(true) }

func (c *Connection) direction(sent bool) []byte {
	var all []byte
	for _, chunk := range c.Chunks {
		if chunk.Sent == sent {
			all = append(all, chunk.Data...)
		}
	}
	return all
}

// Transcript returns a copy of what has crossed the wire. An answer that has arrived is in it, with its request.
func (s *Server) Transcript() Transcript { return s.log.copy() }

const (
	defaultTranscriptLimit = 16 << 20
	recordCost             = 256 // bytes, of a connection without its data
	chunkCost              = 64
)

// A transcript keeps the beginning: when the limit is reached, what follows is counted and not kept.
type transcript struct {
	mu      sync.Mutex // guards everything, the records included
	off     bool
	left    int // bytes until the limit
	lost    int64
	records []*record
}

// A record is a connection's part of a transcript. A nil record takes everything and keeps nothing.
type record struct {
	of *transcript
	Connection
}

func (t *transcript) reset(cfg Config) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.off, t.left, t.lost, t.records = cfg.NoTranscript, cfg.TranscriptLimit, 0, nil
	if t.left == 0 {
		t.left = defaultTranscriptLimit
	}
}

func (t *transcript) open(nc net.Conn) *record {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.off {
		return nil
	}
	if t.left < recordCost {
		t.lost++
		return nil
	}
	t.left -= recordCost
	r := &record{of: t, Connection: Connection{Local: addrPort(nc.LocalAddr()), Remote: addrPort(nc.RemoteAddr())}}
	t.records = append(t.records, r)
	return r
}

func (r *record) add(sent bool, data []byte) {
	if r == nil || len(data) == 0 {
		return
	}
	t := r.of
	t.mu.Lock()
	defer t.mu.Unlock()
	cost := len(data)
	last := len(r.Chunks) - 1
	if last < 0 || r.Chunks[last].Sent != sent {
		cost += chunkCost
	}
	if cost > t.left {
		t.lost += int64(len(data))
		t.left = 0 // a later, smaller piece would make a hole that looks like none
		return
	}
	t.left -= cost
	if last >= 0 && r.Chunks[last].Sent == sent {
		r.Chunks[last].Data = append(r.Chunks[last].Data, data...)
		return
	}
	r.Chunks = append(r.Chunks, Chunk{Sent: sent, Data: bytes.Clone(data)})
}

// unsent takes back the last n bytes added, which could not be sent.
func (r *record) unsent(n int) {
	if r == nil || n == 0 {
		return
	}
	r.of.mu.Lock()
	defer r.of.mu.Unlock()
	if last := len(r.Chunks) - 1; last >= 0 && r.Chunks[last].Sent {
		data := r.Chunks[last].Data
		r.Chunks[last].Data = data[:max(0, len(data)-n)]
	}
}

func (r *record) close() {
	if r == nil {
		return
	}
	r.of.mu.Lock()
	defer r.of.mu.Unlock()
	r.Closed = true
}

func (t *transcript) copy() Transcript {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := Transcript{Lost: t.lost}
	for _, r := range t.records {
		c := r.Connection
		c.Chunks = make([]Chunk, len(r.Chunks))
		for i, chunk := range r.Chunks {
			c.Chunks[i] = Chunk{Sent: chunk.Sent, Data: bytes.Clone(chunk.Data)}
		}
		out.Connections = append(out.Connections, c)
	}
	return out
}

func addrPort(a net.Addr) netip.AddrPort {
	if tcp, ok := a.(*net.TCPAddr); ok {
		ap := tcp.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
