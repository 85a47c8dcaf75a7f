// The 16 values of IQ4_NL and IQ4_XS (kvalues_iq4nl of ggml-common.h), and the nearest one.
#pragma once
#include "formats/shared/least_squares.h"

namespace ramgguf::RAMGGUF_ISA {

alignas(64) static const float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                 1,    13,   25,  38,  53,  69,  89,  113};

// Bins of width 8 over -128..127. A bin holds at most one midpoint between neighbouring values: the
// first table has it (999 for none), the second the code below it.
alignas(64) static const float kIq4Midpoint[32] = {
    999, -115.5f, 999, 999,   -93.5f, 999,   -74, 999, -57, 999, -42, 999, -28.5f, 999, -16, -4.5f,
    7,   999,     19,  31.5f, 999,    45.5f, 999, 61,  999, 79,  999, 999, 101,    999, 999, 999};
alignas(64) static const
    float kIq4Below[32] = {0, 0, 1, 1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,
                           8, 9, 9, 10, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 15};

// The code of the value nearest to v; on a tie, of the larger value.
RAMGGUF_INLINE Lanes nearest_iq4(Lanes v) {
    const Lanes inside = clamp(v, -128.0f, 127.0f);
    const IntLanes bin = truncate((inside + broadcast(128.0f)) * broadcast(0.125f));
    const Lanes step =
        select(inside >= look_up(kIq4Midpoint, bin), broadcast(1.0f), broadcast(0.0f));
    return look_up(kIq4Below, bin) + step;
}

RAMGGUF_INLINE Lanes iq4_value(Lanes code) {
    return look_up(kIq4Values, truncate(code));
}

// For fits.
struct Iq4Levels {
    static constexpr float kLow = -127, kHigh = 113;
    static RAMGGUF_INLINE Lanes nearest(Lanes v) { return iq4_value(nearest_iq4(v)); }
};

}  // namespace ramgguf::RAMGGUF_ISA
