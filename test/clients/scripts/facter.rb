# What facter finds; its command asks only on a machine that it takes for one of EC2.
require "facter"

puts "metadata #{Facter::Resolvers::Ec2.resolve(:metadata).to_s.bytesize} bytes"
puts "userdata #{Facter::Resolvers::Ec2.resolve(:userdata).to_s.bytesize} bytes"
