// IQ2_S (ggml id 22), 2.5625 bpw: superblocks of 256 weights, 16 sub-blocks of 16, points of eight.
//
//   x = d * (0.5 + scale[b]) / 4 * sign * level        scale in 0..15, level 8, 25 or 43
//
// The levels of eight neighbouring weights are one of 1024 points (codebooks.h).
//
//   byte  0    2                 34                66                     74           82
//         | d  | qs: 32 bytes    | signs: 32 bytes | qh: 8 bytes          | scales: 8  |
//         | F16| byte i: bits    | byte i, bit l:  | byte k, bits 2l,     | byte i: of |
//              | 0..7 of the     | is weight 8i+l  | 2l+1: bits 8, 9 of   | b=2i in    |
//              | point of weights| negative        | the point of weights | bits 0..3, |
//              | 8i..8i+7        |                 | 32k+8l..32k+8l+7     | 2i+1       |
//
// Layout of ggml-common.h (block_iq2_s). Encoders: point_scales.h.
#pragma once
#include "formats/shared/point_scales.h"

namespace ramgguf::RAMGGUF_ISA {

struct IQ2_S {
    static constexpr int block_size = 256;

    struct Block {
        uint16_t d;
        uint8_t qs[64], qh[8], scales[8];
    };
    static_assert(sizeof(Block) == 82, "IQ2_S is 82 bytes per 256 weights");

    using Points = Iq2sPoints;
    using Fit = PointFit<16, 8>;
    using Search = PointSearch<IQ2_S>;
    static constexpr int kTries = 1;

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { Search::rtn(x, fit); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes, int j) { return fit.level(j); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j) * q;
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        write(out, fit.d);
        uint8_t high[8] = {};
        for (int j = 0; j < kVectors; ++j) {
            uint16_t points[2];
            const uint32_t signs = points_of<Points>(q[j], points);
            write(out + 34 + 2 * j, (uint16_t)signs);
            for (int k = 0; k < 2; ++k) {
                const int i = 2 * j + k;
                out[2 + i] = (uint8_t)points[k];
                high[i / 4] = (uint8_t)(high[i / 4] | points[k] >> 8 << (i % 4 * 2));
            }
        }
        std::memcpy(out + 66, high, sizeof high);
        pack_scales_of_16(fit, out + 74);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        for (int j = 0; j < kVectors; ++j) {
            uint16_t points[2];
            for (int k = 0; k < 2; ++k) {
                const int i = 2 * j + k;
                points[k] = (uint16_t)(in[2 + i] | (in[66 + i / 4] >> (i % 4 * 2) & 3) << 8);
            }
            q[j] = levels_of<Points>(points, read<uint16_t>(in + 34 + 2 * j));
        }
        unpack_scales_of_16(in + 74, read<uint16_t>(in), fit);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
