#include "textflag.h"

// func exchangeShared(m unsafe.Pointer, size uintptr) int
TEXT ·exchangeShared(SB),NOSPLIT,$0-24
	MOVD	m+0(FP), R19
	MOVD	size+8(FP), R20
	MOVD	$0x10004111, R0 // CLONE_NEWUSER, CLONE_VM, CLONE_VFORK, SIGCHLD
	MOVD	ZR, R1
	MOVD	ZR, R2
	MOVD	ZR, R3
	MOVD	ZR, R4
	MOVD	$220, R8 // clone
	SVC
	CBNZ	R0, parent
	MOVD	$35, R0 // PR_SET_MM
	MOVD	$14, R1 // PR_SET_MM_MAP
	MOVD	R19, R2
	MOVD	R20, R3
	MOVD	ZR, R4
	MOVD	$167, R8 // prctl
	SVC
	NEG	R0, R0
	MOVD	$94, R8 // exit_group
	SVC
parent:
	MOVD	R0, ret+16(FP)
	RET
