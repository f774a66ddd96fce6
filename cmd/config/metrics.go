package config

import (
	"fmt"
	"net/netip"
	"path"
	"strings"
)

// Metrics is where counters can be read, in the form of Prometheus.
type Metrics struct {
	// Listen is a port on loopback or a Unix socket. Without it there is neither. A change
	// takes a restart.
	Listen MetricsAddress `yaml:"listen"`
}

// MetricsAddress is where metrics are served: what net.Listen takes. The zero value is
// nowhere.
type MetricsAddress struct{ Network, Address string }

func (a MetricsAddress) String() string {
	if a.Network == "unix" {
		return "unix:" + a.Address
	}
	return a.Address
}

// MarshalText writes what UnmarshalText reads.
func (a MetricsAddress) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText reads 127.0.0.1:9254, [::1]:9254 or unix:/run/imdsgate/metrics.sock. What
// others than this host could read is refused: it tells an attacker what is watched.
func (a *MetricsAddress) UnmarshalText(text []byte) error {
	const examples = "write 127.0.0.1:9254, [::1]:9254 or unix:/run/imdsgate/metrics.sock"
	if file, unix := strings.CutPrefix(string(text), "unix:"); unix {
		if !path.IsAbs(file) {
			return fmt.Errorf("%q is not the whole path of a socket: %s", text, examples)
		}
		*a = MetricsAddress{"unix", file}
		return nil
	}
	at, err := netip.ParseAddrPort(string(text))
	switch {
	case err != nil || at.Port() == 0:
		return fmt.Errorf("%q is not an address with a port: %s", text, examples)
	case !at.Addr().IsLoopback():
		return fmt.Errorf("%q can be reached from other machines, and metrics tell what is protected and what is not: %s, and have a collector on this host pass them on", text, examples)
	}
	*a = MetricsAddress{"tcp", at.String()}
	return nil
}
