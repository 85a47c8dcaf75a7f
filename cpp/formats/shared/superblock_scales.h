// Fits of the scales of superblocks: a sub-block's scale is a small integer times an F16 step.
//
// First each sub-block is fitted on its own. Then the step is the one to which the fitted scales
// can be rounded at least error, the integers are those of least error among their neighbours, and
// the step is fitted again to the resulting levels. (ggml's encoders round the fitted scales.)
#pragma once
#include "formats/shared/least_squares.h"

namespace ramgguf::RAMGGUF_ISA {

// A lane for each sub-block; steps are equal within a superblock.
struct LinearScales {
    Lanes step, sub;
};

struct AffineScales {
    Lanes step, sub, min_step, sub_min;
};

template <int low, int high>
RAMGGUF_INLINE Lanes nearest_integer(Lanes v) {
    return round_even(clamp(v, (float)low, (float)high));
}

// The integers of formats of points are odd: 1 + 2 scale, with a scale of four bits.
struct OddFields {
    static constexpr float kLargestField = 31.0f;

    // The nearest of 1, 3 .. 31.
    static RAMGGUF_INLINE Lanes nearest_field(Lanes v) {
        const Lanes rank =
            round_even((clamp(v, 1.0f, kLargestField) - broadcast(1.0f)) * broadcast(0.5f));
        return rank + rank + broadcast(1.0f);
    }
};

// For each group of lanes the best of 16 steps: the one that makes
// sum(curvature * (value - step * nearest(value / step))^2) smallest. Step i puts the value of
// largest magnitude at the integer end * (1 - i / 64).
template <int group, class Nearest>
RAMGGUF_INLINE Lanes best_step(Lanes value, Lanes curvature, int end, Nearest nearest) {
    float values[kLanes], curvatures[kLanes], extremes[kLanes], steps[kLanes];
    float share[kLanes];
    const Lanes greatest = reduce_groups<group>(Max{}, value);
    const Lanes least = reduce_groups<group>(Min{}, value);
    store(extremes, select(greatest >= -least, greatest, least));
    store(values, value);
    store(curvatures, curvature);
    for (int i = 0; i < kLanes; ++i) share[i] = (float)end * (1.0f - (float)i / 64);
    for (int first_lane = 0; first_lane < kLanes; first_lane += group) {
        const Lanes step = round_to_f16(broadcast(extremes[first_lane]) / load(share));
        const Lanes per_step = inverse(step);
        Lanes cost = broadcast(0.0f);
        for (int j = first_lane; j < first_lane + group; ++j) {
            const Lanes v = broadcast(values[j]);
            const Lanes off = v - step * nearest(v * per_step);
            cost = cost + broadcast(curvatures[j]) * off * off;
        }
        const Mask cheapest = cost == reduce_all(Min{}, cost);
        float tried[kLanes];
        store(tried, step);
        const uint32_t found = to_bits(cheapest);
        // A step that overflows makes every cost NaN; the first one then reports the overflow.
        const float chosen = tried[found != 0 ? __builtin_ctz(found) : 0];
        for (int j = first_lane; j < first_lane + group; ++j) steps[j] = chosen;
    }
    return load(steps);
}

// --- x ~ step * sub * level ---

template <class Levels, int low, int high, int group, int n, bool weighted>
RAMGGUF_INLINE LinearScales fit_linear_scales(const Tile<n, weighted>& tile, Grid grid) {
    const LinearSolution fit = fit_linear<Levels>(tile, grid);
    const auto nearest = [](Lanes v) { return nearest_integer<low, high>(v); };
    const Lanes step = best_step<group>(fit.scale, fit.curvature, low, nearest);
    return {step, nearest(fit.scale * inverse(step))};
}

// --- x ~ step * sub * level - min_step * sub_min ---

template <int n_max, int n, bool weighted>
RAMGGUF_INLINE Lanes affine_error(const Tile<n, weighted>& tile, Lanes scale, Lanes per_scale,
                                  Lanes minimum) {
    Lanes error = broadcast(0.0f);
    for (int i = 0; i < n; ++i) {
        const Lanes v = tile.x[i] + minimum;
        const Lanes off = v - scale * round_even(clamp(v * per_scale, 0.0f, (float)n_max));
        error = error + tile.weigh(i, off) * off;
    }
    return error;
}

// Tries the first `count` of the nine pairs of integers around the given ones on the weights and
// returns the best; `error` takes its error. Pairs that keep the middle of the range come first: a
// larger scale with a larger minimum.
template <int count, int n_max, int s_max, int n, bool weighted>
RAMGGUF_INLINE AffineScales try_neighbours(const Tile<n, weighted>& tile, AffineScales around,
                                           Lanes& error) {
    constexpr int moves[9][2] = {{0, 0}, {1, 1},  {-1, -1}, {0, 1}, {0, -1},
                                 {1, 0}, {-1, 0}, {1, -1},  {-1, 1}};
    Lanes subs[3], scales[3], per_scale[3];
    for (int k = 0; k < 3; ++k) {
        subs[k] = clamp(around.sub + broadcast((float)(k - 1)), 0.0f, (float)s_max);
        scales[k] = around.step * subs[k];
        per_scale[k] = inverse(scales[k]);
    }
    AffineScales best = around;
    error = broadcast(0x1p100f);
    for (int i = 0; i < count; ++i) {
        const int k = moves[i][0] + 1;
        const Lanes sub_min =
            clamp(around.sub_min + broadcast((float)moves[i][1]), 0.0f, (float)s_max);
        const Lanes found =
            affine_error<n_max>(tile, scales[k], per_scale[k], around.min_step * sub_min);
        const Mask better = found < error;
        error = select(better, found, error);
        best.sub = select(better, subs[k], best.sub);
        best.sub_min = select(better, sub_min, best.sub_min);
    }
    return best;
}

// The steps of least error for the levels that these scales give, over each superblock.
template <int n_max, int group, int n, bool weighted>
RAMGGUF_INLINE AffineScales refit_steps(const Tile<n, weighted>& tile, AffineScales scales) {
    const Lanes zero = broadcast(0.0f);
    const Lanes minimum = scales.min_step * scales.sub_min;
    const Lanes per_scale = inverse(scales.step * scales.sub);
    AffineSums sum{weighted ? zero : broadcast((float)n), zero, zero, zero, zero, zero};
    for (int i = 0; i < n; ++i) {
        const Lanes x = tile.x[i];
        const Lanes level = round_even(clamp((x + minimum) * per_scale, 0.0f, (float)n_max));
        const Lanes wl = tile.weigh(i, level);
        if constexpr (weighted) sum.w = sum.w + tile.w[i];
        sum.t = sum.t + tile.weigh(i, x);
        sum.l = sum.l + wl;
        sum.ll = sum.ll + wl * level;
        sum.lt = sum.lt + wl * x;
    }
    const Lanes ss = reduce_groups<group>(Add{}, scales.sub * scales.sub * sum.ll);
    const Lanes sm = reduce_groups<group>(Add{}, scales.sub * scales.sub_min * sum.l);
    const Lanes mm = reduce_groups<group>(Add{}, scales.sub_min * scales.sub_min * sum.w);
    const Lanes sx = reduce_groups<group>(Add{}, scales.sub * sum.lt);
    const Lanes mx = reduce_groups<group>(Add{}, scales.sub_min * sum.t);
    const Lanes det = ss * mm - sm * sm;
    // Without minima, or with all levels equal, only the step can be fitted.
    const Mask both = det > broadcast(0x1p-20f) * (ss * mm);
    const Lanes per_det = inverse(det);
    const Lanes step = round_to_f16(select(both, (sx * mm - sm * mx) * per_det, sx * inverse(ss)));
    const Lanes min_step = round_to_f16(select(both, (sx * sm - ss * mx) * per_det, zero));
    const Mask usable = (step > zero) & (min_step >= zero);
    scales.step = select(usable, step, scales.step);
    scales.min_step = select(usable, min_step, scales.min_step);
    return scales;
}

template <int n_max, int s_max, int group, int n, bool weighted>
RAMGGUF_INLINE AffineScales fit_affine_scales(const Tile<n, weighted>& tile, Grid grid) {
    const AffineSolution fit = fit_affine<n_max, false>(tile, grid);
    const Lanes zero = broadcast(0.0f);
    const Lanes mean = fit.l * inverse(fit.w);
    AffineScales first;
    const auto nearest = [](Lanes v) { return nearest_integer<0, s_max>(v); };
    first.step = best_step<group>(fit.scale, max(fit.ll - fit.l * mean, zero), s_max, nearest);
    first.sub = nearest(fit.scale * inverse(first.step));
    // The minimum that suits the rounded scale.
    const Lanes minimum = max((first.step * first.sub - fit.scale) * mean - fit.offset, zero);
    first.min_step = best_step<group>(minimum, fit.w, s_max, nearest);
    first.sub_min = nearest(minimum * inverse(first.min_step));

    Lanes first_error, second_error;
    first = try_neighbours<9, n_max, s_max>(tile, first, first_error);
    AffineScales second = refit_steps<n_max, group>(tile, first);
    second = try_neighbours<5, n_max, s_max>(tile, second, second_error);
    const Mask better =
        reduce_groups<group>(Add{}, second_error) < reduce_groups<group>(Add{}, first_error);
    return {select(better, second.step, first.step), select(better, second.sub, first.sub),
            select(better, second.min_step, first.min_step),
            select(better, second.sub_min, first.sub_min)};
}

}  // namespace ramgguf::RAMGGUF_ISA
