#!/bin/bash
# check.sh: for a person who has an EC2 instance with imdsgate installed. Asks the
# real metadata service what no documentation tells, first directly and then
# through imdsgate in audit mode, and compares the two byte by byte.
#
# It needs root, bash and coreutils. imdsgate is stopped for the first half and is
# afterwards as it was. Answers are kept in memory, are never shown, and are gone
# when it ends; what it prints has no token, key or user data in it and may be
# sent to the project.
set -u
export LC_ALL=C
usage='usage: check.sh                     the whole comparison, on an instance
       check.sh --probe DIR         only ask, and keep the answers in DIR
       check.sh --compare DIR DIR   only compare two such sets'

address=169.254.169.254
host=$'Host: 169.254.169.254\r\n'

# ask NAME REQUEST: sends the bytes and keeps what comes back within three
# seconds, with how the connection ended.
ask() {
	local name=$1 request=$2 # and into, of the caller
	# shellcheck disable=SC2016 # the inner shell expands it
	timeout 5 bash -c '
		exec 3<>"/dev/tcp/$1/80" || { echo "no connection"; exit; }
		printf %s "$2" >&3
		timeout 3 cat <&3
		case $? in 0) echo; echo "== FIN" ;; 124) echo; echo "== open" ;; *) echo; echo "== reset" ;; esac
	' ask "$address" "$request" >"$into/$name" 2>/dev/null
}

# masked FILE: an answer without what differs each time, and without secrets: a
# body that is not one of the service's own pages is replaced by its digest.
masked() {
	local constant='s/^(Date|Last-Modified): .*/\1: .../; s/(Token-Ttl-Seconds): [0-9]+/\1: N/I; s/[A-Za-z0-9_-]{54}==/TOKEN/g'
	awk -v RS='\r\n\r\n' 'NR == 1 { print; exit }' "$1" | tr -d '\r' | sed -E "$constant"
	awk -v RS='\r\n\r\n' 'NR > 1 { print }' "$1" | tr -d '\r' | sed -E "$constant" | sha256sum | cut -c 1-16
	tail -n 1 "$1"
}

summary() { # of one answer, fit to be shown
	printf '%-40s %s; %s\n' "$2" "$(head -n 1 "$1" | tr -d '\r' | grep -aoE '^HTTP/[0-9.]+ [0-9]{3}' || echo 'no HTTP')" "$(tail -n 1 "$1")"
}

get() { printf 'GET %s HTTP/1.1\r\n%s%s\r\n' "$1" "$host" "${2-}"; printf x; }

probes() { # $1: where to keep the answers
	local into=$1 token auth role
	token=$(timeout 3 bash -c 'exec 3<>/dev/tcp/169.254.169.254/80; printf "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 300\r\nConnection: close\r\n\r\n" >&3; cat <&3' | tail -c 56)
	auth="X-aws-ec2-metadata-token: $token"$'\r\n'
	# shellcheck disable=SC2016 # the inner shell expands it
	role=$(timeout 3 bash -c 'exec 3<>/dev/tcp/169.254.169.254/80; printf "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: %s\r\nConnection: close\r\n\r\n" "$1" >&3; cat <&3' role "$token" | tail -n 1)
	q() { local r; r=$(get "$2" "${3-}"); ask "$1" "${r%x}"; }
	local id=/latest/meta-data/instance-id
	# 1. spellings
	q plain-v2 $id "$auth"; q plain-v1 $id
	q percent2d '/latest/meta%2ddata/instance-id' "$auth"; q percent2f '/latest%2fmeta-data/instance-id' "$auth"
	q dot '/latest/./meta-data/instance-id' "$auth"; q dotdot '/latest/x/../meta-data/instance-id' "$auth"
	q parameter '/latest/meta-data/instance-id;a' "$auth"; q upper '/LATEST/META-DATA/INSTANCE-ID' "$auth"
	q slashes '/latest//meta-data/instance-id' "$auth"; q query '/latest/meta-data/instance-id?x' "$auth"
	# 2. persistence
	q keepalive $id "$auth"$'Connection: keep-alive\r\n'; q close $id "$auth"$'Connection: close\r\n'
	ask "http10" "GET $id HTTP/1.0"$'\r\n'"$auth"$'\r\n'
	local two; two=$(get $id "$auth"$'Connection: keep-alive\r\n'); two=${two%x}; ask "pipelined" "$two$two"
	# 3. relays
	q xff-v1 $id $'X-Forwarded-For: 203.0.113.9\r\n'; q xff-v2 $id "$auth"$'X-Forwarded-For: 203.0.113.9\r\n'
	q forwarded $id "$auth"$'Forwarded: for=203.0.113.9\r\n'; q via $id "$auth"$'Via: 1.1 x\r\n'
	# 4. methods
	for m in POST DELETE OPTIONS HEAD; do ask "method-$m" "$m $id HTTP/1.1"$'\r\n'"$host$auth"$'\r\n'; done
	# 5. hosts
	ask "no-host" "GET $id HTTP/1.1"$'\r\n'"$auth"$'\r\n'; ask "other-host" "GET $id HTTP/1.1"$'\r\nHost: example.org\r\n'"$auth"$'\r\n'
	# 6. tokens
	q empty-token $id $'X-aws-ec2-metadata-token: \r\n'; q wrong-token $id $'X-aws-ec2-metadata-token: wrong\r\n'
	ask "token-expect" $'PUT /latest/api/token HTTP/1.1\r\n'"$host"$'X-aws-ec2-metadata-token-ttl-seconds: 60\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n'
	ask "token-dated" $'PUT /2021-03-23/api/token HTTP/1.1\r\n'"$host"$'X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n'
	# 8. errors
	q not-found /latest/meta-data/nothing "$auth"; ask "token-get" $'GET /latest/api/token HTTP/1.1\r\n'"$host"$'\r\n'
	# 9. credentials
	q role-list /latest/meta-data/iam/security-credentials/ "$auth"; q role "/latest/meta-data/iam/security-credentials/$role" "$auth"
	q extended /latest/meta-data/iam/security-credentials-extended/ "$auth"; q iam /latest/meta-data/iam/ "$auth"
	q userdata /latest/user-data "$auth"
}

compare() { # two sets of answers: prints the first, and where the second differs
	local differ=0 direct name
	for direct in "$1"/*; do
		name=${direct##*/}
		summary "$direct" "$name"
		if ! diff <(masked "$direct") <(masked "$2/$name") >/dev/null; then
			differ=$((differ + 1))
			echo "    DIFFERS through imdsgate: $(summary "$2/$name" '')"
		fi
	done
	echo "$differ answers differ"
	[ "$differ" = 0 ]
}

case ${1-} in
'') ;;
--probe) probes "${2:?$usage}"; exit ;;
--compare) compare "${2:?$usage}" "${3:?$usage}"; exit ;;
*) echo "$usage" >&2; exit 2 ;;
esac

[ "$(id -u)" = 0 ] || { echo "run it as root" >&2; exit 2; }
command -v imdsgate >/dev/null || { echo "install imdsgate first: make install" >&2; exit 2; }
[ -d /run/systemd/system ] || { echo "this host does not run systemd" >&2; exit 2; }
grep -qi amazon /sys/class/dmi/id/sys_vendor 2>/dev/null || grep -qi '^ec2' /sys/hypervisor/uuid 2>/dev/null ||
	{ echo "this is no EC2 instance; 'make demo' has a stand-in for one" >&2; exit 2; }

was=$(systemctl is-active imdsgated.service)
work=$(mktemp -d /dev/shm/imdsgate-check.XXXXXX) || exit 2
mkdir -m 700 "$work/direct" "$work/gate"
# shellcheck disable=SC2317,SC2329 # the trap calls it
finish() {
	rm -rf "$work"
	if [ "$was" = active ]; then
		systemctl start imdsgated.socket imdsgated.service
	else
		systemctl stop imdsgated.service imdsgated.socket 2>/dev/null
	fi
}
trap finish EXIT
trap 'exit 130' INT TERM

echo "imdsgate $(imdsgate version | cut -d ' ' -f 2), kernel $(uname -r), $(sed -n 's/^PRETTY_NAME=//p' /etc/os-release)"
echo "asking directly ..."
systemctl stop imdsgated.service imdsgated.socket
imdsgate redirect remove >/dev/null
probes "$work/direct"
echo "asking through imdsgate ..."
systemctl start imdsgated.socket imdsgated.service
imdsgate status --wait 10s >/dev/null || { imdsgate status; exit 1; }
imdsgate status --json | grep -q '"mode":"audit"' || { echo "set mode: audit for this" >&2; exit 2; }
probes "$work/gate"
compare "$work/direct" "$work/gate"
result=$?
if command -v ethtool >/dev/null; then
	for dev in /sys/class/net/e*; do
		ethtool -S "${dev##*/}" 2>/dev/null | grep linklocal_allowance_exceeded
	done
fi
exit $result
