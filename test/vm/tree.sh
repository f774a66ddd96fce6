#!/bin/sh
# tree.sh DIR TREE: makes DIR/root, the Debian of test/boot/tree.sh with Debian's kernel for
# clouds and what tests run inside need, and DIR/vmlinuz and DIR/initrd.img, unless they are
# there already.
set -eu
dir=$1
tree=$2
packages='linux-image-cloud-amd64 conntrack busybox kmod'
recipe="$(cat "$tree/recipe") $packages"

if [ "$(cat "$dir/recipe" 2>/dev/null)" = "$recipe" ]; then
	exit 0
fi
mkdir -p "$dir"
rm -rf --one-file-system "$dir/root" "$dir/new" "$dir/recipe"
cp -a "$tree/root" "$dir/new"
# All modules would be half a minute of unpacking at each boot.
mkdir -p "$dir/new/etc/initramfs-tools/conf.d"
echo MODULES=list >"$dir/new/etc/initramfs-tools/conf.d/modules"
printf '%s\n' virtio_pci virtio_blk ext4 crc32c_generic >"$dir/new/etc/initramfs-tools/modules"
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive unshare --mount --pid --fork chroot "$dir/new" sh -eu -c '
	mount -t proc proc /proc
	apt-get -qq update
	apt-get -qq install --no-install-recommends "$@"
	apt-get clean' sh initramfs-tools zstd $packages >"$dir/install.log" 2>&1 || {
	tail -n 20 "$dir/install.log" >&2
	exit 1
}
rm -rf "$dir"/new/var/lib/apt/lists/*
: >"$dir/new/etc/machine-id"
cp "$dir"/new/boot/vmlinuz-* "$dir/vmlinuz"
cp "$dir"/new/boot/initrd.img-* "$dir/initrd.img"
mv "$dir/new" "$dir/root"
printf '%s\n' "$recipe" >"$dir/recipe"
