#!/bin/sh
# install.sh DIR: puts the clients that test/compat runs into DIR/root, a Debian
# of their own: on the host, cloud-init and amazon-ec2-net-utils would take it
# over at the next boot. It costs 2 GB and some minutes, once; with the same
# lists again it does nothing.
#
# Needs root, debootstrap, npm and the network.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
root=$dir/root
suite=bookworm

# AWS's own: awscli, python3-boto3, python3-awscrt, ruby-aws-sdk-core and what is
# called amazon. The rest finds credentials by code of its own, or by AWS's for Go.
packages='ca-certificates
	awscli python3-boto3 python3-awscrt ruby-aws-sdk-core
	cloud-init cloud-guest-utils amazon-ec2-utils amazon-ec2-net-utils ignition
	facter ohai
	s3fs rclone restic s3cmd gdal-bin
	prometheus amazon-ecr-credential-helper
	libvm-ec2-perl php-cli php-async-aws-core php-symfony-http-client
	curl wget'

# Go's ./... stays out of a directory that is a module of its own.
echo 'module clients' >"$dir/go.mod"

stamp=$dir/installed
wanted=$(cat "$0" "$here/node/package-lock.json" | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
	exit 0
fi
for tool in debootstrap npm unshare; do
	PATH="$PATH:/usr/sbin:/sbin" command -v $tool >/dev/null || missing="${missing-} $tool"
done
if [ -n "${missing-}" ]; then
	echo "missing:$missing; install them to run make test-clients" >&2
	exit 1
fi
if [ "$(id -u)" != 0 ]; then
	echo "run this as root: it makes a Debian root" >&2
	exit 1
fi

if [ ! -e "$root/.debootstrapped" ]; then
	rm -rf "$root"
	# Its mounts end with it, also when it is killed.
	unshare --mount --propagation=private \
		debootstrap --variant=minbase "$suite" "$root" http://deb.debian.org/debian >"$dir/debootstrap.log"
	cat >"$root/etc/apt/sources.list" <<-EOF
		deb http://deb.debian.org/debian $suite main
		deb http://deb.debian.org/debian $suite-updates main
		deb http://deb.debian.org/debian-security $suite-security main
	EOF
	touch "$root/.debootstrapped"
fi

# No service may start, and what is mounted or started for the installation ends with it.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
cp /etc/resolv.conf "$root/etc/resolv.conf"
# shellcheck disable=SC2016,SC2086 # the inner shell's variables; a list of words
unshare --mount --propagation=private --pid --fork --kill-child sh -euc '
	mount -t proc proc "$0/proc"
	root=$0
	export DEBIAN_FRONTEND=noninteractive LC_ALL=C HOME=/root
	chroot "$root" apt-get update -qq
	chroot "$root" apt-get install -y -qq --no-install-recommends "$@"
	chroot "$root" apt-get clean
' "$root" $packages >"$dir/apt.log" 2>&1 || { tail -n 20 "$dir/apt.log" >&2; exit 1; }

mkdir -p "$root/opt/clients"
cp "$here/node/package.json" "$here/node/package-lock.json" "$root/opt/clients/"
npm ci --ignore-scripts --prefix "$root/opt/clients" --no-fund --no-audit >"$dir/npm.log" 2>&1 || { tail -n 20 "$dir/npm.log" >&2; exit 1; }
chown -R root:root "$root/opt/clients"

echo "$wanted" >"$stamp"
