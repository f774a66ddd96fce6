#include "textflag.h"

// func exchangeShared(m unsafe.Pointer, size uintptr) int
TEXT ·exchangeShared(SB),NOSPLIT,$0-24
	MOVQ	m+0(FP), R12
	MOVQ	size+8(FP), R13
	MOVQ	$0x10004111, DI // CLONE_NEWUSER, CLONE_VM, CLONE_VFORK, SIGCHLD
	XORL	SI, SI
	XORL	DX, DX
	XORL	R10, R10
	XORL	R8, R8
	MOVL	$56, AX // clone
	SYSCALL
	TESTQ	AX, AX
	JNZ	parent
	MOVL	$35, DI // PR_SET_MM
	MOVL	$14, SI // PR_SET_MM_MAP
	MOVQ	R12, DX
	MOVQ	R13, R10
	XORL	R8, R8
	MOVL	$157, AX // prctl
	SYSCALL
	NEGQ	AX
	MOVQ	AX, DI
	MOVL	$231, AX // exit_group
	SYSCALL
parent:
	MOVQ	AX, ret+16(FP)
	RET
