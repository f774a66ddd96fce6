package witness

// How the programs of level 2 work together.
//
// A TCP connect(2) passes three places, all under the lock of the socket:
//
//   - cgroup/connect4 or connect6, before anything happened. Only here "the current
//     process" is the one that called connect. For an endpoint of the metadata
//     service (everything else leaves after a few comparisons) the program writes a
//     record under the cookie of the socket, or refuses.
//   - sock_ops, TCP_CONNECT_CB: the source port is chosen, the SYN is not sent. Who
//     runs need not be the caller of connect. The program completes the tuple in the
//     record and stores a copy of the record under the tuple. So whoever accepts
//     the connection finds its witness: it is older than the SYN.
//   - sock_ops, ACTIVE_ESTABLISHED_CB, in a softirq: only for the watch over
//     namespaces that the redirect does not cover.
//
// An entry ends in one of three ways, and the first that comes takes it: sock_release
// when the last descriptor is closed; TCP_CLOSE, by STATE_CB, since the subflow of an
// MPTCP socket is a kernel socket, which has no release hook; or a new connect of the
// same socket. Whoever deletes the record, and nobody else, gives its share back.
//
// An element of a BPF hash can be reused as soon as it is deleted, also while bpf(2)
// copies it. So a removal counts in shared.forgetting before and in shared.forgotten
// after it: a reader who sees them equal before, and the first unchanged after his
// lookup, knows that nothing was removed meanwhile.
//
// Same tuple twice: two sockets of one namespace can have it when they are bound to
// different devices. The proxy could not tell them apart, so neither gets it: the copy
// has cookie 0 until one of them ends.

import (
	"net/netip"
	"unsafe"

	"github.com/cilium/ebpf/asm"
)

// plan is all that the programs are made from.
type plan struct {
	endpoints []netip.AddrPort
	probes    []netip.AddrPort // listeners of ours that are treated alike, for Check
	pid       int              // ours
	netns     uint64           // ours
	mark      uint32           // 0: none
	share     uint64           // of sockets, for one user
	factor    uint32           // odd and secret, see users

	connectors, tuples, users, namespaces, coverage, events, shared, writers, execs, former, creators, wanted int // maps
}

const (
	usersBits = 14

	// maxNamespaces bounds the namespaces other than ours that are known: one lookup
	// each for a forwarded connection. Too low, and on a host with more containers
	// than that the newest ones have no witness.
	maxNamespaces = 4096

	// maxWriters is how many foreign writers of a socket are kept.
	maxWriters = 8

	// askAgain limits the reports about one namespace.
	askAgain = 1e9 // ns
)

// fields of struct bpf_sock_addr, bpf_sock_ops and bpf_sock (include/uapi/linux/bpf.h)
const (
	addrIP4, addrIP6, addrPort, addrProtocol, addrSock = 4, 8, 24, 36, 64

	opsOp, opsNewState, opsRemoteIP4, opsLocalIP4            = 0, 8, 24, 28
	opsLocalIP6, opsRemotePort, opsLocalPort                 = 48, 64, 68
	opsFlags, opsSock                                        = 84, 184
	opConnect, opEstablished, opState, stateFlag, stateClose = 3, 4, 10, 4, 7

	sockDevice, sockProtocol, sockMark = 0, 12, 16

	protoTCP, protoMPTCP               = 6, 262
	solSocket, soMark, soBindToDevice  = 1, 36, 25
	updateAny, updateNoExist, existing = 0, 1, 2
)

// places on the stack
const (
	stackRecord = -recordSize
	stackKey    = stackRecord - 8
	stackUser   = stackKey - 8
	stackUID    = stackUser - 8
	stackSock   = stackUID - 8
	stackTask   = stackSock - 8
	stackValue  = stackTask - int16(unsafe.Sizeof(namespace{}))
	stackWriter = stackValue - 16
)

// sight is what a connect program may see of the process: without CAP_PERFMON neither
// (Linux 6.18 has bpf_get_current_comm for those only who may read all memory).
type sight struct {
	comm   bool
	layout *layout
}

// connect is the program of cgroup/connect4 or connect6.
func (p *plan) connect(v6 bool, see sight) asm.Instructions {
	c := &code{}
	c.emit(asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R7, 0))
	c.match(p, v6)
	c.exit(1)

	c.here("probe")
	c.emit(asm.Mov.Imm(asm.R7, 1))
	c.here("endpoint")
	c.emit(
		asm.LoadMem(asm.R1, asm.R6, addrProtocol, asm.Word),
		asm.JEq.Imm(asm.R1, protoTCP, "tcp"),
		asm.JNE.Imm(asm.R1, protoMPTCP, "allow"),
	)
	c.here("tcp")
	c.emit(
		asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetNetnsCookie.Call(), asm.Mov.Reg(asm.R8, asm.R0),
		asm.FnGetCurrentPidTgid.Call(), asm.Mov.Reg(asm.R9, asm.R0),
		asm.LoadImm(asm.R2, int64(p.netns), asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R9), asm.RSh.Imm(asm.R1, 32),
		asm.JEq.Imm(asm.R7, 1, "ours"),
		asm.JEq.Imm(asm.R1, int32(p.pid), "allow"),
		asm.Ja.Label("record"),
	)
	// Nobody but us has business with our probe, and could only fill its backlog.
	c.here("ours")
	c.emit(
		asm.JNE.Reg(asm.R8, asm.R2, "allow"),
		asm.JEq.Imm(asm.R1, int32(p.pid), "record"),
	)
	c.exit(0)

	c.here("record")
	c.record(v6, see.comm)
	if see.layout != nil {
		c.process(see.layout)
	}
	c.emit(
		asm.LoadImm(asm.R1, int64(p.netns), asm.DWord),
		asm.JNE.Reg(asm.R8, asm.R1, "foreign"),
		asm.LoadMem(asm.R7, asm.R6, addrSock, asm.DWord),
	)
	if p.mark != 0 {
		c.emit(
			asm.LoadMem(asm.R1, asm.R7, sockMark, asm.Word),
			asm.JNE.Imm32(asm.R1, int32(p.mark), "unmarked"),
			asm.Mov.Reg(asm.R1, asm.R9), asm.RSh.Imm(asm.R1, 32),
			asm.JEq.Imm(asm.R1, int32(p.pid), "unmarked"), // our probe
			asm.FnGetCurrentUidGid.Call(), asm.LSh.Imm(asm.R0, 32), asm.RSh.Imm(asm.R0, 32), asm.Add.Imm(asm.R0, 1),
		)
		c.setting(asm.R1, p.shared, unsafe.Offsetof(shared{}.markUser))
		c.emit(asm.JEq.Reg(asm.R0, asm.R1, "unmarked"))
		c.setting(asm.R7, p.shared, unsafe.Offsetof(shared{}.denyMarked))
		c.emit()
		c.flag(flagMarked)
		c.emit(asm.JEq.Imm(asm.R7, 0, "marked"))
		c.flag(flagRefused)
		c.here("marked")
		c.report(p)
		c.emit(
			asm.JNE.Imm(asm.R7, 0, "refuse"),
			asm.LoadMem(asm.R7, asm.R6, addrSock, asm.DWord),
		)
	}
	// A client that is bound to a device would lose the answer after the redirect.
	c.here("unmarked")
	c.emit(
		asm.LoadMem(asm.R1, asm.R7, sockDevice, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "insert"),
		asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, stackUser, asm.R1, asm.DWord), // an empty name
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, solSocket), asm.Mov.Imm(asm.R3, soBindToDevice),
	)
	c.stack(asm.R4, stackUser)
	c.emit(
		asm.Mov.Imm(asm.R5, 4), asm.FnSetsockopt.Call(),
		asm.JEq.Imm(asm.R0, 0, "unbound"),
	)
	c.count(p.shared, unsafe.Offsetof(shared{}.bound), 1)
	c.emit(asm.Ja.Label("insert"))
	c.here("unbound")
	c.flag(flagUnbound)
	c.emit(asm.Ja.Label("insert"))

	c.here("foreign")
	c.setting(asm.R1, p.shared, unsafe.Offsetof(shared{}.denyUncovered))
	c.emit(asm.JEq.Imm(asm.R1, 0, "insert"))
	c.lookup(p.coverage, stackRecord+offNetns, "insert")
	c.emit(
		asm.LoadMem(asm.R1, asm.R0, int16(unsafe.Offsetof(coverage{}.uncovered)), asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "insert"),
	)
	c.lookup(p.namespaces, stackRecord+offNetns, "refuse")
	c.dueAgain(int16(unsafe.Offsetof(namespace{}.refused)), "refuse")
	c.flag(flagUncovered | flagRefused)
	c.report(p)
	c.here("refuse")
	c.exit(0)

	c.here("insert")
	c.lookup(p.connectors, stackKey, "new")
	c.emit(asm.Mov.Reg(asm.R7, asm.R0))
	c.forget(p)
	c.here("new")
	c.insert(p)
	c.here("allow")
	c.exit(1)
	return c.ins
}

// match jumps to "endpoint" or "probe" when the destination is one, and else goes on.
func (c *code) match(p *plan, v6 bool) {
	ip := []asm.Register{asm.R1}
	if v6 {
		ip = []asm.Register{asm.R1, asm.R2, asm.R3, asm.R4}
		for i, reg := range ip {
			c.emit(asm.LoadMem(reg, asm.R6, addrIP6+4*int16(i), asm.Word))
		}
	} else {
		c.emit(asm.LoadMem(asm.R1, asm.R6, addrIP4, asm.Word))
	}
	c.emit(asm.LoadMem(asm.R5, asm.R6, addrPort, asm.Word))
	for _, to := range []struct {
		label string
		dst   []netip.AddrPort
	}{{"endpoint", p.endpoints}, {"probe", p.probes}} {
		for _, dst := range to.dst {
			b := dst.Addr().As16()
			words := b[:]
			if !v6 {
				if !dst.Addr().Is4() {
					continue
				}
				words = b[12:]
			}
			next := c.fresh("next")
			// The last word differs most often.
			for i := len(ip) - 1; i >= 0; i-- {
				c.emit(asm.JNE.Imm32(ip[i], word(words[4*i:]), next))
			}
			c.emit(asm.JEq.Imm32(asm.R5, netPort(dst.Port()), to.label))
			c.here(next)
		}
	}
}

// record fills the record on the stack, and the key. R8 is the namespace, R9 the
// thread.
func (c *code) record(v6, comm bool) {
	c.clear(stackRecord, unsafe.Sizeof(record{}))
	at := func(off int16, reg asm.Register, size asm.Size) {
		c.emit(asm.StoreMem(asm.RFP, stackRecord+off, reg, size))
	}
	c.emit(asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetSocketCookie.Call(), asm.StoreMem(asm.RFP, stackKey, asm.R0, asm.DWord))
	at(offCookie, asm.R0, asm.DWord)
	at(offNetns, asm.R8, asm.DWord)
	at(offTID, asm.R9, asm.Word)
	c.emit(asm.Mov.Reg(asm.R1, asm.R9), asm.RSh.Imm(asm.R1, 32))
	at(offPID, asm.R1, asm.Word)
	c.emit(asm.FnGetCurrentUidGid.Call())
	at(offUID, asm.R0, asm.Word)
	c.emit(asm.RSh.Imm(asm.R0, 32))
	at(offGID, asm.R0, asm.Word)
	c.emit(asm.FnKtimeGetNs.Call())
	at(offAt, asm.R0, asm.DWord)
	c.emit(asm.FnKtimeGetBootNs.Call())
	at(offBoot, asm.R0, asm.DWord)
	c.emit(asm.FnGetCurrentCgroupId.Call())
	at(offCgroup, asm.R0, asm.DWord)
	if comm {
		c.stack(asm.R1, stackRecord+offComm)
		c.emit(asm.Mov.Imm(asm.R2, int32(unsafe.Sizeof(record{}.comm))), asm.FnGetCurrentComm.Call())
	}
	if v6 {
		for i := int16(0); i < 16; i += 8 {
			c.emit(asm.LoadMem(asm.R1, asm.R6, addrIP6+i, asm.DWord))
			at(offRemote+i, asm.R1, asm.DWord)
		}
	} else {
		c.emit(
			asm.LoadMem(asm.R1, asm.R6, addrIP4, asm.Word), asm.LSh.Imm(asm.R1, 32),
			asm.LoadImm(asm.R2, int64(uint32(mapped)), asm.DWord), asm.Or.Reg(asm.R1, asm.R2), // at once, see forgetWriters
		)
		at(offRemote+8, asm.R1, asm.DWord)
	}
	c.emit(asm.LoadMem(asm.R1, asm.R6, addrPort, asm.Word), asm.HostTo(asm.BE, asm.R1, asm.Half))
	at(offRport, asm.R1, asm.Half)
}

// flag adds flags to the record on the stack, with the parent behind them: see
// forgetWriters.
func (c *code) flag(flags int32) {
	c.emit(
		asm.LoadMem(asm.R1, asm.RFP, stackRecord+offFlags, asm.DWord), asm.Or.Imm(asm.R1, flags),
		asm.StoreMem(asm.RFP, stackRecord+offFlags, asm.R1, asm.DWord),
	)
}

// report sends the record on the stack to the reader of events.
func (c *code) report(p *plan) {
	c.stack(asm.R2, stackRecord)
	c.output(p)
}

// output sends the record at R2.
func (c *code) output(p *plan) {
	sent := c.fresh("sent")
	c.emit(
		asm.LoadMapPtr(asm.R1, p.events),
		asm.Mov.Imm(asm.R3, int32(recordSize)), asm.Mov.Imm(asm.R4, 0), asm.FnRingbufOutput.Call(),
		asm.JEq.Imm(asm.R0, 0, sent),
	)
	c.count(p.shared, unsafe.Offsetof(shared{}.dropped), 1)
	c.here(sent)
}

// dueAgain jumps if less than askAgain passed since the time in a field of the
// value at R0, and else sets it to now. It uses up R7.
func (c *code) dueAgain(field int16, not string) {
	c.emit(
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.FnKtimeGetNs.Call(),
		asm.LoadMem(asm.R1, asm.R7, field, asm.DWord),
		asm.Mov.Reg(asm.R2, asm.R0), asm.Sub.Reg(asm.R2, asm.R1),
		asm.JLT.Imm(asm.R2, askAgain, not),
		asm.StoreMem(asm.R7, field, asm.R0, asm.DWord),
	)
}

// user puts the address of a user's count in R0. The uid is at stackUID. The users
// are an array, since that cannot be filled: with as many uids as /etc/subuid gives
// him an attacker would fill a hash. Which uids share an element depends on a secret
// factor, so that nobody can choose to share somebody's.
func (c *code) user(p *plan, missing string) {
	c.emit(
		asm.LoadMem(asm.R1, asm.RFP, stackUID, asm.Word),
		asm.Mul.Imm32(asm.R1, int32(p.factor)), asm.RSh.Imm32(asm.R1, 32-usersBits),
		asm.StoreMem(asm.RFP, stackUser, asm.R1, asm.DWord),
	)
	c.lookup(p.users, stackUser, missing)
}

// insert stores the record on the stack, unless its user has a share already: such a
// socket has no witness, but all others still can have one.
func (c *code) insert(p *plan) {
	c.count(p.shared, unsafe.Offsetof(shared{}.connects), 1)
	c.emit(
		asm.LoadMem(asm.R1, asm.RFP, stackRecord+offUID, asm.Word),
		asm.StoreMem(asm.RFP, stackUID, asm.R1, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "store"),
	)
	c.user(p, "allow")
	sockets := int16(unsafe.Offsetof(user{}.sockets))
	c.emit(
		asm.LoadMem(asm.R1, asm.R0, sockets, asm.DWord),
		asm.JGE.Imm(asm.R1, int32(p.share), "over"),
		asm.Mov.Imm(asm.R1, 1), asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, sockets),
	)
	c.here("store")
	c.update(p.connectors, stackKey, stackRecord, updateNoExist)
	c.emit(asm.JNE.Imm(asm.R0, 0, "full"))
	c.count(p.shared, unsafe.Offsetof(shared{}.live), 1)
	c.exit(1)
	c.here("full")
	c.count(p.shared, unsafe.Offsetof(shared{}.full), 1)
	c.giveBack(p, "allow")
	c.exit(1)
	c.here("over")
	c.count(p.shared, unsafe.Offsetof(shared{}.overShare), 1)
}

// giveBack takes one from the count of the user at stackUID, and jumps if there is none.
func (c *code) giveBack(p *plan, done string) {
	c.emit(asm.LoadMem(asm.R1, asm.RFP, stackUID, asm.Word), asm.JEq.Imm(asm.R1, 0, done))
	c.user(p, done)
	c.emit(asm.Mov.Imm(asm.R1, -1), asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, int16(unsafe.Offsetof(user{}.sockets))))
}

// forget removes the record at R7, whose cookie is at stackKey, with all that
// belongs to it.
func (c *code) forget(p *plan) {
	owned, others, counted, done := c.fresh("owned"), c.fresh("others"), c.fresh("counted"), c.fresh("done")
	c.count(p.shared, unsafe.Offsetof(shared{}.forgetting), 1)
	c.emit(
		asm.LoadMem(asm.R1, asm.R7, offUID, asm.Word), asm.StoreMem(asm.RFP, stackUID, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, p.tuples),
		asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, int32(offKey)),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, others),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, owned),
		asm.LoadMem(asm.R2, asm.RFP, stackKey, asm.DWord),
		asm.JNE.Reg(asm.R1, asm.R2, others),
	)
	c.here(owned)
	c.emit(
		asm.LoadMapPtr(asm.R1, p.tuples),
		asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, int32(offKey)),
		asm.FnMapDeleteElem.Call(),
		asm.JNE.Imm(asm.R0, 0, others),
		asm.LoadMapPtr(asm.R1, p.namespaces),
		asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, int32(offNetns)),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, others),
		asm.Mov.Imm(asm.R1, -1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, int16(unsafe.Offsetof(namespace{}.live))),
	)
	c.here(others)
	c.forgetWriters(p, counted)
	c.here(counted)
	c.remove(p.connectors, stackKey)
	c.emit(asm.JNE.Imm(asm.R0, 0, done))
	c.count(p.shared, unsafe.Offsetof(shared{}.live), -1)
	c.giveBack(p, done)
	c.here(done)
	c.count(p.shared, unsafe.Offsetof(shared{}.forgotten), 1)
}

// forgetWriters removes the foreign writers of the record at R7, and jumps when there
// are no more. Their index is stored as one double word: without CAP_PERFMON Linux before
// 6.8 lets no part of a constant on the stack be overwritten.
func (c *code) forgetWriters(p *plan, done string) {
	if p.writers == 0 {
		c.emit(asm.Ja.Label(done))
		return
	}
	c.emit(
		asm.LoadMem(asm.R1, asm.RFP, stackKey, asm.DWord),
		asm.StoreMem(asm.RFP, stackWriter, asm.R1, asm.DWord),
	)
	for i := range int32(maxWriters) {
		c.emit(
			asm.LoadMem(asm.R1, asm.R7, offWriters, asm.Word),
			asm.JLE.Imm(asm.R1, i, done),
			asm.Mov.Imm(asm.R1, i), asm.StoreMem(asm.RFP, stackWriter+8, asm.R1, asm.DWord),
		)
		c.remove(p.writers, stackWriter)
	}
}

// sockOps is the program of sock_ops. It leaves reply as it is: it is somebody else's.
func (p *plan) sockOps(l *layout) asm.Instructions {
	c := &code{}
	c.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, opsOp, asm.Word),
		asm.JEq.Imm(asm.R1, opConnect, "connect"),
		asm.JEq.Imm(asm.R1, opEstablished, "connect"),
		asm.JEq.Imm(asm.R1, opState, "state"),
	)
	c.exit(1)

	c.here("state")
	c.emit(
		asm.LoadMem(asm.R1, asm.R6, opsNewState, asm.Word),
		asm.JNE.Imm(asm.R1, stateClose, "allow"),
	)
	c.known(p)
	c.forget(p)
	c.exit(1)

	c.here("connect")
	c.emit(asm.LoadMem(asm.R1, asm.R6, opsRemotePort, asm.Word), asm.HostTo(asm.BE, asm.R1, asm.Word))
	ports := map[uint16]bool{}
	for _, dst := range append(p.endpoints[:len(p.endpoints):len(p.endpoints)], p.probes...) {
		if !ports[dst.Port()] {
			ports[dst.Port()] = true
			c.emit(asm.JEq.Imm(asm.R1, int32(dst.Port()), "port"))
		}
	}
	c.exit(1)
	c.here("port")
	c.known(p)
	c.emit(
		asm.LoadMem(asm.R1, asm.R7, offNetns, asm.DWord), asm.StoreMem(asm.RFP, stackTask, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R8, asm.R1), // namespace, or 0 if it is ours
		asm.LoadImm(asm.R2, int64(p.netns), asm.DWord),
		asm.JNE.Reg(asm.R8, asm.R2, "elsewhere"),
		asm.Mov.Imm(asm.R8, 0),
	)
	c.here("elsewhere")
	c.emit(
		asm.LoadMem(asm.R1, asm.R6, opsOp, asm.Word),
		asm.JEq.Imm(asm.R1, opEstablished, "established"),

		// Complete the tuple.
		asm.LoadMem(asm.R1, asm.R6, opsLocalPort, asm.Word), asm.StoreMem(asm.R7, offLport, asm.R1, asm.Half),
		asm.LoadMem(asm.R1, asm.R7, offRemote, asm.DWord), asm.JNE.Imm(asm.R1, 0, "v6"),
		asm.LoadMem(asm.R1, asm.R7, offRemote+8, asm.Word), asm.JNE.Imm32(asm.R1, int32(mapped), "v6"),
		asm.Mov.Imm(asm.R2, 0), asm.StoreMem(asm.R7, offLocal, asm.R2, asm.DWord),
		asm.StoreMem(asm.R7, offLocal+8, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, opsLocalIP4, asm.Word), asm.StoreMem(asm.R7, offLocal+12, asm.R1, asm.Word),
		asm.Ja.Label("complete"),
	)
	c.here("v6")
	for i := int16(0); i < 16; i += 4 {
		c.emit(asm.LoadMem(asm.R1, asm.R6, opsLocalIP6+i, asm.Word), asm.StoreMem(asm.R7, offLocal+i, asm.R1, asm.Word))
	}
	c.here("complete")
	c.emit(
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMem(asm.R2, asm.R6, opsFlags, asm.Word), asm.Or.Imm(asm.R2, stateFlag),
		asm.FnSockOpsCbFlagsSet.Call(),
	)
	if l != nil {
		c.deferred(p, l)
	}
	if p.mark != 0 {
		c.markedLate(p)
	}
	c.emit(
		asm.JEq.Imm(asm.R8, 0, "claim"),
	)
	c.lookup(p.namespaces, stackTask, "unseen")
	c.emit(asm.Mov.Reg(asm.R9, asm.R0), asm.Ja.Label("seen"))
	c.here("unseen")
	c.clear(stackValue, unsafe.Sizeof(namespace{}))
	c.emit(
		asm.LoadMem(asm.R1, asm.R7, offUID, asm.Word),
		asm.StoreMem(asm.RFP, stackUID, asm.R1, asm.DWord),
		asm.StoreMem(asm.RFP, stackValue+int16(unsafe.Offsetof(namespace{}.uid)), asm.R1, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "room"),
	)
	c.user(p, "strange")
	namespaces := int16(unsafe.Offsetof(user{}.namespaces))
	c.emit(
		asm.LoadMem(asm.R1, asm.R0, namespaces, asm.DWord),
		asm.JGE.Imm(asm.R1, maxNamespaces/4, "strange"),
		asm.Mov.Imm(asm.R1, 1), asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, namespaces),
	)
	c.here("room")
	c.update(p.namespaces, stackTask, stackValue, updateNoExist)
	c.emit(asm.JNE.Imm(asm.R0, 0, "unroom"))
	c.count(p.shared, unsafe.Offsetof(shared{}.generation), 1)
	c.emit(asm.Ja.Label("crowded"))
	c.here("unroom")
	c.emit(asm.LoadMem(asm.R1, asm.RFP, stackUID, asm.Word), asm.JEq.Imm(asm.R1, 0, "crowded"))
	c.user(p, "crowded")
	c.emit(asm.Mov.Imm(asm.R1, -1), asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, namespaces))
	c.here("crowded")
	c.lookup(p.namespaces, stackTask, "strange")
	c.emit(asm.Mov.Reg(asm.R9, asm.R0))
	c.here("seen")
	c.emit(
		asm.FnKtimeGetNs.Call(),
		asm.StoreMem(asm.R9, int16(unsafe.Offsetof(namespace{}.last)), asm.R0, asm.DWord),
	)

	c.claim(p)
	c.emit(
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R9, asm.R1, asm.DWord, int16(unsafe.Offsetof(namespace{}.live))),
		asm.Ja.Label("allow"),
	)
	// Twice, and not with a question about R8 behind it: without CAP_PERFMON the verifier
	// of 6.1 also follows the processor where it guesses wrong, with R9 being no address.
	c.here("claim")
	c.claim(p)
	c.here("allow")
	c.exit(1)

	c.here("claimed")
	c.emit(
		asm.LoadMapPtr(asm.R1, p.tuples),
		asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, int32(offKey)),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "full"),
		asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
	)
	c.count(p.shared, unsafe.Offsetof(shared{}.ambiguous), 1)
	c.exit(1)
	c.here("full")
	c.count(p.shared, unsafe.Offsetof(shared{}.full), 1)
	c.exit(1)
	c.here("strange")
	c.count(p.shared, unsafe.Offsetof(shared{}.namespaces), 1)
	c.exit(1)

	c.here("established")
	c.emit(asm.JEq.Imm(asm.R8, 0, "allow"))
	c.lookup(p.coverage, stackTask, "unknown")
	c.emit(
		asm.LoadMem(asm.R9, asm.R0, int16(unsafe.Offsetof(coverage{}.until)), asm.DWord),
		asm.FnKtimeGetNs.Call(),
		asm.JGT.Reg(asm.R9, asm.R0, "allow"),
	)
	c.here("unknown")
	c.emit(asm.Mov.Reg(asm.R9, asm.R7)) // dueAgain uses up R7
	c.lookup(p.namespaces, stackTask, "allow")
	c.dueAgain(int16(unsafe.Offsetof(namespace{}.asked)), "allow")
	c.emit(asm.Mov.Reg(asm.R2, asm.R9))
	c.output(p)
	c.exit(1)
	return c.ins
}

// claim stores whose the tuple of the record at R7 is, and jumps to "claimed" if it is
// somebody's.
func (c *code) claim(p *plan) {
	c.emit(
		asm.LoadMapPtr(asm.R1, p.tuples),
		asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, int32(offKey)),
		asm.Mov.Reg(asm.R3, asm.R7),
		asm.Mov.Imm(asm.R4, updateNoExist), asm.FnMapUpdateElem.Call(),
		asm.JNE.Imm(asm.R0, 0, "claimed"),
	)
}

// markedLate takes the daemon's mark off a socket that got it after its connect, which
// deferred the SYN: too late to refuse, but the redirect then sees it. R8 is 0 in our own
// namespace, R7 the record.
func (c *code) markedLate(p *plan) {
	c.emit(
		asm.JNE.Imm(asm.R8, 0, "in order"),
		asm.LoadMem(asm.R1, asm.R6, opsSock, asm.DWord), asm.JEq.Imm(asm.R1, 0, "in order"),
		asm.LoadMem(asm.R1, asm.R1, sockMark, asm.Word),
		asm.JNE.Imm32(asm.R1, int32(p.mark), "in order"),
		asm.LoadMem(asm.R1, asm.R7, offPID, asm.Word), asm.JEq.Imm(asm.R1, int32(p.pid), "in order"),
		asm.LoadMem(asm.R2, asm.R7, offUID, asm.Word), asm.Add.Imm(asm.R2, 1),
	)
	c.setting(asm.R1, p.shared, unsafe.Offsetof(shared{}.markUser))
	c.emit(
		asm.JEq.Reg(asm.R2, asm.R1, "in order"),
		asm.LoadMem(asm.R9, asm.R7, offFlags, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R9), asm.And.Imm(asm.R1, flagMarked), asm.JNE.Imm(asm.R1, 0, "in order"), // connect said so
		asm.Or.Imm(asm.R9, flagMarked),
	)
	c.setting(asm.R1, p.shared, unsafe.Offsetof(shared{}.denyMarked))
	c.emit(
		asm.JEq.Imm(asm.R1, 0, "late"),
		asm.Or.Imm(asm.R9, flagRefused),
		asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, stackUser, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, solSocket), asm.Mov.Imm(asm.R3, soMark),
	)
	c.stack(asm.R4, stackUser)
	c.emit(asm.Mov.Imm(asm.R5, 4), asm.FnSetsockopt.Call())
	c.here("late")
	c.emit(asm.StoreMem(asm.R7, offFlags, asm.R9, asm.Word), asm.Mov.Reg(asm.R2, asm.R7))
	c.output(p)
	c.here("in order")
}

// known puts the cookie of the socket at stackKey and its record in R7, or jumps to
// "allow".
func (c *code) known(p *plan) {
	c.emit(
		asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetSocketCookie.Call(), asm.StoreMem(asm.RFP, stackKey, asm.R0, asm.DWord),
	)
	c.lookup(p.connectors, stackKey, "allow")
	c.emit(asm.Mov.Reg(asm.R7, asm.R0))
}

// release is the program of cgroup/sock_release.
func (p *plan) release() asm.Instructions {
	c := &code{}
	c.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, sockProtocol, asm.Word),
		asm.JEq.Imm(asm.R1, protoTCP, "tcp"),
	)
	c.exit(1)
	c.here("tcp")
	c.known(p)
	c.forget(p)
	c.here("allow")
	c.exit(1)
	return c.ins
}
