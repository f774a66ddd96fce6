#!/bin/sh
# fuzz.sh DURATION: fuzzes every target of the module for so long each.
set -eu
duration=${1:?usage: fuzz.sh DURATION}
cd "$(dirname "$0")/.."
git ls-files '*_test.go' | xargs grep -o '^func Fuzz[A-Za-z0-9]*' | while IFS=: read -r file func; do
	target=${func#func }
	echo "$(dirname "$file") $target"
	# go test -fuzz takes one target at a time. A shorter minimisation keeps one
	# interesting input from eating the time.
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$duration" -fuzzminimizetime 1s "./$(dirname "$file")" </dev/null
done
