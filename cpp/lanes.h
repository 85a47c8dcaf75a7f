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
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// GCC 12 takes its own "undefined" vectors for a mistake of ours (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define RAMGGUF_AVX512 1
#define RAMGGUF_PART_BYTES 64
#elif defined(__AVX2__) && defined(__F16C__)
#define RAMGGUF_AVX2 1
#define RAMGGUF_PART_BYTES 32
#else
#define RAMGGUF_PART_BYTES 16
#endif

#define RAMGGUF_INLINE inline __attribute__((always_inline))

// Lanes of two parts in an order known at compile time.
#if defined(__clang__)
#define RAMGGUF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RAMGGUF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntPart{__VA_ARGS__})
#endif

namespace ramgguf::RAMGGUF_ISA {

typedef float FloatPart __attribute__((vector_size(RAMGGUF_PART_BYTES)));
typedef int32_t IntPart __attribute__((vector_size(RAMGGUF_PART_BYTES)));
typedef float LooseFloatPart
    __attribute__((vector_size(RAMGGUF_PART_BYTES), aligned(1), may_alias));
typedef int32_t LooseIntPart
    __attribute__((vector_size(RAMGGUF_PART_BYTES), aligned(1), may_alias));

constexpr int kLanes = 16;
constexpr int kParts = 64 / RAMGGUF_PART_BYTES;
constexpr int kPartLanes = kLanes / kParts;

struct Lanes {
    FloatPart p[kParts];
};

struct IntLanes {
    IntPart p[kParts];
};

#ifdef RAMGGUF_AVX512
struct Mask {
    __mmask16 m;
};
#else
struct Mask {
    IntPart p[kParts];  // 0 or -1
};
#endif

// A value of type T from its parts, written without a loop so that they stay in registers.
template <class T, class F>
RAMGGUF_INLINE T each_part(F part) {
    if constexpr (kParts == 1) {
        return T{{part(0)}};
    } else if constexpr (kParts == 2) {
        return T{{part(0), part(1)}};
    } else {
        return T{{part(0), part(1), part(2), part(3)}};
    }
}

// --- loading, storing, casting ---

// Of any alignment. Part by part: a memcpy of all 64 bytes would go through the stack.
RAMGGUF_INLINE Lanes load(const float* x) {
    return each_part<Lanes>([&](int k) { return *(const LooseFloatPart*)(x + kPartLanes * k); });
}

RAMGGUF_INLINE IntLanes load(const int32_t* x) {
    return each_part<IntLanes>([&](int k) { return *(const LooseIntPart*)(x + kPartLanes * k); });
}

RAMGGUF_INLINE void store(float* x, Lanes v) {
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) *(LooseFloatPart*)(x + kPartLanes * k) = v.p[k];
}

RAMGGUF_INLINE void store(int32_t* x, IntLanes v) {
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) *(LooseIntPart*)(x + kPartLanes * k) = v.p[k];
}

RAMGGUF_INLINE Lanes broadcast(float x) {
    return each_part<Lanes>([&](int) { return x - FloatPart{}; });
}

RAMGGUF_INLINE IntLanes broadcast(int32_t x) {
    return each_part<IntLanes>([&](int) { return x - IntPart{}; });
}

RAMGGUF_INLINE IntLanes bits(Lanes a) {
    return each_part<IntLanes>([&](int k) { return (IntPart)a.p[k]; });
}

RAMGGUF_INLINE Lanes from_bits(IntLanes a) {
    return each_part<Lanes>([&](int k) { return (FloatPart)a.p[k]; });
}

RAMGGUF_INLINE float first(Lanes a) {
    return a.p[0][0];
}

// --- arithmetic ---

#define RAMGGUF_OPERATOR(Type, op)                                       \
    RAMGGUF_INLINE Type operator op(Type a, Type b) {                    \
        return each_part<Type>([&](int k) { return a.p[k] op b.p[k]; }); \
    }
RAMGGUF_OPERATOR(Lanes, +)
RAMGGUF_OPERATOR(Lanes, -)
RAMGGUF_OPERATOR(Lanes, *)
RAMGGUF_OPERATOR(Lanes, /)
RAMGGUF_OPERATOR(IntLanes, +)
RAMGGUF_OPERATOR(IntLanes, -)
RAMGGUF_OPERATOR(IntLanes, &)
RAMGGUF_OPERATOR(IntLanes, |)
RAMGGUF_OPERATOR(IntLanes, ^)
#undef RAMGGUF_OPERATOR

RAMGGUF_INLINE IntLanes operator<<(IntLanes a, int n) {
    return each_part<IntLanes>([&](int k) { return a.p[k] << n; });
}

// Copies of the sign bit come in from the left.
RAMGGUF_INLINE IntLanes operator>>(IntLanes a, int n) {
    return each_part<IntLanes>([&](int k) { return a.p[k] >> n; });
}

RAMGGUF_INLINE Lanes operator-(Lanes a) {
    return from_bits(bits(a) ^ broadcast(INT32_MIN));
}

RAMGGUF_INLINE Lanes abs(Lanes a) {
    return from_bits(bits(a) & broadcast(INT32_MAX));
}

// |magnitude| with the sign of `sign`.
RAMGGUF_INLINE Lanes copy_sign(Lanes magnitude, Lanes sign) {
    return from_bits((bits(magnitude) & broadcast(INT32_MAX)) |
                     (bits(sign) & broadcast(INT32_MIN)));
}

// --- comparing and choosing ---

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
    // The float below 0.5: with 0.5 itself 0.49999997 would become 1.
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
    const IntLanes same = (a << 16) >> 16;  // in the range of the saturating instruction
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

// --- reductions ---

struct Add {
    RAMGGUF_INLINE Lanes operator()(Lanes a, Lanes b) const { return a + b; }
};
struct Min {
    RAMGGUF_INLINE Lanes operator()(Lanes a, Lanes b) const { return min(a, b); }
};
struct Max {
    RAMGGUF_INLINE Lanes operator()(Lanes a, Lanes b) const { return max(a, b); }
};

// What an operation on Lanes does to single parts.
template <class Op>
RAMGGUF_INLINE FloatPart on_part(Op op, FloatPart a, FloatPart b) {
    Lanes x{}, y{};
    x.p[0] = a;
    y.p[0] = b;
    return op(x, y).p[0];
}

// 4 x 4 lanes in every 16 bytes: lane 4c+i of the result is the reduction of lanes 4c..4c+3 of v_i.
template <class Op>
RAMGGUF_INLINE FloatPart reduce_quads(Op op, FloatPart v0, FloatPart v1, FloatPart v2,
                                      FloatPart v3) {
#if RAMGGUF_PART_BYTES == 64
#define RAMGGUF_QUADS(a, b, i, j, k, l)                                                     \
    RAMGGUF_SHUFFLE(a, b, i, j, 16 + k, 16 + l, 4 + i, 4 + j, 20 + k, 20 + l, 8 + i, 8 + j, \
                    24 + k, 24 + l, 12 + i, 12 + j, 28 + k, 28 + l)
#elif RAMGGUF_PART_BYTES == 32
#define RAMGGUF_QUADS(a, b, i, j, k, l) \
    RAMGGUF_SHUFFLE(a, b, i, j, 8 + k, 8 + l, 4 + i, 4 + j, 12 + k, 12 + l)
#else
#define RAMGGUF_QUADS(a, b, i, j, k, l) RAMGGUF_SHUFFLE(a, b, i, j, 4 + k, 4 + l)
#endif
    const FloatPart x =
        on_part(op, RAMGGUF_QUADS(v0, v1, 0, 1, 0, 1), RAMGGUF_QUADS(v0, v1, 2, 3, 2, 3));
    const FloatPart y =
        on_part(op, RAMGGUF_QUADS(v2, v3, 0, 1, 0, 1), RAMGGUF_QUADS(v2, v3, 2, 3, 2, 3));
    return on_part(op, RAMGGUF_QUADS(x, y, 0, 2, 0, 2), RAMGGUF_QUADS(x, y, 1, 3, 1, 3));
}

// Lane j of the result is the reduction of all lanes of v[j]: 16 reductions for the price of four,
// because their shuffles are shared. Equal entries of v cost nothing (the compiler sees them).
template <class Op>
RAMGGUF_INLINE Lanes reduce_each(Op op, const Lanes (&v)[kLanes]) {
#if RAMGGUF_PART_BYTES == 64
    FloatPart quarter[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        FloatPart half[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            const FloatPart a = v[j + 8 * k].p[0], b = v[j + 8 * k + 4].p[0];
            half[k] = on_part(
                op, RAMGGUF_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                RAMGGUF_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                31));
        }
        quarter[j] = on_part(op,
                             RAMGGUF_SHUFFLE(half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18,
                                             19, 24, 25, 26, 27),
                             RAMGGUF_SHUFFLE(half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21,
                                             22, 23, 28, 29, 30, 31));
    }
    return {{reduce_quads(op, quarter[0], quarter[1], quarter[2], quarter[3])}};
#elif RAMGGUF_PART_BYTES == 32
    return each_part<Lanes>([&](int part) {
        FloatPart quarter[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Lanes &a = v[8 * part + j], &b = v[8 * part + j + 4];
            const FloatPart x = on_part(op, a.p[0], a.p[1]), y = on_part(op, b.p[0], b.p[1]);
            quarter[j] = on_part(op, RAMGGUF_SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11),
                                 RAMGGUF_SHUFFLE(x, y, 4, 5, 6, 7, 12, 13, 14, 15));
        }
        return reduce_quads(op, quarter[0], quarter[1], quarter[2], quarter[3]);
    });
#else
    return each_part<Lanes>([&](int part) {
        FloatPart quarter[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Lanes& a = v[4 * part + j];
            quarter[j] = on_part(op, on_part(op, a.p[0], a.p[2]), on_part(op, a.p[1], a.p[3]));
        }
        return reduce_quads(op, quarter[0], quarter[1], quarter[2], quarter[3]);
    });
#endif
}

// Lanes with i and i ^ distance exchanged.
template <int distance>
RAMGGUF_INLINE Lanes exchange(Lanes a) {
    if constexpr (distance >= kPartLanes) {
        return each_part<Lanes>([&](int k) { return a.p[k ^ (distance / kPartLanes)]; });
    } else {
        constexpr int d = distance;
        return each_part<Lanes>([&](int k) {
#if RAMGGUF_PART_BYTES == 64
            return RAMGGUF_SHUFFLE(a.p[k], a.p[k], 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d,
                                   7 ^ d, 8 ^ d, 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d,
                                   15 ^ d);
#elif RAMGGUF_PART_BYTES == 32
            return RAMGGUF_SHUFFLE(a.p[k], a.p[k], 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d,
                                   7 ^ d);
#else
            return RAMGGUF_SHUFFLE(a.p[k], a.p[k], 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d);
#endif
        });
    }
}

// Lane j of the result is the lane of v[j] of largest magnitude; of a and -a, the negative one
// (zeros: of either sign, which depends on the level).
RAMGGUF_INLINE Lanes extreme_of_each(const Lanes (&v)[kLanes]) {
#if defined(RAMGGUF_AVX512)
    // As unsigned integers with the sign as their last bit: one tree instead of two.
    Lanes keys[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
        keys[j].p[0] = (FloatPart)_mm512_rol_epi32((__m512i)v[j].p[0], 1);
    }
    const auto larger = [](Lanes a, Lanes b) __attribute__((always_inline)) {
        return Lanes{{(FloatPart)_mm512_max_epu32((__m512i)a.p[0], (__m512i)b.p[0])}};
    };
    const Lanes found = reduce_each(larger, keys);
    return {{(FloatPart)_mm512_ror_epi32((__m512i)found.p[0], 1)}};
#else
    const Lanes low = reduce_each(Min{}, v), high = reduce_each(Max{}, v);
    return select(high > -low, high, low);
#endif
}

// Lanes 0..7 of a, then lanes 0..7 of b.
RAMGGUF_INLINE Lanes lower_halves(Lanes a, Lanes b) {
#if RAMGGUF_PART_BYTES == 64
    return {
        {RAMGGUF_SHUFFLE(a.p[0], b.p[0], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)}};
#else
    return each_part<Lanes>([&](int k) { return k < kParts / 2 ? a.p[k] : b.p[k - kParts / 2]; });
#endif
}

// Every lane holds the reduction of all lanes of a (with zeros of either sign: lane 0 counts).
template <class Op>
RAMGGUF_INLINE Lanes reduce_all(Op op, Lanes a) {
    a = op(a, exchange<8>(a));
    a = op(a, exchange<4>(a));
    a = op(a, exchange<2>(a));
    return op(a, exchange<1>(a));
}

RAMGGUF_INLINE float sum_of(Lanes a) {
    return first(reduce_all(Add{}, a));
}
RAMGGUF_INLINE float min_of(Lanes a) {
    return first(reduce_all(Min{}, a));
}
RAMGGUF_INLINE float max_of(Lanes a) {
    return first(reduce_all(Max{}, a));
}

// --- looking up ---

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

// --- sums in double ---

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
