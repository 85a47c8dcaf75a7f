// Statistics of rows of logits; compiled once per ISA level, in namespace ramgguf::RAMGGUF_ISA.
#include "logits.h"

#include <float.h>
#include <math.h>

#include "logits_lanes.h"

#define RAMGGUF_STRING2(x) #x
#define RAMGGUF_STRING(x) RAMGGUF_STRING2(x)

namespace ramgguf::RAMGGUF_ISA {
namespace {

// A row's largest logit and where it stands; broken when a logit is NaN or +inf or none is finite.
struct Peak {
    float value;
    int32_t index;
    int32_t broken;
};

// The last, partial group of a row, filled up with -inf, which adds nothing to any statistic.
struct Tail {
    float values[kGroup];

    Tail(const float* row, size_t begin, size_t end) {
        for (size_t i = 0; i < kGroup; ++i) {
            values[i] = begin + i < end ? row[begin + i] : -INFINITY;
        }
    }
};

Peak find_peak(const float* row, size_t n) {
    NativeF value[kParts];
    NativeI index[kParts], bad[kParts];
    for (size_t part = 0; part < kParts; ++part) {
        value[part] = NativeF{} - INFINITY;
        index[part] = bad[part] = NativeI{};
    }
    const auto add = [&](const float* x, size_t begin) {
        const NativeI here = NativeI{} + static_cast<int32_t>(begin);
        for (size_t part = 0; part < kParts; ++part) {
            const NativeF v = load(x, 0, part);
            const NativeI better = v > value[part];
            value[part] = better ? v : value[part];
            index[part] = better ? here : index[part];
            bad[part] |= ~(v <= FLT_MAX);
        }
    };
    const size_t whole = n - n % kLanes;
    for (size_t i = 0; i < whole; i += kLanes) add(row + i, i);
    if (whole < n) add(Tail(row, whole, n).values, whole);

    float values[kLanes];
    int32_t indices[kLanes], bads[kLanes];
    memcpy(values, value, sizeof values);
    memcpy(indices, index, sizeof indices);
    memcpy(bads, bad, sizeof bads);
    Peak peak = {-INFINITY, 0, 0};
    for (size_t i = 0; i < kLanes; ++i) {
        const int32_t at = indices[i] + static_cast<int32_t>(i);
        const bool first = values[i] == peak.value && at < peak.index;
        if (values[i] > peak.value || first) {
            peak.value = values[i];
            peak.index = at;
        }
        if (bads[i]) peak.broken = 1;
    }
    if (!(peak.value >= -FLT_MAX)) peak.broken = 1;
    return peak;
}

RowScore finish(const Peak& peak, double sum_exp, float target_logit) {
    const double log_sum_exp = static_cast<double>(peak.value) + log(sum_exp);
    const double nll = log_sum_exp - static_cast<double>(target_logit);
    const bool impossible = !(nll <= DBL_MAX);
    return {log_sum_exp, nll, exp(-nll), peak.index, peak.broken || impossible};
}

// Calls visit with groups of 64 logits at a time; the last one is filled up with -inf.
template <class Visit>
inline void for_groups(const float* row, size_t n, const Visit& visit) {
    const size_t whole = n - n % kGroup;
    for (size_t i = 0; i < whole; i += kGroup) visit(row + i);
    if (whole < n) visit(Tail(row, whole, n).values);
}

RowScore score_row(const float* row, size_t n, int32_t target) {
    const Peak peak = find_peak(row, n);
    Sums sums;
    for_groups(row, n, [&](const float* x) {
        for (size_t part = 0; part < kParts; ++part) {
            NativeF p[4];
            for (size_t k = 0; k < 4; ++k) p[k] = exp_nonpositive(load(x, k, part) - peak.value);
            sums.add(part, (p[0] + p[1]) + (p[2] + p[3]));
        }
    });
    return finish(peak, sums.total(), row[target]);
}

// With e_i = exp(a_i - max a): KLD = sum e_i (a_i - b_i) / sum e_i - lse(a) + lse(b). Equal rows
// give exactly 0. Tokens that the reference gives no probability to count nothing.
RowDivergence compare_row(const float* reference, const float* candidate, size_t n,
                          int32_t target) {
    const Peak peak_a = find_peak(reference, n);
    const Peak peak_b = find_peak(candidate, n);
    Sums sum_a, sum_b, sum_difference;
    const auto add = [&](const float* x, const float* y) {
        for (size_t part = 0; part < kParts; ++part) {
            NativeF p[4], q[4], d[4];
            for (size_t k = 0; k < 4; ++k) {
                const NativeF a = load(x, k, part), b = load(y, k, part), zero = {};
                p[k] = exp_nonpositive(a - peak_a.value);
                q[k] = exp_nonpositive(b - peak_b.value);
                d[k] = p[k] > 0.0f ? p[k] * (a - b) : zero;
            }
            sum_a.add(part, (p[0] + p[1]) + (p[2] + p[3]));
            sum_b.add(part, (q[0] + q[1]) + (q[2] + q[3]));
            sum_difference.add(part, (d[0] + d[1]) + (d[2] + d[3]));
        }
    };
    const size_t whole = n - n % kGroup;
    for (size_t i = 0; i < whole; i += kGroup) add(reference + i, candidate + i);
    if (whole < n) add(Tail(reference, whole, n).values, Tail(candidate, whole, n).values);

    const double total_a = sum_a.total();
    const RowScore a = finish(peak_a, total_a, reference[target]);
    const RowScore b = finish(peak_b, sum_b.total(), candidate[target]);
    const double kld = sum_difference.total() / total_a - (a.log_sum_exp - b.log_sum_exp);
    const bool infinite = !(kld <= DBL_MAX);
    return {a, b, kld, b.target_p - a.target_p, a.top == b.top, a.broken || b.broken || infinite};
}

void score(const float* logits, const int32_t* targets, size_t n_rows, size_t n_vocab,
           RowScore* out) {
    for (size_t i = 0; i < n_rows; ++i) {
        out[i] = score_row(logits + i * n_vocab, n_vocab, targets[i]);
    }
}

void compare(const float* reference, const float* candidate, const int32_t* targets, size_t n_rows,
             size_t n_vocab, RowDivergence* out) {
    for (size_t i = 0; i < n_rows; ++i) {
        const size_t row = i * n_vocab;
        out[i] = compare_row(reference + row, candidate + row, n_vocab, targets[i]);
    }
}

void exp_of_nonpositive(const float* x, size_t n, float* out) {
    for (size_t i = 0; i < n; i += kWidth) {
        const Tail group(x, i, n);
        const NativeF y = exp_nonpositive(load(group.values, 0, 0));
        for (size_t j = i; j < n && j < i + kWidth; ++j) out[j] = y[j - i];
    }
}

}  // namespace

extern const Logits logits;
const Logits logits = {RAMGGUF_STRING(RAMGGUF_ISA), score, compare, exp_of_nonpositive};

}  // namespace ramgguf::RAMGGUF_ISA
