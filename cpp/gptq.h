// All that an ISA level exports for rounding with error feedback. Included by per-level objects
// and by the dispatcher.
#pragma once
#include <stdint.h>

namespace ramgguf {

// Rows of one unit: n columns (at most 256, whole blocks) of row_stride floats' distance, changed
// in place. factor (256 x 256, upper triangular) is the unit's part of the Cholesky factor U of
// the inverse Hessian, H^-1 = U^T U; beyond n columns it is the identity. importance has 256
// entries, zero beyond n.
struct GptqRows {
    float* x;
    int64_t n_rows;
    int64_t row_stride;
    int n;
    const float* factor;
    const float* importance;
};

struct Gptq {
    const char* isa;
    int n_formats;
    const char* const* formats;
    // Writes the blocks of every row, out_stride bytes apart, and each column's error divided by
    // the factor's diagonal, n a row: what the columns after the unit have to make up for. Returns
    // the first row in which a weight is too large for the scales of its block, or -1.
    int64_t (*round)(int format, const GptqRows& rows, uint8_t* out, int64_t out_stride,
                     float* errors);
};

}  // namespace ramgguf
