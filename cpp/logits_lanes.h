// Sixteen floats and what the logits pass does with them. The compiler's vector types are used at
// the width of the ISA level, so every level computes the same sixteen lanes in the same order:
// the same numbers to the last bit. Included by per-level objects only.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace ramgguf::RAMGGUF_ISA {

#if defined(__AVX512F__)
constexpr size_t kWidth = 16;
#elif defined(__AVX__)
constexpr size_t kWidth = 8;
#else
constexpr size_t kWidth = 4;
#endif
constexpr size_t kLanes = 16;
constexpr size_t kGroup =
    4 * kLanes;  // logits that are added up in float before they go to the double sums
constexpr size_t kParts = kLanes / kWidth;

typedef float NativeF __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t NativeI __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t NativeU __attribute__((vector_size(kWidth * sizeof(float))));
typedef float HalfF __attribute__((vector_size(kWidth * sizeof(float) / 2)));
typedef double HalfD __attribute__((vector_size(kWidth * sizeof(float))));

#define RAMGGUF_INLINE static inline __attribute__((always_inline))

// Part `part` of the sixteen floats at p + 16 k.
RAMGGUF_INLINE NativeF load(const float* p, size_t k, size_t part) {
    NativeF x;
    memcpy(&x, p + k * kLanes + part * kWidth, sizeof x);
    return x;
}

// Sixteen double sums, one per lane, added up in one fixed order.
struct Sums {
    HalfD low[kParts] = {};
    HalfD high[kParts] = {};

    inline __attribute__((always_inline)) void add(size_t part, NativeF x) {
        HalfF halves[2];
        memcpy(halves, &x, sizeof x);
        low[part] += __builtin_convertvector(halves[0], HalfD);
        high[part] += __builtin_convertvector(halves[1], HalfD);
    }

    double total() const {
        double lane[kLanes];
        for (size_t part = 0; part < kParts; ++part) {
            memcpy(lane + part * kWidth, &low[part], sizeof low[part]);
            memcpy(lane + part * kWidth + kWidth / 2, &high[part], sizeof high[part]);
        }
        for (size_t step = kLanes / 2; step > 0; step /= 2) {
            for (size_t i = 0; i < step; ++i) lane[i] += lane[i + step];
        }
        return lane[0];
    }
};

// e^x for x <= 0, below 2 ulp; 0 below -87 (and for -inf), NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite: n * kLn2High is exact), then
// e^r = 1 + r + r^2 q(r) with q a fit of degree 4 whose relative error is below 4e-9, then n is
// added to the exponent's bits.
RAMGGUF_INLINE NativeF exp_nonpositive(NativeF x) {
    constexpr float kLog2E = 1.44269504f;
    constexpr float kRound =
        12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    constexpr float kLn2High = 0.693359375f;
    constexpr float kLn2Low = -2.12194440e-4f;
    const NativeF shifted = x * kLog2E + kRound;
    const NativeF n = shifted - kRound;
    const NativeF r = (x - n * kLn2High) - n * kLn2Low;
    NativeF q = 1.3814539e-3f * r + 8.368745e-3f;
    q = q * r + 4.166839e-2f;
    q = q * r + 1.6666521e-1f;
    q = q * r + 4.9999994e-1f;
    const NativeF e = (q * (r * r) + r) + 1.0f;
    NativeU bits, exponent;  // unsigned: far below -87 they wrap, and are not used
    memcpy(&bits, &e, sizeof e);
    memcpy(&exponent, &shifted, sizeof shifted);
    bits += exponent << 23;
    NativeF scaled;
    memcpy(&scaled, &bits, sizeof bits);
    const NativeF zero = {};
    return x < -87.0f ? zero : scaled;
}

}  // namespace ramgguf::RAMGGUF_ISA
