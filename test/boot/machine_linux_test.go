// Package boot boots machines: a Debian with its own systemd and our package, in a network
// namespace in which the metadata service is the emulator. It needs the tree that tree.sh
// makes; make test-boot has both.
package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// tree is where tree.sh puts it.
const tree = "../../bin/boot"

// layer is what an image has above the tree: the product, enabled, and workloads. It is
// made once.
var layer = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", fmt.Sprintf("imdsgate-boot-%d-", os.Getpid()))
	if err != nil {
		return "", err
	}
	return dir, prepare(dir)
})

func TestMain(m *testing.M) {
	sweep()
	code := m.Run()
	if dir, _ := layer(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// hierarchies are where cgroups may be: cgroup2, alone or beside version 1, and that which
// systemd has in version 1.
var hierarchies = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"}

// sweep removes what runs have left that were killed. Their machines have ended with them.
func sweep() {
	for _, parent := range append(hierarchies, os.TempDir(), memory) {
		left, _ := filepath.Glob(filepath.Join(parent, "imdsgate-boot-*"))
		for _, dir := range left {
			var pid int
			if _, err := fmt.Sscanf(filepath.Base(dir), "imdsgate-boot-%d-", &pid); err != nil {
				continue
			}
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); !os.IsNotExist(err) {
				continue
			}
			if parent == os.TempDir() {
				os.RemoveAll(dir)
			} else {
				removeCgroups(dir)
			}
		}
	}
}

func prepare(dir string) error {
	repository, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	build := func(env string, args ...string) error {
		cmd := exec.Command("go", args...)
		cmd.Dir, cmd.Env = repository, append(os.Environ(), "CGO_ENABLED=0", env)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", args, err, out)
		}
		return nil
	}
	packages, err := filepath.Glob(filepath.Join(repository, "bin/packages/imdsgate_*_"+runtime.GOARCH+".deb"))
	if err != nil || len(packages) != 1 {
		return fmt.Errorf("one package for this machine is wanted, and there are %d in bin/packages: make packages; %w", len(packages), err)
	}
	root := filepath.Join(dir, "root")
	for _, d := range []string{root + "/usr/bin", dir + "/work", dir + "/merged", root + "/opt"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	// Its name and unit are those of the agent that a profile is about.
	if err := build("", "build", "-o", root+"/usr/bin/amazon-ssm-agent", "./test/boot/asker"); err != nil {
		return err
	}
	files := map[string]string{
		"/etc/systemd/system/cloud-init-local.service": cloudInit,
		"/etc/systemd/system/amazon-ssm-agent.service": ssmAgent,
		"/usr/local/lib/first-boot.py":                 firstBoot,
		"/etc/systemd/journald.conf.d/boot.conf":       "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
	}
	for name, text := range files {
		if err := os.MkdirAll(filepath.Dir(root+name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(root+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	lower, err := filepath.Abs(filepath.Join(tree, "root"))
	if err != nil {
		return err
	}
	if out, err := exec.Command("unshare", "--mount", "--propagation=private", "--", "sh", "-euc", image, "sh", lower, dir, packages[0]).CombinedOutput(); err != nil {
		return fmt.Errorf("install the package: %w\n%s", err, out)
	}
	return nil
}

// aPackage is where the machine has the package, too.
const aPackage = "/opt/imdsgate.deb"

// As whoever bakes an image does it, in a chroot.
const image = `mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/root,workdir=$2/work" "$2/merged"
cp "$3" "$2/merged` + aPackage + `"
chroot "$2/merged" dpkg --install ` + aPackage + `
chroot "$2/merged" systemctl enable imdsgated.socket imdsgated.service cloud-init-local.service amazon-ssm-agent.service
`

// As cloud-init's in Debian, which asks before there is a network of the distribution's.
const cloudInit = `[Unit]
Description=What asks first
DefaultDependencies=no
Wants=network-pre.target
After=systemd-remount-fs.service
Before=network-pre.target shutdown.target
Conflicts=shutdown.target
RequiresMountsFor=/var/lib

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /usr/local/lib/first-boot.py
RemainAfterExit=yes

[Install]
WantedBy=multi-user.target
`

const firstBoot = `import urllib.request
ask = lambda method, path, **h: urllib.request.urlopen(urllib.request.Request(
    "http://169.254.169.254/latest/" + path, method=method, headers={k.replace("_", "-"): v for k, v in h.items()}), timeout=5).read().decode()
token = ask("PUT", "api/token", X_aws_ec2_metadata_token_ttl_seconds="60")
open("/run/user-data", "w").write(ask("GET", "user-data", X_aws_ec2_metadata_token=token))
`

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

// machine is one that has booted, with its disk. Its methods are for one goroutine.
type machine struct {
	*netlab.Lab
	t      testing.TB
	disk   string // its own layer, and where it is mounted
	cmd    *exec.Cmd
	done   chan struct{}
	out    bytes.Buffer
	cgroup string // below the mounts of cgroup2 and of systemd's hierarchy
	leader int    // its systemd
	began  time.Time
}

// settings of a machine.
type settings struct {
	config string
	files  map[string]string // more, by name
	lab    netlab.Options
}

func boot(t testing.TB, s settings) *machine {
	t.Helper()
	labtest.RequireRoot(t)
	if _, err := os.Stat(filepath.Join(tree, "recipe")); err != nil {
		const missing = "needs a Debian tree, which test/boot/tree.sh makes: make test-boot"
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	m := &machine{t: t}
	var err error
	if m.disk, err = os.MkdirTemp("", fmt.Sprintf("imdsgate-boot-%d-", os.Getpid())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.off()
		if err := os.RemoveAll(m.disk); err != nil {
			t.Error(err)
		}
	})
	for _, d := range []string{"own", "work", "root"} {
		if err := os.Mkdir(filepath.Join(m.disk, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.write("/etc/imdsgate/config.yaml", s.config)
	for name, text := range s.files {
		m.write(name, text)
	}
	m.on(s)
	return m
}

// write writes a file of the machine, which is off.
func (m *machine) write(name, text string) {
	m.t.Helper()
	to := filepath.Join(m.disk, "own", name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, []byte(text), 0o644)); err != nil {
		m.t.Fatal(err)
	}
}

// The mounts are private to the process that becomes the machine, and so they end with it.
// All of it is in a PID namespace, since a systemd-nspawn that is killed leaves the machine
// on. systemd-nspawn gives its own cgroup to the machine, below that of cgroup2 in which it
// begins, and needs one in systemd's hierarchy where there is one.
const power = `mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/own,workdir=$2/work" "$2/root"
for h in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
	[ ! -e $h/cgroup.procs ] || { mkdir $h/$3; echo $$ >$h/$3/cgroup.procs; }
done
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn # what it would leave there
: >"$2/netns"
mount --bind "$4" "$2/netns"
cd /
exec unshare --pid --fork --kill-child --mount-proc -- systemd-nspawn -q --keep-unit --register=no --directory="$2/root" --machine="$3" --network-namespace-path="$2/netns" \
	--capability=all --boot --console=pipe --link-journal=no
`

var machines int

// on switches it on. A machine that was off before has its disk, and nothing else.
func (m *machine) on(s settings) {
	m.t.Helper()
	base, err := layer()
	if err != nil {
		m.t.Fatal(err)
	}
	lower, err := filepath.Abs(filepath.Join(tree, "root"))
	if err != nil {
		m.t.Fatal(err)
	}
	if m.Lab, err = netlab.New(s.lab); err != nil {
		m.t.Fatal(err)
	}
	machines++
	m.cgroup = fmt.Sprintf("imdsgate-boot-%d-%d", os.Getpid(), machines)
	m.cmd = exec.Command("unshare", "--mount", "--propagation=private", "--", "sh", "-euc", power, "sh",
		base+"/root:"+lower, m.disk, m.cgroup, m.Instance.Path())
	m.cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	m.cmd.Stdout, m.cmd.Stderr = &m.out, &m.out
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	m.done = make(chan struct{})
	m.began = time.Now()
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	go func() {
		m.cmd.Wait()
		close(m.done)
	}()
	m.await("its systemd", func() bool {
		for _, h := range hierarchies[:2] {
			b, _ := os.ReadFile(filepath.Join(h, m.cgroup, "payload/init.scope/cgroup.procs"))
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				m.leader = pid
				return true
			}
		}
		return false
	})
	m.await("the boot", func() bool {
		state, _ := m.try("systemctl", "is-system-running")
		return state == "running" || state == "degraded"
	})
}

// off cuts the power.
func (m *machine) off() {
	if m.cmd == nil {
		return
	}
	m.cmd.Process.Kill()
	<-m.done
	m.cmd = nil
	if err := m.Lab.Close(); err != nil {
		m.t.Error(err)
	}
	for _, h := range hierarchies {
		top := filepath.Join(h, m.cgroup)
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			removeCgroups(top)
			if _, err := os.Stat(top); err != nil {
				break
			}
			if time.Now().After(end) {
				m.t.Errorf("%s is still there", top)
				break
			}
		}
	}
	if m.t.Failed() {
		m.t.Logf("the machine said:\n%s", m.out.String())
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

// await waits until something is so, for far longer than it takes.
func (m *machine) await(what string, is func() bool) time.Duration {
	m.t.Helper()
	begin := time.Now()
	for !is() {
		select {
		case <-m.done:
			m.t.Fatalf("waiting for %s: the machine went off\n%s", what, m.out.String())
		default:
		}
		if time.Since(begin) > 30*time.Second {
			log, _ := m.try("journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic")
			m.t.Fatalf("waited too long for %s\n%s", what, log)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(begin)
}

// try runs a command in the machine as root, outside of its cgroups, and returns what it
// printed and the exit status.
func (m *machine) try(args ...string) (out string, code int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(m.leader), "--all", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER=cat", "LC_ALL=C.UTF-8"}
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	cmd.Run()
	return strings.TrimSpace(b.String()), cmd.ProcessState.ExitCode()
}

// do is try of what must succeed.
func (m *machine) do(args ...string) string {
	m.t.Helper()
	out, code := m.try(args...)
	if code != 0 {
		log, _ := m.try("journalctl", "--no-pager", "-n", "40", "-o", "short-monotonic", "-u", "imdsgated.service", "-u", "imdsgated.socket")
		m.t.Fatalf("%v: exit %d\n%s\n%s", args, code, out, log)
	}
	return out
}

// property asks systemd.
func (m *machine) property(unit, name string) string {
	m.t.Helper()
	return m.do("systemctl", "show", "--value", "-p", name, unit)
}

// monotonic is a property that is a time since the boot.
func (m *machine) monotonic(unit, name string) time.Duration {
	m.t.Helper()
	n, err := strconv.ParseInt(m.property(unit, name+"Monotonic"), 10, 64)
	if err != nil || n == 0 {
		m.t.Fatalf("%s of %s: %d, %v", name, unit, n, err)
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
	m.t.Helper()
	pid := m.daemon()
	if pid == 0 {
		m.t.Fatal("there is no daemon")
	}
	if err := syscall.Kill(pid, s); err != nil {
		m.t.Fatal(err)
	}
}

// curl asks, as a unit of its own, and returns the status, "000" without one.
func (m *machine) curl(user, path string, args ...string) string {
	m.t.Helper()
	out, _ := m.try(append([]string{"systemd-run", "--quiet", "--pipe", "--wait", "--uid=" + user, "curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}",
		"http://169.254.169.254" + path}, args...)...)
	return out
}

// redirected reports whether new connections are led to the daemon.
func (m *machine) redirected() bool {
	m.t.Helper()
	return strings.Contains(m.do("iptables-save"), "-j REDIRECT --to-ports 254")
}

// outcome is what asker prints.
type outcome struct {
	Requests, Failed, Taken int
	Error                   string
	Slowest                 time.Duration `json:"slowest_ns"`
	Last                    time.Time     `json:"last_failure"`
}

// load asks for a while. The function waits for the end.
func (m *machine) load(lasts time.Duration, args ...string) func() outcome {
	m.t.Helper()
	out, code := "", 0
	var running sync.WaitGroup
	running.Go(func() {
		out, code = m.try(append([]string{"systemd-run", "--quiet", "--pipe", "--wait", "amazon-ssm-agent", "-for", lasts.String()}, args...)...)
	})
	return func() outcome {
		m.t.Helper()
		running.Wait()
		var o outcome
		if err := json.Unmarshal([]byte(out), &o); err != nil || code > 1 {
			m.t.Fatalf("the load: exit %d, %v: %s", code, err, out)
		}
		return o
	}
}

// documents are the events so far.
func (m *machine) documents() (all []gate.Document) {
	m.t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(m.leader), "root/var/log/imdsgate/events.ndjson"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		m.t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var d gate.Document
		if json.Unmarshal(line, &d) == nil {
			all = append(all, d)
		}
	}
	return all
}

// count is how many events have an action.
func (m *machine) count(action string) (n int) {
	m.t.Helper()
	for _, d := range m.documents() {
		if d.At("event.action") == action {
			n++
		}
	}
	return n
}

// event waits for one with an action, and returns the last such.
func (m *machine) event(action string) (last gate.Document) {
	m.t.Helper()
	m.await("an event "+action, func() bool {
		for _, d := range m.documents() {
			if d.At("event.action") == action {
				last = d
			}
		}
		return last != nil
	})
	return last
}

// lasted is the length that an event has.
func lasted(d gate.Document) time.Duration {
	n, _ := d.At("event.duration").(float64)
	return time.Duration(n)
}

// guarded waits until another daemon than pid is ready.
func (m *machine) guarded(pid int) time.Duration {
	m.t.Helper()
	return m.await("the next daemon", func() bool {
		now := m.daemon()
		return now != 0 && now != pid && m.property("imdsgated.service", "ActiveState") == "active"
	})
}
