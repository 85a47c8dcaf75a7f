// IQ3_XXS (ggml id 18), 3.0625 bpw: superblocks of 256 weights, 8 sub-blocks of 32, points of four.
//
//   x = d * (0.5 + scale[b]) / 2 * sign * level        scale in 0..15, level 4, 12 .. 52 or 62
//
// The levels of four neighbouring weights are one of 256 points (codebooks.h). An even number of
// every eight weights is negative, so the eighth sign follows from the others.
//
//   byte  0    2                       66 + 4b                                               98
//         | d  | qs: 64 bytes          | 8 words of 32 bits; word b, bit 7i+l: is weight      |
//         | F16| byte i: the point of  | 32b+8i+l negative, l in 0..6; bits 28..31: scale[b]  |
//              | weights 4i..4i+3      |
//
// Layout of ggml-common.h (block_iq3_xxs). Encoders: point_scales.h.
#pragma once
#include "formats/shared/point_scales.h"

namespace ramgguf::RAMGGUF_ISA {

struct IQ3_XXS {
    static constexpr int block_size = 256;

    struct Block {
        uint16_t d;
        uint8_t qs[96];
    };
    static_assert(sizeof(Block) == 98, "IQ3_XXS is 98 bytes per 256 weights");

    using Points = Iq3xxsPoints;
    using Fit = PointFit<32, 4>;
    using Search = PointSearch<IQ3_XXS>;
    static constexpr int kTries = 2;

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { Search::rtn(x, fit); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes, int j) { return fit.level(j); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j / 2) * q;
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        write(out, fit.d);
        for (int b = 0; b < 8; ++b) {
            uint16_t points[8];
            uint32_t signs = points_of<Points>(q[2 * b], points);
            signs |= points_of<Points>(q[2 * b + 1], points + 4) << 16;
            for (int i = 0; i < 8; ++i) out[2 + 8 * b + i] = (uint8_t)points[i];
            write(out + 66 + 4 * b, signs_and_scale(signs, fit.scale_of(b)));
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        float fields[kLanes];
        for (int b = 0; b < 8; ++b) {
            const uint32_t word = read<uint32_t>(in + 66 + 4 * b);
            const uint32_t signs = signs_of_word(word);
            uint16_t points[8];
            for (int i = 0; i < 8; ++i) points[i] = in[2 + 8 * b + i];
            q[2 * b] = levels_of<Points>(points, signs & 0xffff);
            q[2 * b + 1] = levels_of<Points>(points + 4, signs >> 16);
            fields[b] = fields[b + 8] = (float)(2 * (word >> 28) + 1);
        }
        fit.set(read<uint16_t>(in), load(fields));
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
