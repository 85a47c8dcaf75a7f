// Comparing lanes, and choosing between them: masks, select, min, max.
#pragma once
#include "lanes/vector.h"

namespace ramgguf::RAMGGUF_ISA {

#ifdef RAMGGUF_AVX512
#define RAMGGUF_COMPARE(name, op, predicate)                                    \
    RAMGGUF_INLINE Mask name(Lanes a, Lanes b) {                                \
        return {_mm512_cmp_ps_mask((__m512)a.p[0], (__m512)b.p[0], predicate)}; \
    }
#else
#define RAMGGUF_COMPARE(name, op, predicate)                                        \
    RAMGGUF_INLINE Mask name(Lanes a, Lanes b) {                                    \
        return each_part<Mask>([&](int k) { return (IntPart)(a.p[k] op b.p[k]); }); \
    }
#endif
RAMGGUF_COMPARE(operator<, <, _CMP_LT_OQ)
RAMGGUF_COMPARE(operator<=, <=, _CMP_LE_OQ)
RAMGGUF_COMPARE(operator>, >, _CMP_GT_OQ)
RAMGGUF_COMPARE(operator>=, >=, _CMP_GE_OQ)
RAMGGUF_COMPARE(operator==, ==, _CMP_EQ_OQ)
#undef RAMGGUF_COMPARE

#ifdef RAMGGUF_AVX512

RAMGGUF_INLINE Mask operator>(IntLanes a, IntLanes b) {
    return {_mm512_cmpgt_epi32_mask((__m512i)a.p[0], (__m512i)b.p[0])};
}
RAMGGUF_INLINE Mask operator==(IntLanes a, IntLanes b) {
    return {_mm512_cmpeq_epi32_mask((__m512i)a.p[0], (__m512i)b.p[0])};
}
RAMGGUF_INLINE Mask operator&(Mask a, Mask b) {
    return {(__mmask16)(a.m & b.m)};
}
RAMGGUF_INLINE Mask operator|(Mask a, Mask b) {
    return {(__mmask16)(a.m | b.m)};
}
// Bit i of the result is lane i.
RAMGGUF_INLINE uint32_t to_bits(Mask a) {
    return a.m;
}
RAMGGUF_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
    return {{(FloatPart)_mm512_mask_blend_ps(m.m, (__m512)b.p[0], (__m512)a.p[0])}};
}
RAMGGUF_INLINE IntLanes select(Mask m, IntLanes a, IntLanes b) {
    return {{(IntPart)_mm512_mask_blend_epi32(m.m, (__m512i)b.p[0], (__m512i)a.p[0])}};
}

#else

RAMGGUF_INLINE Mask operator>(IntLanes a, IntLanes b) {
    return each_part<Mask>([&](int k) { return (IntPart)(a.p[k] > b.p[k]); });
}
RAMGGUF_INLINE Mask operator==(IntLanes a, IntLanes b) {
    return each_part<Mask>([&](int k) { return (IntPart)(a.p[k] == b.p[k]); });
}
RAMGGUF_INLINE Mask operator&(Mask a, Mask b) {
    return each_part<Mask>([&](int k) { return a.p[k] & b.p[k]; });
}
RAMGGUF_INLINE Mask operator|(Mask a, Mask b) {
    return each_part<Mask>([&](int k) { return a.p[k] | b.p[k]; });
}
// Bit i of the result is lane i.
RAMGGUF_INLINE uint32_t to_bits(Mask a) {
    uint32_t found = 0;
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) {
#if defined(RAMGGUF_AVX2)
        found |= (uint32_t)_mm256_movemask_ps((__m256)a.p[k]) << (k * kPartLanes);
#elif defined(__x86_64__)
        found |= (uint32_t)_mm_movemask_ps((__m128)a.p[k]) << (k * kPartLanes);
#else
        for (int i = 0; i < kPartLanes; ++i) {
            found |= (uint32_t)(a.p[k][i] & 1) << (k * kPartLanes + i);
        }
#endif
    }
    return found;
}
#if defined(RAMGGUF_AVX2)
RAMGGUF_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
    return each_part<Lanes>([&](int k) {
        return (FloatPart)_mm256_blendv_ps((__m256)b.p[k], (__m256)a.p[k], (__m256)m.p[k]);
    });
}
RAMGGUF_INLINE IntLanes select(Mask m, IntLanes a, IntLanes b) {
    return bits(select(m, from_bits(a), from_bits(b)));
}
#else
RAMGGUF_INLINE IntLanes select(Mask m, IntLanes a, IntLanes b) {
    return each_part<IntLanes>([&](int k) { return (m.p[k] & a.p[k]) | (~m.p[k] & b.p[k]); });
}
RAMGGUF_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
    return from_bits(select(m, bits(a), bits(b)));
}
#endif

#endif

// The lanes i for which bit i is set.
RAMGGUF_INLINE Mask lanes_with_bit(uint32_t word) {
#if defined(RAMGGUF_AVX512)
    return {(__mmask16)word};
#else
    alignas(64) static const int32_t lane_bits[kLanes] = {
        1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
        1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const IntLanes mine = load(lane_bits);
    return (broadcast((int32_t)word) & mine) == mine;
#endif
}

RAMGGUF_INLINE bool any(Mask a) {
    return to_bits(a) != 0;
}

#if defined(RAMGGUF_AVX512)
RAMGGUF_INLINE Lanes min(Lanes a, Lanes b) {
    return {{(FloatPart)_mm512_min_ps((__m512)a.p[0], (__m512)b.p[0])}};
}
RAMGGUF_INLINE Lanes max(Lanes a, Lanes b) {
    return {{(FloatPart)_mm512_max_ps((__m512)a.p[0], (__m512)b.p[0])}};
}
RAMGGUF_INLINE IntLanes min(IntLanes a, IntLanes b) {
    return {{(IntPart)_mm512_min_epi32((__m512i)a.p[0], (__m512i)b.p[0])}};
}
RAMGGUF_INLINE IntLanes max(IntLanes a, IntLanes b) {
    return {{(IntPart)_mm512_max_epi32((__m512i)a.p[0], (__m512i)b.p[0])}};
}
#else
#if defined(RAMGGUF_AVX2)
RAMGGUF_INLINE FloatPart min_part(FloatPart a, FloatPart b) {
    return (FloatPart)_mm256_min_ps((__m256)a, (__m256)b);
}
RAMGGUF_INLINE FloatPart max_part(FloatPart a, FloatPart b) {
    return (FloatPart)_mm256_max_ps((__m256)a, (__m256)b);
}
#elif defined(__x86_64__)
RAMGGUF_INLINE FloatPart min_part(FloatPart a, FloatPart b) {
    return (FloatPart)_mm_min_ps((__m128)a, (__m128)b);
}
RAMGGUF_INLINE FloatPart max_part(FloatPart a, FloatPart b) {
    return (FloatPart)_mm_max_ps((__m128)a, (__m128)b);
}
#else
RAMGGUF_INLINE FloatPart min_part(FloatPart a, FloatPart b) {
    return a < b ? a : b;
}
RAMGGUF_INLINE FloatPart max_part(FloatPart a, FloatPart b) {
    return a > b ? a : b;
}
#endif
RAMGGUF_INLINE Lanes min(Lanes a, Lanes b) {
    return each_part<Lanes>([&](int k) { return min_part(a.p[k], b.p[k]); });
}
RAMGGUF_INLINE Lanes max(Lanes a, Lanes b) {
    return each_part<Lanes>([&](int k) { return max_part(a.p[k], b.p[k]); });
}
RAMGGUF_INLINE IntLanes min(IntLanes a, IntLanes b) {
    return select(b > a, a, b);
}
RAMGGUF_INLINE IntLanes max(IntLanes a, IntLanes b) {
    return select(a > b, a, b);
}
#endif

RAMGGUF_INLINE Lanes clamp(Lanes a, float low, float high) {
    return min(max(a, broadcast(low)), broadcast(high));
}

}  // namespace ramgguf::RAMGGUF_ISA
