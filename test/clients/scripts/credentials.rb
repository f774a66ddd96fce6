# Credentials as AWS's SDK for Ruby finds them.
require "aws-sdk-core"

provider = Aws::CredentialProviderChain.new.resolve
abort "CredentialProviderChain#resolve is nil" if provider.nil?
puts "credentials #{provider.credentials.access_key_id}"
