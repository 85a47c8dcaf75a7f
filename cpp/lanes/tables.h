// Looking up in small tables.
#pragma once
#include "lanes/vector.h"

namespace ramgguf::RAMGGUF_ISA {

// table[index[i]] in lane i; indices 0..15.
RAMGGUF_INLINE Lanes look_up(const float (&table)[16], IntLanes index) {
#if defined(RAMGGUF_AVX512)
    return {{(FloatPart)_mm512_permutexvar_ps((__m512i)index.p[0], _mm512_loadu_ps(table))}};
#elif defined(RAMGGUF_AVX2)
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    return each_part<Lanes>([&](int k) {
        const __m256i i = (__m256i)index.p[k];
        return (FloatPart)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i),
                                           _mm256_permutevar8x32_ps(high, i),
                                           _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    });
#else
    int32_t i[kLanes];
    store(i, index);
    float found[kLanes];
    for (int k = 0; k < kLanes; ++k) found[k] = table[i[k]];
    return load(found);
#endif
}

// table[index[i]] in lane i; indices 0..31.
RAMGGUF_INLINE Lanes look_up(const float (&table)[32], IntLanes index) {
#if defined(RAMGGUF_AVX512)
    return {{(FloatPart)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index.p[0],
                                               _mm512_loadu_ps(table + 16))}};
#elif defined(RAMGGUF_AVX2)
    return each_part<Lanes>([&](int k) {
        const __m256i i = (__m256i)index.p[k];
        const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
        const __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 27));
        __m256 found[4];
        for (int part = 0; part < 4; ++part) {
            found[part] = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8 * part), i);
        }
        return (FloatPart)_mm256_blendv_ps(_mm256_blendv_ps(found[0], found[1], bit3),
                                           _mm256_blendv_ps(found[2], found[3], bit3), bit4);
    });
#else
    int32_t i[kLanes];
    store(i, index);
    float found[kLanes];
    for (int k = 0; k < kLanes; ++k) found[k] = table[i[k]];
    return load(found);
#endif
}

// table[index[i]] in lane i.
RAMGGUF_INLINE IntLanes gather(const uint32_t* table, IntLanes index) {
#if defined(RAMGGUF_AVX512)
    return {{(IntPart)_mm512_i32gather_epi32((__m512i)index.p[0], table, 4)}};
#elif defined(RAMGGUF_AVX2)
    return each_part<IntLanes>([&](int k) {
        return (IntPart)_mm256_i32gather_epi32((const int*)table, (__m256i)index.p[k], 4);
    });
#else
    int32_t i[kLanes];
    store(i, index);
    for (int k = 0; k < kLanes; ++k) i[k] = (int32_t)table[i[k]];
    return load(i);
#endif
}

}  // namespace ramgguf::RAMGGUF_ISA
