#!/bin/sh
# uninstall.sh DESTDIR PREFIX: takes away what install.sh brought. The configuration
# and the events are the operator's and stay.
set -eu
dest=$1
prefix=$2

if [ -z "$dest" ]; then
	if [ "$(id -u)" != 0 ]; then
		echo "uninstalling needs root: sudo make uninstall" >&2
		exit 1
	fi
	if [ -d /run/systemd/system ]; then
		systemctl disable --now imdsgated.service imdsgated.socket 2>/dev/null || true
	fi
	# In enforce mode the redirect outlives the daemon.
	if [ -x "$prefix/bin/imdsgate" ]; then
		"$prefix/bin/imdsgate" redirect remove
	fi
fi
rm -f "$dest$prefix/sbin/imdsgated" "$dest$prefix/bin/imdsgate" \
	"$dest$prefix/lib/systemd/system/imdsgated.service" "$dest$prefix/lib/systemd/system/imdsgated.socket" \
	"$dest$prefix/lib/systemd/system/imdsgated-failed.service" \
	"$dest$prefix/lib/tmpfiles.d/imdsgate.conf" "$dest$prefix/share/bash-completion/completions/imdsgate" \
	"$dest$prefix/share/zsh/site-functions/_imdsgate" "$dest$prefix/share/fish/vendor_completions.d/imdsgate.fish" \
	"$dest$prefix/share/man/man1/imdsgate.1" "$dest$prefix"/share/man/man1/imdsgate-*.1 \
	"$dest$prefix/share/man/man5/imdsgate-config.5" "$dest$prefix/share/man/man8/imdsgated.8" \
	"$dest$prefix/share/imdsgate/config.schema.json"
rm -rf "$dest$prefix/lib/imdsgate/profiles"
rmdir "$dest$prefix/lib/imdsgate" 2>/dev/null || true # unless whoever made the image has put more there
rmdir "$dest$prefix/share/imdsgate" 2>/dev/null || true
[ -z "$dest" ] || exit 0
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
rm -rf /run/imdsgate
if getent passwd imdsgate >/dev/null; then
	userdel imdsgate
fi
if getent group imdsgate >/dev/null; then
	groupdel imdsgate
fi
echo "imdsgate is gone; /etc/imdsgate, /var/log/imdsgate and /var/lib/imdsgate are left for you to delete"
