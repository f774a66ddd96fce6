#include "textflag.h"

// func spark() int
TEXT ·spark(SB),NOSPLIT,$0-8
	MOVQ	$0x4111, DI // CLONE_VM, CLONE_VFORK, SIGCHLD
	XORL	SI, SI
	XORL	DX, DX
	XORL	R10, R10
	XORL	R8, R8
	MOVL	$56, AX // clone
	SYSCALL
	TESTQ	AX, AX
	JNZ	parent
	XORL	DI, DI
	MOVL	$60, AX // exit
	SYSCALL
parent:
	MOVQ	AX, ret+0(FP)
	RET
