#!/bin/sh
# packages.sh: makes everything that is released, in bin/packages: deb, rpm and tarball for
# amd64 and arm64, lists of what is in the programs (CycloneDX), and SHA256SUMS. Two runs on
# the same commit make the same bytes, wherever the source is. ARCHES, VERSION,
# SOURCE_DATE_EPOCH and OUT, which is emptied before, may be set.
set -eu
umask 022
cd "$(dirname "$0")/.."
repository=$PWD
out=${OUT:-$repository/bin/packages}
go=$repository/test/go.sh

VERSION=${VERSION:-$(packaging/version.sh)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export VERSION SOURCE_DATE_EPOCH CGO_ENABLED=0 GOFLAGS='-trimpath -buildvcs=false' GOAMD64=v1 GOARM64=v8.0 TZ=UTC LC_ALL=C

rm -rf "$out"
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # build ARCH
	[ -e "$work/$1/imdsgated" ] ||
		GOOS=linux GOARCH=$1 "$go" build -ldflags "-s -w -X main.version=$VERSION" -o "$work/$1/" ./cmd/imdsgated ./cmd/imdsgate
}
host=$("$go" env GOHOSTARCH) # whose imdsgate writes the manual and the completions
build "$host"
tool() { # tool NAME ARGS...: one of packaging/tools/go.mod
	"$go" tool -modfile=packaging/tools/go.mod "$@"
}
packaging/licenses.sh >"$work/licenses"
printf 'imdsgate (%s) stable; urgency=medium\n\n  * CHANGELOG.md.gz beside this file says what has changed.\n\n -- %s  %s\n' \
	"$VERSION" "$(sed -n 's/^maintainer: //p' packaging/nfpm.yaml)" "$(date --rfc-email --date="@$SOURCE_DATE_EPOCH")" |
	gzip -9n >"$work/changelog.gz"
export WORK="$work"

for arch in ${ARCHES:-amd64 arm64}; do
	ARCH=$arch
	ROOT=$work/$arch/root
	export ARCH ROOT
	build "$arch"
	cp "$work/licenses" "$work/$arch/third-party-licenses"
	packaging/stage.sh "$ROOT" "$work/$arch" "$work/$host/imdsgate"
	find "$ROOT" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
	for packager in deb rpm; do
		tool nfpm package --config packaging/nfpm.yaml --packager $packager --target "$out" >/dev/null
	done
	for program in imdsgated imdsgate; do
		bom=$out/$program-$VERSION-linux-$arch.cdx.json
		tool cyclonedx-gomod bin -json -noserial -version "v$VERSION" -output "$bom" "$work/$arch/$program"
		# The time at which it ran is the one thing that it does not take from the program.
		sed -i "s/\"timestamp\": \"[^\"]*\"/\"timestamp\": \"$(date --date="@$SOURCE_DATE_EPOCH" +%FT%TZ)\"/" "$bom"
	done

	name=imdsgate-$VERSION-linux-$arch
	mkdir "$work/$name"
	cp -R "$ROOT" packaging/install.sh packaging/uninstall.sh packaging/scripts LICENSE "$work/$name"
	tar --create --directory "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" --format=ustar "$name" |
		gzip -9n >"$out/$name.tar.gz"
done
(cd "$out" && sha256sum -- * >SHA256SUMS)
ls -l "$out"
