// IQ4_XS (ggml id 23), 4.25 bpw: superblocks of 256 weights, 8 sub-blocks of 32, 16 unevenly
// spaced values.
//
//   x = d * (scale[b] - 32) * value[q]        q in 0..15, scale in 0..63, value in iq4.h
//
//   byte  0    2                   4                    8                                  136
//         | d  | scales_h: 16 bits | scales_l: 4 bytes  | qs: 128 bytes                     |
//         | F16| bits 4..5 of      | byte i: bits 0..3  | byte 16b+l: weight 32b+l in bits  |
//              | scale[b] in bits  | of scale[2i] low,  | 0..3, weight 32b+16+l in bits     |
//              | 2b and 2b+1       | of [2i+1] high     | 4..7                              |
//
// Layout of ggml-common.h (block_iq4_xs). Encoder: symmetric.h, with the nearest value for a code.
#pragma once
#include "formats/shared/iq4.h"
#include "formats/shared/symmetric.h"

namespace ramgguf::RAMGGUF_ISA {

struct IQ4_XS {
    static constexpr int block_size = 256;
    static constexpr bool scalar_codes = true;

    struct Block {
        uint16_t d, scales_h;
        uint8_t scales_l[4];
        uint8_t qs[128];
    };
    static_assert(sizeof(Block) == 136, "IQ4_XS is 136 bytes per 256 weights");

    using Fit = SymmetricFit<32, -32, -127>;
    using Levels = Iq4Levels;
    using Search = SymmetricSearch<IQ4_XS>;
    static constexpr Grid plain_grid{12, -30.0f, 6.0f}, weighted_grid{16, -30.0f, 6.0f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { fit.rtn(x); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return nearest_iq4(x * fit.inverse.at(j / 2));
    }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j / 2) * iq4_value(q);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        uint8_t fields[kLanes];
        store_u8(fields, truncate(fit.fields.all()) + broadcast(32));
        uint32_t scales_h = 0, scales_l = 0;
        for (int b = 0; b < 8; ++b) {
            scales_l |= (uint32_t)(fields[b] & 15) << (4 * b);
            scales_h |= (uint32_t)(fields[b] >> 4) << (2 * b);
        }
        write(out, fit.d);
        write(out + 2, (uint16_t)scales_h);
        write(out + 4, scales_l);
        for (int b = 0; b < 8; ++b) store_u8(out + 8 + 16 * b, q[2 * b] | q[2 * b + 1] << 4);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        const uint32_t scales_h = read<uint16_t>(in + 2), scales_l = read<uint32_t>(in + 4);
        int32_t fields[kLanes] = {};
        for (int b = 0; b < 8; ++b) {
            fields[b] = (int32_t)((scales_l >> (4 * b) & 15) | (scales_h >> (2 * b) & 3) << 4) - 32;
        }
        fit.set(read<uint16_t>(in), to_float(load(fields)));
        for (int b = 0; b < 8; ++b) {
            const IntLanes both = load_u8(in + 8 + 16 * b);
            q[2 * b] = both & broadcast(15);
            q[2 * b + 1] = both >> 4;
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
