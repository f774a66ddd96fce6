package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/imdsgate/imdsgate/event"
	"golang.org/x/sys/unix"
)

// nameHost has events say which host they are of.
func (d *daemon) nameHost(layout event.Layout) error {
	h, err := describeHost(version)
	if err != nil {
		return err
	}
	h.Layout = layout
	d.host.Store(h)
	return nil
}

// followName does so again when the host is called something else: we are there before
// cloud-init has named the instance, and an image has the name of where it was made.
func (d *daemon) followName() {
	was := d.host.Load()
	name, err := os.Hostname()
	if err != nil || name == was.Name {
		return
	}
	if err := d.nameHost(was.Layout); err != nil {
		d.log.Warn().Err(err).Msg("the host has another name, and events have that of before")
		return
	}
	d.log.Info().Str("was", was.Name).Str("name", name).Msg("the host has another name")
}

// describeHost reads what every event says of this machine.
func describeHost(version string) (*event.Host, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("name this boot: %w", err)
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	// Containers and hosts without systemd may have no machine-id(5); a host.id
	// must be there all the same, since sequences of rules join on it.
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || len(bytes.TrimSpace(id)) == 0 {
		id = boot
	}
	h := &event.Host{
		ID: strings.TrimSpace(string(id)), Name: name, BootID: strings.TrimSpace(string(boot)), Version: version,
		Architecture: map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH],
		Kernel:       unix.ByteSliceToString(uts.Release[:]),
	}
	// One agent to a host: its id follows from the host's, and gives that away
	// as little as machine-id(5) wants.
	sum := sha256.Sum256([]byte("imdsgate agent " + h.ID))
	h.AgentID = hex.EncodeToString(sum[:16])
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return h, nil // a host without it is still a host
	}
	for lines := bufio.NewScanner(bytes.NewReader(release)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), "=")
		value = strings.Trim(value, `"'`)
		switch key {
		case "NAME":
			h.OSName = value
		case "VERSION_ID":
			h.OSVersion = value
		case "ID":
			h.OSPlatform = value
		}
	}
	return h, nil
}
