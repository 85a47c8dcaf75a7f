// The Fit and the encoders that IQ2_XXS, IQ2_XS, IQ2_S and IQ3_XXS share:
//
//   x = d * (1 + 2 scale[b]) / divisor * sign * level       scale in 0..15, levels of codebooks.h
//
// `search` guesses a sub-block's scale by least squares, as if every weight could take its nearest
// level. It rounds the scales as those of other superblocks, then tries fields around the rounded
// ones by the error of the nearest points. RTN takes the scale from a sub-block's mean or largest
// magnitude.
#pragma once
#include "formats/shared/nearest_points.h"
#include "formats/shared/superblock_scales.h"

namespace ramgguf::RAMGGUF_ISA {

// block: weights of a scale
template <int block, int divisor>
struct PointFit : OddFields {
    static constexpr int kBlock = block;
    static constexpr float kDivisor = (float)divisor;

    PerBlock scale;   // d * (1 + 2 scale[b]) / divisor
    PerBlock fields;  // 1 + 2 scale[b]
    uint16_t d;       // F16
    bool overflow;
    int8_t levels[kUnit];  // with signs

    // All products are exact: d has 11 bits, a field 5 and a level 6.
    RAMGGUF_INLINE void set(uint16_t d_, Lanes fields_) {
        d = d_;
        overflow = is_infinite(d);
        fields.set(fields_);
        scale.set(broadcast(f16_to_f32(d) * (1.0f / kDivisor)) * fields_);
    }

    RAMGGUF_INLINE int scale_of(int b) const { return (int)fields.v[b] / 2; }

    RAMGGUF_INLINE Lanes level(int j) const {
        return to_float(load_s8((const uint8_t*)levels + kLanes * j));
    }
};

// --- levels with signs, from and to points and signs ---

// Takes 16 levels, writes the points of 16 / P::kGroup groups. Bit i of the result is set where
// level i is negative.
template <class P>
RAMGGUF_INLINE uint32_t points_of(IntLanes levels, uint16_t* points) {
    const CodebookTables<P>& tables = codebook_tables<P>();
    const Lanes value = to_float(levels);
    const Lanes digits = to_float(truncate(abs(value)) >> P::kShift);
    float codes[kLanes];
    store(codes, reduce_groups<P::kGroup>(Add{}, digits * load(tables.places)));
    for (int g = 0; g < kLanes / P::kGroup; ++g)
        points[g] = tables.index[(int)codes[g * P::kGroup]];
    return to_bits(value < broadcast(0.0f));
}

// The 16 levels of 16 / P::kGroup points.
template <class P>
RAMGGUF_INLINE IntLanes levels_of(const uint16_t* points, uint32_t signs) {
    uint8_t magnitudes[kLanes];
    for (int g = 0; g < kLanes / P::kGroup; ++g) {
        std::memcpy(magnitudes + P::kGroup * g, codebook_tables<P>().points[points[g]], P::kGroup);
    }
    const IntLanes magnitude = load_u8(magnitudes);
    return select(lanes_with_bit(signs), broadcast(0) - magnitude, magnitude);
}

// --- fields that two formats have in common ---

// Scales of sub-blocks of 16, two to a byte.
template <class Fit>
RAMGGUF_INLINE void pack_scales_of_16(const Fit& fit, uint8_t* out) {
    for (int i = 0; i < 8; ++i) {
        out[i] = (uint8_t)(fit.scale_of(2 * i) | fit.scale_of(2 * i + 1) << 4);
    }
}

template <class Fit>
RAMGGUF_INLINE void unpack_scales_of_16(const uint8_t* in, uint16_t d, Fit& fit) {
    float fields[kLanes];
    for (int b = 0; b < 16; ++b) fields[b] = (float)(2 * (in[b / 2] >> (b % 2 * 4) & 15) + 1);
    fit.set(d, load(fields));
}

// Eight signs from seven: an even number is negative.
RAMGGUF_INLINE uint32_t with_eighth_sign(uint32_t seven) {
    return seven | (uint32_t)__builtin_parity(seven) << 7;
}

// A word of 32 bits: four times seven signs, and a scale.
RAMGGUF_INLINE uint32_t signs_and_scale(uint32_t signs, int scale) {
    uint32_t word = (uint32_t)scale << 28;
    for (int i = 0; i < 4; ++i) word |= (signs >> (8 * i) & 127) << (7 * i);
    return word;
}

RAMGGUF_INLINE uint32_t signs_of_word(uint32_t word) {
    uint32_t signs = 0;
    for (int i = 0; i < 4; ++i) signs |= with_eighth_sign(word >> (7 * i) & 127) << (8 * i);
    return signs;
}

// --- the encoders ---

// A Format has Fit, Points and kTries: fields on either side of the rounded one that are tried.
template <class Format>
struct PointSearch {
    using Fit = typename Format::Fit;
    using Points = typename Format::Points;
    static constexpr int n = Fit::kBlock, kGroup = kUnit / n, kUnits = n / 16;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Fit* fits) {
        Tile<n, weighted> tile;
        Mask odd[n / kEight];
        load_magnitudes(x, importance, n_units, tile, odd);
        const PointFinder<Points, n, weighted> finder(tile);
        const LinearSolution found = guess(tile);
        const Lanes step = best_f16(found);
        const Lanes around = Fit::nearest_field(found.scale * inverse(step));
        Lanes field = around, least = finder.error(step * around);
        for (int k = 2; k < 2 * Format::kTries + 2; ++k) {
            const auto move = (float)(k % 2 ? -(k / 2 * 2) : k / 2 * 2);
            const Lanes other = clamp(around + broadcast(move), 1.0f, Fit::kLargestField);
            const Lanes error = finder.error(step * other);
            field = select(error < least, other, field);
            least = min(error, least);
        }
        take_points(finder, x, n_units, step, field, odd, fits);
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes, int j) { return fit.level(j); }

    __attribute__((noinline)) static void rtn(const float* x, Fit& fit) {
        Tile<n, false> tile;
        Mask odd[n / kEight];
        load_magnitudes(x, nullptr, 1, tile, odd);
        const PointFinder<Points, n, false> finder(tile);
        const Lanes largest = largest_of(tile);
        const LinearSolution found = {Points::rtn_scale(mean_of(tile, largest), largest),
                                      broadcast(1.0f)};
        const Lanes step = best_f16(found);
        const Lanes field = Fit::nearest_field(found.scale * inverse(step));
        take_points(finder, x, 1, step, field, odd, &fit);
    }

  private:
    template <bool weighted>
    static RAMGGUF_INLINE void load_magnitudes(const float* x, const float* importance, int n_units,
                                               Tile<n, weighted>& tile, Mask* odd) {
        load_tile<n, kGroup>(x, importance, n_units, tile);
        for (int e = 0; e < n / kEight; ++e) {
            IntLanes sign = broadcast(0);
            for (int i = kEight * e; i < kEight * (e + 1); ++i) {
                sign = sign ^ bits(tile.x[i] + broadcast(0.0f));  // -0 is not negative
                tile.x[i] = abs(tile.x[i]);
            }
            odd[e] = broadcast(0) > sign;
        }
    }

    template <bool weighted>
    static RAMGGUF_INLINE Lanes largest_of(const Tile<n, weighted>& tile) {
        Lanes largest = tile.x[0];
        for (int i = 1; i < n; ++i) largest = max(largest, tile.x[i]);
        return largest;
    }

    // The mean magnitude of each sub-block; the largest is divided by, so that no sum overflows.
    template <bool weighted>
    static RAMGGUF_INLINE Lanes mean_of(const Tile<n, weighted>& tile, Lanes largest) {
        const Lanes per_largest = inverse(largest);
        Lanes sum = broadcast(0.0f), count = broadcast(weighted ? 0.0f : (float)n);
        for (int i = 0; i < n; ++i) {
            sum = sum + tile.weigh(i, tile.x[i] * per_largest);
            if constexpr (weighted) count = count + tile.w[i];
        }
        return sum * inverse(count) * largest;
    }

    // The scales of least error if every weight took its nearest level, whether or not these are
    // points. A search over 24 scales with all points lowered the error of IQ2_S by 0.4 % more and
    // took several times as long.
    template <bool weighted>
    static RAMGGUF_INLINE LinearSolution guess(const Tile<n, weighted>& tile) {
        const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
        const Lanes mean = mean_of(tile, largest_of(tile)), per_mean = inverse(mean);
        Lanes best = zero, scale = zero, curvature = zero;
        const auto attempt = [&](Lanes per_x) {
            Lanes tl = zero, ll = zero;
            for (int i = 0; i < n; ++i) {
                const Lanes level = Points::nearest(tile.x[i] * per_x);
                const Lanes wl = tile.weigh(i, level);
                tl = tl + wl * tile.x[i];
                ll = ll + wl * level;
            }
            tl = tl * per_mean;
            // The error is sum(w t^2) - tl^2 / ll.
            const Mask better = tl * tl > best * ll;
            const Lanes fitted = tl / select(better, ll, one);
            best = select(better, fitted * tl, best);
            scale = select(better, fitted, scale);
            curvature = select(better, ll, curvature);
        };
        for (int k = 2; k < 10; ++k) attempt(per_mean * broadcast(100.0f / (float)k));
        attempt(per_mean * inverse(scale));
        return {scale * mean, curvature};
    }

    // d / divisor, where d is the F16 to which the scales can be rounded at least error.
    static RAMGGUF_INLINE Lanes best_f16(const LinearSolution& found) {
        return best_step<kGroup>(found.scale * broadcast(Fit::kDivisor), found.curvature,
                                 (int)Fit::kLargestField, Fit::nearest_field) *
               broadcast(1.0f / Fit::kDivisor);
    }

    template <class Finder>
    static RAMGGUF_INLINE void take_points(const Finder& finder, const float* x, int n_units,
                                           Lanes step, Lanes field, const Mask* odd, Fit* fits) {
        Lanes levels[n];
        finder.find_points(step * field, odd, levels);
        const Lanes d = step * broadcast(Fit::kDivisor);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(d, unit))), lanes_of_unit(field, unit));
        }
        // Lane b of levels[i] is weight i of sub-block b.
        for (int part = 0; part < n / kLanes; ++part) {
            Lanes* v = levels + kLanes * part;
            transpose_step<8>(v);
            transpose_step<4>(v);
            transpose_step<2>(v);
            transpose_step<1>(v);
            for (int b = 0; b < n_units * kGroup; ++b) {
                const int at = n * (b % kGroup) + kLanes * part;
                const Lanes weights = load(x + kUnit * (b / kGroup) + at);
                const Lanes level = select(weights < broadcast(0.0f), -v[b], v[b]);
                store_u8((uint8_t*)fits[b / kGroup].levels + at, truncate(level));
            }
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
