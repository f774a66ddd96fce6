#include "textflag.h"

// func preloaded()
TEXT ·preloaded(SB),NOSPLIT|NOFRAME,$0
start:
	ADR	start, R19
	ADD	$512, R19 // struct wanted
	MOVD	$2, R0 // AF_INET
	MOVD	$1, R1 // SOCK_STREAM
	MOVD	$0, R2
	MOVD	$198, R8 // socket
	SVC
	MOVD	R0, R20
	MOVD	R19, R1
	MOVD	$16, R2
	MOVD	$203, R8 // connect
	SVC
	MOVD	R20, R0
	ADD	$24, R19, R1
	MOVD	16(R19), R2
	MOVD	$64, R8 // write
	SVC
	ADD	$4096, R19, R21
more:
	MOVD	R20, R0
	MOVD	R21, R1
	MOVD	$4096, R2
	MOVD	$63, R8 // read
	SVC
	CMP	$0, R0
	BLE	done
	MOVD	R0, R2
	MOVD	$1, R0
	MOVD	R21, R1
	MOVD	$64, R8 // write
	SVC
	B	more
done:
	MOVD	$0, R0
	MOVD	$94, R8 // exit_group
	SVC
	BRK

// func preloadedAt() uintptr
TEXT ·preloadedAt(SB),NOSPLIT,$0-8
	MOVD	$·preloaded(SB), R0
	MOVD	R0, ret+0(FP)
	RET
