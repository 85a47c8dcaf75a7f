// Sums over the weights: powers, the largest magnitude, and whether all are finite.
#pragma once
#include "kernels/chunk.h"

namespace ramgguf::RAMGGUF_ISA {

struct WeightLanes {
    DoubleLanes sum = {}, squares = {}, cubes = {}, fourths = {}, weighted = {};
    float max_square = 0;  // of the units that are not wide
    int32_t max_abs = 0;   // of the wide ones, as the bits of a float
};

constexpr int32_t kLargestFinite = 0x7f7fffff;

// The largest lane.
RAMGGUF_INLINE int32_t max_of(IntLanes a) {
    a = max(a, bits(exchange<8>(from_bits(a))));
    a = max(a, bits(exchange<4>(from_bits(a))));
    a = max(a, bits(exchange<2>(from_bits(a))));
    return max(a, bits(exchange<1>(from_bits(a)))).p[0][0];
}

// The largest magnitude of a unit, as the bits of a float. Infinity and NaN compare as the largest.
RAMGGUF_INLINE int32_t max_magnitude(const float* x) {
    IntLanes largest = broadcast(0);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
        largest = max(largest, bits(load(x + kLanes * j)) & broadcast(INT32_MAX));
    }
    return max_of(largest);
}

inline void add_wide_weights(const float* x, const float* w, WeightLanes& sums) {
    for (int i = 0; i < kUnit; ++i) {
        const double value = (double)x[i], square = value * value;
        const int lane = i % kLanes;
        add_to(sums.sum, lane, value);
        add_to(sums.squares, lane, square);
        add_to(sums.cubes, lane, square * value);
        add_to(sums.fourths, lane, square * square);
        if (w) add_to(sums.weighted, lane, (double)w[i] * square);
    }
}

// Fills chunk.wide and the sums; returns whether all weights are finite. A unit that turns out to
// be wide is summed again in double.
template <bool kWeighted>
bool add_units(Chunk& chunk, WeightLanes& sums) {
    chunk.wide = 0;
    // Only the kurtosis needs these two; a float is precise enough for a chunk of them.
    Lanes cubes = broadcast(0.0f), fourths = broadcast(0.0f);
    for (int u = 0; u < chunk.n_units; ++u) {
        const float* x = chunk.x + kUnit * u;
        const float* w = kWeighted ? chunk.w + kUnit * u : nullptr;
        const Lanes zero = broadcast(0.0f);
        Lanes sum = zero, squares = zero, weighted = zero, largest_square = zero;
        Lanes unit_cubes = zero, unit_fourths = zero;
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) {
            const Lanes value = load(x + kLanes * j), square = value * value;
            largest_square = max(largest_square, square);
            sum = sum + value;
            squares = squares + square;
            unit_cubes = unit_cubes + square * value;
            unit_fourths = unit_fourths + square * square;
            if (kWeighted) weighted = weighted + load(w + kLanes * j) * square;
        }
        const float largest = max_of(largest_square);
        // From 2^-30 to 2^30 fourth powers stay within 2^-120 .. 2^120. A NaN may hide from max,
        // not from the sum.
        const bool narrow =
            (largest >= 0x1p-60f) & (largest <= 0x1p60f) & (to_bits(sum == sum) == 0xffff);
        if (__builtin_expect(!narrow, 0)) {
            const int32_t magnitude = max_magnitude(x);
            if (magnitude > kLargestFinite) return false;
            sums.max_abs = magnitude > sums.max_abs ? magnitude : sums.max_abs;
            chunk.wide |= magnitude != 0 ? 1u << u : 0;
            add_wide_weights(x, w, sums);
            continue;
        }
        sums.max_square = largest > sums.max_square ? largest : sums.max_square;
        add_to(sums.sum, sum);
        add_to(sums.squares, squares);
        cubes = cubes + unit_cubes;
        fourths = fourths + unit_fourths;
        if (kWeighted) add_to(sums.weighted, weighted);
    }
    add_to(sums.cubes, cubes);
    add_to(sums.fourths, fourths);
    return true;
}

inline bool add_chunk(Chunk& chunk, WeightLanes& sums) {
    return chunk.w ? add_units<true>(chunk, sums) : add_units<false>(chunk, sums);
}

inline void finish(const WeightLanes& lanes, WeightSums& sums) {
    sums.sum = sum_of(lanes.sum);
    sums.squares = sum_of(lanes.squares);
    sums.cubes = sum_of(lanes.cubes);
    sums.fourths = sum_of(lanes.fourths);
    sums.weighted_squares = sum_of(lanes.weighted);
    // The root of a rounded square is the number itself, exactly, where nothing over- or underflows
    // (Boldo 2015, Stupid is as stupid does: taking the square root of the square of a float).
    std::memcpy(&sums.max_abs, &lanes.max_abs, sizeof lanes.max_abs);
    const float narrow = __builtin_sqrtf(lanes.max_square);
    sums.max_abs = narrow > sums.max_abs ? narrow : sums.max_abs;
}

inline bool all_finite(const Chunk& chunk) {
    int32_t largest = 0;
    for (int u = 0; u < chunk.n_units; ++u) {
        const int32_t magnitude = max_magnitude(chunk.x + kUnit * u);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest <= kLargestFinite;
}

}  // namespace ramgguf::RAMGGUF_ISA
