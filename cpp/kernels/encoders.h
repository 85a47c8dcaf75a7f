// The encoders of block formats. An encoder fits up to kUnits<F> units of 256 weights at once, then
// quantizes their weights with those fits.
//
//   Rtn         scales from the range of a block, without a search: Format::rtn
//   Searching   scales by least squares, weighted by importance where there is any: Format::Search,
//               or Rtn for a format that has no Search
#pragma once
#include <type_traits>

#include "kernels/chunk.h"

namespace ramgguf::RAMGGUF_ISA {

// What stands for Format::Search in a format that has none.
template <class F>
struct RtnSearch {
    static constexpr int kUnits = 1;

    template <bool weighted>
    static RAMGGUF_INLINE void fit(const float* x, const float*, int, typename F::Fit* fits) {
        F::rtn(x, *fits);
    }

    static RAMGGUF_INLINE auto quantize(const typename F::Fit& fit, Lanes x, int j) {
        return F::quantize(fit, x, j);
    }
};

template <class F, class = void>
struct SearchOf {
    using type = RtnSearch<F>;
};
template <class F>
struct SearchOf<F, std::void_t<typename F::Search>> {
    using type = typename F::Search;
};
template <class F>
using Search = typename SearchOf<F>::type;

struct Rtn {
    // First the fits of a whole chunk, then its weights: a fit is a long chain of reductions and
    // divisions, and the chains of several units overlap.
    template <class F>
    static constexpr int kUnits = kChunkUnits;

    template <class F>
    static RAMGGUF_INLINE void fit(const float* x, const float*, int n, typename F::Fit* fits) {
        for (int u = 0; u < n; ++u) F::rtn(x + kUnit * u, fits[u]);
    }

    template <class F>
    static RAMGGUF_INLINE auto quantize(const typename F::Fit& fit, Lanes x, int j) {
        return F::quantize(fit, x, j);
    }
};

struct Searching {
    template <class F>
    static constexpr int kUnits = Search<F>::kUnits;

    template <class F>
    static RAMGGUF_INLINE void fit(const float* x, const float* w, int n_units,
                                   typename F::Fit* fits) {
        if (w) {
            Search<F>::template fit<true>(x, w, n_units, fits);
        } else {
            Search<F>::template fit<false>(x, w, n_units, fits);
        }
    }

    template <class F>
    static RAMGGUF_INLINE auto quantize(const typename F::Fit& fit, Lanes x, int j) {
        return Search<F>::quantize(fit, x, j);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
