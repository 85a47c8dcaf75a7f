// Q4_1 (ggml id 3), 5 bpw: blocks of 32 weights.
//
//   x = d * q + m        q in 0..15
//
//   byte  0    2    4                                                            20
//         | d  | m  | qs: 16 bytes; byte l: weight l in bits 0..3, l+16 in 4..7  |
//         | F16| F16|                                                            |
//
// Layout of ggml-common.h (block_q4_1). The encoder gives the bytes of ggml's
// quantize_row_q4_1_ref: the range of the block in 15 steps, and weights are rounded with the scale
// and minimum before they are rounded to F16.
#pragma once
#include "formats/shared/blocks32.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q4_1 {
    static constexpr int block_size = 32;
    static constexpr bool scalar_codes = true;
    static constexpr bool has_offset = true;

    struct Block {
        uint16_t d, m;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 20, "Q4_1 is 20 bytes per 32 weights");

    using Fit = Blocks32Fit;
    using Search = AffineBlockSearch<Q4_1, 15>;
    static constexpr Grid plain_grid{10, -1.0f, 0.2f}, weighted_grid{20, -3.0f, 0.3f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        const Lanes ranges = ranges_of_blocks32(x), other = exchange<8>(ranges);
        const Lanes high = lower_halves(ranges, ranges);
        const Lanes low = first_zeros_of_blocks(x, -lower_halves(other, other));
        // + 0: zeros of both signs may differ by -0, which ggml never has.
        const Lanes d = (high - low + broadcast(0.0f)) / broadcast(15.0f);
        fit.set_scale(d);
        fit.set_offset(low);
        fit.inverse.set(inverse_or_zero(d));
        fit.low.set(low);
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        const Lanes code = (x - fit.low.at(j / 2)) * fit.inverse.at(j / 2) + broadcast(0.5f);
        return min(to_float(truncate(code)), broadcast(15.0f));
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return q * fit.scale.at(j / 2) + fit.offset.at(j / 2);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int b = 0; b < 8; ++b, out += sizeof(Block)) {
            write(out, (uint16_t)fit.d[b]);
            write(out + 2, (uint16_t)fit.m[b]);
            store_u8(out + 4, q[2 * b] | q[2 * b + 1] << 4);
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        unpack_scales32<Q4_1>(in, fit);
        for (int b = 0; b < 8; ++b, in += sizeof(Block)) {
            const IntLanes both = load_u8(in + 4);
            q[2 * b] = both & broadcast(15);
            q[2 * b + 1] = both >> 4;
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
