// TQ2_0 (ggml id 35), 2.0625 bpw: superblocks of 256 ternary weights.
//
//   x = d * (q - 1)        q in 0..2
//
//   byte  0                                             64   66
//         | qs: 64 bytes                                | d  |
//         | byte 32c+l: weights 128c+l, 128c+32+l,      | F16|
//         | 128c+64+l and 128c+96+l in bits 0..1 .. 6..7|    |
//
// Layout of ggml-common.h (block_tq2_0). Encoder: ternary.h.
#pragma once
#include "formats/shared/ternary.h"

namespace ramgguf::RAMGGUF_ISA {

struct TQ2_0 {
    static constexpr int block_size = 256;

    struct Block {
        uint8_t qs[64];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 66, "TQ2_0 is 66 bytes per 256 weights");

    using Fit = TernaryFit;

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { fit.rtn(x); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int) { return fit.quantize(x); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int) {
        return fit.reconstruct(q);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int c = 0; c < 2; ++c) {
            for (int h = 0; h < 2; ++h) {
                const int j = 8 * c + h;
                store_u8(out + 32 * c + 16 * h,
                         (q[j] | q[j + 2] << 2) | (q[j + 4] << 4 | q[j + 6] << 6));
            }
        }
        write(out + 64, fit.d);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        for (int c = 0; c < 2; ++c) {
            for (int h = 0; h < 2; ++h) {
                const IntLanes four = load_u8(in + 32 * c + 16 * h);
                for (int k = 0; k < 4; ++k) {
                    q[8 * c + 2 * k + h] = four >> (2 * k) & broadcast(3);
                }
            }
        }
        fit.set(read<uint16_t>(in + 64));
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
