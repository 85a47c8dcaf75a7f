// The types Lanes, IntLanes and Mask; loading, storing, casting, arithmetic.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// GCC 12 warns of the "undefined" vectors in its own header (GCC bug 105593).
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

// Picks lanes of two parts, in an order known at compile time.
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

// From any alignment. Part by part: a memcpy of all 64 bytes goes through the stack.
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

// Arithmetic shift: the sign bit is repeated.
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

}  // namespace ramgguf::RAMGGUF_ISA
