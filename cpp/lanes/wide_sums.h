// Sums of float lanes in double.
#pragma once
#include "lanes/vector.h"

namespace ramgguf::RAMGGUF_ISA {

typedef double DoublePart __attribute__((vector_size(RAMGGUF_PART_BYTES)));
typedef float HalfPart __attribute__((vector_size(RAMGGUF_PART_BYTES / 2)));

// 16 doubles.
struct DoubleLanes {
    DoublePart p[2 * kParts];
};

// sums[i] += a[i]
RAMGGUF_INLINE void add_to(DoubleLanes& sums, Lanes a) {
#if defined(RAMGGUF_AVX512)
    const __m512 v = (__m512)a.p[0];
    sums.p[0] += (DoublePart)_mm512_cvtps_pd(_mm512_castps512_ps256(v));
    sums.p[1] += (DoublePart)_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(RAMGGUF_AVX2)
#pragma GCC unroll 2
    for (int k = 0; k < kParts; ++k) {
        const __m256 v = (__m256)a.p[k];
        sums.p[2 * k] += (DoublePart)_mm256_cvtps_pd(_mm256_castps256_ps128(v));
        sums.p[2 * k + 1] += (DoublePart)_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    }
#else
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) {
        HalfPart half[2];
        std::memcpy(half, &a.p[k], sizeof half);
        sums.p[2 * k] += __builtin_convertvector(half[0], DoublePart);
        sums.p[2 * k + 1] += __builtin_convertvector(half[1], DoublePart);
    }
#endif
}

RAMGGUF_INLINE void add_to(DoubleLanes& sums, int lane, double a) {
    constexpr int n = kPartLanes / 2;
    sums.p[lane / n][lane % n] += a;
}

// The sum of the lanes: i and i+8, then i and i+4, i+2, i+1.
inline double sum_of(const DoubleLanes& lanes) {
    double sums[kLanes];
    std::memcpy(sums, &lanes, sizeof sums);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
}

}  // namespace ramgguf::RAMGGUF_ISA
