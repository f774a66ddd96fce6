package boot

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The daemon does all its work with both back ends of iptables, and without what the
// unit takes from it.
func TestConfined(t *testing.T) {
	for _, backend := range []string{"nft", "legacy"} {
		m := boot(t, settings{config: config("enforce") + "redirect: {backend: " + backend + "}\n", files: map[string]string{
			"/etc/sysctl.d/ipv6.conf": "net.ipv6.conf.default.disable_ipv6 = 1\n", // the daemon has it for its link
		}})
		m.guarded(0)
		m.Event("self-test-passed")
		if out := m.Do("imdsgate", "status"); !strings.Contains(out, "redirect     "+backend+": IPv4 host, IPv4 forwarded, IPv6 host, IPv6 forwarded") {
			t.Errorf("%s:\n%s", backend, out)
		}
		if out := m.Do("ip", "-6", "address", "show"); !strings.Contains(out, "fd69:6d64:7367::80") {
			t.Errorf("%s: the link has no IPv6 address:\n%s", backend, out)
		}
		m.Do("iptables-"+backend, "-t", "nat", "-F")
		m.Event("redirect-rule-changed")
		m.confined()

		// A file system that comes after the daemon is the same to both.
		m.Do("sh", "-ec", "mkdir /srv/late; mount -t tmpfs tmpfs /srv/late; cp /usr/bin/curl /srv/late/one; cp /usr/bin/curl /tmp/two; cp /usr/bin/curl /dev/shm/three; mkdir -p /home/x; cp /usr/bin/curl /home/x/four")
		for _, program := range []string{"/srv/late/one", "/tmp/two", "/dev/shm/three", "/home/x/four"} {
			// At level 0 a busy machine may have no time to find out who asks.
			m.Await("an event about "+program, func() bool {
				m.Try(program, "-s", "-m", "10", "-o", "/dev/null", "http://169.254.169.254"+instanceID)
				for _, d := range m.Documents() {
					if d.At("process.executable") == program {
						if d.At("imdsgate.executable.host_verified") != true {
							t.Errorf("%s is not the host's: %v", program, d)
						}
						return true
					}
				}
				return false
			})
		}
	}
}

// confined looks at the process and into its mount namespace.
func (m *machine) confined() {
	m.T.Helper()
	pid := strconv.Itoa(m.daemon())
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		m.T.Fatal(err)
	}
	capabilities := 0
	for _, c := range []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH} {
		capabilities |= 1 << c
	}
	// It is given the others, and at this level needs none of them.
	if had := 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON; !strings.Contains(string(status), fmt.Sprintf("CapBnd:\t%016x\n", capabilities|had)) || !strings.Contains(m.Do("imdsgate", "status"), "level L0") {
		m.T.Errorf("it was not given what it gives up:\n%s", status)
	}
	for _, want := range []string{
		fmt.Sprintf("CapEff:\t%016x\n", capabilities), fmt.Sprintf("CapPrm:\t%016x\n", capabilities), fmt.Sprintf("CapAmb:\t%016x\n", capabilities),
		"NoNewPrivs:\t1\n", "Seccomp:\t2\n", "Umask:\t0027\n",
	} {
		if !strings.Contains(string(status), want) {
			m.T.Errorf("not %q in\n%s", want, status)
		}
	}
	limits, err := os.ReadFile("/proc/" + pid + "/limits")
	if line := strings.Fields(strings.Split(string(limits)+"Max core file size", "Max core file size")[1]); err != nil || len(line) < 2 || line[0] != "0" || line[1] != "0" {
		m.T.Errorf("core dumps: %v, %s", err, limits)
	}
	// What cannot be dumped is root's (proc(5)).
	if out := m.Do("stat", "-c", "%u", "/proc/"+m.Do("systemctl", "show", "--value", "-p", "MainPID", "imdsgated.service")+"/environ"); out != "0" {
		m.T.Errorf("the daemon's memory is its user's, %s", out)
	}
	if out := m.Do("stat", "-c", "%a %U %G", "/var/log/imdsgate/events.ndjson"); out != "640 imdsgate imdsgate" {
		m.T.Errorf("the event file is %s", out)
	}
	if out := m.Do("stat", "-c", "%a %U %G", "/run/imdsgate/control.sock"); out != "660 imdsgate imdsgate" {
		m.T.Errorf("the control socket is %s", out)
	}
	mounted := func(name string) (writable bool) {
		var st unix.Statfs_t
		if err := unix.Statfs("/proc/"+pid+"/root"+name, &st); err != nil {
			m.T.Fatalf("%s: %v", name, err)
		}
		return st.Flags&unix.ST_RDONLY == 0
	}
	for name, writable := range map[string]bool{
		"/": false, "/etc": false, "/home": false, "/usr": false, "/var": false, "/tmp": false, "/sys/fs/cgroup": false, "/proc/sys/kernel": false,
		"/proc/sys/net": true, "/run/imdsgate": true, "/var/lib/imdsgate": true, "/var/log/imdsgate": true,
	} {
		if mounted(name) != writable {
			m.T.Errorf("%s is writable to the daemon: %v", name, !writable)
		}
	}
}
