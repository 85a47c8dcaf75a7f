// TQ1_0 (ggml id 34), 1.6875 bpw: superblocks of 256 ternary weights, five to a byte.
//
//   x = d * (q - 1)        q in 0..2
//
//   byte  0                          32                           48                      52   54
//         | 32 bytes                 | 16 bytes                   | qh: 4 bytes           | d  |
//         | byte l: weights l, l+32, | byte l: weights 160+l,     | byte l: weights 240+l,| F16|
//         | l+64, l+96, l+128        | +16, +32, +48, +64         | +4, +8, +12           |    |
//
// Five digits to base 3, the first the most significant, make n in 0..242. The byte is n * 256 /
// 243, rounded up; four digits get a fifth of 0. To decode, multiply the byte by 3 again and again:
// what overflows it is the next digit.
//
// Layout of ggml-common.h (block_tq1_0). Encoder: ternary.h.
#pragma once
#include "formats/shared/ternary.h"

namespace ramgguf::RAMGGUF_ISA {

struct TQ1_0 {
    static constexpr int block_size = 256;

    struct Block {
        uint8_t qs[48], qh[4];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 54, "TQ1_0 is 54 bytes per 256 weights");

    using Fit = TernaryFit;

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) { fit.rtn(x); }
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int) { return fit.quantize(x); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int) {
        return fit.reconstruct(q);
    }

    // Digit k of the 16 bytes that begin at 16h is in vector first_vector(h) + k * stride(h).
    static constexpr int first_vector(int h) { return h < 2 ? h : 10; }
    static constexpr int stride(int h) { return h < 2 ? 2 : 1; }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int h = 0; h < 3; ++h) {
            Lanes n = broadcast(0.0f);
            for (int k = 0; k < 5; ++k) {
                n = n * broadcast(3.0f) + to_float(q[first_vector(h) + k * stride(h)]);
            }
            const Lanes fraction = n * broadcast(256.0f) + broadcast(242.0f);
            store_u8(out + 16 * h, truncate(fraction / broadcast(243.0f)));
        }
        int32_t last[kLanes];
        store(last, q[15]);
        for (int l = 0; l < 4; ++l) {
            const int n = ((last[l] * 3 + last[l + 4]) * 3 + last[l + 8]) * 3 + last[l + 12];
            out[48 + l] = (uint8_t)((n * 3 * 256 + 242) / 243);
        }
        write(out + 52, fit.d);
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        for (int h = 0; h < 3; ++h) {
            IntLanes byte = load_u8(in + 16 * h);
            for (int k = 0; k < 5; ++k) {
                const IntLanes thrice = byte + byte + byte;
                q[first_vector(h) + k * stride(h)] = thrice >> 8;
                byte = thrice & broadcast(255);
            }
        }
        int32_t last[kLanes];
        for (int l = 0; l < 4; ++l) {
            int byte = in[48 + l];
            for (int k = 0; k < 4; ++k) {
                last[4 * k + l] = byte * 3 >> 8;
                byte = byte * 3 & 255;
            }
        }
        q[15] = load(last);
        fit.set(read<uint16_t>(in + 52));
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
