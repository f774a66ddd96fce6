#!/bin/sh
# Credentials as scripts with wget find them.
service=http://169.254.169.254/latest
token=$(wget -nv -O - -T 5 -t 1 --method=PUT --header="X-aws-ec2-metadata-token-ttl-seconds: 60" $service/api/token) || exit
role=$(wget -nv -O - -T 5 -t 1 --header="X-aws-ec2-metadata-token: $token" $service/meta-data/iam/security-credentials/) || exit
wget -nv -O - -T 5 -t 1 --header="X-aws-ec2-metadata-token: $token" "$service/meta-data/iam/security-credentials/$role"
