// All that an ISA level exports for rows of logits. Included by per-level objects and by the
// dispatcher.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace ramgguf {

// What one row of logits says about its target token. Natural logarithms; top is the most
// probable token, the lowest id on ties. A broken row (a NaN, +inf, no finite logit, or a target
// of probability 0) has no meaningful numbers.
struct RowScore {
    double log_sum_exp;
    double nll;
    double target_p;
    int32_t top;
    int32_t broken;
};

// A row against a reference row: KLD = KL(reference || candidate); delta_p is the target's
// probability under the candidate minus that under the reference.
struct RowDivergence {
    RowScore reference;
    RowScore candidate;
    double kld;
    double delta_p;
    int32_t same_top;
    int32_t broken;
};

struct Logits {
    const char* isa;
    // Rows are contiguous: row i starts at logits + i * n_vocab. Targets are in [0, n_vocab).
    void (*score)(const float* logits, const int32_t* targets, size_t n_rows, size_t n_vocab,
                  RowScore* out);
    void (*compare)(const float* reference, const float* candidate, const int32_t* targets,
                    size_t n_rows, size_t n_vocab, RowDivergence* out);
    // e^x for x <= 0, the function that the sums are made of: below 2 ulp, 0 below -87, NaN for
    // NaN.
    void (*exp_nonpositive)(const float* x, size_t n, float* out);
};

}  // namespace ramgguf
