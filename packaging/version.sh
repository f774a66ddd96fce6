#!/bin/sh
# version.sh: prints the version of the source as dpkg and rpm order it: 1.2.0~rc.1 is
# before 1.2.0, which is before 1.2.0+3.gabc1234, three commits later. Without a tag it is
# 0.0.0 and the number of commits.
set -eu
cd "$(dirname "$0")/.."
if described=$(git describe --tags --match 'v[0-9]*' --long --abbrev=7 --dirty=.dirty 2>/dev/null); then
	echo "$described" | sed -E 's/^v//; s/-([0-9]+)-(g[0-9a-f]+)/+\1.\2/; s/\+0\.g[0-9a-f]+$//; s/-/~/g'
else
	echo "0.0.0+$(git rev-list --count HEAD).g$(git describe --always --abbrev=7 --dirty=.dirty --exclude '*')"
fi
