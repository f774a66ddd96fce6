#!/bin/sh
# A password for a registry, as docker asks its credential helper for one. What it says is in its log.
echo 123456789012.dkr.ecr.us-east-1.amazonaws.com | docker-credential-ecr-login get
code=$?
cat "$HOME"/.ecr/log/*.log >&2
exit $code
