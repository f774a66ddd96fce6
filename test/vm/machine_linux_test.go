// Package vm boots virtual machines: the Debian of test/boot with Debian's own kernel and our
// package, under qemu, with a disk that loses what was not flushed when the power is cut. They
// have no network but the namespaces of the lab, which is inside. It needs what tree.sh makes;
// make test-vm has both.
package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
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

	"github.com/imdsgate/imdsgate/test/gate"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// images is where tree.sh puts what it makes.
const images = "../../bin/vm"

// disk is the image that every machine begins with: the tree with the product, enabled, and
// the tests that run inside. It is made once.
var disk = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp(images, fmt.Sprintf("run-%d-", os.Getpid()))
	if err != nil {
		return "", err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	return dir, prepare(dir)
})

func TestMain(m *testing.M) {
	sweep()
	code := m.Run()
	if made {
		dir, _ := disk()
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// made says that there is a disk to remove.
var made bool

// sweep removes what runs have left that were killed. Their machines have ended with them.
func sweep() {
	left, _ := filepath.Glob(filepath.Join(images, "run-*"))
	for _, dir := range left {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), "run-%d-", &pid); err == nil && syscall.Kill(pid, 0) != nil {
			os.RemoveAll(dir)
		}
	}
}

// packages whose tests run inside.
var packages = []string{"attribution/diag", "attribution/procwatch", "attribution/witness", "test/attacks"}

// programs that these tests build, which "go" has inside.
var programs = []string{"cmd/imdsgated", "cmd/imdsgate", "test/gate/confine", "test/attacks/attacker", "test/attacks/granted"}

// inside is where the machine has them.
const inside = "/opt/imdsgate-tests"

func prepare(dir string) error {
	repository, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	packed, err := filepath.Glob(filepath.Join(repository, "bin/packages/imdsgate_*_amd64.deb"))
	if err != nil || len(packed) != 1 {
		return fmt.Errorf("one package is wanted, and there are %d in bin/packages: make packages; %w", len(packed), err)
	}
	root := filepath.Join(dir, "layer")
	for _, d := range []string{root + "/usr/bin", root + "/usr/local/bin", root + inside + "/programs", dir + "/work", dir + "/merged"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	build := func(args ...string) {
		if err != nil {
			return
		}
		cmd := exec.Command("go", args...)
		cmd.Dir, cmd.Env = repository, append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
		if out, failed := cmd.CombinedOutput(); failed != nil {
			err = fmt.Errorf("go %v: %w\n%s", args, failed, out)
		}
	}
	// Its name and unit are those of the agent that a profile is about.
	build("build", "-o", root+"/usr/bin/amazon-ssm-agent", "./test/boot/asker")
	build("build", "-o", root+"/usr/local/bin/guest", "./test/vm/guest")
	for _, p := range programs {
		build("build", "-trimpath", "-ldflags=-s -w -X main.version=test", "-o", root+inside+"/programs/", "./"+p)
	}
	for _, p := range packages {
		build("test", "-c", "-trimpath", "-o", filepath.Join(root, inside, p, "tests"), "./"+p)
		if data := filepath.Join(repository, p, "testdata"); err == nil {
			if _, missing := os.Stat(data); missing == nil {
				err = os.CopyFS(filepath.Join(root, inside, p, "testdata"), os.DirFS(data))
			}
		}
	}
	if err != nil {
		return err
	}
	files := map[string]string{
		"/etc/systemd/system/guest-commands.service":   commands,
		"/etc/systemd/system/guest-metadata.service":   metadata,
		"/etc/systemd/system/churn.service":            "[Service]\nExecStart=/usr/local/sbin/churn\n",
		"/etc/systemd/journald.conf.d/vm.conf":         "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
		"/etc/modules-load.d/vm.conf":                  "virtio_console\n",
		"/etc/imdsgate/config.yaml":                    config,
		"/etc/fstab":                                   "/dev/vda / ext4 defaults 0 1\n",
		"/etc/systemd/system/getty@.service.d/no.conf": "[Unit]\nConditionPathExists=/nowhere\n",
	}
	for name, text := range files {
		if err := errors.Join(os.MkdirAll(filepath.Dir(root+name), 0o755), os.WriteFile(root+name, []byte(text), 0o644)); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{"/usr/local/bin/go": built, "/usr/local/sbin/churn": churn} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(root+name), 0o755), os.WriteFile(root+name, []byte(text), 0o755)); err != nil {
			return err
		}
	}
	tree, err := filepath.Abs(filepath.Join(images, "root"))
	if err != nil {
		return err
	}
	if out, err := exec.Command("unshare", "--mount", "--propagation=private", "--", "sh", "-euc", image, "sh", tree, dir, packed[0]).CombinedOutput(); err != nil {
		return fmt.Errorf("make the disk: %w\n%s", err, out)
	}
	return os.RemoveAll(root)
}

const config = `mode: enforce
profiles: [amazon-ssm-agent]
events: {fsync: interval, max_size: 1048576}
`

// churn has everything written that the daemon and its readers write, all the time.
const churn = `#!/bin/sh
amazon-ssm-agent -for 1h -rate 20 >/dev/null &
imdsgate events --json --follow --cursor /var/lib/cursor >/dev/null &
while :; do
	imdsgate mode set audit --for 1h --reason churn
	imdsgate decisions add deny --user lp --for 1h --reason churn
	imdsgate mode set enforce --reason churn
	imdsgate decisions add deny --user lp --for 2h --reason churn
done >/dev/null
`

// built is a go that has built everything beforehand.
const built = `#!/bin/sh
set -eu
[ "$1" = build ]
shift
while [ $# -gt 0 ]; do
	case $1 in
	-o) to=$2; shift ;;
	-ldflags) shift ;;
	-*) ;;
	*) cp "` + inside + `/programs/${1##*/}" "$to" ;;
	esac
	shift
done
`

// As whoever bakes an image does it, in a chroot.
const image = `mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/layer,workdir=$2/work" "$2/merged"
cp "$3" "$2/merged/opt/imdsgate.deb"
chroot "$2/merged" dpkg --force-confold --install /opt/imdsgate.deb
chroot "$2/merged" systemctl enable imdsgated.socket imdsgated.service guest-commands.service guest-metadata.service
truncate -s 4G "$2/disk"
mkfs.ext4 -q -d "$2/merged" "$2/disk"
`

const commands = `[Unit]
Description=Commands from outside
DefaultDependencies=no
After=systemd-modules-load.service local-fs.target
ConditionPathExists=!/nowhere

[Service]
ExecStartPre=udevadm wait /dev/virtio-ports/imdsgate
ExecStart=/usr/local/bin/guest commands
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
`

// As on EC2, there is no network before the daemon is ready.
const metadata = `[Unit]
Description=What makes it an EC2 instance
DefaultDependencies=no
After=local-fs.target network-pre.target
Before=network.target
Wants=network.target

[Service]
Type=notify
Environment=` + netlab.Private + `=1
ExecStart=/usr/local/bin/guest metadata

[Install]
WantedBy=multi-user.target
`

// machine is one that has booted, with its disk. Its methods may be called from any
// goroutine, but for those that switch it.
type machine struct {
	t    testing.TB
	dir  string
	cuts int // how often the power was cut; each time the disk gets one more layer
	cmd  *exec.Cmd
	said bytes.Buffer // by qemu; to be read once done is closed
	done chan struct{}

	commands net.Conn

	mu      sync.Mutex // guards the following
	last    int
	waiting map[int]chan result
}

type result struct {
	ID     int
	Output []byte
	Code   int
}

func boot(t testing.TB) *machine {
	t.Helper()
	for _, needs := range []string{filepath.Join(images, "recipe"), "/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-img"} {
		if _, err := os.Stat(needs); err != nil {
			const missing = "needs qemu, and what test/vm/tree.sh makes: make test-vm"
			if os.Getenv("CI") != "" {
				t.Fatal(missing)
			}
			t.Skip(missing)
		}
	}
	made = true
	base, err := disk()
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, waiting: map[int]chan result{}}
	if m.dir, err = os.MkdirTemp(base, "machine-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.off()
		if t.Failed() {
			console, _ := os.ReadFile(filepath.Join(m.dir, "console"))
			t.Logf("the console:\n%s", console[max(0, len(console)-8000):])
		}
		if err := os.RemoveAll(m.dir); err != nil {
			t.Error(err)
		}
	})
	m.layer(filepath.Join(base, "disk"), "raw")
	m.on()
	return m
}

func (m *machine) at(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) layerName() string { return m.at("disk-" + strconv.Itoa(m.cuts)) }

// layer puts an empty one above a disk. Where a machine writes to it first, qemu keeps the
// place in its memory until the machine flushes: what was not flushed is lost with qemu, block
// by block, as a disk loses its cache.
func (m *machine) layer(above, format string) {
	m.t.Helper()
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", above, "-F", format, m.layerName()).CombinedOutput()
	if err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
}

// on switches it on and waits for its first command.
func (m *machine) on() {
	m.t.Helper()
	m.cmd = exec.Command("qemu-system-x86_64", "-accel", accelerator(), "-cpu", "max", "-smp", "2", "-m", "2048",
		"-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot",
		"-kernel", filepath.Join(images, "vmlinuz"), "-initrd", filepath.Join(images, "initrd.img"),
		"-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off systemd.show_status=false",
		"-blockdev", "driver=qcow2,node-name=disk,l2-cache-size=16777216,file.driver=file,file.filename="+m.layerName(),
		"-device", "virtio-blk-pci,drive=disk",
		"-chardev", "socket,id=commands,path="+m.at("commands")+",server=on,wait=off",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=commands,name=imdsgate",
		"-qmp", "unix:"+m.at("qmp")+",server=on,wait=off",
		"-chardev", "file,id=console,append=on,path="+m.at("console"), "-serial", "chardev:console")
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	m.said.Reset()
	m.cmd.Stdout, m.cmd.Stderr = &m.said, &m.said
	m.done = make(chan struct{})
	began := time.Now()
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	go func() {
		m.cmd.Wait()
		close(m.done)
	}()
	for m.commands == nil {
		var err error
		if m.commands, err = net.Dial("unix", m.at("commands")); err == nil {
			break
		}
		m.commands = nil
		select {
		case <-m.done:
			m.t.Fatalf("qemu: %s", m.said.String())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Since(began) > time.Minute {
			m.t.Fatal(err)
		}
	}
	go m.listen(m.commands)
	m.await("the boot", func() bool {
		state, _ := m.try("systemctl", "is-system-running")
		return state == "running" || state == "degraded"
	})
	m.t.Logf("booted in %v", time.Since(began).Round(100*time.Millisecond))
}

// accelerator is KVM only where the processor has it: a /dev/kvm without that (kvm-pvm) makes
// machines in which Debian's kernel does not start.
func accelerator() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	flags := strings.Fields(string(b))
	if _, err := os.Stat("/dev/kvm"); err == nil && (slices.Contains(flags, "vmx") || slices.Contains(flags, "svm")) {
		return "kvm"
	}
	return "tcg,thread=multi"
}

// off cuts the power.
func (m *machine) off() {
	if m.cmd == nil {
		return
	}
	m.cmd.Process.Kill()
	<-m.done
	m.cmd = nil
	if m.commands != nil {
		m.commands.Close()
		m.commands = nil
	}
}

// cut cuts the power and switches it on again.
func (m *machine) cut() {
	m.t.Helper()
	m.off()
	before := m.layerName()
	m.cuts++
	m.layer(before, "qcow2")
	m.on()
}

// listen ends with the connection.
func (m *machine) listen(from net.Conn) {
	for in := json.NewDecoder(from); ; {
		var r result
		if in.Decode(&r) != nil {
			return
		}
		m.mu.Lock()
		if c := m.waiting[r.ID]; c != nil {
			c <- r
			delete(m.waiting, r.ID)
		}
		m.mu.Unlock()
	}
}

// patience is for a machine that is emulated, on a host that others use.
const patience = 3 * time.Minute

// await waits until something is so, for far longer than it takes.
func (m *machine) await(what string, is func() bool) {
	m.t.Helper()
	for begin := time.Now(); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Since(begin) > patience {
			log, _ := m.try("journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic")
			m.t.Fatalf("waited too long for %s\n%s", what, log)
		}
	}
}

// run runs a command in the machine as root and returns what it printed and the exit status.
func (m *machine) run(within time.Duration, args ...string) (out string, code int) {
	m.t.Helper()
	m.mu.Lock()
	m.last++
	id, c := m.last, make(chan result, 1)
	m.waiting[id] = c
	m.mu.Unlock()
	b, err := json.Marshal(map[string]any{"ID": id, "Args": args, "Env": []string{"LC_ALL=C.UTF-8", "SYSTEMD_PAGER=cat", "HOME=/root"}})
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.commands.Write(append(b, '\n')); err != nil {
		<-m.done
		m.t.Fatalf("%v: %v\n%s", args, err, m.said.String())
	}
	select {
	case r := <-c:
		return strings.TrimSpace(string(r.Output)), r.Code
	case <-m.done:
		return "the machine went off", -1
	case <-time.After(within):
		return fmt.Sprintf("no answer within %v", within), -1
	}
}

func (m *machine) try(args ...string) (out string, code int) {
	m.t.Helper()
	return m.run(patience, args...)
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

// curl asks, as a unit of its own, and returns the status, "000" without one.
func (m *machine) curl(user, path string) string {
	m.t.Helper()
	out, _ := m.try("systemd-run", "--quiet", "--pipe", "--wait", "--uid="+user, "curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "http://169.254.169.254"+path)
	return out
}

// spool is what the files of events have, as they are, the oldest first.
func (m *machine) spool() string {
	m.t.Helper()
	return m.do("sh", "-ec", "cd /var/log/imdsgate; for f in $(ls -tr events.ndjson*); do case $f in *.gz) zcat $f;; *) cat $f;; esac; done")
}

// documents are the events so far.
func (m *machine) documents() (all []gate.Document) {
	m.t.Helper()
	for line := range strings.Lines(m.spool()) {
		var d gate.Document
		if json.Unmarshal([]byte(line), &d) == nil {
			all = append(all, d)
		}
	}
	return all
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
