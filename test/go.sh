#!/bin/sh
# go.sh ARGS...: runs the Go toolchain that go.mod asks for.
#
# That is the one on the PATH if it is new enough. Otherwise it comes as a module
# (golang.org/toolchain), which any Go since 1.16 can download and check against
# the checksum database, also one that does not know how to switch to it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
want=$(sed -n 's/^toolchain go//p' "$root/go.mod")

newer() { # newer HAVE WANT: HAVE is at least WANT
	[ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

if ! command -v go >/dev/null 2>&1; then
	echo "there is no go on this machine: run 'make deps' as root, which installs one" >&2
	exit 1
fi
have=$(GOTOOLCHAIN=local go env GOVERSION | sed 's/^go//')
if newer "$have" "${want%.*}"; then
	GOTOOLCHAIN=local exec go "$@"
fi

cd / # away from go.mod, which an old go cannot read
module="golang.org/toolchain@v0.0.1-go$want.$(go env GOHOSTOS)-$(go env GOHOSTARCH)"
dir="$(go env GOMODCACHE)/$module"
if [ ! -d "$dir" ]; then
	echo "go $have is too old; downloading go $want" >&2
	GO111MODULE=on GOFLAGS=-mod=mod go mod download "$module" >&2
fi
if [ ! -x "$dir/bin/go" ]; then # modules have no execute bits
	chmod u+w "$dir/bin" "$dir"/pkg/tool/*
	chmod u+wx "$dir"/bin/* "$dir"/pkg/tool/*/*
fi
cd "$OLDPWD"
PATH="$dir/bin:$PATH" GOROOT="$dir" GOTOOLCHAIN=local exec "$dir/bin/go" "$@"
