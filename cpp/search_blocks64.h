// The encoder `search` for Q2_0: blocks of 64 with a scale and the levels -1..2.
#pragma once
#include "formats/q2_0.h"
#include "search.h"

namespace ramgguf::RAMGGUF_ISA {

// One of the steps puts the extreme weight on -1, so ternary blocks are found exactly.
template <>
struct Grids<Q2_0> {
    static constexpr Grid plain{7, -0.75f, 0.25f}, weighted{9, -0.75f, 0.25f};
};

template <>
struct Search<Q2_0> {
    using Fit = Q2_0::Fit;
    using Levels = IntegerLevels<-1, 2>;
    static constexpr int kUnits = 4;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Fit* fits) {
        if (n_units == 3) {  // a tile is of one, two or four
            fit<weighted>(x, importance, 2, fits);
            fit<weighted>(x + 2 * kUnit, weighted ? importance + 2 * kUnit : nullptr, 1, fits + 2);
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

}  // namespace ramgguf::RAMGGUF_ISA
