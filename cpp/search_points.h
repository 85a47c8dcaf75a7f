// The encoder `search` for IQ3_S: a lane is a sub-block of 32, as in scale_search.h, and a tile's
// elements 4g..4g+3 are what a point stands for.
#pragma once
#include "formats/iq3_s.h"
#include "search.h"

namespace ramgguf::RAMGGUF_ISA {

template <>
struct Grids<IQ3_S> {
    static constexpr Grid plain{9, -2.4f, 0.6f}, weighted{13, -3.6f, 0.6f};
};

// The codes of the two points nearest to four magnitudes, as PointTables::nearest has them.
RAMGGUF_INLINE IntLanes points_near(const Lanes* t) {
    const Lanes end = broadcast(15.5f);
    const IntLanes low = truncate(min(t[0], end)) | truncate(min(t[1], end)) << 4;
    const IntLanes high = truncate(min(t[2], end)) | truncate(min(t[3], end)) << 4;
    return gather(iq3s_tables().nearest, low | high << 8);
}

RAMGGUF_INLINE Lanes magnitude_at(IntLanes code, int k) {
    const Lanes digit = to_float(code >> (3 * k) & broadcast(7));
    return digit + digit + broadcast(1.0f);
}

// The sub-blocks' scales that suit their magnitudes best, with any real factor.
template <bool weighted>
RAMGGUF_INLINE LinearSolution fit_points(const Tile<32, weighted>& tile, Lanes largest, Grid grid) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    const Mask something = largest >= broadcast(kSmallestSpan);
    const Lanes per_largest = select(something, one / select(something, largest, one), zero);
    Lanes best = zero, scale = zero, curvature = zero;
    const auto attempt = [&](Lanes step) {
        const Lanes per_x = per_largest * step;
        Lanes tl = zero, ll = zero;
        for (int g = 0; g < 32; g += 4) {
            Lanes t[4];
            for (int k = 0; k < 4; ++k) t[k] = tile.x[g + k] * per_x;
            const IntLanes code = points_near(t);
            for (int k = 0; k < 4; ++k) {
                const Lanes level = magnitude_at(code, k);
                const Lanes wl = tile.weigh(g + k, level);
                tl = tl + wl * tile.x[g + k];
                ll = ll + wl * level;
            }
        }
        tl = tl * per_largest;
        const Mask better = tl * tl > best * ll;
        const Lanes fitted = tl / select(better, ll, one);
        best = select(better, fitted * tl, best);
        scale = select(better, fitted, scale);
        curvature = select(better, ll, curvature);
    };
    for (int k = 0; k < grid.count; ++k) {
        attempt(broadcast(15.0f + grid.first + grid.step * (float)k));
    }
    attempt(inverse(scale));
    return {select(something, scale * largest, zero), curvature};
}

// The error of the sub-blocks under a scale, each four with the better of two points; calls
// keep(i, magnitude) with what element i becomes.
template <bool weighted, class Keep>
RAMGGUF_INLINE Lanes error_of_points(const Tile<32, weighted>& tile, Lanes scale, Keep keep) {
    const Lanes per_scale = inverse(scale);
    Lanes error = broadcast(0.0f);
    for (int g = 0; g < 32; g += 4) {
        Lanes t[4];
        for (int k = 0; k < 4; ++k) t[k] = tile.x[g + k] * per_scale;
        const IntLanes codes = points_near(t);
        Lanes squares[2], magnitude[2][4];
        for (int c = 0; c < 2; ++c) {
            squares[c] = broadcast(0.0f);
            for (int k = 0; k < 4; ++k) {
                magnitude[c][k] = magnitude_at(codes >> (12 * c), k);
                const Lanes off = tile.x[g + k] - scale * magnitude[c][k];
                squares[c] = squares[c] + tile.weigh(g + k, off) * off;
            }
        }
        const Mask other = squares[1] < squares[0];
        error = error + select(other, squares[1], squares[0]);
        for (int k = 0; k < 4; ++k) keep(g + k, select(other, magnitude[1][k], magnitude[0][k]));
    }
    return error;
}

template <>
struct Search<IQ3_S> {
    using Fit = IQ3_S::Fit;
    static constexpr int kUnits = 2;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Fit* fits) {
        Tile<32, weighted> tile;
        load_tile<32, 8>(x, importance, n_units, tile);
        Lanes largest = broadcast(0.0f);
        for (int i = 0; i < 32; ++i) {
            tile.x[i] = abs(tile.x[i]);
            largest = max(largest, tile.x[i]);
        }
        const LinearSolution found = fit_points(tile, largest, kGrid<IQ3_S, weighted>);
        const Lanes step =
            best_step<8>(found.scale, found.curvature, (int)Fit::kLargestField, Fit::nearest_field);
        const Lanes field = best_field(tile, step, Fit::nearest_field(found.scale * inverse(step)));
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(step, unit))),
                           lanes_of_unit(field, unit));
        }
        error_of_points(tile, step * field, [&](int i, Lanes magnitude) {
            uint8_t bytes[kLanes];
            store_u8(bytes, truncate(magnitude));
            for (int unit = 0; unit < n_units; ++unit) {
                for (int b = 0; b < 8; ++b) fits[unit].chosen[32 * b + i] = bytes[8 * unit + b];
            }
        });
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return copy_sign(to_float(load_u8(fit.chosen + kLanes * j)), x);
    }

  private:
    // The best of a field and its neighbours, tried on the weights.
    template <bool weighted>
    static RAMGGUF_INLINE Lanes best_field(const Tile<32, weighted>& tile, Lanes step,
                                           Lanes around) {
        Lanes best = around, least = broadcast(0x1p100f);
        constexpr float moves[3] = {0.0f, 2.0f, -2.0f};
        for (const float move : moves) {
            const Lanes field = clamp(around + broadcast(move), 1.0f, Fit::kLargestField);
            const Lanes error = error_of_points(tile, step * field, [](int, Lanes) {});
            const Mask better = error < least;
            least = select(better, error, least);
            best = select(better, field, best);
        }
        return best;
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
