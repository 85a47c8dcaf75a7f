// Reductions: of one vector, and of sixteen at once.
#pragma once
#include "lanes/choose.h"

namespace ramgguf::RAMGGUF_ISA {

struct Add {
    RAMGGUF_INLINE Lanes operator()(Lanes a, Lanes b) const { return a + b; }
};
struct Min {
    RAMGGUF_INLINE Lanes operator()(Lanes a, Lanes b) const { return min(a, b); }
};
struct Max {
    RAMGGUF_INLINE Lanes operator()(Lanes a, Lanes b) const { return max(a, b); }
};

// Applies an operation on Lanes to single parts.
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
// because they share their shuffles. The compiler computes equal entries of v once.
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

// Lane j of the result is the lane of v[j] of largest magnitude; of a and -a, the negative one. The
// sign of a zero depends on the ISA level.
RAMGGUF_INLINE Lanes extreme_of_each(const Lanes (&v)[kLanes]) {
#if defined(RAMGGUF_AVX512)
    // Rotated by one bit, the sign is the last bit and an unsigned maximum compares magnitudes:
    // one tree instead of two.
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

// Every lane holds the reduction of all lanes of a. Lanes may differ in the sign of a zero: lane 0
// is the result.
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

}  // namespace ramgguf::RAMGGUF_ISA
