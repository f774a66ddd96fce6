// Package witness sees in the kernel who connects to the metadata service, at the
// moment it happens.
//
// A Witness attaches small BPF programs, assembled here, to the root of cgroup2
// (cgroup/connect4 and connect6, sock_ops, sock_release) and, where the kernel has
// type information, to tracepoints and iterators. It needs neither clang nor
// kernel headers, and for the first group neither BTF nor CAP_PERFMON: CAP_BPF and
// CAP_NET_ADMIN are enough. Every hook is tried by itself; Hooks says which are
// there and why others are not.
//
// What it promises: a Connector is who called connect(2) for exactly the socket
// with the asked tuple, and never anybody else. A socket that could not be recorded,
// because a map was full or its user had more than a share, has no witness at all;
// that is counted in Stats, and the caller must take it for "unknown". Nothing is
// evicted to make room: an LRU of 16,384 lost its victim to 1.2 s of work of one user.
//
// Its limits: a user who has several uids (subuid(5)) has as many shares, and four of
// them fill the maps; root, also root of a container without a user namespace, has no
// share to keep to. Then others have no witness, which is a denial and never a mistake. A
// client that is bound to a device and lacks CAP_NET_RAW stays bound (Stats.StillBound).
// Writes on MPTCP sockets are not seen, and said to be so.
//
// It is the wrong tool for connections that are older than it, for connections of
// the kernel itself, and against root, who can detach it. All methods of Witness may
// be called from any goroutine. Linux only.
package witness
