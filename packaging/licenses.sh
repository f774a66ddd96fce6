#!/bin/sh
# licenses.sh: prints the licenses of what is linked into the programs, which ask to come
# with every copy.
set -eu
cd "$(dirname "$0")/.."
go=$PWD/test/go.sh

section() { # section NAME DIR
	found=
	for file in "$2"/LICENSE* "$2"/LICENCE* "$2"/COPYING* "$2"/NOTICE* "$2"/PATENTS*; do
		[ -f "$file" ] || continue
		found=yes
		printf '==== %s: %s\n\n' "$1" "$(basename "$file")"
		cat "$file"
		echo
	done
	if [ -z "$found" ]; then
		echo "licenses.sh: $1 has no license in $2" >&2
		exit 1
	fi
}

section "Go" "$("$go" env GOROOT)"
modules=$(GOOS=linux GOARCH=amd64 "$go" list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' ./cmd/imdsgated ./cmd/imdsgate | LC_ALL=C sort -u)
echo "$modules" | while read -r path version dir; do
	section "$path $version" "$dir"
done
