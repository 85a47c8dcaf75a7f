// Q4_K (ggml id 12), 4.5 bpw: superblocks of 256 weights, 8 sub-blocks of 32.
//
//   x = d * scale[b] * q - dmin * min[b]        q in 0..15, scale and min in 0..63
//
//   byte  0    2      4            16                                        144
//         | d  | dmin | scales, mins | qs: 128 bytes                          |
//         | F16| F16  | 12 bytes     | byte 32c+l: weight 64c+l in bits 0..3, |
//                                    |             weight 64c+32+l in 4..7    |
//
// Layout of ggml-common.h (block_q4_K); of the 12 bytes see affine.h. Encoder: affine.h.
#pragma once
#include "formats/shared/affine.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q4_K {
    static constexpr int block_size = 256;
    static constexpr bool scalar_codes = true;

    struct Block {
        uint16_t d, dmin;
        uint8_t scales[12];
        uint8_t qs[128];
    };
    static_assert(sizeof(Block) == 144, "Q4_K is 144 bytes per 256 weights");

    using Fit = AffineFit<32, 63, 15>;
    using Search = AffineSearch<Q4_K>;
    static constexpr Grid plain_grid{8, -2.0f, 0.4f}, weighted_grid{16, -3.0f, 0.4f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { fit.rtn(x); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return fit.quantize(x, j);
    }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.reconstruct(q, j);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        write(out, fit.d);
        write(out + 2, fit.dmin);
        pack_6bit_pairs(fit.scale_fields, fit.min_fields, out + 4);
        for (int c = 0; c < 4; ++c) {
            for (int h = 0; h < 2; ++h) {
                store_u8(out + 16 + 32 * c + 16 * h, q[4 * c + h] | q[4 * c + 2 + h] << 4);
            }
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        const Lanes fields = unpack_6bit_pairs(in + 4);
        fit.set(read<uint16_t>(in), read<uint16_t>(in + 2), fields, exchange<8>(fields));
        for (int c = 0; c < 4; ++c) {
            for (int h = 0; h < 2; ++h) {
                const IntLanes both = load_u8(in + 16 + 32 * c + 16 * h);
                q[4 * c + h] = both & broadcast(15);
                q[4 * c + 2 + h] = both >> 4;
            }
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
