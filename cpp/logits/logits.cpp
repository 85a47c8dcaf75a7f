// Statistics of rows of logits; compiled once per ISA level, in namespace ramgguf::RAMGGUF_ISA.
#include "logits/logits.h"

#include <float.h>
#include <math.h>

#include "lanes/float_mode.h"
#include "lanes/lanes.h"

namespace ramgguf::RAMGGUF_ISA {
namespace {

// Logits whose terms are added up in float before they go to the sums in double.
constexpr size_t kGroup = 4 * kLanes;

// A row's largest logit and its index. Broken where a logit is NaN or +inf, or none is finite.
struct Peak {
    float value;
    int32_t index;
    int32_t broken;
};

// The last, partial group of a row, filled up with -inf, which changes no statistic.
struct Tail {
    float values[kGroup];

    Tail(const float* row, size_t begin, size_t end) {
        for (size_t i = 0; i < kGroup; ++i) {
            values[i] = begin + i < end ? row[begin + i] : -INFINITY;
        }
    }
};

Peak find_peak(const float* row, size_t n) {
    Lanes value = broadcast(-INFINITY);
    IntLanes index = broadcast(0);
    Mask sound = lanes_with_bit(0xffff);  // neither NaN nor +inf
    const auto add = [&](const float* x, size_t begin) {
        const Lanes v = load(x);
        const Mask better = v > value;
        value = select(better, v, value);
        index = select(better, broadcast(static_cast<int32_t>(begin)), index);
        sound = sound & (v <= broadcast(FLT_MAX));
    };
    const size_t whole = n - n % kLanes;
    for (size_t i = 0; i < whole; i += kLanes) add(row + i, i);
    if (whole < n) add(Tail(row, whole, n).values, whole);

    float values[kLanes];
    int32_t indices[kLanes];
    store(values, value);
    store(indices, index);
    Peak peak = {-INFINITY, 0, 0};
    for (int i = 0; i < kLanes; ++i) {
        const int32_t at = indices[i] + i;
        const bool first = values[i] == peak.value && at < peak.index;
        if (values[i] > peak.value || first) {
            peak.value = values[i];
            peak.index = at;
        }
    }
    peak.broken = to_bits(sound) != 0xffff || !(peak.value >= -FLT_MAX);
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

// The sum of a group's four vectors.
RAMGGUF_INLINE Lanes sum_of_four(const Lanes (&v)[4]) {
    return (v[0] + v[1]) + (v[2] + v[3]);
}

RowScore score_row(const float* row, size_t n, int32_t target) {
    const Peak peak = find_peak(row, n);
    const Lanes top = broadcast(peak.value);
    DoubleLanes sums = {};
    for_groups(row, n, [&](const float* x) {
        Lanes p[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) p[k] = exp_nonpositive(load(x + kLanes * k) - top);
        add_to(sums, sum_of_four(p));
    });
    return finish(peak, sum_of(sums), row[target]);
}

// With e_i = exp(a_i - max a): KLD = sum e_i (a_i - b_i) / sum e_i - lse(a) + lse(b). Equal rows
// give exactly 0. Tokens of reference probability 0 add nothing.
RowDivergence compare_row(const float* reference, const float* candidate, size_t n,
                          int32_t target) {
    const Peak peak_a = find_peak(reference, n);
    const Peak peak_b = find_peak(candidate, n);
    const Lanes top_a = broadcast(peak_a.value), top_b = broadcast(peak_b.value);
    const Lanes zero = broadcast(0.0f);
    DoubleLanes sum_a = {}, sum_b = {}, sum_difference = {};
    const auto add = [&](const float* x, const float* y) {
        Lanes p[4], q[4], d[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const Lanes a = load(x + kLanes * k), b = load(y + kLanes * k);
            p[k] = exp_nonpositive(a - top_a);
            q[k] = exp_nonpositive(b - top_b);
            d[k] = select(p[k] > zero, p[k] * (a - b), zero);
        }
        add_to(sum_a, sum_of_four(p));
        add_to(sum_b, sum_of_four(q));
        add_to(sum_difference, sum_of_four(d));
    };
    const size_t whole = n - n % kGroup;
    for (size_t i = 0; i < whole; i += kGroup) add(reference + i, candidate + i);
    if (whole < n) add(Tail(reference, whole, n).values, Tail(candidate, whole, n).values);

    const double total_a = sum_of(sum_a);
    const RowScore a = finish(peak_a, total_a, reference[target]);
    const RowScore b = finish(peak_b, sum_of(sum_b), candidate[target]);
    const double kld = sum_of(sum_difference) / total_a - (a.log_sum_exp - b.log_sum_exp);
    const bool infinite = !(kld <= DBL_MAX);
    return {a, b, kld, b.target_p - a.target_p, a.top == b.top, a.broken || b.broken || infinite};
}

// --- what the level exports; noinline, so that nothing floats out of the FloatMode ---

__attribute__((noinline)) void score_all(const float* logits, const int32_t* targets, size_t n_rows,
                                         size_t n_vocab, RowScore* out) {
    for (size_t i = 0; i < n_rows; ++i) {
        out[i] = score_row(logits + i * n_vocab, n_vocab, targets[i]);
    }
}

__attribute__((noinline)) void compare_all(const float* reference, const float* candidate,
                                           const int32_t* targets, size_t n_rows, size_t n_vocab,
                                           RowDivergence* out) {
    for (size_t i = 0; i < n_rows; ++i) {
        const size_t row = i * n_vocab;
        out[i] = compare_row(reference + row, candidate + row, n_vocab, targets[i]);
    }
}

__attribute__((noinline)) void exp_all(const float* x, size_t n, float* out) {
    for (size_t i = 0; i < n; i += kLanes) {
        const Tail group(x, i, n);
        float y[kLanes];
        store(y, exp_nonpositive(load(group.values)));
        for (size_t j = i; j < n && j < i + kLanes; ++j) out[j] = y[j - i];
    }
}

void score(const float* logits, const int32_t* targets, size_t n_rows, size_t n_vocab,
           RowScore* out) {
    const FloatMode mode;
    score_all(logits, targets, n_rows, n_vocab, out);
}

void compare(const float* reference, const float* candidate, const int32_t* targets, size_t n_rows,
             size_t n_vocab, RowDivergence* out) {
    const FloatMode mode;
    compare_all(reference, candidate, targets, n_rows, n_vocab, out);
}

void exp_of_nonpositive(const float* x, size_t n, float* out) {
    const FloatMode mode;
    exp_all(x, n, out);
}

}  // namespace

extern const Logits logits;
const Logits logits = {score, compare, exp_of_nonpositive};

}  // namespace ramgguf::RAMGGUF_ISA
