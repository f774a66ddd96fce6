// Package vm boots virtual machines: the Debian of test/boot with Debian's own kernel and our
// package, under qemu, with a disk that loses what was not flushed when the power is cut. They
// have no network but the namespaces of the lab, which is inside. It needs what tree.sh makes;
// make test-vm has both.
package vm

import (
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
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/test/debian"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// images is where tree.sh puts what it makes.
const images = "../../bin/vm"

// image is a disk that every machine begins with: the product, and the tests that run inside.
var image = debian.Image{
	Tree:   images,
	Needs:  []string{"/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-img"},
	Target: "test-vm",
	Files: map[string]string{
		"/etc/systemd/system/guest-commands.service":   commands,
		"/etc/systemd/system/guest-metadata.service":   metadata,
		"/etc/systemd/system/churn.service":            "[Service]\nExecStart=/usr/local/sbin/churn\n",
		"/etc/systemd/journald.conf.d/vm.conf":         "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
		"/etc/modules-load.d/vm.conf":                  "virtio_console\n",
		"/etc/imdsgate/config.yaml":                    config,
		"/etc/cloud/cloud-init.disabled":               "",
		"/etc/fstab":                                   "/dev/vda / ext4 defaults 0 1\n",
		"/etc/systemd/system/getty@.service.d/no.conf": "[Unit]\nConditionPathExists=/nowhere\n",
		"/usr/local/bin/go":                            built,
		"/usr/local/sbin/churn":                        churn,
	},
	Add:   add,
	Units: []string{"guest-commands.service", "guest-metadata.service"},
	Then:  "truncate -s 4G disk; mkfs.ext4 -q -d merged disk; umount merged; rm -r layer",
}

func TestMain(m *testing.M) { image.Main(m) }

// packages whose tests run inside.
var packages = []string{"attribution/diag", "attribution/procwatch", "attribution/witness", "test/attacks"}

// inside is where the machine has them.
const inside = "/opt/imdsgate-tests"

func add(layer string) error {
	err := errors.Join(debian.Go("build", "-o", layer+"/usr/local/bin/guest", "./test/vm/guest"),
		// What these tests would build with go.
		debian.Go("build", "-trimpath", "-ldflags=-s -w -X main.version=test", "-o", layer+inside+"/programs/",
			"./cmd/imdsgated", "./cmd/imdsgate", "./test/gate/confine", "./test/attacks/attacker", "./test/attacks/granted"))
	for _, p := range packages {
		to, data := filepath.Join(layer, inside, p), filepath.Join("../..", p, "testdata")
		err = errors.Join(err, debian.Go("test", "-c", "-trimpath", "-o", filepath.Join(to, "tests"), "./"+p))
		if _, missing := os.Stat(data); missing == nil {
			err = errors.Join(err, os.CopyFS(filepath.Join(to, "testdata"), os.DirFS(data)))
		}
	}
	return err
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

// machine is one that has booted. Its methods may be called from any goroutine, but for
// those that switch it.
type machine struct {
	*debian.Machine
	cuts     int // how often the power was cut; each time the disk gets one more layer
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
	m := &machine{Machine: image.Machine(t), waiting: map[int]chan result{}}
	m.Patience, m.Run = 3*time.Minute, m.run // it is emulated, on a host that others use
	t.Cleanup(m.off)
	m.layer(filepath.Join(m.Image, "disk"), "raw")
	m.on()
	return m
}

func (m *machine) at(name string) string { return filepath.Join(m.Dir, name) }

func (m *machine) layerName() string { return m.at("disk-" + strconv.Itoa(m.cuts)) }

// layer puts an empty one above a disk. Where a machine writes to it first, qemu keeps the
// place in its memory until the machine flushes: what was not flushed is lost with qemu, block
// by block, as a disk loses its cache.
func (m *machine) layer(above, format string) {
	m.T.Helper()
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", above, "-F", format, m.layerName()).CombinedOutput()
	if err != nil {
		m.T.Fatalf("%v: %s", err, out)
	}
}

// on switches it on and waits for its first command.
func (m *machine) on() {
	m.T.Helper()
	m.Start(exec.Command("qemu-system-x86_64", "-accel", accelerator(), "-cpu", "max", "-smp", "2", "-m", "2048",
		"-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot",
		"-kernel", filepath.Join(images, "vmlinuz"), "-initrd", filepath.Join(images, "initrd.img"),
		"-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off systemd.show_status=false",
		"-blockdev", "driver=qcow2,node-name=disk,l2-cache-size=16777216,file.driver=file,file.filename="+m.layerName(),
		"-device", "virtio-blk-pci,drive=disk",
		"-chardev", "socket,id=commands,path="+m.at("commands")+",server=on,wait=off",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=commands,name=imdsgate",
		"-qmp", "unix:"+m.at("qmp")+",server=on,wait=off", "-serial", "stdio"))
	m.Await("qemu", func() bool {
		c, err := net.Dial("unix", m.at("commands"))
		m.commands = c
		return err == nil
	})
	go m.listen(m.commands)
	m.Booted()
	m.T.Logf("booted in %v", time.Since(m.Began).Round(100*time.Millisecond))
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
	m.Off()
	if m.commands != nil {
		m.commands.Close()
		m.commands = nil
	}
}

// cut cuts the power and switches it on again.
func (m *machine) cut() {
	m.T.Helper()
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

// run is for Machine.Run.
func (m *machine) run(within time.Duration, args ...string) (out string, code int) {
	m.T.Helper()
	if m.commands == nil {
		return "it has no qemu", -1
	}
	m.mu.Lock()
	m.last++
	id, c := m.last, make(chan result, 1)
	m.waiting[id] = c
	m.mu.Unlock()
	b, err := json.Marshal(map[string]any{"ID": id, "Args": args, "Env": []string{"LC_ALL=C.UTF-8", "SYSTEMD_PAGER=cat", "HOME=/root"}})
	if err != nil {
		m.T.Fatal(err)
	}
	if _, err := m.commands.Write(append(b, '\n')); err != nil {
		<-m.Done
		m.T.Fatalf("%v: %v\n%s", args, err, m.Said.String())
	}
	select {
	case r := <-c:
		return strings.TrimSpace(string(r.Output)), r.Code
	case <-m.Done:
		return "the machine went off", -1
	case <-time.After(within):
		return fmt.Sprintf("no answer within %v", within), -1
	}
}
