#!/bin/sh
# stage.sh ROOT BINARIES COMMAND: lays out below ROOT what is installed. This is the one
# list of it: the packages, the tarball and install.sh take what is there. BINARIES is a
# directory with the two programs, which may be for another machine, and the licenses of
# what is in them (licenses.sh); COMMAND is an imdsgate that runs here, and writes the manual
# and the completions.
set -eu
umask 022
root=$1
binaries=$2
command=$3
here=$(dirname "$0")

rm -rf "$root"
put() { # put MODE FILES... DIR
	mode=$1
	shift
	for dir; do :; done
	install -d "$root$dir"
	while [ $# -gt 1 ]; do
		install -m "$mode" "$1" "$root$dir"
		shift
	done
}
as() { # as MODE FILE PATH
	install -D -m "$1" "$2" "$root$3"
}
packed() { # packed PATH: standard input, as gzip of nothing but that
	install -d "$root$(dirname "$1")"
	gzip -9n >"$root$1"
}

put 0755 "$binaries/imdsgated" /usr/sbin
put 0755 "$binaries/imdsgate" /usr/bin
put 0644 "$here"/systemd/*.service "$here"/systemd/*.socket /usr/lib/systemd/system
as 0644 "$here/systemd/imdsgate.preset" /usr/lib/systemd/system-preset/50-imdsgate.preset
as 0644 "$here/systemd/imdsgate.sysusers" /usr/lib/sysusers.d/imdsgate.conf
as 0644 "$here/systemd/imdsgate.tmpfiles" /usr/lib/tmpfiles.d/imdsgate.conf
put 0644 "$here"/profiles/*.yaml /usr/lib/imdsgate/profiles
as 0755 "$here/images/seal.sh" /usr/lib/imdsgate/seal-image
put 0644 "$here/config.schema.json" /usr/share/imdsgate
put 0644 "$here"/apparmor/* /usr/share/imdsgate/apparmor
put 0644 "$here"/selinux/* /usr/share/imdsgate/selinux
put 0644 "$here"/grafana/* /usr/share/imdsgate/grafana
put 0644 "$here"/prometheus/imdsgate.rules.yaml /usr/share/imdsgate/prometheus

install -d -m 0750 "$root/etc/imdsgate" "$root/etc/imdsgate/config.d"
as 0640 "$here/config.yaml" /etc/imdsgate/config.yaml

for shell in bash/bash-completion/completions/imdsgate zsh/zsh/site-functions/_imdsgate fish/fish/vendor_completions.d/imdsgate.fish; do
	install -d "$root/usr/share/$(dirname "${shell#*/}")"
	"$command" completion "${shell%%/*}" >"$root/usr/share/${shell#*/}"
done

pages=$(mktemp -d)
trap 'rm -r "$pages"' EXIT
"$command" man "$pages" "$here/config.yaml"
cp "$here/imdsgated.8" "$pages"
for page in "$pages"/*; do
	gzip -9n "$page"
	put 0644 "$page.gz" "/usr/share/man/man${page##*.}"
done

put 0644 "$here/debian/copyright" /usr/share/doc/imdsgate
packed /usr/share/doc/imdsgate/CHANGELOG.md.gz <"$here/../CHANGELOG.md"
packed /usr/share/doc/imdsgate/third-party-licenses.gz <"$binaries/third-party-licenses"
