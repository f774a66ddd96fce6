#!/bin/sh
# install.sh [DESTDIR [PREFIX]]: puts on this host what stage.sh has laid out, below PREFIX
# (/usr), and notes which files these are, for uninstall.sh. Nothing is started: the last
# lines say how. In the tarball the files are beside it, in the source 'make build' comes first.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dest=${1:-}
prefix=${2:-/usr}
noted=$prefix/lib/imdsgate/installed

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
list=$work/installed
tree=$here/root
if [ ! -d "$tree" ]; then
	bin=$here/../bin
	if [ ! -x "$bin/imdsgated" ] || [ ! -x "$bin/imdsgate" ] || [ ! -e "$bin/third-party-licenses" ]; then
		echo "there is nothing to install yet: run 'make build' first" >&2
		exit 1
	fi
	tree=$work/root
	"$here/stage.sh" "$tree" "$bin" "$bin/imdsgate"
fi
if [ -z "$dest" ]; then
	if [ "$(id -u)" != 0 ]; then
		echo "installing needs root: sudo make install" >&2
		exit 1
	fi
	if ! PATH="$PATH:/usr/sbin:/sbin" command -v iptables >/dev/null 2>&1; then
		echo "there is no iptables here, which brings the traffic to the daemon: apt-get install iptables, or dnf install iptables-nft" >&2
		exit 1
	fi
	by=
	# dpkg also knows a package of which only the configuration is left.
	# shellcheck disable=SC2016 # dpkg's variable
	if dpkg-query --show --showformat='${db:Status-Status}\n' imdsgate 2>/dev/null | grep -qvxE 'config-files|not-installed'; then
		by="dpkg-query --show"
	elif rpm --query imdsgate >/dev/null 2>&1; then
		by="rpm --query"
	fi
	if [ -n "$by" ]; then
		echo "the package imdsgate is installed here ($by imdsgate): remove it first, two of them would be in each other's way" >&2
		exit 1
	fi
	"$here/scripts/before-install.sh"
fi

installs=1
[ ! -e "$dest$noted" ] || installs=2
(cd "$tree" && find . -type f | sed 's|^\./||' | sort) | while read -r file; do
	case $file in
	etc/*) # The operator's, from the first time on.
		for dir in "$dest/etc/imdsgate" "$dest/etc/imdsgate/config.d"; do # dpkg removes an empty one
			[ -d "$dir" ] || install -d -m 0750 "$dir"
		done
		[ -e "$dest/$file" ] || install -m 0640 "$tree/$file" "$dest/$file"
		continue
		;;
	esac
	to=$prefix/${file#usr/}
	echo "$to" >>"$list"
	install -d "$dest${to%/*}"
	# In one step, so that a daemon that starts just now finds the old file or the new one.
	cp -p "$tree/$file" "$dest$to.new"
	case $file in
	*/lib/systemd/system/*) sed -i "s|/usr/|$prefix/|" "$dest$to.new" ;;
	esac
	[ -n "$dest" ] || chown 0:0 "$to.new"
	mv "$dest$to.new" "$dest$to"
done
if [ $installs = 2 ]; then # what the version before had, and this one has not
	sort "$dest$noted" | comm -23 - "$list" | while read -r old; do rm -f "$dest$old"; done
fi
install -m 0644 "$list" "$dest$noted"

[ -z "$dest" ] || exit 0
chgrp imdsgate /etc/imdsgate /etc/imdsgate/config.d /etc/imdsgate/config.yaml
PATH="$prefix/bin:$prefix/sbin:$PATH" "$here/scripts/after-install.sh" $installs
if [ $installs = 2 ]; then
	echo "imdsgate is installed over what was there"
elif [ -d /run/systemd/system ]; then
	cat <<-'END'
		imdsgate is installed, in audit mode, and not started:

		  systemctl enable --now imdsgated.socket imdsgated.service
		  imdsgate status

		Members of the group imdsgate may ask; only root may change anything.
	END
else
	echo "imdsgate is installed; this host does not run systemd, so starting it is up to you ($prefix/lib/systemd/system has the units)"
fi
