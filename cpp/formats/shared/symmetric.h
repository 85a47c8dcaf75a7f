// The Fit that Q3_K, Q6_K and IQ4_XS share: x = d * scale * value(code), d F16 per superblock and
// scale a small signed integer per sub-block.
//
// RTN: a sub-block's scale puts its weight of largest magnitude on the lowest code (which reaches
// one further than the highest); d puts the scale of largest magnitude on the lowest field; fields
// are rounded to nearest against the rounded d; weights with what the decoder will see.
//
// Nearest, because rounding the fields away from zero loses more. NMSE of Q3_K, Q6_K, IQ4_XS on
// 2 M weights of smol768: nearest 0.02815, 0.000424, 0.00732; away 0.02907, 0.000437, 0.00757
// (Gaussian and Student-t: the same order).
#pragma once
#include "formats/shared/superblock_scales.h"

namespace ramgguf::RAMGGUF_ISA {

// The weight of largest magnitude of every block; of a and -a, the negative one; never -0.
template <int kBlock>
RAMGGUF_INLINE Lanes extreme_of_blocks(const float* x) {
    if constexpr (kBlock == 16) {
        Lanes v[kLanes];
        fold_blocks<kBlock>(Max{}, x, v);
        return extreme_of_each(v) + broadcast(0.0f);
    } else {
        const Lanes ranges = ranges_of_blocks32(x), other = exchange<8>(ranges);
        const Lanes high = lower_halves(ranges, ranges), low = -lower_halves(other, other);
        return select(high > -low, high, low) + broadcast(0.0f);
    }
}

template <int block, int lowest_field, int lowest_value>
struct SymmetricFit {
    static constexpr int kBlock = block, kLowestField = lowest_field, kLowestValue = lowest_value;
    static constexpr int kBlocks = kUnit / kBlock;

    PerBlock scale, inverse;  // d * scale, 1 / (d * scale) or 0
    PerBlock fields;          // whole numbers kLowestField .. -kLowestField - 1, for pack
    uint16_t d;               // F16
    bool overflow;

    static RAMGGUF_INLINE int block_of(int vector) { return vector * kLanes / kBlock; }

    // Takes the fields as whole numbers in float lanes, for an encoder.
    RAMGGUF_INLINE void set(uint16_t d_, Lanes fields_) {
        d = d_;
        overflow = is_infinite(d);
        fields.set(fields_);
        set_values(broadcast(f16_to_f32(d)), fields_);
        inverse.set(inverse_or_zero(scale.all()));
    }

    // What the decoder multiplies with.
    RAMGGUF_INLINE void set_values(Lanes d_value, Lanes fields_) { scale.set(d_value * fields_); }

    RAMGGUF_INLINE void rtn(const float* x) {
        const Lanes wanted = extreme_of_blocks<kBlock>(x) * broadcast(1.0f / (float)kLowestValue);
        const Lanes low = reduce_all(Min{}, wanted), high = reduce_all(Max{}, wanted);
        const Lanes top = select(high > -low, high, low);
        const uint16_t d_bits = f32_to_f16(first(top) * (1.0f / (float)kLowestField));
        const Lanes per_unit = inverse_or_zero(broadcast(f16_to_f32(d_bits)));
        set(d_bits,
            round_even(clamp(wanted * per_unit, (float)kLowestField, (float)(-kLowestField - 1))));
    }
};

// The encoder `search` of a format with a SymmetricFit and the levels Format::Levels.
template <class Format>
struct SymmetricSearch {
    using Fit = typename Format::Fit;
    static constexpr int kUnits = Fit::kBlock / 16, kGroup = Fit::kBlocks;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Fit* fits) {
        Tile<Fit::kBlock, weighted> tile;
        load_tile<Fit::kBlock, kGroup>(x, importance, n_units, tile);
        const LinearScales found =
            fit_linear_scales<typename Format::Levels, Fit::kLowestField, -Fit::kLowestField - 1,
                              kGroup>(tile, kGrid<Format, weighted>);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(found.step, unit))),
                           lanes_of_unit(found.sub, unit));
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return Format::quantize(fit, x, j);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
