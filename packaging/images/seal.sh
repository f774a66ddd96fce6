#!/bin/sh
# seal-image: the last step before an image is made of a host that has imdsgate. Takes out
# what belongs to this host alone, so that no two instances are the same one in the events:
# what was recorded and remembered here, the journal, and the machine id. The configuration stays.
set -eu

if [ "$(id -u)" != 0 ]; then
	echo "seal-image: needs root" >&2
	exit 77
fi
# What is recorded and kept may be elsewhere. A path that is not plain is not guessed at.
config=$(imdsgate config dump)
of() { # of SECTION KEY
	printf '%s\n' "$config" | sed -n "/^$1:/,/^[^ ]/s/^  $2: //p"
}
events=$(of events path)
seen=$(of first_seen path)
state=$(of state dir)
for path in "$events" "$seen" "$state"; do
	case $path in
	/*) ;;
	*)
		echo "seal-image: events.path ($events), first_seen.path ($seen) or state.dir ($state) is not an absolute path without special characters; what is there would stay in the image" >&2
		exit 78
		;;
	esac
done
# In a chroot what runs, and /run where it is mounted there, are another system's.
if [ -d /run/systemd/system ] && ! systemd-detect-virt --quiet --chroot; then
	systemctl stop imdsgated.service imdsgated.socket
	imdsgate redirect remove
	rm -rf /run/imdsgate
	# Until it is off, journald writes to /run, and not to /var/log/journal anew. Old ones cannot be told.
	journalctl --relinquish-var 2>/dev/null || true
fi
rm -rf /var/log/imdsgate /var/lib/imdsgate
# Elsewhere the directory may have more than ours: these files, rotated or put aside, too.
for file in "$events" "$seen" "${seen%/*}/journal-cursor" "$state/decisions.json" "$state/mode.json" "$state/redirect.json"; do
	rm -f "$file" "$file".*
done

# It has events, too, and under another machine id nobody would ever rotate it. Without the directory
# an instance would have no journal that outlives a boot (journald.conf(5), Storage=).
rm -rf /var/log/journal/*

# Empty, and not away: then systemd makes a new one, and does not apply presets as it does at
# the first boot of all, machine-id(5).
if [ -e /etc/machine-id ]; then
	: >/etc/machine-id
fi
if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
	rm /var/lib/dbus/machine-id
fi
# Where presets are applied all the same, what is enabled here stays so.
if systemctl --quiet is-enabled imdsgated.service 2>/dev/null; then
	mkdir -p /etc/systemd/system-preset
	printf 'enable imdsgated.socket\nenable imdsgated.service\n' >/etc/systemd/system-preset/10-imdsgate.preset
fi
