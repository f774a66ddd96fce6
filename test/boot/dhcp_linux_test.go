package boot

import (
	"context"
	"net"
	"sync"
	"syscall"

	"github.com/imdsgate/imdsgate/test/lab/netlab"
	"golang.org/x/sys/unix"
)

// lease answers DHCP as a subnet's router does, with the address that the instance of the
// lab is to have, until it is stopped. There is one client, so that nothing is remembered.
func lease(lab *netlab.Lab) (stop func(), err error) {
	// Without the device, a broadcast has no route there.
	here := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if wrong := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "ec2") }); wrong != nil {
			return wrong
		}
		return err
	}}
	var router net.PacketConn
	err = lab.Metadata.Do(func() (err error) {
		router, err = here.ListenPacket(context.Background(), "udp4", ":67")
		return err
	})
	if err != nil {
		return nil, err
	}
	var running sync.WaitGroup
	running.Go(func() {
		const head = 240 // of RFC 2131, section 2, up to the options
		for b := make([]byte, 1500); ; {
			n, _, err := router.ReadFrom(b)
			if err != nil {
				return // closed
			}
			answer, ok := map[byte]byte{discover: offer, request: ack}[kind(b[:n])]
			if !ok {
				continue
			}
			b[0] = 2 // BOOTREPLY
			copy(b[16:20], []byte{172, 31, 0, 10})
			router.WriteTo(append(b[:head:head], 53, 1, answer, 54, 4, 172, 31, 0, 1, 51, 4, 0, 0, 14, 16,
				1, 4, 255, 255, 240, 0, 3, 4, 172, 31, 0, 1, 255), &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
		}
	})
	return func() { router.Close(); running.Wait() }, nil
}

// Kinds of messages (RFC 2132, 9.6).
const discover, offer, request, ack = 1, 2, 3, 5

// kind is the first option that clients send.
func kind(message []byte) byte {
	if len(message) < 243 || message[240] != 53 {
		return 0
	}
	return message[242]
}
