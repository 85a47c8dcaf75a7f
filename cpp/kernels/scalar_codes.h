// Formats with a code for every single weight, given the scales of its block. GPTQ and descent
// round their weights one by one.
#pragma once
#include <type_traits>

#include "kernels/encoders.h"

namespace ramgguf::RAMGGUF_ISA {

template <class F, class = void>
constexpr bool kScalarCodes = false;
template <class F>
constexpr bool kScalarCodes<F, std::enable_if_t<F::scalar_codes>> = true;

// The largest code, where quantize does not keep codes within their range; otherwise 0.
template <class F, class = void>
constexpr float kLargestCode = 0;
template <class F>
constexpr float kLargestCode<F, std::enable_if_t<(F::largest_code > 0)>> = F::largest_code;

// The codes nearest to x under the scales of fit; x may be anything.
template <class F>
RAMGGUF_INLINE auto nearest_code(const typename F::Fit& fit, Lanes x, int j) {
    const auto code = Search<F>::quantize(fit, x, j);
    if constexpr (kLargestCode<F> > 0) {
        return clamp(code, -kLargestCode<F>, kLargestCode<F>);
    } else {
        return code;
    }
}

}  // namespace ramgguf::RAMGGUF_ISA
