package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/imdsgate/imdsgate/attribution"
	"github.com/imdsgate/imdsgate/attribution/witness"
	"github.com/imdsgate/imdsgate/cmd/config"
	"github.com/imdsgate/imdsgate/cmd/report"
	"github.com/imdsgate/imdsgate/control"
	"github.com/imdsgate/imdsgate/event"
	"github.com/imdsgate/imdsgate/event/sink"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/metrics"
	"github.com/imdsgate/imdsgate/policy"
	"github.com/imdsgate/imdsgate/policy/firstseen"
	"github.com/imdsgate/imdsgate/proxy"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
)

// daemon is everything that runs, put together by hand in run.
type daemon struct {
	path string       // of the configuration, as given
	mode *policy.Mode // of the command line
	log  zerolog.Logger

	config    config.Config // at the start
	since     time.Time
	host      atomic.Pointer[event.Host] // as it is called now
	spool     *sink.File
	finder    *attribution.Finder
	actors    atomic.Pointer[attribution.Finder] // the same, for sighted
	witness   *witness.Witness                   // nil below level 2
	required  attribution.Level
	rules     iptables.Config
	engine    *policy.Engine
	decisions decisions
	modes     modes
	bypass    bypass
	started   chan struct{} // closed when the redirect is there
	terms     *firstseen.Store
	counted   *metrics.Requests // nil if nobody can read it
	redirect  *iptables.Redirect
	readings  readings
	culprits  culprits
	files     files
	proxy     *proxy.Proxy
	health    health
	guards    bool // there has been a redirect of ours; guarded by modes.changing

	mu         sync.Mutex      // guards the following
	failure    string          // why the redirect is not installed
	taken      map[bool]bool   // whether clients of this host come here, by whether it is IPv4
	found      iptables.Report // of the redirect, when it was last written
	repairs    uint64
	open       map[string]time.Time // ways past the redirect, and since when
	reattached uint64               // BPF programs
	loaded     time.Time            // the policy in force
	refused    uint64               // policies
	unserved   string               // why metrics are not
	journal    *report.Journal      // nil if it gets nothing; replaced, never changed
	broken     error                // what the last check of attribution found
	level      string
}

// run starts everything in the order in which one needs the other, waits until
// ctx is done, and ends everything in the reverse order.
func (d *daemon) run(ctx context.Context, c config.Config, p *policy.Policy) (err error) {
	d.config, d.since, d.loaded = c, time.Now(), time.Now()
	d.countEvents(c.Metrics)
	if os.Geteuid() == 0 {
		return fmt.Errorf("run as a user of our own, whose sockets the redirect can tell from root's: %w; packaging/systemd/imdsgated.service shows how, and which capabilities it needs", fs.ErrPermission)
	}
	if err := hideMemory(); err != nil {
		return err
	}
	inherited, connector, err := activated()
	if err != nil {
		return err
	}
	if err := checkCapabilities(len(inherited) > 0); err != nil {
		return err
	}
	if err := d.nameHost(c.Events.Layout); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.Events.Path), 0o750); err != nil {
		return fmt.Errorf("make the directory of the event file: %w", readOnly(err))
	}
	if d.spool, err = sink.Open(c.Events, d.host.Load); err != nil {
		return readOnly(err)
	}
	defer func() { err = errors.Join(err, d.spool.Close()) }()

	rules := c.Redirect.WithDefaults()
	rules.UID = uint32(os.Geteuid())
	rules.Cgroup = ownCgroup()
	rules.SocketActivated = len(inherited) > 0
	d.rules = rules

	hangup := make(chan os.Signal, 1) // from now on it waits, instead of ending us
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	d.started = make(chan struct{})
	d.health.due = make(chan struct{}, 1)
	d.engine = policy.NewEngine(p)
	d.tookUp(c, p)
	d.recallDecisions(c.State.Dir)
	d.recallMode(c.State.Dir)
	d.terms = firstseen.Open(c.FirstSeen.Path, d.keptTerms)
	defer func() { d.keptTerms(d.terms.Close()) }()
	d.engine.KeepTerms(d.terms)
	closeAttribution, err := d.openAttribution(c.Attribution, rules, connector)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAttribution()) }()

	listening, err := control.Listen(c.Control.Socket, d.controlGroup(c))
	if err != nil {
		return err
	}
	defer listening.Close() // if nobody is answered there; until then they wait

	rules.Enforce = d.engine.Mode() == policy.Enforce
	if d.redirect, err = iptables.Open(ctx, rules); err != nil {
		return err
	}
	defer d.redirect.Close()

	d.proxy = proxy.New(proxy.Options{
		Endpoints: rules.Endpoints, Mark: rules.Mark, MaxConns: int(c.Limits.Connections), Host: d.host.Load,
		Rate: int(c.Limits.RequestsPerSecond), Burst: int(c.Limits.Burst), DialAhead: int(c.Upstream.DialAhead),
		Forwardable: d.forwardable, Record: d.record,
	}, d.finder, d.engine)
	endReadings := d.readings.begin()
	defer endReadings()
	answering := control.Serve(listening, d.routes())
	defer func() { err = errors.Join(err, answering.Close()) }()
	told := ctx // to end
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	listeners, err := d.listen(ctx, rules, inherited)
	if err != nil {
		return err
	}
	defer d.remove()
	var serving sync.WaitGroup
	defer func() {
		// Who says it a second time will not wait for answers.
		drain, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		if drainErr := d.proxy.Shutdown(drain); drainErr != nil {
			d.log.Warn().Err(drainErr).Msg("drained")
		}
		serving.Wait()
	}()

	defer d.release() // also when start fails half-way
	if err := d.start(ctx); err != nil {
		closeAll(listeners)
		if told.Err() != nil { // in the middle of that, which is no failure
			return nil
		}
		return err
	}
	// Not before the rules exempt us: those that enforce mode has left are about the
	// cgroup of the daemon before, and lead our own connections back to us.
	for _, ln := range listeners {
		serving.Go(func() {
			addr := ln.Addr().(*net.TCPAddr).AddrPort()
			if err := d.proxy.Serve(ln, !addr.Addr().Unmap().IsLoopback()); err != nil {
				fail(fmt.Errorf("serve a port: %w", err))
			}
		})
	}
	if c.Events.Journal {
		d.journal = new(report.Journal)
	}
	closeMetrics, err := d.serveMetrics(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeMetrics()) }()
	close(d.started)
	var background sync.WaitGroup
	defer background.Wait()
	defer fail(nil)
	background.Go(func() { d.keepTime(ctx) })
	background.Go(func() { d.checkAttribution(ctx) })
	background.Go(func() { d.keepHealth(ctx) })
	background.Go(func() { d.reloadOnHangup(ctx, hangup) })
	background.Go(func() { d.watchFiles(ctx) })
	if c.Events.Journal {
		background.Go(func() { d.passToJournal(ctx, filepath.Join(filepath.Dir(c.FirstSeen.Path), "journal-cursor")) })
	}

	if err := freeStart(); err != nil {
		d.log.Debug().Err(err).Msg("memory that only the start has needed is kept")
	}
	sd.SdNotify(false, sd.SdNotifyReady+"\n"+d.statusText())
	d.log.Info().Str("version", version).Stringer("mode", d.engine.Mode()).Int("rules", len(p.Rules())).Int("grants", len(p.Grants())).
		Stringer("attribution", d.finder.Level()).Str("events", c.Events.Path).Msg("serving")
	if d.engine.Mode() == policy.Enforce && d.engine.Policy().Posture != policy.Strict {
		d.log.Warn().Msg("a program that no rule matches gets what it asks for; in posture strict only one with a grant does")
	}
	<-ctx.Done()
	sd.SdNotify(false, sd.SdNotifyStopping)
	if told.Err() == nil {
		return context.Cause(ctx)
	}
	return nil
}

// statusText is what systemctl status shows of us (STATUS= in sd_notify(3)).
func (d *daemon) statusText() string {
	p := d.engine.Policy()
	return fmt.Sprintf("STATUS=%s mode, attribution %s, %d rules, %d grants", d.engine.Mode(), d.finder.Level(), len(p.Rules()), len(p.Grants()))
}

// readOnly says what to do about a file that cannot be written where it is configured.
func readOnly(err error) error {
	if errors.Is(err, unix.EROFS) {
		err = fmt.Errorf("%w: add its directory to the unit, which may write nowhere else: systemctl edit imdsgated, [Service], ReadWritePaths=", err)
	}
	return err
}

// keptTerms says whether what rules have seen outlives a restart. Without that they go
// on, and raise an alert for each client once more after the next.
func (d *daemon) keptTerms(err error) {
	if err != nil {
		d.log.Warn().Err(err).Msg("what rules have seen for the first time is not kept beyond a restart")
	} else {
		d.log.Debug().Msg("what rules have seen for the first time is kept")
	}
}

// passToJournal is a reader of the event file, which knows after a restart where it was.
func (d *daemon) passToJournal(ctx context.Context, state string) {
	failed := func(err error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		now := *d.journal
		switch {
		case errors.Is(err, sink.ErrMissed):
			now.Missed++
		case err != nil:
			now.Error = err.Error()
		default:
			now.Error = ""
		}
		d.journal = &now
	}
	err := sink.Journal(ctx, d.spool.Path(), state, func(err error) {
		failed(err)
		switch {
		case errors.Is(err, sink.ErrMissed):
			d.log.Error().Err(err).Msg("journald does not have all events")
		case errors.Is(err, sink.ErrNotCommitted):
			d.log.Warn().Err(err).Msg("journald has events, and would have some twice")
		case err != nil:
			d.log.Warn().Err(err).Msg("journald takes no events, which wait in the event file")
		default:
			d.log.Info().Msg("events are passed on to journald again as they should be")
		}
	})
	if err != nil {
		failed(err)
		d.log.Error().Err(err).Msg("events are not passed on to journald any more")
	}
}

// journalNow is how events are passed on to journald.
func (d *daemon) journalNow() report.Journal {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.journal == nil {
		return report.Journal{}
	}
	return *d.journal
}

// connectorName is FileDescriptorName= of a socket of the proc connector.
const connectorName = "proc-connector"

// activated takes over what systemd holds for us: the ports, and a socket that hears
// the proc connector (sd_listen_fds_with_names(3)).
func activated() (listeners []net.Listener, connector *os.File, err error) {
	for _, file := range activation.Files(true) {
		if file.Name() == connectorName {
			connector = file
			continue
		}
		ln, err := net.FileListener(file)
		file.Close()
		if err != nil {
			return nil, nil, fmt.Errorf("take over the port %s from systemd: %w", file.Name(), err)
		}
		listeners = append(listeners, ln)
	}
	return listeners, connector, nil
}

// controlGroup is the group that may ask: the one that is configured, or ours
// if we have one of our own.
func (d *daemon) controlGroup(c config.Config) int {
	name := c.Control.Group
	if name == "" {
		name = "imdsgate"
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		if c.Control.Group != "" {
			d.log.Warn().Err(err).Msg("only root may ask on the control socket")
		}
		return -1
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return -1
	}
	return gid
}

// ownCgroup is the unit that systemd started us in, below the cgroup2 mount;
// "" if we are in none, or cgroup2 does not have it.
func ownCgroup() string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/"); ok && path != "" && !strings.HasPrefix(path, "..") {
			return path
		}
	}
	return ""
}

// listen opens the ports, unless systemd holds them for us. Connections wait there until
// they are served.
func (d *daemon) listen(ctx context.Context, rules iptables.Config, inherited []net.Listener) ([]net.Listener, error) {
	if len(inherited) > 0 {
		return inherited, held(ports(rules), inherited)
	}
	if err := d.redirect.EnsureLink(); err != nil {
		return nil, err
	}
	var listeners []net.Listener
	for _, addr := range ports(rules) {
		ln, err := proxy.Listen(ctx, addr)
		// The kernel has no IPv6, or an old one has it off: see proxy.Listen.
		if addr.Addr().Is6() && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)) {
			d.log.Info().Stringer("address", addr).Msg("this host has no IPv6")
			continue
		}
		if err != nil {
			closeAll(listeners)
			return nil, fmt.Errorf("listen on %v, where the redirect leads: %w; is another daemon running?", addr, err)
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

var errPorts = errors.New("systemd holds other ports")

// held refuses what systemd holds for us if it is not where the redirect leads. A host without IPv6 may have none of
// its ports.
func held(want []netip.AddrPort, inherited []net.Listener) error {
	var have []netip.AddrPort
	for _, ln := range inherited {
		if a, ok := ln.Addr().(*net.TCPAddr); ok {
			have = append(have, netip.AddrPortFrom(a.AddrPort().Addr().Unmap(), a.AddrPort().Port()))
		}
	}
	is6 := func(a netip.AddrPort) bool { return a.Addr().Is6() }
	for _, a := range want {
		if !slices.Contains(have, a) && (!is6(a) || slices.ContainsFunc(have, is6)) {
			return fmt.Errorf("%w: the redirect leads to %v, and imdsgated.socket holds %v: give imdsgated.socket the ports and addresses of redirect: in the configuration (systemctl edit imdsgated.socket: an empty ListenStream=, then one for each), or take them out there", errPorts, a, have)
		}
	}
	return nil
}

func closeAll(listeners []net.Listener) {
	for _, ln := range listeners {
		ln.Close()
	}
}

// ports are where the redirect leads.
func ports(rules iptables.Config) []netip.AddrPort {
	var all []netip.AddrPort
	for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		all = append(all, netip.AddrPortFrom(a, rules.HostPort))
	}
	for _, a := range rules.ForwardedAddrs {
		all = append(all, netip.AddrPortFrom(a, rules.ForwardedPort))
	}
	return all
}

// start brings the traffic here, and deals with connections that were there
// before.
func (d *daemon) start(ctx context.Context) error {
	d.modes.changing.Lock()
	defer d.modes.changing.Unlock()
	mode := d.engine.Mode()
	d.state("daemon-started", "info", fmt.Sprintf("imdsgated %s started in %s mode", version, mode), nil)
	if mode == policy.Off {
		_, err := iptables.Remove(ctx)
		d.keepStanding(mode)
		d.returned(false)
		return err
	}
	open := d.wasOpen(ctx)
	older, err := d.bring(ctx, mode)
	if err != nil {
		return err
	}
	if err := d.verify(ctx, mode); err != nil {
		return err
	}
	d.beginWatch()
	if err := d.settle(older); err != nil {
		return err
	}
	d.returned(open)
	d.guards = true
	return nil
}

// verify reads the rules back. At boot others write theirs, too: what is not as it was
// made is made again.
func (d *daemon) verify(ctx context.Context, mode policy.Mode) error {
	const tries = 3
	for try := 1; ; try++ {
		differences, err := d.redirect.Verify(ctx)
		if err != nil {
			return fmt.Errorf("verify the redirect: %w", err)
		}
		if len(differences) == 0 {
			return nil
		}
		if try == tries {
			return fmt.Errorf("the redirect was changed %d times right after it was installed, now: %s; which other tool writes rules?", tries, differences[0])
		}
		if err := d.install(ctx, mode == policy.Enforce); err != nil {
			return err
		}
	}
}

// install makes the redirect, with the guard of enforce mode or without, and remembers
// how that went.
func (d *daemon) install(ctx context.Context, enforce bool) error {
	report, err := d.redirect.InstallFor(ctx, enforce)
	d.mu.Lock()
	d.failure, d.found = "", report
	if err != nil {
		d.failure = err.Error()
	} else {
		d.took(report)
	}
	d.mu.Unlock()
	if err != nil {
		return fmt.Errorf("install the redirect: %w", err)
	}
	d.redirected(true)
	if enforce {
		d.keepStanding(policy.Enforce)
	} else {
		d.keepStanding(policy.Audit)
	}
	for _, w := range report.Warnings {
		d.log.Warn().Msg(w)
	}
	for _, p := range report.Prohibitions {
		d.log.Warn().Msg(p.String())
	}
	d.notTaken(report)
	d.evaded(report.Evasions, event.Actor{}, "")
	d.opened(report)
	if report.Changed {
		d.state("redirect-installed", "change", "the redirect is installed with "+report.Backend.String(), nil)
	}
	return nil
}

// took remembers which of this host's clients are led here. It is called with d.mu held.
func (d *daemon) took(report iptables.Report) {
	d.taken = map[bool]bool{}
	for _, f := range report.Families {
		d.taken[f.Family == iptables.IPv4] = f.Skipped == "" && f.Hooks.Host
	}
}

// release leads no more connections here in audit mode, where nothing of ours may
// stand between a client and the service. In enforce mode the redirect stays: until we
// are back, connections are held by the socket unit, or refused.
func (d *daemon) release() {
	d.modes.changing.Lock() // and nobody changes the mode any more
	d.endWatch()
	mode := d.engine.Mode()
	if mode == policy.Audit {
		d.redirected(false)
		if err := iptables.Release(context.Background()); err != nil {
			d.log.Error().Err(err).Msg("the redirect could not be taken away")
		}
	}
	if d.guards && mode != policy.Off { // or else somebody has remembered an earlier time
		d.leaves(mode == policy.Audit)
	}
	d.state("daemon-stopped", "info", fmt.Sprintf("imdsgated stopped in %s mode", mode), nil)
}

// remove takes away what release has left for the connections that were here.
func (d *daemon) remove() {
	if d.engine.Mode() != policy.Audit {
		return
	}
	if _, err := iptables.Remove(context.Background()); err != nil {
		d.log.Error().Err(err).Msg("the redirect could not be removed")
	}
}

// forwardable asks what the host would have done with a client of another
// namespace. When that cannot be told, audit mode lets him pass.
func (d *daemon) forwardable(client, endpoint netip.AddrPort) error {
	err := d.redirect.Forwardable(client, endpoint)
	if d.engine.Mode() != policy.Enforce && !errors.Is(err, iptables.ErrNotForwarded) {
		return nil
	}
	return err
}

// reloadOnHangup reads the configuration again on SIGHUP.
func (d *daemon) reloadOnHangup(ctx context.Context, hangup <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			sd.SdNotify(false, sd.SdNotifyReloading)
			if changed, err := d.reload(ctx); err == nil && changed.Refused != "" {
				d.log.Error().Str("error", changed.Refused).Msg("the new configuration is refused, the old one stays in force")
			}
			sd.SdNotify(false, sd.SdNotifyReady+"\n"+d.statusText())
		}
	}
}

// reload replaces the policy by the one that the configuration has now, or leaves
// everything as it is, and tells what it did. The error is that of ctx, before the
// daemon has started.
func (d *daemon) reload(ctx context.Context) (report.Reload, error) {
	select {
	case <-d.started:
	case <-ctx.Done():
		return report.Reload{}, ctx.Err()
	}
	d.modes.changing.Lock()
	defer d.modes.changing.Unlock()
	old := d.engine.Policy()
	was := d.modesNow()
	r := report.Reload{Before: policyReport(old), After: policyReport(old), Changed: []string{}}
	c, p, err := d.load()
	if err == nil && p.Mode == policy.Enforce && d.finder.Level() < d.required {
		err = d.tooLow()
	}
	if err == nil {
		err = d.takeUp(ctx, p)
	}
	if err != nil {
		r.Refused = err.Error()
		d.mu.Lock()
		d.refused++
		d.mu.Unlock()
		d.state("policy-rejected", "change", "the new policy is refused, the old one stays in force", err)
		return r, nil
	}
	for _, w := range warnings(p) {
		d.log.Warn().Msg(w)
	}
	d.mu.Lock()
	d.loaded = time.Now()
	d.mu.Unlock()
	d.tookUp(c, p)
	d.admitMark()
	if p.Mode != was.Configured {
		line := fmt.Sprintf("mode %s, was %s", p.Mode, was.Configured)
		if now := d.modesNow(); now.Mode != p.Mode {
			line += fmt.Sprintf("; it begins when %s is over, which %s has set", now.Mode, now.Set.By)
		}
		r.Changed = append(r.Changed, line)
	}
	r.After, r.Changed = policyReport(p), append(r.Changed, old.Changes(p)...)
	r.Restart = d.config.Restart(c)
	for _, key := range r.Restart {
		d.log.Warn().Str("key", key).Msg("what has changed there holds from the next start on")
	}
	d.state("policy-activated", "change", fmt.Sprintf("a policy with %d rules and %d grants is in force, was %s", len(p.Rules()), len(p.Grants()), old.Digest), nil)
	d.log.Info().Int("rules", len(p.Rules())).Int("grants", len(p.Grants())).Int("changes", len(r.Changed)).Str("digest", p.Digest).Msg("reloaded")
	return r, nil
}

// takeUp puts a policy in force, with its mode, unless an operator has set one for a
// time: then the new one comes when that is over. It is called with modes.changing held.
func (d *daemon) takeUp(ctx context.Context, p *policy.Policy) error {
	m := &d.modes
	now := d.modesNow()
	switch {
	case p.Mode == now.Configured:
		d.engine.SetPolicy(p)
	case now.Set != nil && !now.Set.Until.IsZero():
		d.engine.SetPolicy(p)
		d.state("mode-configured", "change", fmt.Sprintf("the configuration asks for %s mode, which begins when the one that %s has set is over", p.Mode, now.Set.By), nil)
	default:
		if err := d.goTo(ctx, p.Mode, nil, p, event.Actor{}, "the configuration asks for it"); err != nil {
			return err
		}
	}
	m.mu.Lock()
	m.configured = p.Mode
	m.mu.Unlock()
	d.keepStanding(d.engine.Mode())
	return nil
}

// state records something about the daemon itself.
func (d *daemon) state(action, kind, message string, failure error) {
	d.change(event.State{Action: action, Type: kind, Message: message}, failure)
}

// change records something about the daemon itself, with what else there is to say.
func (d *daemon) change(s event.State, failure error) {
	d.record(d.changed(s, failure))
}

func (d *daemon) changed(s event.State, failure error) *event.Event {
	p := d.engine.Policy()
	s.Mode, s.Policy, s.Level = d.engine.Mode().String(), p.Digest, d.levelNow()
	s.Rules, s.Grants = int64(len(p.Rules())), int64(len(p.Grants()))
	if failure != nil {
		s.Failed, s.Reason = true, strings.TrimPrefix(s.Reason+"; "+failure.Error(), "; ")
	}
	return &event.Event{Kind: event.Lifecycle, Host: d.host.Load(), Time: time.Now(), State: s}
}
