// The Fit and the search that IQ2_XXS, IQ2_XS, IQ2_S and IQ3_XXS share:
//
//   x = d * (1 + 2 scale[b]) / divisor * sign * level       scale in 0..15, levels of codebooks.h
//
// Every scale that is tried is judged by the exact error of the nearest points under it.
#pragma once
#include "formats/shared/nearest_points.h"
#include "formats/shared/superblock_scales.h"

namespace ramgguf::RAMGGUF_ISA {

#ifndef RG_MOVES
#define RG_MOVES 2
#endif
#ifndef RG_COUNT
#define RG_COUNT 6
#define RG_FIRST 0.7f
#define RG_STEP 0.12f
#endif

// --- sixteen levels with signs, from and to points and signs ---

// The numbers of the points of 16 / P::kGroup groups; bit i of the result is set where level i is
// negative.
template <class P>
RAMGGUF_INLINE uint32_t points_of(IntLanes levels, int32_t* points) {
    float places[kLanes];
    for (int i = 0; i < kLanes; ++i) places[i] = (float)power(P::kLevels, i % P::kGroup);
    const Lanes value = to_float(levels);
    const IntLanes digits = truncate(abs(value)) >> (P::kLevels == 3 ? 4 : 3);
    float codes[kLanes];
    store(codes, reduce_groups<P::kGroup>(Add{}, to_float(digits) * load(places)));
    for (int g = 0; g < kLanes / P::kGroup; ++g) {
        points[g] = codebook_tables<P>().index[(int)codes[g * P::kGroup]];
    }
    return to_bits(value < broadcast(0.0f));
}

template <class P>
RAMGGUF_INLINE IntLanes levels_of(const int32_t* points, uint32_t signs) {
    uint8_t magnitudes[kLanes];
    for (int g = 0; g < kLanes / P::kGroup; ++g) {
        std::memcpy(magnitudes + P::kGroup * g, codebook_tables<P>().points[points[g]], P::kGroup);
    }
    const IntLanes magnitude = load_u8(magnitudes);
    return select(lanes_with_bit(signs), broadcast(0) - magnitude, magnitude);
}

// block: weights of a scale; d counts as d / divisor
template <int block, int divisor>
struct PointFit {
    static constexpr int kBlock = block;
    static constexpr float kLargestField = 31.0f, kDivisor = (float)divisor;

    PerBlock scale;   // d * (1 + 2 scale[b]) / divisor
    PerBlock fields;  // 1 + 2 scale[b]
    uint16_t d;       // F16
    bool overflow;
    int8_t levels[kUnit];  // with signs

    // The nearest of 1, 3 .. 31.
    static RAMGGUF_INLINE Lanes nearest_field(Lanes v) {
        const Lanes rank =
            round_even((clamp(v, 1.0f, kLargestField) - broadcast(1.0f)) * broadcast(0.5f));
        return rank + rank + broadcast(1.0f);
    }

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

// Eight signs of seven: an even number is negative.
RAMGGUF_INLINE uint32_t with_eighth_sign(uint32_t seven) {
    return seven | (uint32_t)__builtin_parity(seven) << 7;
}

// A word of 32 bits of four times seven signs and a scale.
RAMGGUF_INLINE uint32_t signs_and_scale(uint32_t signs, int scale) {
    uint32_t word = (uint32_t)scale << 28;
    for (int i = 0; i < 4; ++i) word |= (signs >> (8 * i) & 127) << (7 * i);
    return word;
}

RAMGGUF_INLINE uint32_t signs_of_32(uint32_t word) {
    uint32_t signs = 0;
    for (int i = 0; i < 4; ++i) signs |= with_eighth_sign(word >> (7 * i) & 127) << (8 * i);
    return signs;
}

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
        load(x, importance, n_units, tile, odd);
        const PointFinder<Points, weighted, n> finder(tile);

        // A scale for each sub-block.
        LinearSolution found = guess(tile);
        Lanes levels[n];
#if RG_V == 1
        {
        Lanes best = broadcast(0x1p120f), scale = found.scale;
        for (int k = 0; k < RG_COUNT; ++k) {
            const Lanes tried = found.scale * broadcast((RG_FIRST + RG_STEP * (float)k));
            const Lanes error = finder.error(tried, odd);
            scale = select(error < best, tried, scale);
            best = min(error, best);
        }
        finder.points(scale, odd, levels);
        found = solve(tile, levels);
        }
#endif

        // The step that suits them, and the best of three fields for each.
        const Lanes divisor = broadcast(Fit::kDivisor), per_divisor = broadcast(1.0f / Fit::kDivisor);
        Lanes d = best_step<kGroup>(found.scale * divisor, found.curvature,
                                          (int)Fit::kLargestField, Fit::nearest_field);
        const Lanes around = Fit::nearest_field(found.scale * inverse(d * per_divisor));
        Lanes field = around, least = finder.error(d * per_divisor * around, odd);
        constexpr float moves[2] = {2.0f, -2.0f};
        for (int mv = 0; mv < RG_MOVES; ++mv) { const float move = moves[mv];
            const Lanes other = clamp(around + broadcast(move), 1.0f, Fit::kLargestField);
            const Lanes error = finder.error(d * per_divisor * other, odd);
            field = select(error < least, other, field);
            least = min(error, least);
        }
        finder.points(d * per_divisor * field, odd, levels);
#ifdef RG_REFIT
        {
            // The step of least error for these points.
            const LinearSolution s = solve(tile, levels);
            const Lanes num = reduce_groups<kGroup>(Add{}, s.scale * s.curvature * field);
            const Lanes den = reduce_groups<kGroup>(Add{}, s.curvature * field * field);
            d = round_to_f16(num * inverse(den) * divisor);
            if (RG_REFIT) finder.points(d * per_divisor * field, odd, levels);
        }
#endif
        keep(x, n_units, d, field, levels, fits);
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes, int j) { return fit.level(j); }

    static RAMGGUF_INLINE void rtn(const float* x, Fit& out) { fit<false>(x, nullptr, 1, &out); }

    // Fills the tile with magnitudes.
    template <bool weighted>
    static RAMGGUF_INLINE void load(const float* x, const float* importance, int n_units,
                                    Tile<n, weighted>& tile, Mask* odd) {
        load_tile<n, kGroup>(x, importance, n_units, tile);
        for (int e = 0; e < n / kEight; ++e) {
            IntLanes sign = broadcast(0);
            for (int i = kEight * e; i < kEight * (e + 1); ++i) {
                sign = sign ^ bits(tile.x[i] + broadcast(0.0f));
                tile.x[i] = abs(tile.x[i]);
            }
            odd[e] = broadcast(0) > sign;
        }
    }

    // The scales of least error if every weight took its nearest level, whether or not these are
    // points.
    template <bool weighted>
    static RAMGGUF_INLINE LinearSolution guess(const Tile<n, weighted>& tile) {
        const Lanes per_mean = inverse(mean_of(tile));
        const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
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
            const Mask better = tl * tl > best * ll;
            const Lanes fitted = tl / select(better, ll, one);
            best = select(better, fitted * tl, best);
            scale = select(better, fitted, scale);
            curvature = select(better, ll, curvature);
        };
        for (int k = 0; k < RG_PC; ++k) attempt(per_mean * broadcast(1/(RG_PF + RG_PS * (float)k)));
        const Lanes mean = inverse(per_mean);
        if (RG_LL) attempt(inverse(scale * mean));
        return {scale * mean, curvature};
    }

    // The mean magnitude of each sub-block.
    template <bool weighted>
    static RAMGGUF_INLINE Lanes mean_of(const Tile<n, weighted>& tile) {
        Lanes sum = broadcast(0.0f), count = broadcast(weighted ? 0.0f : (float)n);
        for (int i = 0; i < n; ++i) {
            sum = sum + tile.weigh(i, tile.x[i]);
            if constexpr (weighted) count = count + tile.w[i];
        }
        return sum * inverse(count);
    }

    template <bool weighted>
    static RAMGGUF_INLINE LinearSolution solve(const Tile<n, weighted>& tile, const Lanes* levels) {
        Lanes lx = broadcast(0.0f), ll = lx;
        for (int i = 0; i < n; ++i) {
            const Lanes wl = tile.weigh(i, levels[i]);
            lx = lx + wl * tile.x[i];
            ll = ll + wl * levels[i];
        }
        return {lx * inverse(ll), ll};
    }

    static RAMGGUF_INLINE void keep(const float* x, int n_units, Lanes d, Lanes field,
                                    Lanes* levels, Fit* fits) {
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
                const Lanes weights = ramgguf::RAMGGUF_ISA::load(x + kUnit * (b / kGroup) + at);
                const Lanes value = select(weights < broadcast(0.0f), -v[b], v[b]);
                store_u8((uint8_t*)fits[b / kGroup].levels + at, truncate(value));
            }
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
