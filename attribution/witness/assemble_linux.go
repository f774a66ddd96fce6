package witness

import (
	"fmt"

	"github.com/cilium/ebpf/asm"
)

// code collects the instructions of one program. Its methods that emit several say
// which registers they use up; R6 to R9 survive calls of helpers, R0 to R5 do not.
type code struct {
	ins   asm.Instructions
	label string // of the instruction that comes next
	n     int
}

func (c *code) emit(ins ...asm.Instruction) {
	if c.label != "" {
		ins[0] = ins[0].WithSymbol(c.label)
		c.label = ""
	}
	c.ins = append(c.ins, ins...)
}

// here names the next instruction.
func (c *code) here(label string) {
	if c.label != "" {
		c.emit(asm.Ja.Label(label)) // an instruction has one name
	}
	c.label = label
}

// fresh makes up a label that no other part of the program has.
func (c *code) fresh(name string) string {
	c.n++
	return fmt.Sprintf("%s_%d", name, c.n)
}

// stack puts the address of a place on the stack into a register.
func (c *code) stack(reg asm.Register, offset int16) {
	c.emit(asm.Mov.Reg(reg, asm.RFP), asm.Add.Imm(reg, int32(offset)))
}

// clear stores zeros from offset on. Also the padding: without CAP_PERFMON the
// verifier lets no byte of the stack be read that was not written.
func (c *code) clear(offset int16, size uintptr) {
	for i := int16(0); i < int16(size); i += 4 {
		c.emit(asm.StoreImm(asm.RFP, offset+i, 0, asm.Word)) // the package has none for a double word
	}
}

// lookup leaves in R0 the address of the value for the key at this place of the
// stack, and jumps if there is none.
func (c *code) lookup(fd int, key int16, missing string) {
	c.emit(asm.LoadMapPtr(asm.R1, fd))
	c.stack(asm.R2, key)
	c.emit(asm.FnMapLookupElem.Call(), asm.JEq.Imm(asm.R0, 0, missing))
}

// update leaves in R0 what bpf_map_update_elem answers.
func (c *code) update(fd int, key, value int16, flags int32) {
	c.emit(asm.LoadMapPtr(asm.R1, fd))
	c.stack(asm.R2, key)
	c.stack(asm.R3, value)
	c.emit(asm.Mov.Imm(asm.R4, flags), asm.FnMapUpdateElem.Call())
}

// remove leaves in R0 what bpf_map_delete_elem answers.
func (c *code) remove(fd int, key int16) {
	c.emit(asm.LoadMapPtr(asm.R1, fd))
	c.stack(asm.R2, key)
	c.emit(asm.FnMapDeleteElem.Call())
}

// count adds to a field of shared. It uses up R1 and R2.
func (c *code) count(fd int, field uintptr, by int32) {
	c.emit(
		asm.LoadMapValue(asm.R1, fd, uint32(field)),
		asm.Mov.Imm(asm.R2, by),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),
	)
}

// setting loads a field of shared.
func (c *code) setting(reg asm.Register, fd int, field uintptr) {
	c.emit(asm.LoadMapValue(reg, fd, uint32(field)), asm.LoadMem(reg, reg, 0, asm.DWord))
}

// exit returns a constant.
func (c *code) exit(value int32) { c.emit(asm.Mov.Imm(asm.R0, value), asm.Return()) }
