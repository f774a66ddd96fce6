package imdstest

import (
	"encoding/base64"
	"fmt"
	"maps"
	"strings"
	"time"
)

// What the instance is. The account is the one of AWS's documentation.
const (
	accountID  = "123456789012"
	instanceID = "i-0123456789abcdef0"
	imageID    = "ami-0fa4e000000000001"
	region     = "us-east-1"
	zone       = region + "a"
	macAddress = "02:fa:4e:00:00:0a"
	localIPv4  = "172.31.0.10"
	localIPv6  = "fd00:ec2:1::10"
	localName  = "ip-172-31-0-10.ec2.internal"
	publicIPv4 = "203.0.113.10" // RFC 5737
	publicName = "ec2-203-0-113-10.compute-1.amazonaws.com"
	keyName    = "imdsgate-lab-key"
	publicKey  = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEZBS0VGQUtFRkFLRUZBS0VGQUtFRkFLRUZBS0VGQUtF " + keyName
)

// leaves returns the values that are no credentials, by path below the version (EC2 User Guide, "Instance metadata
// categories" and "Dynamic data categories"). Categories that need an event, such as spot/, are not there.
func (i *instance) leaves() map[string]string {
	document := i.identityDocument()
	all := map[string]string{
		"dynamic/fws/instance-monitoring":      "disabled",
		"dynamic/instance-identity/document":   document,
		"dynamic/instance-identity/dsa2048":    fakeSignature("dsa2048", 16),
		"dynamic/instance-identity/pkcs7":      fakeSignature("pkcs7", 20),
		"dynamic/instance-identity/rsa2048":    fakeSignature("rsa2048", 24),
		"dynamic/instance-identity/signature":  fakeSignature("signature", 3),
		"meta-data/ami-id":                     imageID,
		"meta-data/ami-launch-index":           "0",
		"meta-data/ami-manifest-path":          "(unknown)",
		"meta-data/ancestor-ami-ids":           "ami-0fa4e000000000000",
		"meta-data/hostname":                   localName,
		"meta-data/instance-action":            "none",
		"meta-data/instance-id":                instanceID,
		"meta-data/instance-life-cycle":        "on-demand",
		"meta-data/instance-type":              "m5.large",
		"meta-data/ipv6":                       localIPv6,
		"meta-data/kernel-id":                  "aki-0fa4e000",
		"meta-data/local-hostname":             localName,
		"meta-data/local-ipv4":                 localIPv4,
		"meta-data/mac":                        macAddress,
		"meta-data/outpost-arn":                "arn:aws:outposts:" + region + ":" + accountID + ":outpost/op-0fa4e00000000000a",
		"meta-data/product-codes":              "fa4efa4efa4efa4efa4efa4ef",
		"meta-data/profile":                    "default-hvm",
		"meta-data/public-hostname":            publicName,
		"meta-data/public-ipv4":                publicIPv4,
		"meta-data/ramdisk-id":                 "ari-0fa4e000",
		"meta-data/reservation-id":             "r-0fa4e00000000000a",
		"meta-data/security-groups":            "imdsgate-lab",
		"meta-data/system":                     "nitro",
		"meta-data/block-device-mapping/ami":   "/dev/xvda",
		"meta-data/block-device-mapping/root":  "/dev/xvda",
		"meta-data/hibernation/configured":     "false",
		"meta-data/metrics/vhostmd":            `<?xml version="1.0" encoding="UTF-8"?>`,
		"meta-data/public-keys/0/openssh-key":  publicKey,
		"meta-data/services/domain":            "amazonaws.com",
		"meta-data/services/partition":         "aws",
		"meta-data/placement/group-id":         "pg-0fa4e00000000000a",
		"meta-data/placement/group-name":       "imdsgate-lab",
		"meta-data/placement/host-id":          "h-0fa4e00000000000a",
		"meta-data/placement/partition-number": "1",
		"meta-data/placement/region":           region,

		"meta-data/autoscaling/target-lifecycle-state":   "InService",
		"meta-data/events/maintenance/history":           "[]",
		"meta-data/events/maintenance/scheduled":         "[]",
		"meta-data/identity-credentials/ec2/info":        successDocument(i.launched, "AccountId", accountID),
		"meta-data/managed-ssh-keys/signer-cert":         "-----BEGIN CERTIFICATE-----\n" + fakeSignature("signer-cert", 8) + "\n-----END CERTIFICATE-----",
		"meta-data/managed-ssh-keys/signer-ocsp/fa4e":    fakeSignature("signer-ocsp", 8),
		"meta-data/placement/availability-zone":          zone,
		"meta-data/placement/availability-zone-id":       "use1-az1",
		"meta-data/elastic-gpus/associations/elg-0fa4e0": `{"version_2018_02_12":{"elastic-gpu-id":"elg-0fa4e0"}}`,
		"meta-data/elastic-inference/associations/eia-0fa4e0": `{"version_2018_04_12":` +
			`{"elastic-inference-accelerator-id":"eia-0fa4e0"}}`,
		"meta-data/managed-ssh-keys/active-keys/ec2-user": publicKey,
	}
	for name, value := range map[string]string{
		"device-number":                   "0",
		"interface-id":                    "eni-0fa4e00000000000a",
		"ipv4-associations/" + publicIPv4: localIPv4,
		"ipv4-prefix":                     "172.31.1.0/28",
		"ipv6-prefix":                     "fd00:ec2:1:0:1::/80",
		"ipv6s":                           localIPv6,
		"local-hostname":                  localName,
		"local-ipv4s":                     localIPv4,
		"mac":                             macAddress,
		"network-card":                    "0",
		"network-card-index":              "0",
		"owner-id":                        accountID,
		"public-hostname":                 publicName,
		"public-ipv4s":                    publicIPv4,
		"security-group-ids":              "sg-0fa4e00000000000a",
		"security-groups":                 "imdsgate-lab",
		"subnet-id":                       "subnet-0fa4e00000000000a",
		"subnet-ipv4-cidr-block":          "172.31.0.0/20",
		"subnet-ipv6-cidr-blocks":         "fd00:ec2:1::/64",
		"vpc-id":                          "vpc-0fa4e00000000000a",
		"vpc-ipv4-cidr-block":             "172.31.0.0/16",
		"vpc-ipv4-cidr-blocks":            "172.31.0.0/16",
		"vpc-ipv6-cidr-blocks":            "fd00:ec2:1::/56",
	} {
		all["meta-data/network/interfaces/macs/"+macAddress+"/"+name] = value
	}
	for key, value := range i.Tags {
		all["meta-data/tags/instance/"+key] = value
	}
	switch {
	case i.UserData == nil:
		all["user-data"] = "#cloud-config\nfqdn: " + localName + "\npassword: fake-password-in-user-data\n"
	case len(i.UserData) > 0:
		all["user-data"] = string(i.UserData)
	}
	return all
}

func (i *instance) identityDocument() string {
	return `{
  "accountId" : "` + accountID + `",
  "architecture" : "x86_64",
  "availabilityZone" : "` + zone + `",
  "billingProducts" : null,
  "devpayProductCodes" : null,
  "marketplaceProductCodes" : null,
  "imageId" : "` + imageID + `",
  "instanceId" : "` + instanceID + `",
  "instanceType" : "m5.large",
  "kernelId" : null,
  "pendingTime" : "` + stamp(i.launched) + `",
  "privateIp" : "` + localIPv4 + `",
  "ramdiskId" : null,
  "region" : "` + region + `",
  "version" : "2017-09-30"
}`
}

// fakeSignature returns base64 that decodes to a text saying what it is not, in lines of 64 characters.
func fakeSignature(kind string, lines int) string {
	text := strings.Repeat("this is no "+kind+" but a fake; ", 1+lines*48/16)
	var out []string
	for n := range lines {
		out = append(out, base64.StdEncoding.EncodeToString([]byte(text[n*48:(n+1)*48])))
	}
	return strings.Join(out, "\n")
}

// documents returns the credential documents and what leads to them.
func (i *instance) documents() map[string]string {
	all := map[string]string{
		"meta-data/identity-credentials/ec2/security-credentials/ec2-instance": i.credentials(90000+i.issue, false),
	}
	if i.NoRole {
		return all
	}
	maps.Copy(all, map[string]string{
		"meta-data/iam/info": successDocument(i.issuedAt,
			"InstanceProfileArn", "arn:aws:iam::"+accountID+":instance-profile/"+i.Role,
			"InstanceProfileId", "AIPAEXAMPLEFAKE00001"),
		"meta-data/iam/security-credentials/" + i.Role: i.credentials(i.issue, false),
	})
	if i.ExtendedCredentials {
		all["meta-data/iam/security-credentials-extended/"+i.Role] = i.credentials(i.issue, true)
	}
	return all
}

// credentials is a document of about 1.3 KB (EC2 User Guide, "Retrieve security credentials from instance metadata").
func (i *instance) credentials(number int, extended bool) string {
	members := []string{
		"Type", "AWS-HMAC",
		"AccessKeyId", fmt.Sprintf("ASIAEXAMPLEFAKE%05d", number),
		"SecretAccessKey", fmt.Sprintf("fake-secret-access-key-%05d-of-no-account", number)[:40],
		"Token", fmt.Sprintf("fake-session-token-%05d-", number) + strings.Repeat("FAKE", 256) + "==",
		"Expiration", stamp(i.issuedAt.Add(i.CredentialLifetime)),
	}
	if extended {
		members = append(members, "AccountId", accountID)
	}
	return successDocument(i.issuedAt, members...)
}

// successDocument renders a document in the service's layout: Code, LastUpdated, then pairs of name and value.
func successDocument(updated time.Time, members ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : %q", stamp(updated))
	for n := 0; n < len(members); n += 2 {
		fmt.Fprintf(&b, ",\n  %q : %q", members[n], members[n+1])
	}
	b.WriteString("\n}")
	return b.String()
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }
