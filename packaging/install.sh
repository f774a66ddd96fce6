#!/bin/sh
# install.sh DESTDIR PREFIX: puts imdsgate on this host. The binaries are in bin/.
# Nothing is started: the last lines say how.
set -eu
cd "$(dirname "$0")/.."
dest=$1
prefix=$2

if [ ! -x bin/imdsgated ] || [ ! -x bin/imdsgate ]; then
	echo "there is nothing to install yet: run 'make build' first" >&2
	exit 1
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
	getent group imdsgate >/dev/null || groupadd --system imdsgate
	getent passwd imdsgate >/dev/null || useradd --system --gid imdsgate --home-dir /nonexistent --no-create-home \
		--shell /usr/sbin/nologin --comment "instance metadata gate" imdsgate
fi

install -d "$dest$prefix/sbin" "$dest$prefix/bin" "$dest$prefix/lib/systemd/system" "$dest$prefix/lib/tmpfiles.d" "$dest/etc/imdsgate" \
	"$dest$prefix/lib/imdsgate/profiles" "$dest$prefix/share/man/man1" "$dest$prefix/share/man/man5" "$dest$prefix/share/man/man8" \
	"$dest$prefix/share/bash-completion/completions" "$dest$prefix/share/zsh/site-functions" "$dest$prefix/share/fish/vendor_completions.d" "$dest$prefix/share/imdsgate"
install -m 0755 bin/imdsgated "$dest$prefix/sbin/imdsgated"
install -m 0755 bin/imdsgate "$dest$prefix/bin/imdsgate"
for unit in imdsgated.service imdsgated.socket imdsgated-failed.service; do
	sed "s|/usr/|$prefix/|" packaging/systemd/$unit >"$dest$prefix/lib/systemd/system/$unit"
	chmod 0644 "$dest$prefix/lib/systemd/system/$unit"
done
install -m 0644 packaging/systemd/imdsgate.tmpfiles "$dest$prefix/lib/tmpfiles.d/imdsgate.conf"
install -m 0644 packaging/profiles/*.yaml "$dest$prefix/lib/imdsgate/profiles"

bin/imdsgate completion bash >"$dest$prefix/share/bash-completion/completions/imdsgate"
bin/imdsgate completion zsh >"$dest$prefix/share/zsh/site-functions/_imdsgate"
bin/imdsgate completion fish >"$dest$prefix/share/fish/vendor_completions.d/imdsgate.fish"
pages=$(mktemp -d)
trap 'rm -r "$pages"' EXIT
bin/imdsgate man "$pages" packaging/config.yaml
install -m 0644 "$pages"/imdsgate*.1 "$dest$prefix/share/man/man1"
install -m 0644 "$pages/imdsgate-config.5" "$dest$prefix/share/man/man5"
install -m 0644 packaging/imdsgated.8 "$dest$prefix/share/man/man8"
install -m 0644 packaging/config.schema.json "$dest$prefix/share/imdsgate/config.schema.json"
if [ ! -e "$dest/etc/imdsgate/config.yaml" ]; then
	install -m 0644 packaging/config.yaml "$dest/etc/imdsgate/config.yaml"
fi

[ -z "$dest" ] || exit 0
if [ -d /run/systemd/system ]; then
	systemd-tmpfiles --create imdsgate.conf
	systemctl daemon-reload
	cat <<-'END'
		imdsgate is installed, in audit mode, and not started:

		  systemctl enable --now imdsgated.socket imdsgated.service
		  imdsgate status

		Members of the group imdsgate may ask; only root may change anything.
	END
else
	echo "imdsgate is installed; this host does not run systemd, so starting it is up to you (packaging/systemd has the units)"
fi
