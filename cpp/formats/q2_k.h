// Q2_K (ggml id 10), 2.625 bpw: superblocks of 256 weights, 16 sub-blocks of 16.
//
//   x = d * scale[b] * q - dmin * min[b]        q in 0..3, scale and min in 0..15
//
//   byte  0                  16                                       80   82     84
//         | scales: 16 bytes | qs: 64 bytes                           | d   | dmin |
//         | byte b: scale in | byte 32c+l: weights 128c+l, 128c+32+l, | F16 | F16  |
//         | bits 0..3, min   | 128c+64+l and 128c+96+l in bits 0..1,  |
//         | in bits 4..7     | 2..3, 4..5 and 6..7                    |
//
// Layout of ggml-common.h (block_q2_K). Encoder: affine.h.
#pragma once
#include "formats/shared/affine.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q2_K {
    static constexpr int block_size = 256;
    static constexpr bool scalar_codes = true;

    struct Block {
        uint8_t scales[16];
        uint8_t qs[64];
        uint16_t d, dmin;
    };
    static_assert(sizeof(Block) == 84, "Q2_K is 84 bytes per 256 weights");

    using Fit = AffineFit<16, 15, 3>;
    using Search = AffineSearch<Q2_K>;
    static constexpr Grid plain_grid{6, -1.0f, 0.3f}, weighted_grid{12, -2.0f, 0.4f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { fit.rtn(x); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return fit.quantize(x, j);
    }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.reconstruct(q, j);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        store_u8(out, truncate(fit.scale_fields.all()) | truncate(fit.min_fields.all()) << 4);
        for (int c = 0; c < 2; ++c) {
            for (int h = 0; h < 2; ++h) {
                const int j = 8 * c + h;
                store_u8(out + 16 + 32 * c + 16 * h,
                         (q[j] | q[j + 2] << 2) | (q[j + 4] << 4 | q[j + 6] << 6));
            }
        }
        write(out + 80, fit.d);
        write(out + 82, fit.dmin);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        const IntLanes fields = load_u8(in);
        fit.set(read<uint16_t>(in + 80), read<uint16_t>(in + 82), to_float(fields & broadcast(15)),
                to_float(fields >> 4));
        for (int c = 0; c < 2; ++c) {
            for (int h = 0; h < 2; ++h) {
                const IntLanes four = load_u8(in + 16 + 32 * c + 16 * h);
                for (int k = 0; k < 4; ++k) {
                    q[8 * c + 2 * k + h] = four >> (2 * k) & broadcast(3);
                }
            }
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
