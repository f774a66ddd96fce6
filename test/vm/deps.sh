#!/bin/sh
# deps.sh: installs qemu, which nothing but make test-vm needs. Debian and Ubuntu.
set -eu
if command -v qemu-system-x86_64 >/dev/null && command -v qemu-img >/dev/null; then
	exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "missing: qemu-system-x86_64 and qemu-img; install them to run make test-vm" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends qemu-system-x86 qemu-utils >/dev/null
