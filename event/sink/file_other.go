//go:build !linux

package sink

import (
	"os"
	"time"
)

func openAppend(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
}

func sinceBoot() uint64 { return uint64(time.Now().UnixMicro()) }
