#!/bin/sh
# after-remove.sh: lets systemd forget the units. With purge, which rpm does not
# have, the configuration, the events, what the daemon has kept, and its user go, too.
set -e

case $1 in
remove | purge | 0) ;;
*) exit 0 ;;
esac
rm -f /etc/systemd/system-preset/10-imdsgate.preset # of seal-image
if [ "$1" = purge ]; then
	rm -rf /etc/imdsgate /var/lib/imdsgate /var/log/imdsgate
	if getent passwd imdsgate >/dev/null; then
		userdel imdsgate # and its group
	fi
fi
# In a chroot what runs, and /run where it is mounted there, are another system's.
if [ -d /run/systemd/system ] && ! systemd-detect-virt --quiet --chroot; then
	rm -rf /run/imdsgate
	systemctl daemon-reload || true
	systemctl reset-failed imdsgated.service imdsgated.socket imdsgated-failed.service 2>/dev/null || true
fi
