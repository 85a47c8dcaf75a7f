// Gram matrices of activations: what an ISA level exports. Plain data and functions only, because
// the code of every level and the dispatcher include it.
#pragma once
#include <stddef.h>

namespace ramgguf {

struct Gram {
    // gram (n x n, symmetric) += the sum of x^T x over n_rows contiguous rows x of n floats.
    // scratch holds kScratchRows rows of n rounded up to kScratchColumns.
    void (*add)(const float* x, size_t n_rows, size_t n, float* scratch, float* gram);

    static constexpr size_t kScratchRows = 128, kScratchColumns = 32;
};

}  // namespace ramgguf
