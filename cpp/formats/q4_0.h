// Q4_0 (ggml id 2), 4.5 bpw: blocks of 32 weights.
//
//   x = d * (q - 8)        q in 0..15
//
//   byte  0    2                                                            18
//         | d  | qs: 16 bytes; byte l: weight l in bits 0..3, l+16 in 4..7  |
//         | F16|                                                            |
//
// Layout of ggml-common.h (block_q4_0). The encoder gives the bytes of ggml's
// quantize_row_q4_0_ref: d puts the weight of largest magnitude on code 0, and weights are rounded
// with the scale before it is rounded to F16.
#pragma once
#include "formats/shared/blocks32.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q4_0 {
    static constexpr int block_size = 32;
    static constexpr bool scalar_codes = true;
    static constexpr bool has_offset = false;

    struct Block {
        uint16_t d;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 18, "Q4_0 is 18 bytes per 32 weights");

    using Fit = Blocks32Fit;
    using Levels = IntegerLevels<-8, 7>;
    using Search = LinearBlockSearch<Q4_0>;
    static constexpr Grid plain_grid{8, -1.0f, 0.4f}, weighted_grid{12, -1.0f, 0.4f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        const Lanes d = first_extreme_of_blocks(x) * broadcast(-0.125f);
        fit.set_scale(d);
        fit.inverse.set(inverse_or_zero(d));
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        const Lanes code = x * fit.inverse.at(j / 2) + broadcast(8.5f);
        return min(to_float(truncate(code)), broadcast(15.0f));
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return (q - broadcast(8.0f)) * fit.scale.at(j / 2);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int b = 0; b < 8; ++b, out += sizeof(Block)) {
            write(out, (uint16_t)fit.d[b]);
            store_u8(out + 2, q[2 * b] | q[2 * b + 1] << 4);
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        unpack_scales32<Q4_0>(in, fit);
        for (int b = 0; b < 8; ++b, in += sizeof(Block)) {
            const IntLanes both = load_u8(in + 2);
            q[2 * b] = both & broadcast(15);
            q[2 * b + 1] = both >> 4;
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
