#include "textflag.h"

// func preloaded()
TEXT ·preloaded(SB),NOSPLIT|NOFRAME,$0
	LEAQ	·preloaded(SB), R12
	ADDQ	$512, R12 // struct wanted
	MOVL	$2, DI // AF_INET
	MOVL	$1, SI // SOCK_STREAM
	XORL	DX, DX
	MOVL	$41, AX // socket
	SYSCALL
	MOVQ	AX, BX
	MOVQ	BX, DI
	MOVQ	R12, SI
	MOVL	$16, DX
	MOVL	$42, AX // connect
	SYSCALL
	MOVQ	BX, DI
	LEAQ	24(R12), SI
	MOVQ	16(R12), DX
	MOVL	$1, AX // write
	SYSCALL
more:
	MOVQ	BX, DI
	LEAQ	4096(R12), SI
	MOVL	$4096, DX
	XORL	AX, AX // read
	SYSCALL
	TESTQ	AX, AX
	JLE	done
	MOVL	$1, DI
	LEAQ	4096(R12), SI
	MOVQ	AX, DX
	MOVL	$1, AX // write
	SYSCALL
	JMP	more
done:
	XORL	DI, DI
	MOVL	$231, AX // exit_group
	SYSCALL
	INT	$3

// func preloadedAt() uintptr
TEXT ·preloadedAt(SB),NOSPLIT,$0-8
	LEAQ	·preloaded(SB), AX
	MOVQ	AX, ret+0(FP)
	RET
