// Q3_K (ggml id 11), 3.4375 bpw: superblocks of 256 weights, 16 sub-blocks of 16.
//
//   x = d * (scale[b] - 32) * (q - 4)        q in 0..7, scale in 0..63
//
//   byte  0                  32                                  96               108  110
//         | hmask: 32 bytes  | qs: 64 bytes                      | scales         | d   |
//         | byte l, bit b:   | byte 32c+l: bits 0..1 of weights  | 12 bytes,      | F16 |
//         | bit 2 of weight  | 128c+l, +32, +64 and +96 in bits  | see below      |
//         | 32b+l            | 0..1, 2..3, 4..5 and 6..7         |
//
//   scales: byte 0..7    bits 0..3 of scale[i] in bits 0..3, of scale[i+8] in bits 4..7
//           byte 8..11   bits 4..5 of scale[i], [i+4], [i+8], [i+12] in bits 0..1 .. 6..7
//
// Layout of ggml-common.h (block_q3_K). Encoder: symmetric.h.
#pragma once
#include "formats/shared/symmetric.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q3_K {
    static constexpr int block_size = 256;
    static constexpr bool scalar_codes = true;

    struct Block {
        uint8_t hmask[32];
        uint8_t qs[64];
        uint8_t scales[12];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 110, "Q3_K is 110 bytes per 256 weights");

    using Fit = SymmetricFit<16, -32, -4>;
    using Levels = IntegerLevels<-4, 3>;
    using Search = SymmetricSearch<Q3_K>;
    static constexpr Grid plain_grid{2, 0.0f, 0.5f}, weighted_grid{8, -0.6f, 0.4f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { fit.rtn(x); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return round_even(clamp(x * fit.inverse.at(j), -4.0f, 3.0f));
    }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j) * q;
    }

    // The codes come and go as -4..3.
    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        const IntLanes bias = broadcast(4), low = broadcast(3);
        for (int h = 0; h < 2; ++h) {
            IntLanes high = broadcast(0);
            for (int c = 0; c < 2; ++c) {
                IntLanes four = broadcast(0);
                for (int k = 0; k < 4; ++k) {
                    const IntLanes code = q[8 * c + 2 * k + h] + bias;
                    four = four | (code & low) << (2 * k);
                    high = high | (code >> 2) << (4 * c + k);
                }
                store_u8(out + 32 + 32 * c + 16 * h, four);
            }
            store_u8(out + 16 * h, high);
        }
        pack_scales(truncate(fit.fields.all()) + broadcast(32), out + 96);
        write(out + 108, fit.d);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        uint8_t fields[kLanes];
        unpack_scales(in + 96, fields);
        fit.set(read<uint16_t>(in + 108), to_float(load_u8(fields) - broadcast(32)));
        for (int h = 0; h < 2; ++h) {
            const IntLanes high = load_u8(in + 16 * h);
            for (int c = 0; c < 2; ++c) {
                const IntLanes four = load_u8(in + 32 + 32 * c + 16 * h);
                for (int k = 0; k < 4; ++k) {
                    q[8 * c + 2 * k + h] = (four >> (2 * k) & broadcast(3)) +
                                           ((high >> (4 * c + k) & broadcast(1)) << 2) -
                                           broadcast(4);
                }
            }
        }
    }

    static RAMGGUF_INLINE void pack_scales(IntLanes scales, uint8_t* out) {
        uint8_t bytes[kLanes];
        store_u8(bytes, scales);
        const uint64_t a = read<uint64_t>(bytes), b = read<uint64_t>(bytes + 8);
        const uint64_t low = 0x0f0f0f0f0f0f0f0fu, high = 0x0303030303030303u;
        write(out, (a & low) | (b & low) << 4);
        const uint64_t ah = a >> 4 & high, bh = b >> 4 & high;
        write(out + 8, (uint32_t)(ah | ah >> 32 << 2 | bh << 4 | bh >> 32 << 6));
    }

    static RAMGGUF_INLINE void unpack_scales(const uint8_t* in, uint8_t* scales) {
        const uint64_t both = read<uint64_t>(in);
        const uint64_t four = read<uint32_t>(in + 8);
        const uint64_t low = 0x0f0f0f0f0f0f0f0fu, high = 0x03030303u;
        const uint64_t ah = (four & high) | (four >> 2 & high) << 32;
        const uint64_t bh = (four >> 4 & high) | (four >> 6 & high) << 32;
        write(scales, (both & low) | ah << 4);
        write(scales + 8, (both >> 4 & low) | bh << 4);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
