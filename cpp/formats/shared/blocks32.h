// The Fit that the formats with blocks of 32 share (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL): one F16
// scale, and for some one F16 offset, per block. A unit is eight blocks; lane b is block b, and
// lanes 8..15 repeat lanes 0..7.
#pragma once
#include <type_traits>

#include "formats/shared/iq4.h"

namespace ramgguf::RAMGGUF_ISA {

struct Blocks32Fit {
    PerBlock scale, offset;        // as the decoder sees them
    PerBlock inverse, low;         // what quantize multiplies with and subtracts
    int32_t d[kLanes], m[kLanes];  // F16
    bool overflow;

    static RAMGGUF_INLINE int block_of(int vector) { return vector / 2; }

    RAMGGUF_INLINE void set_scale(Lanes wanted) {
        const IntLanes h = f32_to_f16(wanted);
        store(d, h);
        scale.set(f16_to_f32(h));
        overflow = any_overflow(h);
    }

    RAMGGUF_INLINE void set_offset(Lanes wanted) {
        const IntLanes h = f32_to_f16(wanted);
        store(m, h);
        offset.set(f16_to_f32(h));
        overflow = overflow || any_overflow(h);
    }
};

// d (and m, where Format has it) of the eight blocks of a unit, for a decoder.
template <class Format>
RAMGGUF_INLINE void unpack_scales32(const uint8_t* in, Blocks32Fit& fit) {
    for (int b = 0; b < 8; ++b) {
        const uint8_t* block = in + b * (int)sizeof(typename Format::Block);
        fit.d[b] = read<uint16_t>(block);
        fit.m[b] = Format::has_offset ? read<uint16_t>(block + 2) : 0;
        fit.d[b + 8] = fit.m[b + 8] = 0;
    }
    fit.scale.set(f16_to_f32(load(fit.d)));
    fit.offset.set(f16_to_f32(load(fit.m)));
}

// The weight of largest magnitude of every block of 32; of a and -a the one that comes first, as
// in ggml's reference; +0 for a block of zeros.
inline Lanes first_extreme_of_blocks(const float* x) {
    const Lanes ranges = ranges_of_blocks32(x), other = exchange<8>(ranges);
    const Lanes high = lower_halves(ranges, ranges), low = -lower_halves(other, other);
    const Lanes extreme = select(high > -low, high, low) + broadcast(0.0f);
    uint32_t ties = to_bits((high == -low) & (high > low)) & 0xff;
    if (ties == 0) return extreme;
    float found[kLanes];
    store(found, extreme);
    for (int b = 0; ties != 0; ++b, ties >>= 1) {
        if ((ties & 1) == 0) continue;
        const float* block = x + 32 * b;
        int i = 0;
        while (block[i] != found[b] && block[i] != -found[b]) ++i;
        found[b] = found[b + 8] = block[i];
    }
    return load(found);
}

// The smallest weight of every block of 32 as ggml's reference has it: of zeros of both signs the
// one that comes first.
inline Lanes first_zeros_of_blocks(const float* x, Lanes low) {
    uint32_t zeros = to_bits(low == broadcast(0.0f)) & 0xff;
    if (zeros == 0) return low;
    float found[kLanes];
    store(found, low);
    for (int b = 0; zeros != 0; ++b, zeros >>= 1) {
        if ((zeros & 1) == 0) continue;
        int i = 0;
        while (x[32 * b + i] != 0.0f) ++i;
        found[b] = found[b + 8] = x[32 * b + i];
    }
    return load(found);
}

// The encoder `search` of blocks of 32 with a scale and the levels Format::Levels.
template <class Format>
struct LinearBlockSearch {
    static constexpr int kUnits = 2;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Blocks32Fit* fits) {
        using Levels = typename Format::Levels;
        Tile<32, weighted> tile;
        load_tile<32, 1>(x, importance, n_units, tile);
        const LinearSolution found = fit_linear<Levels>(tile, kGrid<Format, weighted>);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set_scale(lanes_of_unit(found.scale, unit));
            fits[unit].inverse.set(inverse_or_zero(fits[unit].scale.all()));
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const Blocks32Fit& fit, Lanes x, int j) {
        using Levels = typename Format::Levels;
        if constexpr (std::is_same_v<Levels, Iq4Levels>) return Format::quantize(fit, x, j);
        return Levels::nearest(x * fit.inverse.at(j / 2)) - broadcast(Levels::kLow);
    }
};

// The encoder `search` of blocks of 32 with a scale, an offset and the codes 0..kCodeMax.
template <class Format, int kCodeMax>
struct AffineBlockSearch {
    static constexpr int kUnits = 2;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Blocks32Fit* fits) {
        Tile<32, weighted> tile;
        load_tile<32, 1>(x, importance, n_units, tile);
        const AffineSolution found = fit_affine<kCodeMax, true>(tile, kGrid<Format, weighted>);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set_scale(lanes_of_unit(found.scale, unit));
            fits[unit].set_offset(lanes_of_unit(found.offset, unit));
            fits[unit].inverse.set(inverse_or_zero(fits[unit].scale.all()));
            fits[unit].low.set(fits[unit].offset.all());
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const Blocks32Fit& fit, Lanes x, int j) {
        const Lanes code = (x - fit.low.at(j / 2)) * fit.inverse.at(j / 2);
        return round_even(clamp(code, 0.0f, (float)kCodeMax));
    }
};

// The 32 bits of vectors 2b and 2b+1 of the unit whose codes have bit 4 set, and back.
RAMGGUF_INLINE uint32_t fifth_bits(IntLanes q0, IntLanes q1) {
    const IntLanes bit = broadcast(16);
    return to_bits((q0 & bit) == bit) | to_bits((q1 & bit) == bit) << 16;
}

RAMGGUF_INLINE IntLanes from_fifth_bits(uint32_t qh, int half) {
    return select(lanes_with_bit(qh >> (16 * half)), broadcast(16), broadcast(0));
}

}  // namespace ramgguf::RAMGGUF_ISA
