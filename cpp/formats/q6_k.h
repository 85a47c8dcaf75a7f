// Q6_K (ggml id 14), 6.5625 bpw: superblocks of 256 weights, 16 sub-blocks of 16.
//
//   x = d * scale[b] * (q - 32)        q in 0..63, scale in -128..127
//
//   byte  0                            128                     192               208  210
//         | ql: 128 bytes              | qh: 64 bytes          | scales: 16 int8 | d   |
//         | byte 64c+l: bits 0..3 of   | byte 32c+l: bits 4..5 |                 | F16 |
//         | weight 128c+l in bits 0..3,| of weights 128c+l,    |
//         | of 128c+64+l in bits 4..7  | +32, +64 and +96 in   |
//         | (l = 0..63)                | bits 0..1 .. 6..7     |
//
// Layout of ggml-common.h (block_q6_K). Encoder: symmetric.h.
#pragma once
#include "formats/shared/symmetric.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q6_K {
    static constexpr int block_size = 256;
    static constexpr bool scalar_codes = true;

    struct Block {
        uint8_t ql[128];
        uint8_t qh[64];
        int8_t scales[16];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 210, "Q6_K is 210 bytes per 256 weights");

    using Fit = SymmetricFit<16, -128, -32>;
    using Levels = IntegerLevels<-32, 31>;
    using Search = SymmetricSearch<Q6_K>;
    static constexpr Grid plain_grid{5, -2.0f, 0.6f}, weighted_grid{12, -3.0f, 0.5f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { fit.rtn(x); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return round_even(clamp(x * fit.inverse.at(j), -32.0f, 31.0f));
    }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j) * q;
    }

    // The codes come and go as -32..31.
    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        const IntLanes bias = broadcast(32), low = broadcast(15);
        for (int c = 0; c < 2; ++c) {
            for (int h = 0; h < 2; ++h) {
                IntLanes high = broadcast(0), part[4];
                for (int k = 0; k < 4; ++k) {
                    part[k] = q[8 * c + 2 * k + h] + bias;
                    high = high | (part[k] >> 4) << (2 * k);
                }
                for (int k = 0; k < 2; ++k) {
                    store_u8(out + 64 * c + 32 * k + 16 * h, (part[k] & low) | (part[k + 2] & low)
                                                                                   << 4);
                }
                store_u8(out + 128 + 32 * c + 16 * h, high);
            }
        }
        store_u8(out + 192, truncate(fit.fields.all()));
        write(out + 208, fit.d);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        fit.set(read<uint16_t>(in + 208), to_float(load_s8(in + 192)));
        for (int c = 0; c < 2; ++c) {
            for (int h = 0; h < 2; ++h) {
                const IntLanes high = load_u8(in + 128 + 32 * c + 16 * h);
                for (int k = 0; k < 4; ++k) {
                    const IntLanes both = load_u8(in + 64 * c + 32 * (k % 2) + 16 * h);
                    const IntLanes low = k < 2 ? both & broadcast(15) : both >> 4;
                    q[8 * c + 2 * k + h] =
                        (low | (high >> (2 * k) & broadcast(3)) << 4) - broadcast(32);
                }
            }
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
