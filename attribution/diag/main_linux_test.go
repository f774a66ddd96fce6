package diag

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/test/lab/labtest"
	"github.com/imdsgate/imdsgate/test/lab/netlab"
)

// The tests run in a network namespace of their own, since they make interfaces and
// redirect connections.
func TestMain(m *testing.M) {
	// What this process starts, such as workers that fuzz, finds it as it is.
	const prepared = "IMDSGATE_TEST_PREPARED"
	if os.Getenv(netlab.Private) != "" && os.Getenv(prepared) == "" {
		os.Setenv(prepared, "1")
		for _, command := range []string{
			"ip link set lo up",
			// The way to an endpoint. The redirect takes the packets off it.
			"ip link add eth0 type veth peer name eth0peer",
			"ip addr add 10.0.3.16/24 dev eth0",
			"ip addr add fd00:ec2:1::10/64 dev eth0 nodad",
			"ip link set eth0 up",
			"ip link set eth0peer up",
			"ip route add 169.254.169.254 dev eth0",
			"ip route add fd00:ec2::254 dev eth0",
		} {
			if err := run(command); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
	}
	labtest.Main(m)
}

func run(command string) error {
	args := strings.Fields(command)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}
