// MXFP4 (ggml id 39), 4.25 bpw: blocks of 32 weights, FP4 values (E2M1) with a power of two.
//
//   x = 2^(e - 128) * value[q]        e in 0..255, value in 0, 1, 2, 3, 4, 6, 8, 12 and negatives
//
//   byte  0    1                                                            17
//         | e  | qs: 16 bytes; byte l: weight l in bits 0..3, l+16 in 4..7  |
//
// Layout of ggml-common.h (block_mxfp4), the values twice those of the OCP Microscaling Formats
// specification 1.0, the scale half. RTN, as in the specification: the largest magnitude's power of
// two takes the largest value's (8); weights take the nearest value, ties the smaller one.
#pragma once
#include "formats/shared/least_squares.h"

namespace ramgguf::RAMGGUF_ISA {

alignas(64) static const
    float kFp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The nearest of the eight magnitudes, as its code.
RAMGGUF_INLINE Lanes nearest_fp4(Lanes magnitude) {
    const Lanes one = broadcast(1.0f), zero = broadcast(0.0f);
    Lanes code = zero;
    constexpr float midpoints[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 10.0f};
    for (const float midpoint : midpoints) {
        code = code + select(magnitude > broadcast(midpoint), one, zero);
    }
    return code;
}

// 2^(e - 128) for whole e in 0..255: those of e = 0 and 1 are denormal.
RAMGGUF_INLINE Lanes half_power(IntLanes e) {
    const IntLanes one = broadcast(1);
    const IntLanes denormal = select(e == broadcast(0), broadcast(0x200000), broadcast(0x400000));
    return from_bits(select(one + one > e, denormal, (e - one) << 23));
}

struct MXFP4 {
    static constexpr int block_size = 32;

    struct Block {
        uint8_t e;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 17, "MXFP4 is 17 bytes per 32 weights");

    struct Fit {
        PerBlock scale, inverse;
        int32_t e[kLanes];
        bool overflow;

        RAMGGUF_INLINE void set(IntLanes exponents) {
            store(e, exponents);
            scale.set(half_power(exponents));
            inverse.set(inverse_of(exponents));
            overflow = false;
        }

        // 2^(128 - e), but 2^127 for e = 0: only blocks of denormal floats have that exponent.
        static RAMGGUF_INLINE Lanes inverse_of(IntLanes exponents) {
            return from_bits((broadcast(255) - max(exponents, broadcast(1))) << 23);
        }
    };

    // RTN's exponents for blocks with these largest magnitudes.
    static RAMGGUF_INLINE IntLanes exponents_for(Lanes largest) {
        return max((bits(largest) >> 23) - broadcast(2), broadcast(0));
    }

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        const auto larger = [](Lanes a, Lanes b) { return max(abs(a), abs(b)); };
        fit.set(exponents_for(reduce_blocks<32>(larger, x)));
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        const Lanes zero = broadcast(0.0f);
        const Lanes code = nearest_fp4(abs(x) * fit.inverse.at(j / 2));
        return code + select((x < zero) & (code > zero), broadcast(8.0f), zero);
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return look_up(kFp4Values, truncate(q)) * fit.scale.at(j / 2);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int b = 0; b < 8; ++b, out += sizeof(Block)) {
            out[0] = (uint8_t)fit.e[b];
            store_u8(out + 1, q[2 * b] | q[2 * b + 1] << 4);
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        for (int b = 0; b < 8; ++b, in += sizeof(Block)) {
            fit.e[b] = fit.e[b + 8] = in[0];
            const IntLanes both = load_u8(in + 1);
            q[2 * b] = both & broadcast(15);
            q[2 * b + 1] = both >> 4;
        }
        fit.scale.set(half_power(load(fit.e)));
    }

    // The best of three exponents: RTN's, one more, one less.
    struct Search {
        static constexpr int kUnits = 2;

        template <bool weighted>
        __attribute__((noinline)) static void fit(const float* x, const float* importance,
                                                  int n_units, Fit* fits) {
            Tile<32, weighted> tile;
            load_tile<32, 1>(x, importance, n_units, tile);
            Lanes largest = broadcast(0.0f);
            for (int i = 0; i < 32; ++i) largest = max(largest, abs(tile.x[i]));
            const IntLanes middle = exponents_for(largest);
            IntLanes best = middle;
            Lanes least = broadcast(0x1p100f);
            constexpr int moves[3] = {0, 1, -1};
            for (const int move : moves) {
                const IntLanes e = max(middle + broadcast(move), broadcast(0));
                const Lanes error = error_under(tile, Fit::inverse_of(e));
                // In the units of the middle power.
                const Lanes comparable = error * broadcast(move == 0  ? 1.0f
                                                           : move > 0 ? 4.0f
                                                                      : 0.25f);
                const Mask better = comparable < least;
                least = select(better, comparable, least);
                best = select(better, e, best);
            }
            for (int unit = 0; unit < n_units; ++unit) {
                fits[unit].set(bits(lanes_of_unit(from_bits(best), unit)));
            }
        }

        static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
            return MXFP4::quantize(fit, x, j);
        }

      private:
        template <bool weighted>
        static RAMGGUF_INLINE Lanes error_under(const Tile<32, weighted>& tile,
                                                Lanes inverse_scale) {
            Lanes error = broadcast(0.0f);
            for (int i = 0; i < 32; ++i) {
                const Lanes t = abs(tile.x[i]) * inverse_scale;
                const Lanes off = t - look_up(kFp4Values, truncate(nearest_fp4(t)));
                error = error + tile.weigh(i, off) * off;
            }
            return error;
        }
    };
};

}  // namespace ramgguf::RAMGGUF_ISA
