# Credentials as VM::EC2 finds them.
use strict;
use VM::EC2::Instance::Metadata;

my $credentials = VM::EC2::Instance::Metadata->new->iam_credentials;
die "iam_credentials is undef\n" unless defined $credentials;
print "credentials ", $credentials->accessKeyId, "\n";
