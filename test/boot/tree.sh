#!/bin/sh
# tree.sh DIR [SUITE]: makes DIR/root, a small Debian that boots, unless it is there already.
# It is not changed by the tests: each machine has a layer of its own above it.
set -eu
dir=$1
suite=${2:-bookworm}
packages=systemd,systemd-sysv,dbus,iptables,iproute2,curl,python3,procps,rpm
# Have dependencies that debootstrap does not understand.
services='cloud-init nftables'
# In Debian 13 it conflicts with cloud-init.
[ "$suite" != bookworm ] || services="$services firewalld"
# What the tree was made of, so that a change here makes it anew.
recipe="$suite minbase $packages $services"

if [ "$(cat "$dir/recipe" 2>/dev/null)" = "$recipe" ]; then
	exit 0
fi
if [ "$(id -u)" != 0 ]; then
	echo "making a Debian tree needs root" >&2
	exit 1
fi
mkdir -p "$dir"
rm -rf --one-file-system "$dir/root" "$dir/new" "$dir/recipe"
# Without its own namespace a run that is killed would leave /proc mounted in the tree.
unshare --mount --propagation=private -- \
	debootstrap --variant=minbase --include="$packages" "$suite" "$dir/new" >"$dir/debootstrap.log" 2>&1 || {
	tail -20 "$dir/debootstrap.log" >&2
	exit 1
}
echo force-unsafe-io >"$dir/new/etc/dpkg/dpkg.cfg.d/unsafe-io"
# Firewalld is for the tests that start it; cloud-init does nothing until it has a datasource.
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive unshare --mount --pid --fork chroot "$dir/new" sh -eu -c '
	mount -t proc proc /proc
	apt-get -qq update
	apt-get -qq install --no-install-recommends "$@"
	[ ! -e /lib/systemd/system/firewalld.service ] || systemctl --quiet disable firewalld.service' sh $services >"$dir/install.log" 2>&1 || {
	tail -n 20 "$dir/install.log" >&2
	exit 1
}
rm -rf "$dir"/new/var/cache/apt/* "$dir"/new/var/lib/apt/lists/*
# An image has neither: the first boot makes them (machine-id(5)).
: >"$dir/new/etc/machine-id"
rm -f "$dir/new/var/lib/dbus/machine-id"
mv "$dir/new" "$dir/root"
printf '%s\n' "$recipe" >"$dir/recipe"
