# Credentials as boto3 finds them.
import sys

import boto3

credentials = boto3.Session().get_credentials()
if credentials is None:
    sys.exit("Session.get_credentials() is None")
print("credentials", credentials.access_key)
