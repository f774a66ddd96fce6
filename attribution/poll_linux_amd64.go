package attribution

import "golang.org/x/sys/unix"

// oldPollCalls are those that newer architectures do not have.
var oldPollCalls = []int{unix.SYS_POLL, unix.SYS_SELECT}
