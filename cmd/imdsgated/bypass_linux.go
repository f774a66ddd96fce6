package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/diag"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
)

// bypass is what is known of connections that do not come here.
type bypass struct {
	mu     sync.Mutex      // held by who looks for them
	told   map[uint64]bool // of which there was an event, by their cookies
	making map[uint64]bool // that may turn out to be some
}

// settle deals with connections that are older than the redirect, and with those that
// were made while it was installed.
func (d *daemon) settle(older []diag.Socket) error {
	d.bypass.mu.Lock()
	defer d.bypass.mu.Unlock()
	return d.direct(older, nil, "is older than the redirect and does not pass through it")
}

// settleAgain is settle after a repair: for connections that were made meanwhile, and for
// those that the tracker has lost with the rules. Their clients would wait for an answer
// that was sent and cannot come. Of our own connections those are aborted which have lost
// their port: the proxy asks again on another, unless an answer has begun.
func (d *daemon) settleAgain(lost []iptables.Lost) error {
	for _, l := range lost {
		err := d.finder.AbortTuple(diag.Tuple{Local: l.Local, Remote: l.Remote})
		if err != nil { // mostly it has ended meanwhile
			d.log.Debug().Err(err).Msg("a connection that has lost its port with the rules was not aborted")
			continue
		}
		d.log.Info().Stringer("local", l.Local).Msg("a connection that has lost its port with the rules was aborted")
	}
	d.bypass.mu.Lock()
	defer d.bypass.mu.Unlock()
	return d.direct(nil, nil, "was made while the rules were not there, or was cut off when they went")
}

// settleMade is settle for connections that were being made then. The kernel gives one up
// after two minutes (tcp_syn_retries of ip-sysctl.rst). While the mode changes it does
// nothing: on the way from enforce to off every connection is direct, and is to be.
func (d *daemon) settleMade() error {
	if !d.modes.changing.TryLock() {
		return nil
	}
	defer d.modes.changing.Unlock()
	b := &d.bypass
	b.mu.Lock()
	defer b.mu.Unlock()
	if d.engine.Mode() == policy.Off {
		b.making = nil
	}
	if len(b.making) == 0 {
		return nil
	}
	before := b.making
	err := d.direct(nil, before, "had begun before the rules were there and does not pass through them")
	maps.DeleteFunc(b.making, func(cookie uint64, _ bool) bool { return !before[cookie] })
	return err
}

// direct looks for connections that do not come here, those with the cookies alone if some
// are given, tells once of each, and in enforce mode aborts them. It is called with
// bypass.mu held.
func (d *daemon) direct(older []diag.Socket, only map[uint64]bool, why string) error {
	found, making, err := d.finder.Direct(d.rules.Endpoints, ports(d.rules), d.rules.UID)
	b := &d.bypass
	if err == nil {
		b.making = make(map[uint64]bool)
	}
	for _, s := range making {
		b.making[s.Cookie] = true
	}
	told := make(map[uint64]bool)
	var all []bypassing
	for _, s := range slices.Concat(older, found) {
		switch {
		case told[s.Cookie]: // older, and found again
			continue
		case only != nil && !only[s.Cookie]:
			if b.told[s.Cookie] {
				told[s.Cookie] = true
			}
			continue
		case !b.told[s.Cookie]:
			all = append(all, bypassing{Socket: s})
		case d.engine.Mode() == policy.Enforce && d.finder.Abort(s) == nil: // in audit mode it was left alone
			all = append(all, bypassing{s, true})
		}
		told[s.Cookie] = true
	}
	one := min(len(all), maxDirect)
	ctx, cancel := context.WithTimeout(context.Background(), nameWithin)
	defer cancel()
	for _, s := range all[:one] {
		d.tellDirect(ctx, s, why)
	}
	d.tellRest(all[one:], why)
	if err == nil {
		b.told = told
	}
	return err
}

const (
	// nameWithin is how long a look at connections may take to find out who has them.
	nameWithin = 500 * time.Millisecond
	// maxDirect is of how many connections one look tells one by one. Any user can have
	// thousands, and a finding for each would drive others' events out of the file.
	maxDirect = 32
)

// bypassing is a connection that does not come here.
type bypassing struct {
	diag.Socket
	aborted bool // before it is told
}

func (d *daemon) abort(s bypassing) error {
	if s.aborted {
		return nil
	}
	return d.finder.Abort(s.Socket)
}

// tellDirect tells of one connection that does not come here. Who has it is looked up as
// long as there is time for that.
func (d *daemon) tellDirect(ctx context.Context, s bypassing, why string) {
	by, who := event.Actor{UserID: strconv.FormatUint(uint64(s.UID), 10)}, fmt.Sprintf("a process of uid %d", s.UID)
	if ctx.Err() == nil && !s.aborted {
		l := d.finder.Find(attribution.Conn{Client: s.Local, Endpoint: s.Remote})
		if o := l.Complete(ctx, true); o.Attributed() {
			by, who = named(o.Subjects[0])
		}
		l.Close()
	}
	message := fmt.Sprintf("a connection of %s to %v %s", who, s.Remote, why)
	var err error
	if d.engine.Mode() == policy.Enforce {
		if err = d.abort(s); err == nil {
			message += "; it was aborted"
		}
	}
	d.finding("direct-imds-connection", event.State{Actor: by, Message: message}, err)
}

// tellRest is tellDirect for what is too many to be told one by one.
func (d *daemon) tellRest(rest []bypassing, why string) {
	if len(rest) == 0 {
		return
	}
	message := fmt.Sprintf("connections to the service that are not told one by one: %d, each of which %s", len(rest), why)
	var err error
	if d.engine.Mode() == policy.Enforce {
		aborted := 0
		for _, s := range rest {
			if failed := d.abort(s); failed != nil {
				err = failed
			} else {
				aborted++
			}
		}
		message += fmt.Sprintf("; aborted: %d", aborted)
	}
	d.finding("direct-imds-connection", event.State{Message: message}, err)
}
