#!/bin/sh
# after-install.sh: lets systemd know the units, starts nothing, and gives a daemon that
# runs its new program. dpkg calls it with configure and the version that was there before,
# rpm and install.sh with 1 the first time, and 2 for an upgrade.
set -e

case $1 in
configure) upgrade=${2:+yes} ;;
1) upgrade= ;;
2) upgrade=yes ;;
*) exit 0 ;; # dpkg takes back what it has begun
esac
command -v systemctl >/dev/null 2>&1 || exit 0

if [ -z "$upgrade" ]; then
	systemctl --no-reload preset imdsgated.socket imdsgated.service >/dev/null 2>&1 || true
fi
[ -d /run/systemd/system ] || exit 0
systemd-tmpfiles --create imdsgate.conf || true
systemctl daemon-reload || true
if [ -n "$upgrade" ] && systemctl --quiet is-active imdsgated.service; then
	# The socket unit keeps the ports: who connects now waits until the new daemon answers.
	if ! imdsgated -check >/dev/null; then
		echo "imdsgated: the new version refuses the configuration, see above; the old one keeps running, but nothing starts after it, nor at a boot. Correct it, and then: systemctl restart imdsgated.service" >&2
	elif ! systemctl try-restart imdsgated.service; then
		echo "imdsgated: the new version did not start: journalctl -u imdsgated.service" >&2
	fi
fi
