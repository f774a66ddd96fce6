#!/bin/sh
# before-remove.sh: stops the daemon and takes the redirect away, while there still is the
# program that can. dpkg and uninstall.sh call it with remove, rpm with 0; an upgrade calls
# it with something else, and touches nothing.
set -e

case $1 in
remove | 0) ;;
*) exit 0 ;;
esac
command -v systemctl >/dev/null 2>&1 || exit 0

# In a chroot the rules and the units that run are those of another system.
if [ -d /run/systemd/system ] && ! systemd-detect-virt --quiet --chroot; then
	systemctl stop imdsgated.service imdsgated.socket || true
	# In enforce mode the redirect outlives the daemon.
	if ! imdsgate redirect remove; then
		echo "imdsgate: the redirect is still there, and nothing would answer behind it: see above, then remove the package again" >&2
		exit 1
	fi
fi
# Not before: where the package stays because of the redirect, the next boot has its daemon.
systemctl --no-reload disable imdsgated.service imdsgated.socket >/dev/null 2>&1 || true
