#!/bin/bash
# The role as the functions of amazon-ec2-net-utils find it. On its own it asks only for what is not guarded.
# shellcheck source=/dev/null # it is in the clients' root
. /usr/share/amazon-ec2-net-utils/lib.sh
get_imds iam/security-credentials/
