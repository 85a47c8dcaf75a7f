// The encoder `search`: fills a format's Fit as its rtn does, but by fitting scales to the weights.
//
// Search<Format>::fit takes kUnits units at once, so that all 16 lanes hold a sub-block.
#pragma once
#include "formats/affine.h"
#include "formats/symmetric.h"
#include "scale_search_super.h"

namespace ramgguf::RAMGGUF_ISA {

template <class Fit>
struct SearchFit;

template <class Format>
using Search = SearchFit<typename Format::Fit>;

// Lanes of unit `unit` (of the one or two whose sub-blocks lie side by side) moved to the front.
RAMGGUF_INLINE Lanes lanes_of_unit(Lanes a, int unit) {
    return unit == 0 ? a : exchange<8>(a);
}

template <int kBlock, int kFieldMax, int kCodeMax>
struct SearchFit<AffineFit<kBlock, kFieldMax, kCodeMax>> {
    static constexpr int kUnits = kBlock / 16;
    using Fit = AffineFit<kBlock, kFieldMax, kCodeMax>;

    template <bool weighted>
    static void fit(const float* x, const float* importance, Fit* fits) {
        constexpr int group = kUnit / kBlock;
        Tile<kBlock, weighted> tile;
        load_tile<kBlock, group>(x, importance, tile);
        constexpr Grid grid{8, -1.0f, 0.25f};
        const AffineScales found = fit_affine_scales<kCodeMax, kFieldMax, group>(tile, grid);
        for (int unit = 0; unit < kUnits; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(found.step, unit))),
                           f32_to_f16(first(lanes_of_unit(found.min_step, unit))),
                           lanes_of_unit(found.sub, unit), lanes_of_unit(found.sub_min, unit));
        }
    }
};

template <int kBlock, int kLowestField, int kLowestValue>
struct SearchFit<SymmetricFit<kBlock, kLowestField, kLowestValue>> {
    static constexpr int kUnits = kBlock / 16;
    using Fit = SymmetricFit<kBlock, kLowestField, kLowestValue>;

    template <bool weighted>
    static void fit(const float* x, const float* importance, Fit* fits) {
        constexpr int group = kUnit / kBlock;
        Tile<kBlock, weighted> tile;
        load_tile<kBlock, group>(x, importance, tile);
        const LinearScales found = search(tile);
        for (int unit = 0; unit < kUnits; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(found.step, unit))),
                           lanes_of_unit(found.sub, unit));
        }
    }

    template <class T>
    static RAMGGUF_INLINE LinearScales search(const T& tile) {
        constexpr int group = kUnit / kBlock, high = -kLowestField - 1;
        if constexpr (kLowestValue == -127) {
            constexpr Grid grid{8, -20.0f, 6.0f};
            return fit_linear_scales<CodebookLevels, kLowestField, high, group>(tile, grid);
        } else {
            constexpr Grid grid =
                kLowestValue == -4 ? Grid{10, -0.5f, 0.25f} : Grid{5, -0.9f, 0.4f};
            using Levels = IntegerLevels<kLowestValue, -kLowestValue - 1>;
            return fit_linear_scales<Levels, kLowestField, high, group>(tile, grid);
        }
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
