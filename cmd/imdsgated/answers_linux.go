package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/proxy"
	"github.com/prometheus/procfs"
)

// routes are what an operator may ask for.
func (d *daemon) routes() map[string]control.Route {
	return map[string]control.Route{
		"status":      {Answer: d.status},
		"explain":     {Answer: d.explain},
		"whois":       {Answer: d.whois},
		"events":      {Stream: d.events},
		"credentials": {Answer: d.credentials},
		"decisions":   {Answer: d.listDecisions},
		"mode":        {Answer: d.answerMode},
		"hop-limit": {Answer: d.ofInstance(func(ctx context.Context, e netip.AddrPort) (any, error) {
			beyond, err := d.proxy.BeyondHost(ctx, e)
			return report.HopLimit{Beyond: beyond}, err
		})},
		"imds-v1": {Answer: d.ofInstance(func(ctx context.Context, e netip.AddrPort) (any, error) {
			answered, err := d.proxy.WithoutToken(ctx, e)
			return report.IMDSv1{Answered: answered}, err
		})},

		"decisions/add":    {Change: true, Answer: d.addDecision},
		"decisions/delete": {Change: true, Answer: d.deleteDecisions},
		"mode/set":         {Change: true, Answer: d.setMode},
		"reload": {Change: true, Answer: func(ctx context.Context, _ control.Question) (any, error) {
			return d.reload(ctx)
		}},
	}
}

func (d *daemon) status(ctx context.Context, _ control.Question) (any, error) {
	p := d.engine.Policy()
	s := report.Status{
		Version: version, PID: os.Getpid(), Since: d.since, Mode: d.engine.Mode().String(),
		Modes: d.modesNow(), Decisions: d.decisionsNow(),
		Policy:      policyReport(p),
		Attribution: d.attributionStatus(),
		Events:      report.Events{Path: d.spool.Path(), Stats: d.spool.Stats()},
		FirstSeen:   d.terms.Stats(),
		Files:       d.files.status(),

		SequencesEvicted: d.engine.Evicted(),
	}
	n := d.proxy.Stats()
	s.Requests = report.Requests{
		Open: d.proxy.Open(), Connections: n.Connections.Load(), Requests: n.Requests.Load(), Denied: n.Denied.Load(),
		WouldDeny: n.WouldDeny.Load(), Malformed: n.Malformed.Load(), NotRedirected: n.NotRedirected.Load(),
		NotForwardable: n.NotForwardable.Load(), UpstreamFailed: n.UpstreamFailed.Load(),
		Evicted: n.Evicted.Load(), Throttled: n.Throttled.Load(), Looped: n.Looped.Load(),
		DialledAhead: d.proxy.Ahead().Made.Load(), DialledUnused: d.proxy.Ahead().Unused.Load(),
	}
	s.Requests.Tokens, s.Requests.Forgotten = d.proxy.Tokens()
	s.Metrics.Listen = d.config.Metrics.Listen.String()
	d.mu.Lock()
	s.Metrics.Error = d.unserved
	s.Events.Journal = d.journal
	d.mu.Unlock()
	var err error
	if s.Requests.LinkLocalExceeded, err = allowanceExceeded("ena", "linklocal_allowance_exceeded"); err != nil {
		d.log.Warn().Err(err).Msg("packets that the network interfaces dropped are not known")
	}
	s.Redirect = d.redirectStatus(ctx)
	s.SelfTest = d.healthNow()
	s.Process.UID, s.Process.Goroutines = os.Geteuid(), runtime.NumGoroutine()
	if self, err := procfs.Self(); err == nil {
		if stat, err := self.Stat(); err == nil {
			s.Process.ResidentMB = uint64(stat.ResidentMemory()) >> 20
		}
		s.Process.Descriptors, _ = self.FileDescriptorsLen()
	}
	return s, nil
}

// expiresSoon is when an operator should think about a grant that ends.
const expiresSoon = 14 * 24 * time.Hour

func policyReport(p *policy.Policy) report.Policy {
	r := report.Policy{Name: p.Name, Revision: p.Revision, Posture: p.Posture.String(), Digest: p.Digest, Skipped: len(p.Skipped)}
	for _, loaded := range p.Rules() {
		rule := report.Rule{ID: loaded.ID, Name: loaded.Name, Version: loaded.Version, File: loaded.File}
		for _, x := range loaded.Excluded {
			rule.Exclusions = append(rule.Exclusions, x.Text)
		}
		r.Rules = append(r.Rules, rule)
	}
	for _, g := range p.Grants() {
		r.Grants = append(r.Grants, g.Name)
		if end := g.Expires.Time; !end.IsZero() && time.Until(end) < expiresSoon {
			r.Expiring = append(r.Expiring, report.Expiring{Name: g.Name, Expires: end.Format(time.DateOnly)})
		}
	}
	for _, d := range p.Denies() {
		r.Denies = append(r.Denies, d.Name)
	}
	return r
}

// redirectStatus reads the rules as they are now.
func (d *daemon) redirectStatus(ctx context.Context) report.Redirect {
	d.mu.Lock()
	r := report.Redirect{Error: d.failure, Repairs: d.repairs}
	d.mu.Unlock()
	found, err := d.readings.read(ctx, d.redirect.Status)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	if d.engine.Mode() == policy.Off {
		r.Notes = append(r.Notes, "removed: the mode is off")
		r.Backend = found.Backend.String()
		return r
	}
	for _, difference := range found.Differences {
		r.Differences = append(r.Differences, difference.String())
	}
	r.Backend = found.Backend.String()
	for _, f := range found.Families {
		switch {
		case f.Skipped != "":
			r.Notes = append(r.Notes, fmt.Sprintf("%s: %s", f.Family, f.Skipped))
		default:
			if f.Hooks.Host {
				r.Covered = append(r.Covered, f.Family.String()+" host")
			}
			if f.Hooks.Forwarded {
				r.Covered = append(r.Covered, f.Family.String()+" forwarded")
			}
		}
		if n := f.Guard.Host + f.Guard.Forwarded + f.Guard.Listener; n > 0 {
			r.Notes = append(r.Notes, fmt.Sprintf("%s guard: %d packets past the redirect from this host, %d forwarded, %d to our ports without it",
				f.Family, f.Guard.Host, f.Guard.Forwarded, f.Guard.Listener))
		}
	}
	for _, lock := range found.Locks {
		r.Locks = append(r.Locks, report.Foreign{Message: lock.Message(), Fix: lock.Fix()})
	}
	for _, e := range found.Evasions {
		r.Evasions = append(r.Evasions, report.Foreign{Message: e.Message(), Fix: e.Fix()})
	}
	for _, w := range found.Ways {
		r.Ways = append(r.Ways, w.String())
	}
	r.Contested = d.contest()
	r.Notes = append(r.Notes, found.Warnings...)
	for _, p := range found.Prohibitions {
		r.Notes = append(r.Notes, p.String())
	}
	if found.Conntrack.First {
		r.Notes = append(r.Notes, fmt.Sprintf("connection tracking is on for our rules only: %d sockets, room for %d", found.Conntrack.Sockets, found.Conntrack.Max))
	}
	r.Installed = len(r.Differences) == 0 && len(r.Covered) > 0
	return r
}

func (d *daemon) events(ctx context.Context, q control.Question, line func([]byte) error) error {
	last := 20
	switch v := q.Args.Get("last"); v {
	case "":
	case "all":
		last = sink.All
	default:
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 {
			return fmt.Errorf("%w: %q is not a number of events", control.ErrBadQuestion, v)
		}
		last = n
	}
	return sink.Tail(ctx, d.spool.Path(), last, q.Args.Get("follow") == "true", line)
}

// credentials tells which keys were handed out, or to whom the one that is named was.
func (d *daemon) credentials(_ context.Context, q control.Question) (any, error) {
	c := report.Credentials{Since: d.since, Issued: []report.Issuance{}}
	lines, forgotten := d.proxy.Issued(q.Args.Get("key"))
	c.Forgotten = forgotten
	for _, l := range lines {
		i := report.Issuance{
			AccessKeyID: l.AccessKeyID, First: l.First, Last: l.Last, Count: l.Count, Source: l.Source.String(), To: []report.Recipient{},
			Mode: l.Decision.Mode, Verdict: l.Decision.Verdict.String(), WouldBe: l.Decision.WouldBe.String(), Grant: l.Decision.Grant, Reason: l.Decision.Reason,
		}
		if !l.Expiration.IsZero() {
			i.Expiration = &l.Expiration
		}
		if r := l.Decision.Rule; r != nil {
			i.Rule, i.RuleID = r.Name, r.ID
		}
		for _, r := range l.To {
			i.To = append(i.To, report.Recipient(r))
		}
		c.Issued = append(c.Issued, i)
	}
	return c, nil
}

// ofInstance asks the instance's own service, at the first of its endpoints that answers.
func (d *daemon) ofInstance(ask func(context.Context, netip.AddrPort) (any, error)) func(context.Context, control.Question) (any, error) {
	return func(ctx context.Context, _ control.Question) (answer any, err error) {
		err = fmt.Errorf("%w: no endpoint of the instance is configured", control.ErrBadQuestion)
		for _, e := range (iptables.Config{}).WithDefaults().Endpoints {
			if !slices.Contains(d.rules.Endpoints, e) {
				continue
			}
			if answer, err = ask(ctx, e); err == nil {
				return answer, nil
			}
		}
		return nil, err
	}
}

// explain judges the requests that a process could make.
func (d *daemon) explain(_ context.Context, q control.Question) (any, error) {
	pid, err := strconv.Atoi(q.Args.Get("pid"))
	if err != nil || pid <= 0 {
		return nil, fmt.Errorf("%w: %q is not the number of a process", control.ErrBadQuestion, q.Args.Get("pid"))
	}
	found, err := d.finder.Process(pid)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no process %d", control.ErrBadQuestion, pid)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: process %d cannot be read: %w", control.ErrBadQuestion, pid, err)
	}
	path := q.Args.Get("path")
	if path == "" {
		path = report.CredentialsPath
	}
	ask := report.Ask(q.Args.Get("method"), path, q.Args.Get("v1") != "true")
	ev := report.Asking(d.host.Load(), proxy.Process(found), ask)
	ev.Time, ev.Connection.Accepted, ev.Attribution.Level = time.Now(), time.Now(), d.finder.Level().String()
	e := report.Explain(d.engine, ev)
	e.Verdicts = report.Classes(d.engine, ev)
	for _, was := range d.finder.Past(found) {
		e.Past = append(e.Past, report.SubjectOf(proxy.Process(was)))
	}
	return e, nil
}

// whois attributes one connection, for a person.
func (d *daemon) whois(ctx context.Context, q control.Question) (any, error) {
	client, err := netip.ParseAddrPort(q.Args.Get("client"))
	if err != nil {
		return nil, fmt.Errorf("%w: %q is not an address with a port", control.ErrBadQuestion, q.Args.Get("client"))
	}
	client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
	ctx, cancel := context.WithTimeout(ctx, whoisTakes)
	defer cancel()
	var own, none error
	for _, endpoint := range d.rules.Endpoints {
		if endpoint.Addr().Is4() != client.Addr().Is4() {
			continue
		}
		if asker, ours := d.proxy.For(client, endpoint); ours {
			own = fmt.Errorf("%w: %v is our own connection to the service, for the client %v: ask for that", control.ErrBadQuestion, client, asker)
			continue
		}
		for _, forwarded := range []bool{false, true} {
			l := d.finder.Find(attribution.Conn{Client: client, Endpoint: endpoint, Forwarded: forwarded})
			o := l.Complete(ctx, true)
			l.Close()
			if o.Socket.Inode == 0 {
				none = fmt.Errorf("%w: no connection from %v to the metadata service", control.ErrBadQuestion, client)
				if o.Err != nil {
					none = fmt.Errorf("find the connection from %v: %w", client, o.Err)
				}
				continue
			}
			w := report.Whois{
				Client: client.String(), Endpoint: endpoint.String(), Forwarded: forwarded, Level: o.Level.String(),
				Confidence: o.Confidence().String(), Via: o.Via, Complete: o.Complete, Reason: o.Reason.String(), Took: o.Took,
				Inode: o.Socket.Inode, Cookie: o.Socket.Cookie,
			}
			if o.Err != nil {
				w.Error = o.Err.Error()
			}
			for i, found := range o.Subjects {
				p := proxy.Process(found)
				w.Subjects = append(w.Subjects, report.Holder{Role: o.Roles[i].String(), Subject: report.SubjectOf(p), Ancestors: report.AncestorsOf(p)})
			}
			return w, nil
		}
	}
	return nil, cmp.Or(own, none, fmt.Errorf("%w: the service has no endpoint for clients like %v", control.ErrBadQuestion, client))
}

// whoisTakes bounds the wait of a person for a search of the host.
const whoisTakes = 5 * time.Second
