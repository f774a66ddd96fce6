package imdstest

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"time"
)

// Tokens carry their own expiry and a keyed hash, so that a load test can ask for millions without filling memory:
// 01 00 04 00 (which makes them start with AQAEA, as real ones do), expiry, serial number, hash; 40 bytes, 56
// characters of base64url.
const (
	tokenSize = 56
	maxTTL    = 21600 // seconds (EC2 User Guide, "How Instance Metadata Service Version 2 works")
)

var tokenPrefix = [4]byte{1, 0, 4, 0}

func (i *instance) mint(now time.Time, ttl, serial int64) []byte {
	var raw [40]byte
	copy(raw[:], tokenPrefix[:])
	binary.BigEndian.PutUint64(raw[4:], uint64(now.Add(time.Duration(ttl)*time.Second).UnixNano()))
	binary.BigEndian.PutUint64(raw[12:], uint64(serial))
	copy(raw[20:], i.seal(raw[:20]))
	return base64.URLEncoding.AppendEncode(nil, raw[:])
}

// check returns the remaining life of a token in seconds, rounded up as the service does.
func (i *instance) check(token string, now time.Time) (ttl int64, ok bool) {
	var raw [42]byte
	if len(token) != tokenSize {
		return 0, false
	}
	n, err := base64.URLEncoding.Strict().Decode(raw[:], []byte(token))
	if err != nil || n != 40 || [4]byte(raw[:4]) != tokenPrefix {
		return 0, false
	}
	if subtle.ConstantTimeCompare(raw[20:40], i.seal(raw[:20])) == 0 {
		return 0, false
	}
	left := time.Unix(0, int64(binary.BigEndian.Uint64(raw[4:]))).Sub(now)
	return int64((left + time.Second - 1) / time.Second), left > 0
}

func (i *instance) seal(payload []byte) []byte {
	var keyed [52]byte
	copy(keyed[:], i.secret[:])
	copy(keyed[32:], payload)
	sum := sha256.Sum256(keyed[:])
	return sum[:20]
}
