// Q5_0 (ggml id 6), 5.5 bpw: blocks of 32 weights.
//
//   x = d * (q - 16)        q in 0..31
//
//   byte  0    2                       6                                           22
//         | d  | qh: 32 bits; bit l is | qs: 16 bytes; byte l: bits 0..3 of weight |
//         | F16| bit 4 of weight l     | l in bits 0..3, of l+16 in bits 4..7      |
//
// Layout of ggml-common.h (block_q5_0). The encoder gives the bytes of ggml's
// quantize_row_q5_0_ref: d puts the weight of largest magnitude on code 0, and weights are rounded
// with the scale before it is rounded to F16.
#pragma once
#include "formats/shared/blocks32.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q5_0 {
    static constexpr int block_size = 32;
    static constexpr bool scalar_codes = true;
    static constexpr bool has_offset = false;

    struct Block {
        uint16_t d;
        uint8_t qh[4];
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 22, "Q5_0 is 22 bytes per 32 weights");

    using Fit = Blocks32Fit;
    using Levels = IntegerLevels<-16, 15>;
    using Search = LinearBlockSearch<Q5_0>;
    static constexpr Grid plain_grid{8, -2.0f, 0.4f}, weighted_grid{16, -5.0f, 0.6f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        const Lanes d = first_extreme_of_blocks(x) * broadcast(-0.0625f);
        fit.set_scale(d);
        fit.inverse.set(inverse_or_zero(d));
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        const Lanes code = x * fit.inverse.at(j / 2) + broadcast(16.5f);
        return min(to_float(truncate(code)), broadcast(31.0f));
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return (q - broadcast(16.0f)) * fit.scale.at(j / 2);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        const IntLanes low = broadcast(15);
        for (int b = 0; b < 8; ++b, out += sizeof(Block)) {
            write(out, (uint16_t)fit.d[b]);
            write(out + 2, fifth_bits(q[2 * b], q[2 * b + 1]));
            store_u8(out + 6, (q[2 * b] & low) | (q[2 * b + 1] & low) << 4);
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        unpack_scales32<Q5_0>(in, fit);
        for (int b = 0; b < 8; ++b, in += sizeof(Block)) {
            const IntLanes both = load_u8(in + 6);
            const uint32_t qh = read<uint32_t>(in + 2);
            q[2 * b] = (both & broadcast(15)) | from_fifth_bits(qh, 0);
            q[2 * b + 1] = both >> 4 | from_fifth_bits(qh, 1);
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
