// What the kernels share: a chunk of weights as floats, the lanes that its errors are added up in,
// and the functions of a format.
#pragma once
#include "formats/shared/unit.h"
#include "kernels/codec.h"
#include "kernels/gptq.h"

namespace ramgguf::RAMGGUF_ISA {

constexpr int kChunkUnits = 8;
constexpr int kChunk = kChunkUnits * kUnit;

// A chunk of weights as floats. In a unit that is `wide` the fourth power of some weight could
// leave the range of a float, so its sums are made in double.
struct Chunk {
    const float* x;
    const float* w;  // importance, or null
    int n_units;
    uint32_t wide;  // bit u: unit u
};

// Sums over many units, lane by lane.
struct ErrorLanes {
    DoubleLanes squares = {}, weighted = {};
    double max_square = 0;
    bool overflow = false;
};

using RoundRows = int64_t (*)(const GptqRows& rows, uint8_t* out, int64_t out_stride,
                              float* errors);

// A unit of columns of the Hessian, for descent.
struct DescentUnit {
    const float* hessian;   // its diagonal part: n x n
    int64_t stride;         // of its rows
    const float* diagonal;  // n
    const float* inverse;   // n: 1 / diagonal, or 0 where that is 0
    const float* row_sums;  // 16 x kUnit: the sums of rows 16i .. 16i+15 of its diagonal part
    int n;                  // columns: at most 256, a multiple of 32
    float least_gain;       // of the error, for which scales are changed
};

// Lowers the error of one row's unit. gradient is H (w - q), 256 floats of which n count, and is
// kept up to date; change (256 floats) takes what the decoded weights were changed by. Returns
// whether anything changed.
using DescendUnit = bool (*)(const DescentUnit& unit, float* gradient, uint8_t* blocks,
                             float* change);

// The functions of a format; kernels/format.h defines them.
struct FormatKernels {
    // Floats of n <= kChunk weights, followed by zeros to the end of the last unit.
    void (*decode)(const uint8_t* in, int64_t n, float* out);
    // Returns the index of the first unit with an overflow, or -1.
    int (*encode[kEncoders])(const float* x, const float* w, int64_t n, uint8_t* out);
    void (*measure[kEncoders])(const Chunk& chunk, ErrorLanes& errors);
    // Null for formats without a code for every weight.
    RoundRows round;  // as Gptq::round
    DescendUnit descend;
};

// --- errors ---

// Adds up the errors of a unit, where reconstruct(j) decodes vector j. Returns the largest squares.
template <bool kWeighted, class Reconstruct>
RAMGGUF_INLINE Lanes add_errors(const float* x, const float* w, ErrorLanes& errors,
                                Reconstruct reconstruct) {
    Lanes squares[2] = {broadcast(0.0f), broadcast(0.0f)}, weighted = broadcast(0.0f);
    Lanes largest[2] = {broadcast(0.0f), broadcast(0.0f)};
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
        const Lanes error = load(x + kLanes * j) - reconstruct(j);
        const Lanes square = error * error;
        squares[j % 2] = squares[j % 2] + square;
        largest[j % 2] = max(largest[j % 2], square);
        if (kWeighted) weighted = weighted + load(w + kLanes * j) * square;
    }
    add_to(errors.squares, squares[0] + squares[1]);
    if (kWeighted) add_to(errors.weighted, weighted);
    return max(largest[0], largest[1]);
}

inline void add_wide_errors(const float* x, const float* w, const float* q, ErrorLanes& errors) {
    for (int i = 0; i < kUnit; ++i) {
        const double error = (double)x[i] - (double)q[i];
        const double square = error * error;
        add_to(errors.squares, i % kLanes, square);
        if (w) add_to(errors.weighted, i % kLanes, (double)w[i] * square);
        if (square > errors.max_square) errors.max_square = square;
    }
}

}  // namespace ramgguf::RAMGGUF_ISA
