// Rounding with error feedback (GPTQ): what an ISA level exports. Plain data and functions only,
// because the code of every level and the dispatcher include it.
#pragma once
#include <stdint.h>

namespace ramgguf {

// A unit of columns of some rows: n columns (at most 256, whole blocks); the rows begin row_stride
// floats apart and are changed in place. factor (256 x 256, upper triangular) is the unit's part of
// the Cholesky factor U of the inverse Hessian, H^-1 = U^T U, and the identity beyond n columns.
// importance has 256 entries, zero beyond n.
struct GptqRows {
    float* x;
    int64_t n_rows;
    int64_t row_stride;
    int n;
    const float* factor;
    const float* importance;
};

struct Gptq {
    // Whether the format (an index into Codec::formats) can be rounded weight by weight.
    bool (*supports)(int format);
    // Writes the blocks of every row, out_stride bytes apart. errors takes n floats a row: each
    // column's error over the factor's diagonal, which the columns after the unit make up for.
    // Returns the first row in which a weight is too large for the scales of its block, or -1.
    int64_t (*round)(int format, const GptqRows& rows, uint8_t* out, int64_t out_stride,
                     float* errors);
};

}  // namespace ramgguf
