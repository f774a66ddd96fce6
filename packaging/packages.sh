#!/bin/sh
# packages.sh: makes everything that is released, in bin/packages: deb, rpm and tarball for
# amd64 and arm64, a list of what is in the programs (CycloneDX), and SHA256SUMS. Two runs on
# the same commit make the same bytes, wherever the source is.
set -eu
umask 022
cd "$(dirname "$0")/.."
repository=$PWD
out=$repository/bin/packages
go=$repository/test/go.sh
tools=$repository/packaging/tools

VERSION=$(packaging/version.sh)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export VERSION SOURCE_DATE_EPOCH CGO_ENABLED=0 GOFLAGS='-trimpath -buildvcs=false' GOAMD64=v1 GOARM64=v8.0 TZ=UTC LC_ALL=C

rm -rf "$out"
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # build ARCH DIR
	GOOS=linux GOARCH=$1 $go build -ldflags "-s -w -X main.version=$VERSION" -o "$2/" ./cmd/imdsgated ./cmd/imdsgate
}
build "$($go env GOHOSTARCH)" "$work/host"
(cd "$tools" && GOFLAGS=-buildvcs=false $go build -o "$work/tools/" tool)

for arch in amd64 arm64; do
	ARCH=$arch
	ROOT=$work/$arch/root
	export ARCH ROOT
	build "$arch" "$work/$arch"
	packaging/stage.sh "$ROOT" "$work/$arch" "$work/host/imdsgate"
	find "$ROOT" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
	for packager in deb rpm; do
		"$work/tools/nfpm" package --config packaging/nfpm.yaml --packager $packager --target "$out" >/dev/null
	done
done
(cd "$out" && sha256sum -- * >SHA256SUMS)
ls -l "$out"
