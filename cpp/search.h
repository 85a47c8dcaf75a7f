// The encoder `search`: fills a format's Fit as its rtn does, but by fitting scales to the weights.
//
// Search<Format> has
//   kUnits                        the most units that it takes at once: then all lanes are in use
//   fit<weighted>(x, w, n, fits)  x and w point at n units; w is read if weighted
//   quantize(fit, x, j)           as Format::quantize, for scales that may clip
#pragma once
#include <type_traits>

#include "formats/affine.h"
#include "formats/blocks32.h"
#include "formats/symmetric.h"
#include "scale_search_super.h"

namespace ramgguf::RAMGGUF_ISA {

// What is said of formats below needs only their names.
#define X(name, id) struct name;
#include "formats.def"
#undef X

// The steps that are tried, without importance and with it. With importance more are worth their
// time: what matters may lie far from the extreme value that a step is counted from. Chosen with
// bench/encoders_error.py: the last ones added lower no error by more than half a percent, or, for
// Q3_K and Q6_K without importance, would cost more time than they are worth.
template <class Format>
struct Grids;
template <>
struct Grids<Q2_K> {
    static constexpr Grid plain{6, -1.0f, 0.3f}, weighted{12, -2.0f, 0.4f};
};
template <>
struct Grids<Q3_K> {
    static constexpr Grid plain{2, 0.0f, 0.5f}, weighted{8, -0.6f, 0.4f};
};
template <>
struct Grids<Q4_K> {
    static constexpr Grid plain{8, -2.0f, 0.4f}, weighted{16, -3.0f, 0.4f};
};
template <>
struct Grids<Q5_K> : Grids<Q4_K> {};
template <>
struct Grids<Q6_K> {
    static constexpr Grid plain{5, -2.0f, 0.6f}, weighted{12, -3.0f, 0.5f};
};
template <>
struct Grids<IQ4_NL> {
    static constexpr Grid plain{12, -30.0f, 6.0f}, weighted{16, -30.0f, 6.0f};
};
template <>
struct Grids<IQ4_XS> : Grids<IQ4_NL> {};
template <>
struct Grids<Q4_0> {
    static constexpr Grid plain{8, -1.0f, 0.4f}, weighted{12, -1.0f, 0.4f};
};
template <>
struct Grids<Q5_0> {
    static constexpr Grid plain{8, -2.0f, 0.4f}, weighted{16, -5.0f, 0.6f};
};
template <>
struct Grids<Q4_1> {
    static constexpr Grid plain{10, -1.0f, 0.2f}, weighted{20, -3.0f, 0.3f};
};
template <>
struct Grids<Q5_1> : Grids<Q4_1> {};

template <class Format, bool weighted>
constexpr Grid kGrid = weighted ? Grids<Format>::weighted : Grids<Format>::plain;

// Lanes of unit `unit` (of the one or two whose sub-blocks lie side by side) moved to the front.
RAMGGUF_INLINE Lanes lanes_of_unit(Lanes a, int unit) {
    return unit == 0 ? a : exchange<8>(a);
}

// By the kind of a format's Fit; what is not one of these has nothing to search for.
template <class Format, class Fit>
struct SearchOf {
    static constexpr int kUnits = 1;

    template <bool weighted>
    static RAMGGUF_INLINE void fit(const float* x, const float*, int, Fit* fits) {
        Format::rtn(x, *fits);
    }

    static RAMGGUF_INLINE auto quantize(const Fit& fit, Lanes x, int j) {
        return Format::quantize(fit, x, j);
    }
};

// Q2_K, Q4_K, Q5_K
template <class Format, int kBlock, int kFieldMax, int kCodeMax>
struct SearchOf<Format, AffineFit<kBlock, kFieldMax, kCodeMax>> {
    static constexpr int kUnits = kBlock / 16, kGroup = kUnit / kBlock;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              typename Format::Fit* fits) {
        Tile<kBlock, weighted> tile;
        load_tile<kBlock, kGroup>(x, importance, n_units, tile);
        const AffineScales found =
            fit_affine_scales<kCodeMax, kFieldMax, kGroup>(tile, kGrid<Format, weighted>);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(found.step, unit))),
                           f32_to_f16(first(lanes_of_unit(found.min_step, unit))),
                           lanes_of_unit(found.sub, unit), lanes_of_unit(found.sub_min, unit));
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const typename Format::Fit& fit, Lanes x, int j) {
        return Format::quantize(fit, x, j);
    }
};

// Q3_K, Q6_K, IQ4_XS
template <class Format, int kBlock, int kLowestField, int kLowestValue>
struct SearchOf<Format, SymmetricFit<kBlock, kLowestField, kLowestValue>> {
    static constexpr int kUnits = kBlock / 16, kGroup = kUnit / kBlock;
    static constexpr bool kCodebook = kLowestValue == -127;
    using Levels = std::conditional_t<kCodebook, CodebookLevels,
                                      IntegerLevels<kLowestValue, -kLowestValue - 1>>;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              typename Format::Fit* fits) {
        Tile<kBlock, weighted> tile;
        load_tile<kBlock, kGroup>(x, importance, n_units, tile);
        const LinearScales found =
            fit_linear_scales<Levels, kLowestField, -kLowestField - 1, kGroup>(
                tile, kGrid<Format, weighted>);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(found.step, unit))),
                           lanes_of_unit(found.sub, unit));
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const typename Format::Fit& fit, Lanes x, int j) {
        return Format::quantize(fit, x, j);
    }
};

template <class Format>
struct Search : SearchOf<Format, typename Format::Fit> {};

// Blocks of 32 with a scale: IQ4_NL, Q4_0, Q5_0.
template <class Format, class Levels>
struct LinearBlockSearch {
    static constexpr int kUnits = 2;
    static constexpr bool kCodebook = std::is_same_v<Levels, CodebookLevels>;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Blocks32Fit* fits) {
        Tile<32, weighted> tile;
        load_tile<32, 1>(x, importance, n_units, tile);
        const LinearSolution found = fit_linear<Levels>(tile, kGrid<Format, weighted>);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set_scale(lanes_of_unit(found.scale, unit));
            fits[unit].inverse.set(inverse_or_zero(fits[unit].scale.all()));
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const Blocks32Fit& fit, Lanes x, int j) {
        if constexpr (kCodebook) return Format::quantize(fit, x, j);
        return Levels::nearest(x * fit.inverse.at(j / 2)) - broadcast(Levels::kLow);
    }
};

// Blocks of 32 with a scale and an offset: Q4_1, Q5_1.
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

template <>
struct Search<IQ4_NL> : LinearBlockSearch<IQ4_NL, CodebookLevels> {};
template <>
struct Search<Q4_0> : LinearBlockSearch<Q4_0, IntegerLevels<-8, 7>> {};
template <>
struct Search<Q5_0> : LinearBlockSearch<Q5_0, IntegerLevels<-16, 15>> {};
template <>
struct Search<Q4_1> : AffineBlockSearch<Q4_1, 15> {};
template <>
struct Search<Q5_1> : AffineBlockSearch<Q5_1, 31> {};

}  // namespace ramgguf::RAMGGUF_ISA
