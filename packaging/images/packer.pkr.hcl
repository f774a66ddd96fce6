# An AMI that has imdsgate, and that asks for IMDSv2:
#
#   packer init . && packer build -var version=1.0.0 -var package=imdsgate_1.0.0_amd64.deb \
#     -var sha256=... -var config=config.yaml .
packer {
  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = ">= 1.1.4"
    }
  }
}

variable "version" {
  type = string
}

variable "package" {
  type        = string
  description = "The package of the architecture of the instance type, on this machine."
}

variable "sha256" {
  type        = string
  description = "Its line of SHA256SUMS, which you have compared."
}

variable "config" {
  type        = string
  description = "What becomes /etc/imdsgate/config.yaml."
}

variable "region" {
  type    = string
  default = "us-east-1"
}

source "amazon-ebs" "imdsgate" {
  ami_name      = "debian-12-imdsgate-${var.version}"
  instance_type = "t3.small"
  region        = var.region
  ssh_username  = "admin"
  imds_support  = "v2.0"
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  source_ami_filter {
    filters = {
      name                = "debian-12-amd64-*"
      virtualization-type = "hvm"
    }
    owners      = ["136693071363"] # https://wiki.debian.org/Cloud/AmazonEC2Image
    most_recent = true
  }
}

build {
  sources = ["source.amazon-ebs.imdsgate"]

  provisioner "file" {
    source      = var.package
    destination = "/tmp/imdsgate.deb"
  }
  provisioner "file" {
    source      = var.config
    destination = "/tmp/config.yaml"
  }
  provisioner "shell" {
    inline = [
      "set -eu",
      "echo '${var.sha256}  /tmp/imdsgate.deb' | sha256sum --check --strict",
      "sudo apt-get update",
      "sudo DEBIAN_FRONTEND=noninteractive apt-get install -y /tmp/imdsgate.deb",
      "sudo install -m 0640 -g imdsgate /tmp/config.yaml /etc/imdsgate/config.yaml",
      "sudo imdsgated -check",
      "sudo systemctl enable imdsgated.socket imdsgated.service",
      "rm /tmp/imdsgate.deb /tmp/config.yaml",
      "sudo /usr/lib/imdsgate/seal-image",
    ]
  }
}
