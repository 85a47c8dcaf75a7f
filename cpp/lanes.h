// The one vector type of the project: 16 float lanes, whatever the machine's registers are.
//
// A Lanes is 1 x 64, 2 x 32 or 4 x 16 bytes of the compiler's vector type (GCC and Clang), so the
// same source runs on AVX-512, AVX2, SSE2 and NEON, and on anything else through the compiler.
// Intrinsics stand only where a machine has one instruction for what takes several operators.
//
// Same bits at every ISA level:
//  - no fused multiply-add (it is compiled with -ffp-contract=off, and none is written);
//  - min and max are `a < b ? a : b` and `a > b ? a : b`, as on x86, also for zeros and NaN;
//  - truncate gives INT32_MIN for what does not fit, as on x86;
//  - a reduction folds lane i with i+8, then i+4, then i+2, then i+1, lower lane on the left.
// The kernels set the rounding mode to nearest-even with denormals kept before they come here.
#pragma once
#include "lanes/choose.h"
#include "lanes/convert.h"
#include "lanes/reduce.h"
#include "lanes/tables.h"
#include "lanes/vector.h"
#include "lanes/wide_sums.h"
