package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// LinkName is the link that carries the addresses of the forwarded listeners.
const LinkName = "imdsgate0"

// Config is what an operator and the daemon may choose. Zero fields mean the defaults written beside them; UID has
// none.
type Config struct {
	// Endpoints are the metadata service's addresses. Default 169.254.169.254:80 and [fd00:ec2::254]:80.
	Endpoints []netip.AddrPort `yaml:"endpoints"`

	// HostPort, default 254, is where the daemon listens on 127.0.0.1 and ::1 for clients of this host's own network
	// namespace. ForwardedPort, default 253, is where it listens on ForwardedAddrs for all others. Both are below
	// 1024, so that with the daemon dead no ordinary user can take them and answer root's clients. IANA keeps 249 to
	// 255 reserved.
	HostPort      uint16 `yaml:"host_port"`
	ForwardedPort uint16 `yaml:"forwarded_port"`

	// ForwardedAddrs are addresses of our own on the link LinkName, one of each family of Endpoints. Default
	// 169.254.213.80 and fd69:6d64:7367::80. They must be used by nobody else on the instance or in its VPC.
	ForwardedAddrs []netip.Addr `yaml:"forwarded_addrs"`

	// Mark is SO_MARK of the daemon's upstream sockets. The default 0x7FFF0815 is the one that systemd's metadata lock
	// lets through (systemd src/imds/imdsd.c, 85-imds-early.network); with another one the daemon is locked out there.
	Mark uint32 `yaml:"-"`

	// UID is the daemon's own user. Root is refused: its other processes would share the exemption.
	UID uint32 `yaml:"-"`

	// Cgroup is the daemon's unit below the cgroup2 mount, "system.slice/imdsgated.service". Without it, that is with
	// the default "", who has CAP_NET_RAW and the daemon's uid passes as the daemon. A unit that starts again has a new
	// cgroup under the old name and the old rules do not match it, so every start must Install.
	Cgroup string `yaml:"-"`

	// Enforce makes the guard refuse packets that reach the endpoints past the redirect; otherwise it counts them.
	Enforce bool `yaml:"-"`

	// SocketActivated says that somebody else keeps both listeners open while the daemon is dead, as imdsgated.socket
	// does.
	SocketActivated bool `yaml:"-"`

	// Backend, default auto, is the rule back end to write to.
	Backend Backend `yaml:"backend"`

	// OverrideForeign takes the hooks that other people's rules have locked (see Lock), and lets the daemon's packets
	// and redirected ones past the filter rules of our back end. Its policy must then do the job of those rules.
	OverrideForeign bool `yaml:"override_foreign"`

	// OverrideConntrack installs even if more sockets are open than half of what the connection tracker can hold. When
	// it is full the kernel drops new connections of the whole host ("nf_conntrack: table full, dropping packet").
	OverrideConntrack bool `yaml:"override_conntrack"`
}

const (
	defaultHostPort      = 254
	defaultForwardedPort = 253
	defaultMark          = 0x7FFF0815
)

// WithDefaults returns c with every zero field that has a default replaced by it.
func (c Config) WithDefaults() Config {
	if c.Endpoints == nil {
		c.Endpoints = []netip.AddrPort{
			netip.MustParseAddrPort("169.254.169.254:80"),
			netip.MustParseAddrPort("[fd00:ec2::254]:80"),
		}
	}
	if c.HostPort == 0 {
		c.HostPort = defaultHostPort
	}
	if c.ForwardedPort == 0 {
		c.ForwardedPort = defaultForwardedPort
	}
	if c.ForwardedAddrs == nil {
		c.ForwardedAddrs = []netip.Addr{
			netip.MustParseAddr("169.254.213.80"),
			netip.MustParseAddr("fd69:6d64:7367::80"),
		}
	}
	if c.Mark == 0 {
		c.Mark = defaultMark
	}
	return c
}

// Validate reports everything that is wrong with c after its zero fields have been given their defaults.
func (c Config) Validate() error {
	c = c.WithDefaults()
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if len(c.Endpoints) == 0 {
		bad("endpoints: none given")
	}
	for _, e := range c.Endpoints {
		if !plainUnicast(e.Addr()) || e.Port() == 0 {
			bad("endpoints: %v is not the address and port of another machine", e)
		}
	}
	for _, a := range c.ForwardedAddrs {
		if !plainUnicast(a) {
			bad("forwarded_addrs: %v is not an address of one machine", a)
		}
		for _, e := range c.Endpoints {
			if a == e.Addr() {
				bad("forwarded_addrs: %v is an endpoint", a)
			}
		}
	}
	for _, f := range Families {
		if n := len(c.forwarded(f)); len(c.endpoints(f)) > 0 && n != 1 {
			bad("forwarded_addrs: %d %v addresses, want 1", n, f)
		}
	}
	if c.HostPort >= 1024 || c.ForwardedPort >= 1024 {
		bad("host_port %d, forwarded_port %d: at least one is open to ordinary users, want both below 1024", c.HostPort, c.ForwardedPort)
	}
	if c.HostPort == c.ForwardedPort {
		bad("host_port and forwarded_port are both %d", c.HostPort)
	}
	if c.UID == 0 {
		bad("the daemon needs a user of its own: uid 0 would exempt all of root's processes")
	}
	// XT_CGROUP_PATH_MAX in include/uapi/linux/netfilter/xt_cgroup.h, less the terminating zero.
	if len(c.Cgroup) > 511 || strings.ContainsFunc(c.Cgroup, needsEscape) {
		bad("cgroup %q cannot be written in a rule", c.Cgroup)
	}
	return errors.Join(errs...)
}

func plainUnicast(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast()
}

func needsEscape(r rune) bool { return r < ' ' || r == '"' || r == '\'' || r == '\\' || r == 0x7f }

func (c Config) endpoints(f Family) []netip.AddrPort {
	var of []netip.AddrPort
	for _, e := range c.Endpoints {
		if familyOf(e.Addr()) == f {
			of = append(of, e)
		}
	}
	return of
}

func (c Config) forwarded(f Family) []netip.Addr {
	var of []netip.Addr
	for _, a := range c.ForwardedAddrs {
		if familyOf(a) == f {
			of = append(of, a)
		}
	}
	return of
}

// A Family is an address family, each with a rule set of its own.
type Family uint8

const (
	IPv4 Family = iota
	IPv6
)

// Families are all of them, in the order in which they are installed.
var Families = [...]Family{IPv4, IPv6}

func (f Family) String() string {
	if f == IPv6 {
		return "IPv6"
	}
	return "IPv4"
}

// MarshalText returns what String returns.
func (f Family) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

func familyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// localhost is the address on which the daemon listens for host clients: the one to which REDIRECT sends locally
// generated packets (net/netfilter/nf_nat_redirect.c).
func (f Family) localhost() netip.Addr {
	if f == IPv6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// A Backend is one of the two rule stores that the iptables commands write to. They exist side by side in the kernel
// and each sees its own rules only.
type Backend uint8

const (
	BackendAuto   Backend = iota // the one that holds other people's rules, else the distribution's choice
	BackendNFT                   // iptables-nft: rules in nf_tables
	BackendLegacy                // iptables-legacy: rules in x_tables
)

var backendNames = [...]string{BackendAuto: "auto", BackendNFT: "nft", BackendLegacy: "legacy"}

func (b Backend) String() string {
	if int(b) < len(backendNames) {
		return backendNames[b]
	}
	return fmt.Sprintf("backend %d", uint8(b))
}

// UnmarshalText accepts what String returns.
func (b *Backend) UnmarshalText(text []byte) error {
	for i, name := range backendNames {
		if string(text) == name {
			*b = Backend(i)
			return nil
		}
	}
	return fmt.Errorf("backend %q: want auto, nft or legacy", text)
}

// MarshalText returns what String returns.
func (b Backend) MarshalText() ([]byte, error) { return []byte(b.String()), nil }
