package proxy

import (
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// What leaves for the service through us is no more than clients alone would send: it
// shares 1,024 packets a second with DNS and NTP.
func TestNoMorePackets(t *testing.T) {
	const times = 20
	kept := strings.Replace(askB, "\r\n\r\n", "\r\nConnection: keep-alive\r\n\r\n", 1)
	for _, c := range []struct {
		name string
		do   func(r *rig, direct bool)
		late int // acknowledgements of their own
	}{
		// Whoever reads an answer before its end has come acknowledges each by itself, and we are faster than a client.
		{"new connections", func(r *rig, direct bool) {
			for range times {
				talk(r.t, r.dial(direct), askB, time.Second)
			}
		}, times},
		{"one kept connection", func(r *rig, direct bool) {
			conn := r.dial(direct)
			for range times {
				r.served("a client", conn, kept)
			}
			conn.Close()
		}, 3}, // on a busy host; a connection more would be four packets
		{"connections on which nothing is asked", func(r *rig, direct bool) {
			for range times {
				r.dial(direct).Close()
			}
		}, times / 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, setting{lab: netlab.Options{IMDS: emulator()}})
			run(t, "iptables", "-t", "mangle", "-A", "POSTROUTING", "-o", "eth0", "-d", "169.254.169.254", "-j", "RETURN")
			sent := func(direct bool) int {
				run(t, "iptables", "-t", "mangle", "-Z")
				c.do(r, direct)
				r.settled()
				time.Sleep(100 * time.Millisecond) // the last acknowledgements
				out, err := exec.Command("iptables", "-t", "mangle", "-vnxL", "POSTROUTING").Output()
				if err != nil {
					t.Fatal(err)
				}
				lines := strings.Split(string(out), "\n")
				n, err := strconv.Atoi(strings.Fields(lines[2])[0])
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
			alone, through := sent(true), sent(false)
			t.Logf("%d packets alone, %d through us", alone, through)
			if alone < times || through > alone+c.late {
				t.Errorf("%d packets alone, %d through us", alone, through)
			}
		})
	}
}
