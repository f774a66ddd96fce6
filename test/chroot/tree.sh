#!/bin/sh
# tree.sh DIR: makes DIR/root, a Debian with what the packages and the material for images
# are tried with: lintian, rpm and rpmlint, the compilers of SELinux and AppArmor, cloud-init,
# Packer and Ansible. On the host, cloud-init would take it over at the next boot. It costs
# 1 GB and some minutes, once; with the same list again it does nothing.
#
# Needs root, debootstrap and the network.
set -eu
mkdir -p "$1"
dir=$(cd "$1" && pwd)
packages='iptables passwd systemd shellcheck
	lintian rpm rpmlint
	curl apparmor checkpolicy semodule-utils selinux-policy-dev make
	ansible-core ansible-lint python3-apt cloud-init packer'

echo 'module chroot' >"$dir/go.mod" # Go's ./... stays out of a directory that is a module of its own
stamp=$dir/installed
wanted=$(sha256sum <"$0")
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
	exit 0
fi
if ! PATH="$PATH:/usr/sbin:/sbin" command -v debootstrap >/dev/null; then
	echo "missing: debootstrap; install it to run make test-packages" >&2
	exit 1
fi
if [ ! -e "$dir/root/.debootstrapped" ]; then
	rm -rf "$dir/root"
	debootstrap --variant=minbase bookworm "$dir/root" http://deb.debian.org/debian >"$dir/debootstrap.log" || {
		tail -n 20 "$dir/debootstrap.log" >&2
		exit 1
	}
	touch "$dir/root/.debootstrapped"
fi
# No service may start, and what dpkg installs need not survive a power cut.
printf '#!/bin/sh\nexit 101\n' >"$dir/root/usr/sbin/policy-rc.d"
chmod 755 "$dir/root/usr/sbin/policy-rc.d"
echo force-unsafe-io >"$dir/root/etc/dpkg/dpkg.cfg.d/unsafe-io"
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive unshare --mount --pid --fork chroot "$dir/root" sh -eu -c '
	mount -t proc proc /proc
	dpkg --configure --pending >/dev/null # of a run that was cut off
	apt-get -qq update
	apt-get -qq install --no-install-recommends "$@" >/dev/null
	apt-get clean' sh $packages
echo "$wanted" >"$stamp"
