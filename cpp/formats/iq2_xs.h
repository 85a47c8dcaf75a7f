// IQ2_XS (ggml id 17), 2.3125 bpw: superblocks of 256 weights, 16 sub-blocks of 16, points of
// eight.
//
//   x = d * (0.5 + scale[b]) / 4 * sign * level        scale in 0..15, level 8, 25 or 43
//
// The levels of eight neighbouring weights are one of 512 points (codebooks.h). An even number of
// them is negative, so the eighth sign follows from the others.
//
//   byte  0    2                                        66            74
//         | d  | qs: 32 words of 16 bits                | scales: 8   |
//         | F16| word i: bits 0..8 the point of weights | byte i: of  |
//              | 8i..8i+7, bit 9+l: is weight 8i+l      | b=2i in bits|
//              | negative, l in 0..6                    | 0..3, 2i+1  |
//
// Layout of ggml-common.h (block_iq2_xs). Encoders: point_scales.h.
#pragma once
#include "formats/shared/point_scales.h"

namespace ramgguf::RAMGGUF_ISA {

struct IQ2_XS {
    static constexpr int block_size = 256;

    struct Block {
        uint16_t d;
        uint16_t qs[32];
        uint8_t scales[8];
    };
    static_assert(sizeof(Block) == 74, "IQ2_XS is 74 bytes per 256 weights");

    using Points = Iq2xsPoints;
    using Fit = PointFit<16, 8>;
    using Search = PointSearch<IQ2_XS>;
    static constexpr int kTries = 2;

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { Search::rtn(x, fit); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes, int j) { return fit.level(j); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j) * q;
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        write(out, fit.d);
        for (int j = 0; j < kVectors; ++j) {
            uint16_t points[2];
            const uint32_t signs = points_of<Points>(q[j], points);
            for (int k = 0; k < 2; ++k) {
                const uint32_t seven = signs >> (8 * k) & 127;
                write(out + 2 + 4 * j + 2 * k, (uint16_t)(points[k] | seven << 9));
            }
        }
        pack_scales_of_16(fit, out + 66);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        for (int j = 0; j < kVectors; ++j) {
            uint16_t points[2];
            uint32_t signs = 0;
            for (int k = 0; k < 2; ++k) {
                const uint32_t word = read<uint16_t>(in + 2 + 4 * j + 2 * k);
                points[k] = (uint16_t)(word & 511);
                signs |= with_eighth_sign(word >> 9) << (8 * k);
            }
            q[j] = levels_of<Points>(points, signs);
        }
        unpack_scales_of_16(in + 66, read<uint16_t>(in), fit);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
