// e^x for x <= 0.
#pragma once
#include "lanes/vector.h"

namespace ramgguf::RAMGGUF_ISA {

// Below 2 ulp of error; 0 below -87 (and for -inf), NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite: n * kLn2High is exact). Then
// e^r = 1 + r + r^2 q(r), where q is a fit of degree 4 with a relative error below 4e-9, and n is
// added to the exponent's bits.
//
// Each part is computed to its end before the next one: its values then stay in registers.
RAMGGUF_INLINE Lanes exp_nonpositive(Lanes a) {
    constexpr float kLog2E = 1.44269504f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum has the integer in its low bits
    constexpr float kLn2High = 0.693359375f;
    constexpr float kLn2Low = -2.12194440e-4f;
    typedef uint32_t Word __attribute__((vector_size(RAMGGUF_PART_BYTES)));
    return each_part<Lanes>([&](int k) __attribute__((always_inline)) {
        const FloatPart x = a.p[k];
        const FloatPart shifted = x * kLog2E + kRound;
        const FloatPart n = shifted - kRound;
        const FloatPart r = (x - n * kLn2High) - n * kLn2Low;
        FloatPart q = 1.3814539e-3f * r + 8.368745e-3f;
        q = q * r + 4.166839e-2f;
        q = q * r + 1.6666521e-1f;
        q = q * r + 4.9999994e-1f;
        const FloatPart e = (q * (r * r) + r) + 1.0f;
        // Unsigned: far below -87 the sum wraps, and is not used.
        const FloatPart scaled = (FloatPart)((Word)e + ((Word)shifted << 23));
        return x < -87.0f ? FloatPart{} : scaled;
    });
}

}  // namespace ramgguf::RAMGGUF_ISA
