// Q8_0 (ggml id 8), 8.5 bpw: blocks of 32 weights.
//
//   x = d * q        q in -127..127
//
//   byte  0    2                                 34
//         | d  | qs: 32 int8; byte l is weight l |
//         | F16|                                 |
//
// Layout of ggml-common.h (block_q8_0). The encoder gives the bytes of ggml's
// quantize_row_q8_0_ref: d is the largest magnitude / 127, and weights are rounded, ties away from
// zero, with the scale before it is rounded to F16.
#pragma once
#include "formats/shared/blocks32.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q8_0 {
    static constexpr int block_size = 32;
    static constexpr bool scalar_codes = true;
    static constexpr bool has_offset = false;

    struct Block {
        uint16_t d;
        int8_t qs[32];
    };
    static_assert(sizeof(Block) == 34, "Q8_0 is 34 bytes per 32 weights");

    using Fit = Blocks32Fit;
    static constexpr float largest_code = 127;  // quantize gives more for larger weights

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        const auto larger = [](Lanes a, Lanes b) { return max(abs(a), abs(b)); };
        const Lanes d = reduce_blocks<32>(larger, x) / broadcast(127.0f);
        fit.set_scale(d);
        fit.inverse.set(inverse_or_zero(d));
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return to_float(round_away(x * fit.inverse.at(j / 2)));
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return q * fit.scale.at(j / 2);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int b = 0; b < 8; ++b, out += sizeof(Block)) {
            write(out, (uint16_t)fit.d[b]);
            store_u8(out + 2, q[2 * b]);
            store_u8(out + 18, q[2 * b + 1]);
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        unpack_scales32<Q8_0>(in, fit);
        for (int b = 0; b < 8; ++b, in += sizeof(Block)) {
            q[2 * b] = load_s8(in + 2);
            q[2 * b + 1] = load_s8(in + 18);
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
