package netlab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// BuildClients builds the programs of module test/clients into dir: sdkclient, which asks the metadata service as
// aws-sdk-go-v2 does, and aemm, AWS's own mock of the service (amazon-ec2-metadata-mock; its --help tells its
// options, and it needs a HOME of its own). The working directory must be inside this repository. The first time, the
// modules are downloaded; from then on Go's build cache makes it take about a second.
func BuildClients(dir string) (sdkclient, aemm string, err error) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", "", fmt.Errorf("find this module: %w", err)
	}
	clients := filepath.Join(string(bytes.TrimSpace(root)), "test", "clients")
	sdkclient, aemm = filepath.Join(dir, "sdkclient"), filepath.Join(dir, "aemm")
	for out, pkg := range map[string]string{
		sdkclient: "./sdkclient",
		aemm:      "github.com/aws/amazon-ec2-metadata-mock/cmd/ec2-metadata-mock",
	} {
		cmd := exec.Command("go", "build", "-o", out, pkg)
		cmd.Dir = clients
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			return "", "", fmt.Errorf("build %s: %w: %s", pkg, err, text)
		}
	}
	return sdkclient, aemm, nil
}
