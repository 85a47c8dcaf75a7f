// Q2_0 (ggml id 42), 2.25 bpw: blocks of 64 weights.
//
//   x = d * (q - 1)        q in 0..3
//
//   byte  0    2                                                                      18
//         | d  | qs: 16 bytes; byte l: weights 4l .. 4l+3 in bits 0..1 .. 6..7        |
//         | F16|                                                                      |
//
// Layout of ggml-common.h (block_q2_0). RTN gives the bytes of ggml's quantize_row_q2_0_ref: d is
// the largest magnitude, so the block becomes ternary; weights are rounded, ties away from zero,
// with the scale before it is rounded to F16.
#pragma once
#include "formats/shared/blocks32.h"

namespace ramgguf::RAMGGUF_ISA {

struct Q2_0 {
    static constexpr int block_size = 64;
    static constexpr int kBlocks = kUnit / block_size;

    struct Block {
        uint16_t d;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 18, "Q2_0 is 18 bytes per 64 weights");

    // Lanes 2b and 2b+1 both have the scale of block b, one for each half.
    using Fit = Blocks32Fit;
    using Levels = IntegerLevels<-1, 2>;
    // One of the steps puts the extreme weight on -1, so ternary blocks are found exactly.
    static constexpr Grid plain_grid{7, -0.75f, 0.25f}, weighted_grid{9, -0.75f, 0.25f};

    struct Search {
        static constexpr int kUnits = 4;

        template <bool weighted>
        __attribute__((noinline)) static void fit(const float* x, const float* importance,
                                                  int n_units, Fit* fits) {
            if (n_units == 3) {  // a tile has one, two or four
                fit<weighted>(x, importance, 2, fits);
                fit<weighted>(x + 2 * kUnit, weighted ? importance + 2 * kUnit : nullptr, 1,
                              fits + 2);
                return;
            }
            Tile<64, weighted> tile;
            load_tile<64, 1>(x, importance, n_units, tile);
            PerBlock scales;
            scales.set(fit_linear<Levels>(tile, kGrid<Q2_0, weighted>).scale);
            for (int unit = 0; unit < n_units; ++unit) {
                PerBlock halves;
                for (int b = 0; b < kLanes; ++b) halves.v[b] = scales.v[4 * unit + b / 2 % 4];
                fits[unit].set_scale(halves.all());
                fits[unit].inverse.set(inverse_or_zero(fits[unit].scale.all()));
            }
        }

        static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
            return Levels::nearest(x * fit.inverse.at(j / 2)) + broadcast(1.0f);
        }
    };

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        const auto larger = [](Lanes a, Lanes b) { return max(abs(a), abs(b)); };
        const Lanes halves = reduce_blocks<32>(larger, x);
        const Lanes d = max(halves, exchange<1>(halves));
        fit.set_scale(d);
        fit.inverse.set(inverse_or_zero(d));
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        const IntLanes code = round_away(x * fit.inverse.at(j / 2));
        return to_float(min(max(code, broadcast(-1)), broadcast(2)) + broadcast(1));
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return (q - broadcast(1.0f)) * fit.scale.at(j / 2);
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int b = 0; b < kBlocks; ++b, out += sizeof(Block)) {
            write(out, (uint16_t)fit.d[2 * b]);
            for (int k = 0; k < 4; ++k) {
                const IntLanes v = q[4 * b + k], one = broadcast(1), two = broadcast(2);
                const uint32_t low = to_bits((v & one) == one), high = to_bits((v & two) == two);
                write(out + 2 + 4 * k, spread(low) | spread(high) << 1);
            }
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        for (int b = 0; b < kBlocks; ++b, in += sizeof(Block)) {
            const float d = f16_to_f32(read<uint16_t>(in));
            fit.scale.v[2 * b] = fit.scale.v[2 * b + 1] = d;
            for (int k = 0; k < 4; ++k) {
                const uint32_t word = read<uint32_t>(in + 2 + 4 * k);
                const Mask low = lanes_with_bit(gathered(word)),
                           high = lanes_with_bit(gathered(word >> 1));
                const IntLanes zero = broadcast(0);
                q[4 * b + k] = select(low, broadcast(1), zero) | select(high, broadcast(2), zero);
            }
        }
    }

  private:
    // Bits 0..15 to bits 0, 2 .. 30, and back.
    static RAMGGUF_INLINE uint32_t spread(uint32_t v) {
        v = (v | v << 8) & 0x00ff00ffu;
        v = (v | v << 4) & 0x0f0f0f0fu;
        v = (v | v << 2) & 0x33333333u;
        return (v | v << 1) & 0x55555555u;
    }
    static RAMGGUF_INLINE uint32_t gathered(uint32_t v) {
        v &= 0x55555555u;
        v = (v | v >> 1) & 0x33333333u;
        v = (v | v >> 2) & 0x0f0f0f0fu;
        v = (v | v >> 4) & 0x00ff00ffu;
        return (v | v >> 8) & 0xffffu;
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
