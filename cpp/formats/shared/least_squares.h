// Fits of block scales by weighted least squares: 16 sub-blocks at a time, one per lane.
//
// A fit tries a grid of steps. At each it rounds the sub-block, solves the least squares problem
// for those levels, and keeps the solution of least error. ggml's reference encoders work in the
// same way (make_qx_quants and make_qkx2_quants in ggml-quants.c); this is another implementation.
//
// A tile holds element i of sixteen sub-blocks in x[i], so no fit adds across lanes.
#pragma once
#include "formats/shared/unit.h"

namespace ramgguf::RAMGGUF_ISA {

// A block whose span is smaller becomes zeros: the smallest F16 scale is 2^-24.
constexpr float kSmallestSpan = 0x1p-40f;
// No weight counts less than this share of the most important one.
constexpr float kSmallestImportance = 0x1p-20f;

// Element i of 16 sub-blocks of n elements, and their importance unless all count alike.
template <int n, bool weighted>
struct Tile {
    Lanes x[n];
    Lanes w[weighted ? n : 1];

    RAMGGUF_INLINE Lanes weigh(int i, Lanes v) const {
        if constexpr (weighted) return w[i] * v;
        return v;
    }
};

// One step of a transposition. Let d be the distance. The lower result takes lane l from a where
// bit d of l is clear, and lane l - d from b where it is set; the upper result takes lane l + d
// from a where it is clear, and lane l from b where it is set.
template <int distance, bool upper>
RAMGGUF_INLINE Lanes interleave(const Lanes& a, const Lanes& b) {
    constexpr int d = distance;
    return each_part<Lanes>([&](int k) {
        if constexpr (d >= kPartLanes) {
            constexpr int parts = d / kPartLanes;
            if (k & parts) return upper ? b.p[k] : b.p[k - parts];
            return upper ? a.p[k + parts] : a.p[k];
        } else {
#define RAMGGUF_FROM(l) (((l) & d) ? kPartLanes + (l) - (upper ? 0 : d) : (l) + (upper ? d : 0))
#if RAMGGUF_PART_BYTES == 64
            return RAMGGUF_SHUFFLE(
                a.p[k], b.p[k], RAMGGUF_FROM(0), RAMGGUF_FROM(1), RAMGGUF_FROM(2), RAMGGUF_FROM(3),
                RAMGGUF_FROM(4), RAMGGUF_FROM(5), RAMGGUF_FROM(6), RAMGGUF_FROM(7), RAMGGUF_FROM(8),
                RAMGGUF_FROM(9), RAMGGUF_FROM(10), RAMGGUF_FROM(11), RAMGGUF_FROM(12),
                RAMGGUF_FROM(13), RAMGGUF_FROM(14), RAMGGUF_FROM(15));
#elif RAMGGUF_PART_BYTES == 32
            return RAMGGUF_SHUFFLE(a.p[k], b.p[k], RAMGGUF_FROM(0), RAMGGUF_FROM(1),
                                   RAMGGUF_FROM(2), RAMGGUF_FROM(3), RAMGGUF_FROM(4),
                                   RAMGGUF_FROM(5), RAMGGUF_FROM(6), RAMGGUF_FROM(7));
#else
            return RAMGGUF_SHUFFLE(a.p[k], b.p[k], RAMGGUF_FROM(0), RAMGGUF_FROM(1),
                                   RAMGGUF_FROM(2), RAMGGUF_FROM(3));
#endif
#undef RAMGGUF_FROM
        }
    });
}

template <int distance>
RAMGGUF_INLINE void transpose_step(Lanes* v) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & distance) continue;
        const Lanes low = interleave<distance, false>(v[i], v[i + distance]);
        v[i + distance] = interleave<distance, true>(v[i], v[i + distance]);
        v[i] = low;
    }
}

// Lane j of out[i] is x[n * (j & rows) + i].
template <int n>
RAMGGUF_INLINE void transpose(const float* x, int rows, Lanes* out) {
    static_assert(n % kLanes == 0, "whole vectors");
    for (int first = 0; first < n; first += kLanes) {
        Lanes v[kLanes];
        for (int j = 0; j < kLanes; ++j) v[j] = load(x + n * (j & rows) + first);
        transpose_step<8>(v);
        transpose_step<4>(v);
        transpose_step<2>(v);
        transpose_step<1>(v);
        for (int i = 0; i < kLanes; ++i) out[first + i] = v[i];
    }
}

// 1 / a where a is a proper number, else 0.
RAMGGUF_INLINE Lanes inverse(Lanes a) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    const Mask proper = abs(a) >= broadcast(0x1p-100f);
    return select(proper, one / select(proper, a, one), zero);
}

// Every lane holds the reduction of its group of `group` neighbours.
template <int group, class Op>
RAMGGUF_INLINE Lanes reduce_groups(Op op, Lanes a) {
    if constexpr (group >= 16) a = op(a, exchange<8>(a));
    if constexpr (group >= 8) a = op(a, exchange<4>(a));
    if constexpr (group >= 4) a = op(a, exchange<2>(a));
    if constexpr (group >= 2) a = op(a, exchange<1>(a));
    return a;
}

// Fills the tile with n_units units. A single unit of blocks of 32 fills both halves of the lanes.
// Importance is divided by the largest of its group of `group` sub-blocks, which share a step. A
// group whose importance is all zero is fitted as if all its weights were equally important.
template <int n, int group, bool weighted>
RAMGGUF_INLINE void load_tile(const float* x, const float* importance, int n_units,
                              Tile<n, weighted>& tile) {
    const int rows = n_units * (kUnit / n) - 1;
    transpose<n>(x, rows, tile.x);
    if constexpr (weighted) {
        transpose<n>(importance, rows, tile.w);
        Lanes greatest = tile.w[0];
        for (int i = 1; i < n; ++i) greatest = max(greatest, tile.w[i]);
        greatest = reduce_groups<group>(Max{}, greatest);
        const Lanes one = broadcast(1.0f);
        const Mask something = greatest >= broadcast(0x1p-100f);
        const Lanes per_greatest = one / select(something, greatest, one);
        for (int i = 0; i < n; ++i) {
            const Lanes share = max(tile.w[i] * per_greatest, broadcast(kSmallestImportance));
            tile.w[i] = select(something, share, one);
        }
    }
}

// The lanes of unit `unit` (of one or two that were fitted side by side) moved to the front.
RAMGGUF_INLINE Lanes lanes_of_unit(Lanes a, int unit) {
    return unit == 0 ? a : exchange<8>(a);
}

// --- the levels of a format ---

// Integers low..high.
template <int low, int high>
struct IntegerLevels {
    static constexpr float kLow = low, kHigh = high;
    static RAMGGUF_INLINE Lanes nearest(Lanes v) { return round_even(clamp(v, kLow, kHigh)); }
};

// --- x ~ scale * level ---

struct LinearSolution {
    Lanes scale;
    Lanes curvature;  // sum of w * level^2: the error grows by this times the deviation squared
};

// The steps that a fit tries: `count` of them; number k puts the extreme value at the last level
// + first + k * step.
//
// A format has one grid for fits without importance and a wider one with it, because an important
// weight may lie far from the extreme value. The grids were chosen with bench/encoders_error.py:
// one more step would lower no error by more than 0.5 % or, for Q3_K and Q6_K without importance,
// would take more time than it is worth.
struct Grid {
    int count;
    float first, step;
};

template <class Format, bool weighted>
constexpr Grid kGrid = weighted ? Format::weighted_grid : Format::plain_grid;

// The scale of least error. It may have either sign, because the levels are not symmetric.
template <class Levels, int n, bool weighted>
RAMGGUF_INLINE LinearSolution fit_linear(const Tile<n, weighted>& tile, Grid grid) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    Lanes low = tile.x[0], high = tile.x[0];
    for (int i = 1; i < n; ++i) {
        low = min(low, tile.x[i]);
        high = max(high, tile.x[i]);
    }
    // The unit of t is minus the extreme value.
    const Lanes unit = select(high >= -low, -high, -low);
    const Mask something = abs(unit) >= broadcast(kSmallestSpan);
    const Lanes per_unit = select(something, one / select(something, unit, one), zero);
    Lanes t[n];
    for (int i = 0; i < n; ++i) t[i] = tile.x[i] * per_unit;

    Lanes best = zero, scale = zero, curvature = zero;
    const auto attempt = [&](Lanes step) {
        Lanes tl = zero, ll = zero;
        for (int i = 0; i < n; ++i) {
            const Lanes level = Levels::nearest(t[i] * step);
            const Lanes wl = tile.weigh(i, level);
            tl = tl + wl * t[i];
            ll = ll + wl * level;
        }
        // The error is sum(w t^2) - tl^2 / ll.
        const Mask better = tl * tl > best * ll;
        const Lanes fitted = tl / select(better, ll, one);
        best = select(better, fitted * tl, best);
        scale = select(better, fitted, scale);
        curvature = select(better, ll, curvature);
    };
    for (int k = 0; k < grid.count; ++k) {
        const float beyond = grid.first + grid.step * (float)k;
        attempt(broadcast(beyond - Levels::kLow));
        attempt(broadcast(-(beyond + Levels::kHigh)));
    }
    attempt(inverse(scale));
    return {select(something, scale * unit, zero), curvature};
}

// --- x ~ scale * level + offset ---

struct AffineSolution {
    Lanes scale;     // >= 0
    Lanes offset;    // <= 0 unless positive_offset
    Lanes w, l, ll;  // sums of w, w level, w level^2: how the error grows with deviations
};

// Sums over a sub-block, with weights t and levels l: of w, wt, wtt, wl, wll, wlt.
struct AffineSums {
    Lanes w, t, tt, l, ll, lt;
};

// The scale and offset of least error for the levels 0..n_max.
template <int n_max, bool positive_offset, int n, bool weighted>
RAMGGUF_INLINE AffineSolution fit_affine(const Tile<n, weighted>& tile, Grid grid) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    Lanes low = positive_offset ? tile.x[0] : zero, high = tile.x[0];
    for (int i = 0; i < n; ++i) {
        low = min(low, tile.x[i]);
        high = max(high, tile.x[i]);
    }
    const Lanes span = high - low;
    const Mask something = span >= broadcast(kSmallestSpan);
    const Lanes per_span = select(something, one / select(something, span, one), zero);
    // t runs from 0 to 1; an offset above `limit` would be positive in x.
    const Lanes limit = positive_offset ? broadcast(0x1p100f) : -low * per_span;
    Lanes t[n];
    AffineSums sum{weighted ? zero : broadcast((float)n), zero, zero, zero, zero, zero};
    for (int i = 0; i < n; ++i) {
        t[i] = (tile.x[i] - low) * per_span;
        if constexpr (weighted) sum.w = sum.w + tile.w[i];
        const Lanes wt = tile.weigh(i, t[i]);
        sum.t = sum.t + wt;
        sum.tt = sum.tt + wt * t[i];
    }
    Lanes best = broadcast(0x1p100f);
    AffineSolution fit{zero, zero, sum.w, zero, zero};
    const Lanes fixed_offset = positive_offset ? zero : limit;
    const auto attempt = [&](auto level_of) {
        sum.l = sum.ll = sum.lt = zero;
        for (int i = 0; i < n; ++i) {
            const Lanes level = level_of(t[i]);
            const Lanes wl = tile.weigh(i, level);
            sum.l = sum.l + wl;
            sum.ll = sum.ll + wl * level;
            sum.lt = sum.lt + wl * t[i];
        }
        // Cramer's rule, with one division: by the determinant, or, where the offset would be
        // beyond its limit or the levels are all alike, by ll for the scale alone.
        const Lanes det = sum.w * sum.ll - sum.l * sum.l;
        const Lanes m_det = sum.ll * sum.t - sum.l * sum.lt;
        const Mask fixed = (m_det > limit * det) | (det <= broadcast(0x1p-100f));
        const Lanes numerator =
            select(fixed, sum.lt - fixed_offset * sum.l, sum.w * sum.lt - sum.t * sum.l);
        const Lanes denominator = inverse(select(fixed, sum.ll, det));
        const Lanes s = numerator * denominator;
        const Lanes m = select(fixed, fixed_offset, m_det * denominator);
        const Lanes two = broadcast(2.0f);
        const Lanes error =
            sum.tt + s * (s * sum.ll - two * sum.lt) + m * (m * sum.w + two * (s * sum.l - sum.t));
        const Mask better = (error < best) & (s > zero);
        best = select(better, error, best);
        fit.scale = select(better, s, fit.scale);
        fit.offset = select(better, m, fit.offset);
        fit.l = select(better, sum.l, fit.l);
        fit.ll = select(better, sum.ll, fit.ll);
    };
    for (int k = 0; k < grid.count; ++k) {
        const Lanes step = broadcast((float)n_max + grid.first + grid.step * (float)k);
        attempt([&](Lanes v) { return round_even(min(v * step, broadcast((float)n_max))); });
    }
    const Lanes per_scale = inverse(fit.scale), shift = fit.offset;
    attempt(
        [&](Lanes v) { return round_even(clamp((v - shift) * per_scale, 0.0f, (float)n_max)); });
    fit.scale = select(something, fit.scale * span, zero);
    fit.offset = fit.offset * span + low;
    return fit;
}

}  // namespace ramgguf::RAMGGUF_ISA
