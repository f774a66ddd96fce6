package iptables

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// onBench runs fn in an instance with Docker's and kube-proxy's rules, once for each back end.
func onBench(b *testing.B, fn func(b *testing.B, r *Redirect) error) {
	for _, backend := range backends {
		b.Run(backend.String(), func(b *testing.B) {
			lab := labtest.Start(b, netlab.Options{Containers: true, NoIMDS: true})
			err := lab.Instance.Do(func() error {
				for _, file := range []string{"docker", "kube-proxy"} {
					rules, err := os.Open("testdata/locks/" + file + ".rules")
					if err != nil {
						return err
					}
					defer rules.Close()
					cmd := exec.Command("iptables-"+backend.String()+"-restore", "--noflush")
					cmd.Stdin = rules
					if err := cmd.Run(); err != nil {
						return err
					}
				}
				// Docker's policy drops what br-lab forwards.
				if err := exec.Command("iptables-"+backend.String(), "-P", "FORWARD", "ACCEPT").Run(); err != nil {
					return err
				}
				r, err := Open(context.Background(), Config{UID: uid})
				if err != nil {
					return err
				}
				defer r.Close()
				return fn(b, r)
			})
			if err != nil {
				b.Fatal(err)
			}
		})
	}
}

func BenchmarkInstall(b *testing.B) {
	onBench(b, func(b *testing.B, r *Redirect) error {
		for b.Loop() {
			if _, err := r.Install(context.Background()); err != nil {
				return err
			}
			b.StopTimer()
			if _, err := Remove(context.Background()); err != nil {
				return err
			}
			b.StartTimer()
		}
		return nil
	})
}

func BenchmarkVerify(b *testing.B) {
	onBench(b, func(b *testing.B, r *Redirect) error {
		if _, err := r.Install(context.Background()); err != nil {
			return err
		}
		for b.Loop() {
			if d, err := r.Verify(context.Background()); err != nil || len(d) > 0 {
				b.Error(d)
				return err
			}
		}
		return nil
	})
}

func BenchmarkForwardable(b *testing.B) {
	from := netip.MustParseAddrPort("172.17.0.2:40000")
	onBench(b, func(b *testing.B, r *Redirect) error {
		if _, err := r.Status(context.Background()); err != nil {
			return err
		}
		b.ReportAllocs()
		for b.Loop() {
			if err := r.Forwardable(from, endpoint[IPv4]); err != nil {
				return err
			}
		}
		return nil
	})
}

// BenchmarkJudge walks 10 000 rules, as kube-proxy makes them.
func BenchmarkJudge(b *testing.B) {
	var text strings.Builder
	text.WriteString("*filter\n:FORWARD ACCEPT [0:0]\n")
	for range 10_000 {
		text.WriteString("-A FORWARD -d 10.100.0.10/32 -p tcp -m comment --comment \"default/web\" -m tcp --dport 80 -j REJECT\n")
	}
	text.WriteString("COMMIT\n")
	for b.Loop() {
		r, err := parseSave(text.String())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := (rules{IPv4: r.judged("x")}).locks(Config{}.WithDefaults(), IPv4, "x", usualWays); err != nil {
			b.Fatal(err)
		}
	}
}
