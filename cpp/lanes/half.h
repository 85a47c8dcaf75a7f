// 16-bit floats: F16 (IEEE binary16) and BF16, 16 lanes at a time and one at a time; nearest-even.
#pragma once
#include "lanes/lanes.h"

namespace ramgguf::RAMGGUF_ISA {

// The low 16 bits of every lane are an F16.
RAMGGUF_INLINE Lanes f16_to_f32(IntLanes h) {
#if defined(RAMGGUF_AVX512)
    return {{(FloatPart)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h.p[0]))}};
#else
    // Exponent and mantissa, read as those of a float, give the value times 2^-112 exactly, also
    // for denormals. Only infinity and NaN need the largest exponent instead.
    const IntLanes sign = (h & broadcast(0x8000)) << 16;
    const IntLanes magnitude = (h & broadcast(0x7fff)) << 13;
    const Lanes normal = from_bits(magnitude) * broadcast(0x1p112f);
    const Lanes special = from_bits(magnitude | broadcast(0x7f800000));
    const Mask is_special = magnitude > broadcast(0x0f7fffff);
    const Lanes value = select(is_special, special, normal);
    return from_bits(bits(value) | sign);
#endif
}

// Overflow gives infinity.
RAMGGUF_INLINE IntLanes f32_to_f16(Lanes x) {
#if defined(RAMGGUF_AVX512)
    return {{(IntPart)_mm512_cvtepu16_epi32(
        _mm512_cvtps_ph((__m512)x.p[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))}};
#elif defined(RAMGGUF_AVX2)
    return each_part<IntLanes>([&](int k) {
        return (IntPart)_mm256_cvtepu16_epi32(
            _mm256_cvtps_ph((__m256)x.p[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    });
#else
    const IntLanes sign = bits(x) & broadcast(INT32_MIN);
    const IntLanes magnitude = bits(x) ^ sign;
    // Normal: rebias the exponent and round 13 bits off, half to even.
    const IntLanes odd = (magnitude >> 13) & broadcast(1);
    const IntLanes normal = (magnitude - broadcast(0x37fff001) + odd) >> 13;
    // Denormal: adding 0.5 makes the float's last bit worth 2^-24.
    const IntLanes denormal = bits(from_bits(magnitude) + broadcast(0.5f)) - broadcast(0x3f000000);
    // 65520 and more: infinity; NaN stays one.
    const IntLanes nan = broadcast(0x7e00);
    const IntLanes large = select(magnitude > broadcast(0x7f800000), nan, broadcast(0x7c00));
    IntLanes h = select(broadcast(0x38800000) > magnitude, denormal, normal);
    h = select(magnitude > broadcast(0x477fefff), large, h);
    return h | ((sign >> 16) & broadcast(0x8000));
#endif
}

RAMGGUF_INLINE Lanes load_f16(const uint8_t* x) {
#if defined(RAMGGUF_AVX512)
    return {{(FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x))}};
#elif defined(RAMGGUF_AVX2)
    return each_part<Lanes>([&](int k) {
        return (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + 16 * k)));
    });
#else
    return f16_to_f32(load_u16(x));
#endif
}

// The nearest F16, as a float.
RAMGGUF_INLINE Lanes round_to_f16(Lanes x) {
#if defined(RAMGGUF_AVX512)
    return {{(FloatPart)_mm512_cvtph_ps(
        _mm512_cvtps_ph((__m512)x.p[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))}};
#elif defined(RAMGGUF_AVX2)
    return each_part<Lanes>([&](int k) {
        return (FloatPart)_mm256_cvtph_ps(
            _mm256_cvtps_ph((__m256)x.p[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    });
#else
    return f16_to_f32(f32_to_f16(x));
#endif
}

RAMGGUF_INLINE Lanes bf16_to_f32(IntLanes h) {
    return from_bits(h << 16);
}

// Overflow gives infinity; NaN stays one.
RAMGGUF_INLINE IntLanes f32_to_bf16(Lanes x) {
    const IntLanes b = bits(x);
    const IntLanes odd = (b >> 16) & broadcast(1);
    const IntLanes rounded = ((b + broadcast(0x7fff) + odd) >> 16) & broadcast(0xffff);
    const IntLanes quiet = ((b >> 16) & broadcast(0xffff)) | broadcast(64);
    return select((b & broadcast(INT32_MAX)) > broadcast(0x7f800000), quiet, rounded);
}

RAMGGUF_INLINE float f16_to_f32(uint16_t h) {
#if defined(RAMGGUF_AVX512) || defined(RAMGGUF_AVX2)
    return _cvtsh_ss(h);
#else
    return first(f16_to_f32(broadcast((int32_t)h)));
#endif
}

RAMGGUF_INLINE uint16_t f32_to_f16(float x) {
#if defined(RAMGGUF_AVX512) || defined(RAMGGUF_AVX2)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (uint16_t)f32_to_f16(broadcast(x)).p[0][0];
#endif
}

}  // namespace ramgguf::RAMGGUF_ISA
