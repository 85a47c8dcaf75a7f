// Lanes of floats from and to integers, bytes and 16-bit words.
#pragma once
#include "lanes/vector.h"

namespace ramgguf::RAMGGUF_ISA {

// --- float <-> integer ---

RAMGGUF_INLINE Lanes to_float(IntLanes a) {
    return each_part<Lanes>([&](int k) { return __builtin_convertvector(a.p[k], FloatPart); });
}

// Towards zero; INT32_MIN for NaN and for what does not fit.
RAMGGUF_INLINE IntLanes truncate(Lanes a) {
    return each_part<IntLanes>([&](int k) {
#if defined(RAMGGUF_AVX512)
        return (IntPart)_mm512_cvttps_epi32((__m512)a.p[k]);
#elif defined(RAMGGUF_AVX2)
        return (IntPart)_mm256_cvttps_epi32((__m256)a.p[k]);
#elif defined(__x86_64__)
        return (IntPart)_mm_cvttps_epi32((__m128)a.p[k]);
#else
        const FloatPart limit = 2147483648.0f - FloatPart{};
        const IntPart fits = (IntPart)(a.p[k] < limit) & (IntPart)(a.p[k] >= -limit);
        const FloatPart safe = (FloatPart)((IntPart)a.p[k] & fits);
        const IntPart lowest = INT32_MIN - IntPart{};
        return (IntPart)((__builtin_convertvector(safe, IntPart) & fits) | (lowest & ~fits));
#endif
    });
}

// To the nearest integer, ties to even; for |a| <= 2^22.
RAMGGUF_INLINE Lanes round_even(Lanes a) {
    const Lanes magic = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's last bit is worth 1
    return (a + magic) - magic;
}

// To the nearest integer, ties away from zero (C's roundf); INT32_MIN for what does not fit.
RAMGGUF_INLINE IntLanes round_away(Lanes a) {
    // The largest float below 0.5: adding 0.5 itself would round 0.49999997 up to 1.
    return truncate(a + copy_sign(broadcast(0.49999997f), a));
}

// --- bytes and 16-bit words ---

RAMGGUF_INLINE IntLanes load_u8(const uint8_t* x) {
#if defined(RAMGGUF_AVX512)
    return {{(IntPart)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x))}};
#elif defined(RAMGGUF_AVX2)
    return each_part<IntLanes>([&](int k) {
        return (IntPart)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(x + 8 * k)));
    });
#else
    int32_t wide[kLanes];
    for (int i = 0; i < kLanes; ++i) wide[i] = x[i];
    return load(wide);
#endif
}

RAMGGUF_INLINE IntLanes load_s8(const uint8_t* x) {
#if defined(RAMGGUF_AVX512)
    return {{(IntPart)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x))}};
#elif defined(RAMGGUF_AVX2)
    return each_part<IntLanes>([&](int k) {
        return (IntPart)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(x + 8 * k)));
    });
#else
    return (load_u8(x) << 24) >> 24;
#endif
}

RAMGGUF_INLINE IntLanes load_u16(const uint8_t* x) {
#if defined(RAMGGUF_AVX512)
    return {{(IntPart)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x))}};
#elif defined(RAMGGUF_AVX2)
    return each_part<IntLanes>([&](int k) {
        return (IntPart)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(x + 16 * k)));
    });
#else
    uint16_t narrow[kLanes];
    std::memcpy(narrow, x, sizeof narrow);
    int32_t wide[kLanes];
    for (int i = 0; i < kLanes; ++i) wide[i] = narrow[i];
    return load(wide);
#endif
}

// The low byte of every lane.
RAMGGUF_INLINE void store_u8(uint8_t* x, IntLanes a) {
#if defined(RAMGGUF_AVX512)
    _mm_storeu_si128((__m128i*)x, _mm512_cvtepi32_epi8((__m512i)a.p[0]));
#elif defined(RAMGGUF_AVX2)
    const IntLanes low = a & broadcast(0xff);
    const __m256i words = _mm256_packus_epi32((__m256i)low.p[0], (__m256i)low.p[1]);
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i*)x, _mm_packus_epi16(_mm256_castsi256_si128(in_order),
                                                   _mm256_extracti128_si256(in_order, 1)));
#elif defined(__x86_64__)
    const IntLanes low = a & broadcast(0xff);
    const __m128i words0 = _mm_packs_epi32((__m128i)low.p[0], (__m128i)low.p[1]);
    const __m128i words1 = _mm_packs_epi32((__m128i)low.p[2], (__m128i)low.p[3]);
    _mm_storeu_si128((__m128i*)x, _mm_packus_epi16(words0, words1));
#else
    int32_t wide[kLanes];
    store(wide, a);
    for (int i = 0; i < kLanes; ++i) x[i] = (uint8_t)wide[i];
#endif
}

// The low 16 bits of every lane.
RAMGGUF_INLINE void store_u16(uint8_t* x, IntLanes a) {
#if defined(RAMGGUF_AVX512)
    _mm256_storeu_si256((__m256i*)x, _mm512_cvtepi32_epi16((__m512i)a.p[0]));
#elif defined(RAMGGUF_AVX2)
    const IntLanes low = a & broadcast(0xffff);
    const __m256i words = _mm256_packus_epi32((__m256i)low.p[0], (__m256i)low.p[1]);
    _mm256_storeu_si256((__m256i*)x, _mm256_permute4x64_epi64(words, 0xd8));
#elif defined(__x86_64__)
    const IntLanes same = (a << 16) >> 16;  // sign-extended, so that nothing saturates
    for (int k = 0; k < 2; ++k) {
        _mm_storeu_si128((__m128i*)(x + 16 * k),
                         _mm_packs_epi32((__m128i)same.p[2 * k], (__m128i)same.p[2 * k + 1]));
    }
#else
    int32_t wide[kLanes];
    store(wide, a);
    uint16_t narrow[kLanes];
    for (int i = 0; i < kLanes; ++i) narrow[i] = (uint16_t)wide[i];
    std::memcpy(x, narrow, sizeof narrow);
#endif
}

}  // namespace ramgguf::RAMGGUF_ISA
