package iptables

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the files in testdata")

// golden compares got with a file, or rewrites the file.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s, - expected, + got:\n%s", file, diff)
	}
}

func TestPlan(t *testing.T) {
	admit := FullCoverage
	admit.IPv4.Admit = true
	for name, p := range map[string]Plan{
		"audit":            Config{UID: 990}.Plan(FullCoverage),
		"enforce":          Config{UID: 990, Enforce: true, Cgroup: "system.slice/imdsgated.service"}.Plan(Coverage{IPv4: FullCoverage.IPv4, IPv6: FullCoverage.IPv6, CgroupID: 4711, Zone: true}),
		"override-foreign": Config{UID: 990, OverrideForeign: true}.Plan(admit),
		"host-hook-locked": Config{UID: 990}.Plan(Coverage{IPv4: Hooks{Forwarded: true}, IPv6: Hooks{Forwarded: true}}),
		"other-endpoints": Config{UID: 990, HostPort: 900, ForwardedPort: 901, Mark: 1, Endpoints: []netip.AddrPort{
			netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("169.254.170.2:80"),
		}}.Plan(FullCoverage),
	} {
		t.Run(name, func(t *testing.T) { golden(t, filepath.Join("testdata/plan", name+".txt"), p.String()) })
	}
}

func TestConfigValidate(t *testing.T) {
	for _, c := range []struct {
		name   string
		config Config
		want   []string
	}{
		{"default", Config{UID: 990}, nil},
		{"no uid", Config{}, []string{"a user of its own"}},
		{"one family", Config{UID: 990, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[fd00:ec2::254]:80")}}, nil},
		{"all at once", Config{
			HostPort: 8080, ForwardedPort: 8080, Cgroup: `a"b`,
			Endpoints:      []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:80"), netip.MustParseAddrPort("169.254.169.254:0"), netip.MustParseAddrPort("[::ffff:1.2.3.4]:80")},
			ForwardedAddrs: []netip.Addr{netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("169.254.213.80"), netip.MustParseAddr("::1")},
		}, []string{
			"127.0.0.1:80 is not", "169.254.169.254:0 is not", "[::ffff:1.2.3.4]:80 is not", "::1 is not", "169.254.169.254 is an endpoint",
			"2 IPv4 addresses, want 1", "open to ordinary users", "both 8080", "a user of its own", `cgroup "a\"b"`,
		}},
		{"no endpoints", Config{UID: 990, Endpoints: []netip.AddrPort{}}, []string{"none given"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.config.Validate()
			if (err == nil) != (c.want == nil) {
				t.Fatal(err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is missing in:\n%v", want, err)
				}
			}
		})
	}
}

func TestBackendText(t *testing.T) {
	for _, b := range []Backend{BackendAuto, BackendNFT, BackendLegacy} {
		var got Backend
		if err := got.UnmarshalText([]byte(b.String())); err != nil || got != b {
			t.Errorf("%s: %v, %v", b, got, err)
		}
	}
	var b Backend
	if err := b.UnmarshalText([]byte("ebtables")); err == nil {
		t.Error("ebtables: no error")
	}
}
