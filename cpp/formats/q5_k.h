// Q5_K (ggml id 13), 5.5 bpw: superblocks of 256 weights, 8 sub-blocks of 32.
//
//   x = d * scale[b] * q - dmin * min[b]        q in 0..31, scale and min in 0..63
//
//   byte  0    2      4              16                48                              176
//         | d  | dmin | scales, mins | qh: 32 bytes    | qs: 128 bytes                  |
//         | F16| F16  | 12 bytes     | byte l, bit b:  | byte 32c+l: bits 0..3 of weight|
//                                    | bit 4 of weight | 64c+l in bits 0..3, of weight  |
//                                    | 32b+l           | 64c+32+l in bits 4..7          |
//
// Layout of ggml-common.h (block_q5_K); of the 12 bytes see affine.h. Encoder: affine.h.
#pragma once
#include "formats/shared/affine.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q5_K {
    static constexpr int block_size = 256;
    static constexpr bool scalar_codes = true;

    struct Block {
        uint16_t d, dmin;
        uint8_t scales[12];
        uint8_t qh[32];
        uint8_t qs[128];
    };
    static_assert(sizeof(Block) == 176, "Q5_K is 176 bytes per 256 weights");

    using Fit = AffineFit<32, 63, 31>;
    using Search = AffineSearch<Q5_K>;
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
        const IntLanes low = broadcast(15);
        for (int h = 0; h < 2; ++h) {
            IntLanes high = broadcast(0);
            for (int b = 0; b < 8; ++b) high = high | (q[2 * b + h] >> 4) << b;
            store_u8(out + 16 + 16 * h, high);
            for (int c = 0; c < 4; ++c) {
                store_u8(out + 48 + 32 * c + 16 * h, (q[4 * c + h] & low) | (q[4 * c + 2 + h] & low)
                                                                                << 4);
            }
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        const Lanes fields = unpack_6bit_pairs(in + 4);
        fit.set(read<uint16_t>(in), read<uint16_t>(in + 2), fields, exchange<8>(fields));
        for (int h = 0; h < 2; ++h) {
            const IntLanes high = load_u8(in + 16 + 16 * h);
            for (int c = 0; c < 4; ++c) {
                const IntLanes both = load_u8(in + 48 + 32 * c + 16 * h);
                const IntLanes bit = broadcast(1);
                q[4 * c + h] = (both & broadcast(15)) | (high >> (2 * c) & bit) << 4;
                q[4 * c + 2 + h] = both >> 4 | (high >> (2 * c + 1) & bit) << 4;
            }
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
