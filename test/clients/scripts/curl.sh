#!/bin/sh
# Credentials as scripts with curl find them.
service=http://169.254.169.254/latest
token=$(curl -fsS -m 5 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" $service/api/token) || exit
role=$(curl -fsS -m 5 -H "X-aws-ec2-metadata-token: $token" $service/meta-data/iam/security-credentials/) || exit
curl -fsS -m 5 -H "X-aws-ec2-metadata-token: $token" "$service/meta-data/iam/security-credentials/$role"
