package install

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
)

// commands are those that scripts ask of a host. They note what they were asked in /asked;
// systemd-detect-virt finds a chroot if there is /chroot, and no redirect is removed if there
// is /stuck. The imdsgate that reads the configuration is the real one.
var commands = map[string]string{
	"systemctl":           `echo "systemctl $*" >>/asked`,
	"journalctl":          `echo "journalctl $*" >>/asked`,
	"systemd-detect-virt": `test -e /chroot`,
	"imdsgate": `case $1 in config) exec /built/imdsgate "$@" ;; esac
		echo "imdsgate $*" >>/asked
		test ! -e /stuck`,
}

// TestScripts runs what stops and cleans in a root of its own, which lies over that of this
// host and goes with the mount namespace. systemd runs there, as far as scripts can see.
func TestScripts(t *testing.T) {
	labtest.RequireRoot(t)
	dir := tree(t)
	for name, text := range commands {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const root = `
		at=$(mktemp -d)
		mount -t tmpfs tmpfs "$at"
		trap 'umount -l "$at"; rmdir "$at"' EXIT
		mkdir "$at/upper" "$at/work" "$at/root"
		mount -t overlay -o "lowerdir=/,upperdir=$at/upper,workdir=$at/work" overlay "$at/root"
		mkdir "$at/root/source" "$at/root/built" "$at/root/commands"
		cp -R packaging/. "$at/root/source"
		cp bin/imdsgate "$at/root/built"
		cp systemctl systemd-detect-virt imdsgate "$at/root/commands"
		chroot "$at/root" /usr/bin/env "PATH=/commands:$PATH" sh -euc "
			rm -rf /etc/imdsgate /usr/lib/imdsgate
			mkdir -p /run/systemd/system /run/imdsgate /var/log/imdsgate /var/lib/imdsgate /etc/imdsgate
			: >/asked
			$1"`
	for _, c := range []struct{ name, script, says string }{
		{"what is removed is disabled at the end", `
			sh /source/scripts/before-remove.sh remove
			sed 's/ imdsgated.*//' /asked`, "systemctl stop\nimdsgate redirect remove\nsystemctl --no-reload disable\n"},
		{"what is not removed stays enabled", `
			touch /stuck
			sh /source/scripts/before-remove.sh remove 2>/dev/null || cat /asked`, "systemctl stop imdsgated.service imdsgated.socket\nimdsgate redirect remove\n"},
		{"in a chroot nothing is stopped", `
			touch /chroot
			sh /source/scripts/before-remove.sh remove
			sed 's/ imdsgated.*//' /asked`, "systemctl --no-reload disable\n"},
		{"a removal", `
			sh /source/scripts/after-remove.sh remove
			ls -d /run/imdsgate /var/lib/imdsgate 2>/dev/null || true`, "/var/lib/imdsgate\n"},
		{"/run of another system after a removal", `
			touch /chroot
			sh /source/scripts/after-remove.sh remove
			ls -d /run/imdsgate; cat /asked`, "/run/imdsgate\n"},
		{"/run of another system, in an image", `
			touch /chroot
			mkdir -p /var/log/journal/0123456789abcdef0123456789abcdef
			sh /source/images/seal.sh
			ls -A /var/log/journal
			ls -d /run/imdsgate /var/log/imdsgate /var/lib/imdsgate 2>/dev/null || cat /asked`, "/run/imdsgate\nsystemctl --quiet is-enabled imdsgated.service\n"},
		{"an image of a host that records elsewhere", `
			mkdir -p '/data/the log' /data/state
			echo 'events: {path: /data/the log/events.ndjson}' >/etc/imdsgate/config.yaml
			echo 'first_seen: {path: /data/seen.db}' >>/etc/imdsgate/config.yaml
			echo 'state: {dir: /data/state}' >>/etc/imdsgate/config.yaml
			touch '/data/the log/events.ndjson' '/data/the log/events.ndjson.1' /data/seen.db /data/seen.db.damaged /data/journal-cursor
			touch /data/state/decisions.json /data/state/mode.json /data/others '/data/the log/others.ndjson'
			sh /source/images/seal.sh
			find /data -type f | sort`, "/data/others\n/data/the log/others.ndjson\n"},
		{"an image of a host that records who knows where", `
			echo 'events: {path: events.ndjson}' >/etc/imdsgate/config.yaml
			sh /source/images/seal.sh || ls -d /var/lib/imdsgate; cat /asked`,
			"seal-image: events.path (events.ndjson), first_seen.path (/var/lib/imdsgate/first-seen.db) or state.dir (/var/lib/imdsgate) " +
				"is not an absolute path without special characters; what is there would stay in the image\n/var/lib/imdsgate\n"},
		{"an image with a configuration that is wrong", `
			echo 'mode: none' >/etc/imdsgate/config.yaml
			sh /source/images/seal.sh 2>/dev/null || echo $?; cat /asked`, "78\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command("unshare", "--mount", "--net", "sh", "-euc", root, "sh", c.script)
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			if err != nil || string(out) != c.says {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
