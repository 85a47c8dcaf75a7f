// All that an ISA level exports for sums over activations. Included by per-level objects and by
// the dispatcher.
#pragma once
#include <stddef.h>

namespace ramgguf {

struct Gram {
    const char* isa;
    // gram (n x n, symmetric) += the sum of x^T x over n_rows contiguous rows x of n floats.
    // scratch holds kScratchRows rows of n rounded up to kScratchColumns.
    void (*add)(const float* x, size_t n_rows, size_t n, float* scratch, float* gram);

    static constexpr size_t kScratchRows = 128, kScratchColumns = 32;
};

}  // namespace ramgguf
