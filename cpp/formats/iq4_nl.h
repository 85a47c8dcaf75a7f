// IQ4_NL (ggml id 20), 4.5 bpw: blocks of 32 weights, 16 unevenly spaced values.
//
//   x = d * value[q]        q in 0..15, value in -127..113 (iq4.h)
//
//   byte  0    2                                                            18
//         | d  | qs: 16 bytes; byte l: weight l in bits 0..3, l+16 in 4..7  |
//         | F16|                                                            |
//
// Layout of ggml-common.h (block_iq4_nl). RTN: d puts the weight of largest magnitude on -127;
// weights take the nearest value under the rounded d.
#pragma once
#include "formats/shared/blocks32.h"
#include "formats/shared/iq4.h"

namespace ramgguf::RAMGGUF_ISA {

struct IQ4_NL {
    static constexpr int block_size = 32;
    static constexpr bool scalar_codes = true;
    static constexpr bool has_offset = false;

    struct Block {
        uint16_t d;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 18, "IQ4_NL is 18 bytes per 32 weights");

    using Fit = Blocks32Fit;
    using Levels = Iq4Levels;
    using Search = LinearBlockSearch<IQ4_NL>;
    static constexpr Grid plain_grid{12, -30.0f, 6.0f}, weighted_grid{16, -30.0f, 6.0f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        fit.set_scale(first_extreme_of_blocks(x) * broadcast(1.0f / -127.0f));
        fit.inverse.set(inverse_or_zero(fit.scale.all()));
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return nearest_iq4(x * fit.inverse.at(j / 2));
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j / 2) * iq4_value(q);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int b = 0; b < 8; ++b, out += sizeof(Block)) {
            write(out, (uint16_t)fit.d[b]);
            store_u8(out + 2, q[2 * b] | q[2 * b + 1] << 4);
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        unpack_scales32<IQ4_NL>(in, fit);
        for (int b = 0; b < 8; ++b, in += sizeof(Block)) {
            const IntLanes both = load_u8(in + 2);
            q[2 * b] = both & broadcast(15);
            q[2 * b + 1] = both >> 4;
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
