package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Privileges, tried with iptables 1.8.9 on Linux 6.18 as an ordinary user with ambient capabilities:
//
//	                              nft                    legacy
//	CAP_NET_ADMIN                 everything             nothing
//	+ CAP_NET_RAW                 everything             nothing: cannot open /run/xtables.lock (mode 0600, root's)
//	+ CAP_DAC_READ_SEARCH         everything             everything, if the lock file exists
//
// For legacy CAP_NET_RAW opens its raw socket and CAP_DAC_READ_SEARCH the lock, which is only read, and
// /proc/net/ip_tables_names (mode 0440). Making a missing lock file would take write access to /run, so a unit without
// root needs a tmpfiles.d line "f /run/xtables.lock 0600 root root". A lock file of one's own (XTABLES_LOCKFILE) works
// and is wrong: legacy rewrites whole tables, and two writers under different locks undo each other's rules. Without
// CAP_DAC_READ_SEARCH nobody can tell whether there are legacy rules, and Remove says that it could not look.

// A Redirect is the deed to a Config on this host. Install, InstallFor, Verify, Status and Watch each hold its mutex
// while they read and write rules; Forwardable does not wait for them. All may be called from any goroutine whose
// thread is in the network namespace of Open. Close is its opener's.
type Redirect struct {
	config Config
	all    []*tools
	use    *tools
	route  *netlink.Handle

	mu      sync.Mutex            // guards the following
	broken  error                 // why there are no IPv6 rules; see ipv6Skipped
	noZone  error                 // why our connections have no zone of the tracker
	told    told                  // by Install and Watch
	patient bool                  // Watch runs
	locks   map[Lock]time.Time    // since when they are there, as last read
	foreign atomic.Pointer[rules] // as last read

	writers writers // not guarded
	contest atomic.Pointer[Contest]
}

// Report is what was found and done.
type Report struct {
	Backend  Backend
	Version  string    // of its commands
	Others   []Backend // that somebody's rules are in, too
	Families []FamilyReport

	// Locks are why hooks are not taken: those are missing in Families. A command that installs exits 1 if there are any.
	Locks      []Lock
	Overridden []Lock // hooks taken in spite of these

	Evasions []Evasion // hooks are taken in spite of these
	Ways     []Way     // how packets get from here to the service

	Prohibitions []Prohibition // that routing makes, of its own

	Conntrack Conntrack
	Warnings  []string // each a sentence for the operator

	Changed     bool         // Install only: something had to be written
	Lost        []Lost       // Install only: connections that are to be aborted, or their owners wait in vain
	Differences []Difference // Status only: how the host differs from what Install would make of it
}

// A FamilyReport is about one family.
type FamilyReport struct {
	Family  Family
	Skipped string // why this host has no such rules, "" if it has
	Hooks   Hooks
	Guard   Guard // Status only
}

// Guard counts packets since the rules were written.
type Guard struct {
	Host      uint64 // of this host's, to an endpoint past the redirect
	Forwarded uint64 // forwarded ones, likewise
	Listener  uint64 // to a listener without having been redirected; always refused
}

// Conntrack is about the connection tracker, which one nat rule switches on for all traffic of the host.
type Conntrack struct {
	First   bool // nobody else's rule needs it
	Sockets int  // open TCP and UDP sockets
	Max     int  // entries it can hold; 0 if it is not loaded yet
}

// Crowded reports whether there is less room than the sockets may come to need. Half is
// for the entries that outlive them: TIME_WAIT for two minutes, idle UDP for three.
func (c Conntrack) Crowded() bool { return c.Max > 0 && c.Sockets > c.Max/2 }

// Open finds the tools of this host and decides which back end to use. It changes nothing.
func Open(ctx context.Context, c Config) (*Redirect, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	r := &Redirect{config: c.WithDefaults()}
	var err error
	if r.all, err = findTools(ctx, searchPath()); err != nil {
		return nil, err
	}
	for _, t := range r.all {
		t.started = r.writers.started
	}
	if r.use, err = r.choose(ctx); err != nil {
		return nil, err
	}
	if r.route, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open route netlink: %w", err)
	}
	return r, nil
}

// Close gives back the descriptors. The rules stay.
func (r *Redirect) Close() { r.route.Close() }

func (r *Redirect) choose(ctx context.Context) (*tools, error) {
	if b := r.config.Backend; b != BackendAuto {
		if t := byBackend(r.all, b); t != nil {
			return t, nil
		}
		return nil, fmt.Errorf("%w of the %s back end, which redirect.backend asks for: %s, or use the other one", ErrNoTool, b, howToInstall)
	}
	var inUse []*tools
	for _, t := range r.all {
		for _, f := range Families {
			// A store that cannot be read, as on a kernel without it, holds nobody's rules.
			if rules, err := t.save(ctx, f); err == nil && rules.foreign() && !slices.Contains(inUse, t) {
				inUse = append(inUse, t)
			}
		}
	}
	if len(inUse) == 1 {
		return inUse[0], nil
	}
	for _, t := range r.all {
		if t.isStandard {
			return t, nil
		}
	}
	return r.all[0], nil
}

// A survey is a host as it was read.
type survey struct {
	saved    map[*tools]map[Family]*ruleset
	devices  map[string][]string // see native.devices
	locks    map[Lock]time.Time  // since when they are there
	waiting  bool                // for one to last
	tracking bool                // by rules of ours that are there
	plan     Plan
	report   Report
}

func (r *Redirect) survey(ctx context.Context) (*survey, error) {
	s := &survey{report: Report{Backend: r.use.backend, Version: r.use.version}, locks: make(map[Lock]time.Time)}
	skipped, err := r.ipv6Skipped()
	if err != nil {
		return nil, err
	}
	families := Families[:]
	if skipped != "" {
		families = []Family{IPv4}
	}
	foreign, tracked, err := r.read(ctx, families, s)
	if err != nil {
		return nil, err
	}
	r.foreign.Store(&foreign)

	on := Coverage{Zone: r.noZone == nil}
	for _, f := range families {
		hooks, err := r.hooks(f, foreign, s)
		if err != nil {
			return nil, err
		}
		s.report.Families = append(s.report.Families, FamilyReport{Family: f, Hooks: hooks})
		if f == IPv6 {
			on.IPv6 = hooks
		} else {
			on.IPv4 = hooks
		}
	}
	r.locks = s.locks
	s.report.Ways = r.ways(families, s.devices)
	if on.CgroupID, err = cgroupID(r.config.Cgroup); err != nil {
		return nil, err
	}
	s.plan = r.config.Plan(on)
	if skipped != "" {
		s.report.Families = append(s.report.Families, FamilyReport{Family: IPv6, Skipped: skipped})
		s.plan = s.plan.without(IPv6)
	}
	if r.broken != nil {
		s.report.Warnings = append(s.report.Warnings, fmt.Sprintf(
			"there is no IPv6 redirect (%v): when somebody switches IPv6 on, the metadata service is reached past the daemon", r.broken))
	}

	for _, e := range (Config{}).WithDefaults().Endpoints {
		if !slices.Contains(r.config.Endpoints, e) && slices.Contains(families, familyOf(e.Addr())) {
			s.report.Warnings = append(s.report.Warnings, fmt.Sprintf(
				"%s is not among redirect.endpoints, so the instance's own metadata service is reached there past the daemon", e))
		}
	}

	if r.noZone != nil {
		s.report.Warnings = append(s.report.Warnings, fmt.Sprintf(
			"the connection tracker does not keep the daemon's connections apart from clients' (%v): for ten seconds after the service has reset one, "+
				"a client with the same port is not redirected; have the kernel's module xt_CT", r.noZone))
	}

	if on, err := readInt("/proc/sys/net/ipv4/conf/all/accept_source_route"); err == nil && on != 0 {
		s.report.Warnings = append(s.report.Warnings, sourceRouteWarning)
	}
	s.report.Conntrack.First = !tracked
	return s, s.report.Conntrack.read()
}

// Any user may give his packets a source route (IP_OPTIONS, ip(7)) whose first hop is this host and whose last is an
// endpoint. Neither hook sees the endpoint: filter FORWARD comes before the destination is changed
// (net/ipv4/ip_forward.c, ip_forward_finish), and a client got through in enforce (measured). The kernel's default is
// off. IPv6 changes it before, and there the guard refuses.
const sourceRouteWarning = "net.ipv4.conf.all.accept_source_route is 1, so a user of this host may send packets to the " +
	"metadata service past the redirect, by way of the host itself; set it to 0"

// read reads all rules of the host: ours into s, everybody else's for judging. tracked says that somebody else uses
// the connection tracker.
func (r *Redirect) read(ctx context.Context, families []Family, s *survey) (foreign rules, tracked bool, err error) {
	warn := func(format string, args ...any) {
		s.report.Warnings = append(s.report.Warnings, fmt.Sprintf(format, args...))
	}
	foreign = make(rules)
	s.saved = make(map[*tools]map[Family]*ruleset)
	for _, t := range r.all {
		s.saved[t] = make(map[Family]*ruleset)
		for _, f := range families {
			have, err := t.save(ctx, f)
			if err != nil && t == r.use {
				return nil, false, err
			}
			if err != nil {
				warn("%s rules of %s were not read: %v", f, t.store(), err)
				have = new(ruleset)
			}
			s.saved[t][f] = have
			foreign[f] = append(foreign[f], have.judged(t.store())...)
			tracked = tracked || have.tracks()
			s.tracking = s.tracking || !have.installed(f).empty()
			if t != r.use && have.foreign() && !slices.Contains(s.report.Others, t.backend) {
				s.report.Others = append(s.report.Others, t.backend)
			}
		}
	}
	native, err := readNative(ctx, searchPath())
	if err != nil {
		warn("native nftables rules were not read, so other people's locks in them were not found: %v", err)
	}
	for _, f := range families {
		foreign[f] = append(foreign[f], native.bases[f]...)
	}
	s.devices = native.devices
	// Open vSwitch, IPVS and tc track connections without a rule. Once ours are there it cannot be told from the count.
	count, err := readInt(trackerSysctls + "nf_conntrack_count")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, fmt.Errorf("is there connection tracking: %w", err)
	}
	return foreign, tracked || native.tracks || !s.tracking && count > 0, nil
}

// hooks decides what to take in one family, and says why not in the report.
func (r *Redirect) hooks(f Family, foreign rules, s *survey) (Hooks, error) {
	report := &s.report
	has := awake
	if f == IPv6 {
		var err error
		if has, err = ipv6Presence(); err != nil {
			return Hooks{}, err
		}
	}
	ways := make(map[netip.AddrPort]way)
	reachable := false
	for _, e := range r.config.endpoints(f) {
		w, err := r.way(e.Addr(), 0)
		reachable = reachable || !errors.Is(err, unix.ENETUNREACH)
		if errors.Is(err, unix.EACCES) {
			p := Prohibition{Endpoint: e.Addr(), Mark: r.config.Mark}
			if _, err := r.way(e.Addr(), r.config.Mark); err != nil {
				p.Daemon = err.Error()
			}
			if !slices.Contains(report.Prohibitions, p) { // of each port of one address
				report.Prohibitions = append(report.Prohibitions, p)
			}
		}
		ways[e] = w
	}
	found, err := foreign.locks(r.config, f, r.use.store(), ways)
	if err != nil {
		return Hooks{}, fmt.Errorf("judge other people's %s rules: %w", f, err)
	}
	report.Warnings = append(report.Warnings, found.unclear...)
	report.Evasions = append(report.Evasions, found.evasions...)
	if !reachable || has == dormant {
		// Nobody can be harmed, for nobody gets to an endpoint, as with IPv6 on most instances.
		found.locks = slices.DeleteFunc(found.locks, func(l Lock) bool { return !l.Kind.overridable() })
	}
	wanted := len(r.config.endpoints(f)) > 0
	hooks := Hooks{Host: wanted, Forwarded: wanted, Admit: found.admit}
	if f == IPv6 && wanted && !r.loopbackHas(f) {
		hooks.Host = r.config.Enforce
		hooks.Admit = hooks.Admit && hooks.Host
		if has == awake {
			report.Warnings = append(report.Warnings, r.loopbackWarning())
		}
	}
	for _, l := range found.locks {
		if !r.lasts(l, s) {
			report.Warnings = append(report.Warnings, fmt.Sprintf("in %v the %s hook is given back: %s", lockLasts, l.Hook, l))
			continue
		}
		if r.config.OverrideForeign && l.Kind.overridable() {
			report.Overridden = append(report.Overridden, l)
			continue
		}
		if has == awake { // otherwise there is nothing to be done about them yet
			report.Locks = append(report.Locks, l)
		}
		switch l.Hook {
		case HostHook:
			hooks.Host, hooks.Admit = false, false
		case ForwardedHook:
			hooks.Forwarded = false
		}
	}
	return hooks, nil
}

// lockLasts is for how long a lock must be there, in enforce mode, until its hook is given back: firewalld drops
// everything while it loads its rules anew (its set_policy; measured), and whatever it drops reaches nobody. To give
// the hook back would open the service until the next look. In audit mode nothing of ours may stand in the way.
const lockLasts = 5 * time.Second

// lasts reports whether a lock is to be respected now. It is called with r.mu held.
func (r *Redirect) lasts(l Lock, s *survey) bool {
	since, known := r.locks[l]
	if !known {
		since = time.Now()
		if !r.patient {
			since = since.Add(-lockLasts)
		}
	}
	s.locks[l] = since
	if !r.config.Enforce || time.Since(since) >= lockLasts {
		return true
	}
	s.waiting = true
	return false
}

// way asks the kernel how it would send a packet of this host.
func (r *Redirect) way(to netip.Addr, mark uint32) (way, error) {
	routes, err := r.route.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Mark: mark})
	if err != nil || len(routes) == 0 {
		return way{}, err
	}
	source, _ := netip.AddrFromSlice(routes[0].Src)
	w := way{source: source.Unmap()}
	if link, err := r.route.LinkByIndex(routes[0].LinkIndex); err == nil {
		w.out = link.Attrs().Name
	}
	return w, nil
}

// Install makes the plan true and returns what it found on the way. It may be called again at any time; what is in
// place already is not touched. If it returns an error, the host's rules are as they were. Hooks that are locked by
// other people's rules are left out, which is no error: see Report.Locks.
//
// The listeners should be ready before. Those on ForwardedAddrs need IP_FREEBIND, or EnsureLink first. Connections
// that are older than the rules go on past them in audit; in enforce the guard resets them with their next packet.
func (r *Redirect) Install(ctx context.Context) (report Report, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	err = r.unlessDormant(func() (err error) {
		report, err = r.install(ctx)
		return err
	})
	return report, err
}

// InstallFor is Install with the guard of enforce mode, or that of audit mode, from now on. After an error the guard
// is the one of before.
func (r *Redirect) InstallFor(ctx context.Context, enforce bool) (report Report, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.config.Enforce
	r.config.Enforce = enforce
	err = r.unlessDormant(func() (err error) {
		report, err = r.install(ctx)
		return err
	})
	if err != nil {
		r.config.Enforce = was
	}
	return report, err
}

// Want has Watch keep the guard of enforce mode, or that of audit mode, from its next look on. It is for who has left a
// mode, and could not write its rules again.
func (r *Redirect) Want(enforce bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.config.Enforce = enforce
}

func (r *Redirect) install(ctx context.Context) (_ Report, err error) {
	// What kept the rules from having a zone may be over, as a lock that was held.
	was := r.noZone
	r.noZone = nil
	defer func() {
		if err != nil {
			r.noZone = was
		}
	}()
	s, err := r.survey(ctx)
	if err != nil {
		return Report{}, err
	}
	if err := r.portsAreSafe(&s.report); err != nil {
		return s.report, err
	}
	if err := r.trackerHasRoom(s); err != nil {
		return s.report, err
	}
	undo, err := r.apply(ctx, s)
	if err != nil && r.noZone == nil && ctx.Err() == nil {
		if r.noZone = r.use.tryZone(ctx); r.noZone != nil {
			without, surveyErr := r.survey(ctx)
			if surveyErr != nil {
				return s.report, errors.Join(err, surveyErr)
			}
			s = without
			undo, err = r.apply(ctx, s)
		}
	}
	if err != nil {
		return s.report, err
	}
	if s.report.Conntrack.Max == 0 { // it is loaded only now
		if err = s.report.Conntrack.read(); err == nil {
			err = r.trackerHasRoom(s)
		}
		if err != nil {
			return s.report, errors.Join(err, undo())
		}
	}
	r.told.learn(s.report)
	return s.report, nil
}

// EnsureLink makes the link and its addresses, so that the listeners can be opened before Install.
func (r *Redirect) EnsureLink() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.unlessDormant(func() error {
		p := r.config.Plan(FullCoverage)
		skipped, err := r.ipv6Skipped()
		if err != nil {
			return err
		}
		if skipped != "" {
			p = p.without(IPv6)
		}
		_, err = ensureLink(r.route, p.Link)
		return err
	})
}

// apply makes s.plan true. undo makes it untrue again.
func (r *Redirect) apply(ctx context.Context, s *survey) (undo func() error, err error) {
	var done []func() error
	undo = func() error {
		var errs []error
		for _, f := range slices.Backward(done) {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			if undone := undo(); undone != nil {
				err = errors.Join(err, fmt.Errorf("and taking it back: %w", undone))
			}
		}
	}()

	differences, err := verifyLink(r.route, s.plan.Link)
	if err != nil {
		return undo, err
	}
	if len(differences) > 0 {
		made, err := ensureLink(r.route, s.plan.Link)
		if made {
			done = append(done, func() error { _, err := removeLink(r.route); return err })
		}
		if err != nil {
			return undo, err
		}
		s.report.Changed = true
	}
	settle := func(t *tools, want FamilyPlan) error {
		have := s.saved[t][want.Family]
		before := have.installed(want.Family)
		done = append(done, func() error {
			_, err := t.settle(context.WithoutCancel(ctx), before, nil)
			return err
		})
		changed, err := t.settle(ctx, want, have)
		s.report.Changed = s.report.Changed || changed
		return err
	}
	for _, want := range s.plan.Families {
		before := s.saved[r.use][want.Family].installed(want.Family)
		if err := settle(r.use, want); err != nil {
			return undo, err
		}
		var err error
		switch {
		case before.zoned() != want.zoned():
			var lost []Lost
			lost, err = forget(want.Family, r.config.Enforce) // connections of the moment are reset
			s.report.Lost = append(s.report.Lost, lost...)
		case before.redirects() != want.redirects():
			err = forgetEnded(want.Family)
		}
		if err != nil {
			s.report.Warnings = append(s.report.Warnings, err.Error())
		}
	}
	for t, saved := range s.saved {
		for f, have := range saved {
			if t != r.use && !have.installed(f).empty() {
				if err := settle(t, FamilyPlan{Family: f}); err != nil {
					return undo, err
				}
			}
		}
	}
	return undo, nil
}

// Verify returns how the host differs from what Install would make of it now.
func (r *Redirect) Verify(ctx context.Context) ([]Difference, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.surveyed(ctx)
	if err != nil {
		return nil, err
	}
	return r.differences(s)
}

// surveyed is a survey for who has installed nothing.
func (r *Redirect) surveyed(ctx context.Context) (s *survey, err error) {
	err = r.unlessDormant(func() (err error) {
		s, err = r.survey(ctx)
		return err
	})
	return s, err
}

func (r *Redirect) differences(s *survey) ([]Difference, error) {
	all, err := verifyLink(r.route, s.plan.Link)
	if err != nil {
		return nil, err
	}
	for _, want := range s.plan.Families {
		all = append(all, compare(s.saved[r.use][want.Family], want).differences...)
	}
	for t, saved := range s.saved {
		for f, have := range saved {
			if t != r.use {
				for _, d := range compare(have, FamilyPlan{Family: f}).differences {
					d.Problem += " (" + t.store() + ")"
					all = append(all, d)
				}
			}
		}
	}
	return all, nil
}

// Status is Verify with everything else there is to know, the guard's counters included. It changes nothing.
func (r *Redirect) Status(ctx context.Context) (Report, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.surveyed(ctx)
	if err != nil {
		return Report{}, err
	}
	if err := r.portsAreSafe(&s.report); err != nil {
		s.report.Warnings = append(s.report.Warnings, err.Error())
	}
	if s.report.Differences, err = r.differences(s); err != nil {
		return s.report, err
	}
	for i := range s.report.Families {
		f := &s.report.Families[i]
		if f.Skipped != "" {
			continue
		}
		is := s.saved[r.use][f.Family].installed(f.Family)
		if f.Guard, err = r.use.guard(is); err != nil {
			return s.report, err
		}
	}
	return s.report, nil
}

// guard reads the counters of the last rules of our filter chains.
func (t *tools) guard(is FamilyPlan) (Guard, error) {
	protocol := map[Family]goiptables.Protocol{IPv4: goiptables.ProtocolIPv4, IPv6: goiptables.ProtocolIPv6}[is.Family]
	ipt, err := goiptables.New(goiptables.IPFamily(protocol), goiptables.Path(t.byFamily[is.Family].iptables), goiptables.Timeout(10))
	if err != nil {
		return Guard{}, fmt.Errorf("read counters: %w", err)
	}
	var g Guard
	for name, packets := range map[string]*uint64{outputs: &g.Host, forward: &g.Forwarded, inputs: &g.Listener} {
		if !slices.ContainsFunc(is.Chains, Chain{Table: "filter", Name: name}.same) {
			continue
		}
		stats, err := ipt.StructuredStats("filter", name)
		if err != nil {
			return Guard{}, fmt.Errorf("read counters of %s filter %s: %w", is.Family, name, err)
		}
		if len(stats) > 0 {
			*packets = stats[len(stats)-1].Packets
		}
	}
	return g, nil
}

// Release lets new connections go to the endpoints themselves, and keeps those that were redirected: the rules that
// remain have the kernel go on tracking connections, without which it would no longer change the addresses of their
// packets, and they would be reset (nf_ct_netns_put, net/netfilter/nf_conntrack_proto.c; measured). Remove takes away
// the rest when they have ended. Like Remove it needs to know nothing, and goes on after an error.
func Release(ctx context.Context) error {
	all, err := findStores(ctx)
	errs := []error{err}
	has, err := ipv6Presence()
	errs = append(errs, err)
	for _, t := range all {
		for _, f := range Families {
			have, err := t.save(ctx, f)
			if err == nil {
				var changed bool
				if changed, err = t.settle(ctx, have.installed(f).withoutTable("nat"), have); changed {
					forgetEnded(f) // what it cannot forget harms few, and the redirect is gone
				}
			}
			if f == IPv4 || has == awake {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Remove takes away everything that any Install has left in this network namespace, in both back ends and families.
// It needs no configuration and nothing that the installer knew. What belongs to others stays as it is; the built-in
// chains that iptables made for the first rule in them stay too, empty. With the nat rules connection tracking ends,
// if nobody else uses it. It goes on after an error.
func Remove(ctx context.Context) (removed bool, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, fmt.Errorf("open route netlink: %w", err)
	}
	defer h.Close()
	var errs []error
	all, err := findStores(ctx)
	errs = append(errs, err)
	has, err := ipv6Presence()
	errs = append(errs, err)
	for _, t := range all {
		for _, f := range Families {
			changed, err := t.settle(ctx, FamilyPlan{Family: f}, nil)
			if changed {
				forget(f, false) // likewise
			}
			removed = removed || changed
			if f == IPv4 || has == awake {
				errs = append(errs, err)
			}
		}
	}
	gone, err := removeLink(h)
	return removed || gone, errors.Join(append(errs, err)...)
}

// portsAreSafe refuses what would let an ordinary user answer root's clients while the daemon is dead. In audit the
// redirect goes with the daemon, so it is a warning.
func (r *Redirect) portsAreSafe(report *Report) error {
	if r.config.SocketActivated {
		return nil
	}
	start, err := readInt("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if errors.Is(err, fs.ErrNotExist) {
		return nil // before Linux 4.11 it is 1024
	}
	if err != nil {
		return fmt.Errorf("who may bind the listeners' ports: %w", err)
	}
	lowest := min(r.config.HostPort, r.config.ForwardedPort)
	highest := max(r.config.HostPort, r.config.ForwardedPort)
	if int(highest) < start {
		return nil
	}
	err = fmt.Errorf("any user may bind ports %d and %d while the daemon is down, because net.ipv4.ip_unprivileged_port_start is %d: "+
		"raise it to %d, or let imdsgated.socket hold them", lowest, highest, start, int(highest)+1)
	if r.config.Enforce {
		return err
	}
	report.Warnings = append(report.Warnings, err.Error())
	return nil
}

// trackerHasRoom refuses to be the one who switches the connection tracker on for more sockets than it can hold with
// ease. Where our rules have it on already that helps nobody: the mode could not be changed, nor the daemon restarted.
func (r *Redirect) trackerHasRoom(s *survey) error {
	c := s.report.Conntrack
	if !c.First || !c.Crowded() || s.tracking || r.config.OverrideConntrack {
		return nil
	}
	return fmt.Errorf("the redirect would be the first to use connection tracking here, for all of the host's traffic: "+
		"%d sockets are open, and it holds %d connections, half of which should be free; "+
		"raise net.netfilter.nf_conntrack_max to %d or more, or set redirect.override_conntrack: true", c.Sockets, c.Max, 2*c.Sockets)
}

const trackerSysctls = "/proc/sys/net/netfilter/"

func (c *Conntrack) read() error {
	c.Sockets = 0
	for _, name := range []string{"sockstat", "sockstat6"} {
		text, err := os.ReadFile(procNet + name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("count sockets: %w", err)
		}
		c.Sockets += openSockets(string(text))
	}
	entries, err := readInt(trackerSysctls + "nf_conntrack_max")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("size of the connection tracker: %w", err)
	}
	c.Max = entries
	return nil
}

// openSockets reads /proc/net/sockstat: TCP and UDP in use, and TCP in TIME_WAIT.
func openSockets(sockstat string) int {
	n := 0
	for line := range strings.Lines(sockstat) {
		f := strings.Fields(line)
		if len(f) == 0 || !slices.Contains([]string{"TCP:", "TCP6:", "UDP:", "UDP6:"}, f[0]) {
			continue
		}
		for i := 1; i+1 < len(f); i += 2 {
			if f[i] == "inuse" || f[i] == "tw" {
				count, _ := strconv.Atoi(f[i+1])
				n += count
			}
		}
	}
	return n
}

func readInt(path string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// cgroupID returns the number of a directory of the cgroup2 tree, wherever that is mounted.
func cgroupID(path string) (uint64, error) {
	if path == "" {
		return 0, nil
	}
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fs syscall.Statfs_t
		if syscall.Statfs(mount, &fs) != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		var st syscall.Stat_t
		if err := syscall.Stat(mount+"/"+path, &st); err != nil {
			return 0, fmt.Errorf("find cgroup %s: %w", path, err)
		}
		return st.Ino, nil
	}
	return 0, fmt.Errorf("find cgroup %s: there is no cgroup2 tree: %w", path, errors.ErrUnsupported)
}
