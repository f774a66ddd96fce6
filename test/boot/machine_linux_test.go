// Package boot boots machines: a Debian with its own systemd and our package, in a network
// namespace in which the metadata service is the emulator. It needs the tree that tree.sh
// makes; make test-boot has both.
package boot

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
	"github.com/imdsgate/imdsgate/test/debian"
	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// image is what all machines begin with: the product, and workloads.
var image = debian.Image{
	Tree:   cmp.Or(os.Getenv("IMDSGATE_BOOT_TREE"), "../../bin/boot"),
	Target: "test-boot",
	Files: map[string]string{
		"/etc/systemd/system/amazon-ssm-agent.service": ssmAgent,
		"/etc/systemd/journald.conf.d/boot.conf":       "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
	},
	Units: []string{"amazon-ssm-agent.service"},
}

// hierarchies are where cgroups may be: cgroup2, alone or beside version 1, and that which
// systemd has in version 1.
var hierarchies = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"}

func TestMain(m *testing.M) {
	for _, dir := range debian.Left(append(hierarchies, memory)...) {
		removeCgroups(dir)
	}
	image.Main(m)
}

const ssmAgent = `[Unit]
Description=What must have credentials at boot
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
ExecStart=/usr/bin/amazon-ssm-agent -path /latest/meta-data/iam/security-credentials/
RemainAfterExit=yes

[Install]
WantedBy=multi-user.target
`

// machine is one that has booted. Its methods are for one goroutine.
type machine struct {
	*debian.Machine
	*netlab.Lab
	unlease func()
	cgroup  string // below the mounts of cgroup2 and of systemd's hierarchy
	leader  int    // its systemd
}

// settings of a machine.
type settings struct {
	config string
	files  map[string]string // more, by name
	lab    netlab.Options
	bare   bool // it has no address of IPv4 until it asks for one, by DHCP
}

func boot(t testing.TB, s settings) *machine {
	t.Helper()
	m := &machine{Machine: image.Machine(t)}
	m.Patience, m.Run = 30*time.Second, m.run
	t.Cleanup(m.off)
	own := filepath.Join(m.Dir, "own")
	if err := errors.Join(os.Mkdir(own, 0o755), os.Mkdir(filepath.Join(m.Dir, "work"), 0o755), os.Mkdir(filepath.Join(m.Dir, "root"), 0o755),
		debian.Write(own, map[string]string{"/etc/imdsgate/config.yaml": s.config}), debian.Write(own, s.files)); err != nil {
		t.Fatal(err)
	}
	m.on(s)
	return m
}

// The mounts are private to the process that becomes the machine, and so they end with it.
// All of it is in a PID namespace, since a systemd-nspawn that is killed leaves the machine
// on. systemd-nspawn gives its own cgroup to the machine, below that of cgroup2 in which it
// begins, and needs one in systemd's hierarchy where there is one.
const power = `mount -t overlay overlay -o "lowerdir=$1/layer:$1/../root,upperdir=$2/own,workdir=$2/work" "$2/root"
for h in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
	[ ! -e $h/cgroup.procs ] || { mkdir $h/$3; echo $$ >$h/$3/cgroup.procs; }
done
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn # what it would leave there
: >"$2/netns"
mount --bind "$4" "$2/netns"
cd /
exec unshare --pid --fork --kill-child --mount-proc -- systemd-nspawn -q --keep-unit --register=no --directory="$2/root" --machine="$3" --network-namespace-path="$2/netns" \
	--capability=all --boot --console=pipe --link-journal=no --resolv-conf=off
`

// on switches it on. A machine that was off before has its disk, and nothing else.
func (m *machine) on(s settings) {
	m.T.Helper()
	var err error
	if m.Lab, err = netlab.New(s.lab); err != nil {
		m.T.Fatal(err)
	}
	if s.bare {
		if err := m.Instance.Run(exec.Command("ip", "-4", "address", "flush", "dev", "eth0")); err != nil {
			m.T.Fatal(err)
		}
		if m.unlease, err = lease(m.Lab); err != nil {
			m.T.Fatal(err)
		}
	}
	m.cgroup = debian.Name(filepath.Base(m.Dir))
	cmd := exec.Command("unshare", "--mount", "--propagation=private", "--", "sh", "-euc", power, "sh", m.Image, m.Dir, m.cgroup, m.Instance.Path())
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	m.Start(cmd)
	m.Await("its systemd", func() bool {
		for _, h := range hierarchies[:2] {
			b, _ := os.ReadFile(filepath.Join(h, m.cgroup, "payload/init.scope/cgroup.procs"))
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				m.leader = pid
				return true
			}
		}
		return false
	})
	m.Booted()
}

// off cuts the power.
func (m *machine) off() {
	m.Off()
	if m.Lab == nil {
		return
	}
	if m.unlease != nil {
		m.unlease()
	}
	if err := m.Lab.Close(); err != nil {
		m.T.Error(err)
	}
	m.Lab, m.unlease = nil, nil
	for _, h := range hierarchies {
		top := filepath.Join(h, m.cgroup)
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			removeCgroups(top)
			if _, err := os.Stat(top); err != nil {
				break
			}
			if time.Now().After(end) {
				m.T.Errorf("%s is still there", top)
				break
			}
		}
	}
}

// removeCgroups removes those below first.
func removeCgroups(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeCgroups(filepath.Join(dir, e.Name()))
		}
	}
	unix.Rmdir(dir)
}

// run is for Machine.Run. What runs is outside of the machine's cgroups.
func (m *machine) run(within time.Duration, args ...string) (out string, code int) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(m.leader), "--all", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER=cat", "LC_ALL=C.UTF-8"}
	b, _ := cmd.CombinedOutput()
	return string(bytes.TrimSpace(b)), cmd.ProcessState.ExitCode()
}

// file is where a file of the machine is for the host that runs the test.
func (m *machine) file(name string) string { return fmt.Sprintf("/proc/%d/root%s", m.leader, name) }

// monotonic is a property that is a time since the boot.
func (m *machine) monotonic(unit, name string) time.Duration {
	m.T.Helper()
	n, err := strconv.ParseInt(m.Property(unit, name+"Monotonic"), 10, 64)
	if err != nil || n == 0 {
		m.T.Fatalf("%s of %s: %d, %v", name, unit, n, err)
	}
	return time.Duration(n) * time.Microsecond
}

// daemon is the number of the daemon on the host that runs the test; 0 if there is none.
// What the unit runs after it is the same program with an argument.
func (m *machine) daemon() int {
	for _, h := range hierarchies[:2] {
		b, _ := os.ReadFile(filepath.Join(h, m.cgroup, "payload/system.slice/imdsgated.service/cgroup.procs"))
		for _, line := range strings.Fields(string(b)) {
			command, _ := os.ReadFile("/proc/" + line + "/cmdline")
			if pid, err := strconv.Atoi(line); err == nil && string(command) == "/usr/sbin/imdsgated\x00" {
				return pid
			}
		}
	}
	return 0
}

// signal sends one to the daemon.
func (m *machine) signal(s syscall.Signal) {
	m.T.Helper()
	pid := m.daemon()
	if pid == 0 {
		m.T.Fatal("there is no daemon")
	}
	if err := syscall.Kill(pid, s); err != nil {
		m.T.Fatal(err)
	}
}

// redirected reports whether new connections are led to the daemon.
func (m *machine) redirected() bool {
	m.T.Helper()
	return strings.Contains(m.Do("iptables-save"), "-j REDIRECT --to-ports 254")
}

// outcome is what asker prints.
type outcome struct {
	Requests, Failed, Taken int
	Error                   string
	Slowest                 time.Duration `json:"slowest_ns"`
	Last                    time.Time     `json:"last_failure"`
}

// load asks for a while, as a unit of the machine. The function waits for the end.
func (m *machine) load(lasts time.Duration, args ...string) func() outcome {
	m.T.Helper()
	return m.loadOf("root", lasts, args...)
}

// loadOf is load of somebody else's.
func (m *machine) loadOf(user string, lasts time.Duration, args ...string) func() outcome {
	m.T.Helper()
	return m.loading(func() (string, int) {
		return m.Try(append([]string{"systemd-run", "--quiet", "--pipe", "--wait", "--uid=" + user, "amazon-ssm-agent", "-for", lasts.String()}, args...)...)
	})
}

// contained is load from the container behind the machine's bridge.
func (m *machine) contained(lasts time.Duration, args ...string) func() outcome {
	m.T.Helper()
	return m.loading(func() (string, int) {
		cmd := exec.Command(filepath.Join(m.Image, "layer/usr/bin/amazon-ssm-agent"), append([]string{"-for", lasts.String()}, args...)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		m.Bridged.Run(cmd)
		return out.String(), cmd.ProcessState.ExitCode()
	})
}

// withContainer is a lab in which everywhere is: a container gets tokens, as far as its way goes.
var withContainer = netlab.Options{Containers: true, IMDS: &imdstest.Config{HopLimit: 2}}

// everywhere is load from the machine, where others try to get the ports meanwhile, and from a
// container, over both families. The outcomes are by the addresses that asked.
func (m *machine) everywhere(lasts time.Duration, args ...string) func() map[string]outcome {
	m.T.Helper()
	less := append([]string{"-rate", "20"}, args...)
	less6 := append([]string{"-endpoint", "[fd00:ec2::254]"}, less...)
	loads := map[string]func() outcome{
		"172.31.0.10": m.load(lasts, append([]string{"-bind"}, args...)...), "fd00:ec2:1::10": m.load(lasts, less6...),
		"172.17.0.2": m.contained(lasts, less...), "fd00:ec2:17::2": m.contained(lasts, less6...),
	}
	return func() map[string]outcome {
		m.T.Helper()
		all := map[string]outcome{}
		for from, load := range loads {
			all[from] = load()
		}
		return all
	}
}

// served complains of outcomes that are not what everywhere has without a daemon in the way, or
// of which no event tells.
func (m *machine) served(all map[string]outcome) {
	m.T.Helper()
	told := map[any]int{}
	for _, d := range m.Documents() {
		told[d.At("source.ip")]++
	}
	for _, from := range slices.Sorted(maps.Keys(all)) {
		o := all[from]
		if want := map[bool]int{true: 250, false: 100}[from == "172.31.0.10"]; o.Requests < want || o.Failed != 0 || o.Taken != 0 || told[from] == 0 {
			m.T.Errorf("from %s, of which %d events tell: %+v", from, told[from], o)
		} else {
			m.T.Logf("from %s: %d requests, %d failed, the slowest took %v", from, o.Requests, o.Failed, o.Slowest.Round(time.Millisecond))
		}
	}
}

// loading runs what prints an outcome.
func (m *machine) loading(run func() (string, int)) func() outcome {
	out, code := "", 0
	var running sync.WaitGroup
	running.Go(func() { out, code = run() })
	return func() outcome {
		m.T.Helper()
		running.Wait()
		var o outcome
		if err := json.Unmarshal([]byte(out), &o); err != nil || code > 1 {
			m.T.Fatalf("the load: exit %d, %v: %s", code, err, out)
		}
		return o
	}
}

// count is how many events have an action.
func (m *machine) count(action string) (n int) {
	m.T.Helper()
	for _, d := range m.Documents() {
		if d.At("event.action") == action {
			n++
		}
	}
	return n
}

// lasted is the length that an event has.
func lasted(d gate.Document) time.Duration {
	n, _ := d.At("event.duration").(float64)
	return time.Duration(n)
}

// guarded waits until another daemon than pid is ready.
func (m *machine) guarded(pid int) time.Duration {
	m.T.Helper()
	return m.Await("the next daemon", func() bool {
		now := m.daemon()
		return now != 0 && now != pid && m.Property("imdsgated.service", "ActiveState") == "active"
	})
}
