#!/bin/sh
# vuln.sh: known vulnerabilities of what we depend on. The database is at
# vuln.go.dev; a machine that cannot reach it says so, and checks nothing.
set -eu
cd "$(dirname "$0")/.."
out=$(go tool govulncheck ./... 2>&1) && { echo "$out"; exit 0; }
case $out in
*vuln.go.dev*) echo "govulncheck: its database cannot be reached from here, so nothing was checked" ;;
*)
	echo "$out"
	exit 1
	;;
esac
