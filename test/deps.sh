#!/bin/sh
# deps.sh: installs what building and testing imdsgate needs, and no more than
# is missing. Debian and Ubuntu (apt), Amazon Linux and Fedora (dnf).
set -eu

missing=
# The demo's thief runs as a user who may not see a Python in root's home.
[ -x /usr/bin/python3 ] || missing=' python3'
for tool in go gcc curl iptables-nft iptables-legacy nft conntrack nsenter haproxy nginx shellcheck busybox groff zsh fish rpm dpkg-deb promtool debootstrap systemd-nspawn systemd-analyze qemu-aarch64; do
	# /usr/sbin is not on every user's PATH.
	PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" >/dev/null 2>&1 || missing="$missing $tool"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
	echo "missing:$missing; run this as root, it installs them" >&2
	exit 1
fi

if command -v apt-get >/dev/null 2>&1; then
	packages=
	for tool in $missing; do
		case $tool in
		go) package='golang-go ca-certificates' ;;
		groff) package=groff-base ;;
		dpkg-deb) package=dpkg ;;
		gcc) package='gcc libc6-dev' ;;
		iptables-nft | iptables-legacy) package=iptables ;;
		nft) package=nftables ;;
		nginx) package=nginx-light ;;
		promtool) package=prometheus ;;
		nsenter) package=util-linux ;;
		systemd-nspawn) package=systemd-container ;;
		systemd-analyze) package=systemd ;;
		qemu-aarch64) package=qemu-user ;;
		*) package=$tool ;;
		esac
		packages="$packages $package"
	done
	export DEBIAN_FRONTEND=noninteractive
	# The peers of the benchmark are run by hand: no service may start.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ]; then
		printf '#!/bin/sh\nexit 101\n' >$policy
		chmod 755 $policy
		trap 'rm -f $policy' EXIT
	fi
	apt-get update -qq
	# shellcheck disable=SC2086 # a list of words
	apt-get install -y -qq --no-install-recommends $packages >/dev/null
elif command -v dnf >/dev/null 2>&1; then
	packages=
	for tool in $missing; do
		case $tool in
		go) package=golang ;;
		groff) package=groff-base ;;
		dpkg-deb) package=dpkg ;;
		iptables-nft) package=iptables-nft ;;
		iptables-legacy) package=iptables-legacy ;;
		promtool) package=golang-github-prometheus ;;
		nft) package=nftables ;;
		conntrack) package=conntrack-tools ;;
		nsenter) package=util-linux-core ;;
		shellcheck) package=ShellCheck ;;
		systemd-nspawn) package=systemd-container ;;
		systemd-analyze) package=systemd ;;
		qemu-aarch64) package=qemu-user ;;
		*) package=$tool ;;
		esac
		packages="$packages $package"
	done
	# Where there is no ShellCheck and no busybox, no test is skipped without them; without
	# fish that of its completions is, without promtool those of metrics, without qemu-user
	# that of the packages for another machine, and without debootstrap there is no make test-boot.
	for package in $packages; do
		dnf install -y -q "$package" || case $package in ShellCheck | busybox | fish | golang-github-prometheus | qemu-user | debootstrap) ;; *) exit 1 ;; esac
	done
else
	echo "missing:$missing; install them, this host has neither apt-get nor dnf" >&2
	exit 1
fi
