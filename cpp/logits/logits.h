// Statistics of rows of logits: what an ISA level exports. Plain data and functions only, because
// the code of every level and the dispatcher include it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace ramgguf {

// The score of one row of logits for its target token. Natural logarithms. top is the most probable
// token, on a tie the one of lowest id. The numbers of a broken row mean nothing: it has a NaN,
// +inf, no finite logit, or a target of probability 0.
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
    // Rows are contiguous: row i starts at logits + i * n_vocab. Targets are in [0, n_vocab).
    void (*score)(const float* logits, const int32_t* targets, size_t n_rows, size_t n_vocab,
                  RowScore* out);
    void (*compare)(const float* reference, const float* candidate, const int32_t* targets,
                    size_t n_rows, size_t n_vocab, RowDivergence* out);
    // e^x for x <= 0, as the sums use it (lanes/exp.h).
    void (*exp_nonpositive)(const float* x, size_t n, float* out);
};

}  // namespace ramgguf
