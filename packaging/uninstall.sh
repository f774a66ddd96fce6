#!/bin/sh
# uninstall.sh [DESTDIR [PREFIX [purge]]]: takes away what install.sh has put below PREFIX.
# The configuration and the events are the operator's and stay, with the user whose they
# are, unless the last word is purge.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dest=${1:-}
prefix=${2:-/usr}
how=${3:-remove}
noted=$prefix/lib/imdsgate/installed

if [ -z "$dest" ] && [ "$(id -u)" != 0 ]; then
	echo "uninstalling needs root: sudo make uninstall" >&2
	exit 1
fi
if [ -e "$dest$noted" ]; then
	[ -n "$dest" ] || PATH="$prefix/bin:$prefix/sbin:$PATH" "$here/scripts/before-remove.sh" remove
	while read -r file; do
		rm -f "$dest$file"
	done <"$dest$noted"
	rm -f "$dest$noted"
	for dir in lib/imdsgate/profiles lib/imdsgate share/imdsgate/apparmor share/imdsgate/grafana share/imdsgate/prometheus share/imdsgate/selinux share/imdsgate share/doc/imdsgate; do
		rmdir "$dest$prefix/$dir" 2>/dev/null || true # unless whoever made the image has put more there
	done
elif [ "$how" != purge ]; then
	echo "$dest$noted is not there, so nothing that install.sh has brought is, either" >&2
fi
[ -z "$dest" ] || exit 0
"$here/scripts/after-remove.sh" "$how"
[ "$how" = purge ] || echo "imdsgate is gone; /etc/imdsgate, /var/log/imdsgate and /var/lib/imdsgate are left: '$0 \"\" $prefix purge' deletes them"
