// The one SIMD layer of the project: vectors of 16 float lanes, whatever the machine's registers.
//
// A Lanes is 1 x 64, 2 x 32 or 4 x 16 bytes of the compiler's vector type (GCC and Clang), so the
// same source runs on AVX-512, AVX2, SSE2, NEON and any other machine the compiler supports.
// Intrinsics stand only where a machine has one instruction for several operators.
//
// Same bits at every ISA level:
//  - no fused multiply-add: compiled with -ffp-contract=off, and none is written;
//  - min and max are `a < b ? a : b` and `a > b ? a : b`, as on x86, also for zeros and NaN;
//  - truncate gives INT32_MIN for NaN and for numbers out of range, as on x86;
//  - a reduction folds lane i with i+8, then i+4, then i+2, then i+1, lower lane on the left.
// Callers hold a FloatMode (float_mode.h): rounding to nearest-even, denormals kept.
#pragma once
#include "lanes/choose.h"
#include "lanes/convert.h"
#include "lanes/exp.h"
#include "lanes/reduce.h"
#include "lanes/tables.h"
#include "lanes/vector.h"
#include "lanes/wide_sums.h"
