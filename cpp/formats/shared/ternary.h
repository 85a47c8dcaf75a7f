// What TQ1_0 and TQ2_0 share: x = d * (q - 1), q in 0..2, one F16 d per 256 weights. Models that
// were trained with ternary weights fit exactly; others lose most of their quality.
//
// The encoder gives the bytes of ggml's quantize_row_tq1_0_ref and quantize_row_tq2_0_ref: d is the
// largest magnitude, and q is rounded (ties away from zero) with d as a float, not as an F16.
#pragma once
#include "formats/shared/unit.h"

namespace ramgguf::RAMGGUF_ISA {

struct TernaryFit {
    float scale, inverse;
    uint16_t d;  // F16
    bool overflow;

    RAMGGUF_INLINE void rtn(const float* x) {
        Lanes largest = broadcast(0.0f);
        for (int j = 0; j < kVectors; ++j) largest = max(largest, abs(load(x + kLanes * j)));
        largest = reduce_all(Max{}, largest);
        inverse = first(inverse_or_zero(largest));
        set(f32_to_f16(first(largest)));
    }

    RAMGGUF_INLINE void set(uint16_t d_) {
        d = d_;
        scale = f16_to_f32(d);
        overflow = is_infinite(d);
    }

    RAMGGUF_INLINE Lanes quantize(Lanes x) const {
        const IntLanes code = round_away(x * broadcast(inverse));
        return to_float(min(max(code, broadcast(-1)), broadcast(1)) + broadcast(1));
    }

    RAMGGUF_INLINE Lanes reconstruct(Lanes q) const {
        return (q - broadcast(1.0f)) * broadcast(scale);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
