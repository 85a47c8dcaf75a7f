// The encoder `search` for MXFP4: the best of three powers of two.
#pragma once
#include "formats/mxfp4.h"
#include "search.h"

namespace ramgguf::RAMGGUF_ISA {

template <>
struct Search<MXFP4> {
    using Fit = MXFP4::Fit;
    static constexpr int kUnits = 2;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Fit* fits) {
        Tile<32, weighted> tile;
        load_tile<32, 1>(x, importance, n_units, tile);
        Lanes largest = broadcast(0.0f);
        for (int i = 0; i < 32; ++i) largest = max(largest, abs(tile.x[i]));
        const IntLanes middle = MXFP4::exponents_for(largest);
        IntLanes best = middle;
        Lanes least = broadcast(0x1p100f);
        constexpr int moves[3] = {0, 1, -1};
        for (const int move : moves) {
            const IntLanes e = max(middle + broadcast(move), broadcast(0));
            const Lanes error = error_under(tile, MXFP4::Fit::inverse_of(e));
            // In the units of the middle power.
            const Lanes comparable = error * broadcast(move == 0 ? 1.0f : move > 0 ? 4.0f : 0.25f);
            const Mask better = comparable < least;
            least = select(better, comparable, least);
            best = select(better, e, best);
        }
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set(bits(lanes_of_unit(from_bits(best), unit)));
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return MXFP4::quantize(fit, x, j);
    }

  private:
    template <bool weighted>
    static RAMGGUF_INLINE Lanes error_under(const Tile<32, weighted>& tile, Lanes inverse_scale) {
        Lanes error = broadcast(0.0f);
        for (int i = 0; i < 32; ++i) {
            const Lanes t = abs(tile.x[i]) * inverse_scale;
            const Lanes off = t - look_up(kFp4Values, truncate(nearest_fp4(t)));
            error = error + tile.weigh(i, off) * off;
        }
        return error;
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
