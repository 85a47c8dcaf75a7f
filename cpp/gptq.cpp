// GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1): the columns of a weight are rounded
// one after the other, and those that follow make up for each one's error as far as the inputs'
// correlation lets them. Compiled once per ISA level, in namespace ramgguf::RAMGGUF_ISA.
//
// Scales are fitted, by the encoder `search`, to the weights as they stand when the sweep enters a
// block: for a superblock once for all of its 256 columns.
#include "gptq.h"

#include <string.h>

#include <type_traits>

#include "float_mode.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q4_k.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"
#include "search.h"

#define RAMGGUF_STRING2(x) #x
#define RAMGGUF_STRING(x) RAMGGUF_STRING2(x)

// Formats whose codes stand for themselves, given the scales of their block.
#define RAMGGUF_GPTQ_FORMATS(X) \
    X(Q4_0)                     \
    X(Q4_1)                     \
    X(Q5_0)                     \
    X(Q5_1)                     \
    X(Q8_0)                     \
    X(Q2_K)                     \
    X(Q3_K)                     \
    X(Q4_K)                     \
    X(Q5_K)                     \
    X(Q6_K)                     \
    X(IQ4_NL)                   \
    X(IQ4_XS)

namespace ramgguf::RAMGGUF_ISA {
namespace {

// A row's unit while it is swept.
struct alignas(64) Sweep {
    float x[kUnit];
    float errors[kUnit];
    int32_t codes[kUnit];
};

// Search keeps codes within their range, but for Q8_0, whose scale is made for the largest weight;
// what is fed back may make others larger.
template <class F>
RAMGGUF_INLINE auto level(const typename F::Fit& fit, Lanes x, int j) {
    const auto code = Search<F>::quantize(fit, x, j);
    if constexpr (std::is_same_v<F, Q8_0>) {
        return clamp(code, -127.0f, 127.0f);
    } else {
        return code;
    }
}

// Rounds columns begin .. end with the scales of fit, in turn, and hands on their errors.
template <class F>
RAMGGUF_INLINE void round_columns(const typename F::Fit& fit, const float* factor, int begin,
                                  int end, Sweep& sweep) {
    for (int k = begin; k < end; ++k) {
        const int j = k / kLanes;
        const IntLanes code = to_int(level<F>(fit, load(sweep.x + kLanes * j), j));
        alignas(64) int32_t codes[kLanes];
        alignas(64) float values[kLanes];
        store(codes, code);
        store(values, F::reconstruct(fit, to_float(code), j));
        sweep.codes[k] = codes[k % kLanes];
        const float* row = factor + (int64_t)kUnit * k;
        const float error = (sweep.x[k] - values[k % kLanes]) / row[k];
        sweep.errors[k] = error;
        for (int v = j; v < kVectors; ++v) {
            float* x = sweep.x + kLanes * v;
            store(x, load(x) - broadcast(error) * load(row + kLanes * v));
        }
    }
}

template <class F>
RAMGGUF_INLINE void pack_codes(const typename F::Fit& fit, const Sweep& sweep, uint8_t* bytes) {
    IntLanes q[kVectors];
    for (int j = 0; j < kVectors; ++j) q[j] = load(sweep.codes + kLanes * j);
    F::pack(fit, q, bytes);
}

// Returns whether all scales could be stored.
template <class F>
bool round_row(const GptqRows& rows, float* x, uint8_t* out, Sweep& sweep) {
    constexpr int kBlock = F::block_size;
    constexpr int kBytes = (int)sizeof(typename F::Block);
    typename F::Fit fits[Search<F>::kUnits];
    bool stored = true;
    for (int begin = 0; begin < rows.n; begin += kBlock) {
        Search<F>::template fit<true>(sweep.x, rows.importance, 1, fits);
        stored &= !fits[0].overflow;
        round_columns<F>(fits[0], rows.factor, begin, begin + kBlock, sweep);
        uint8_t bytes[kUnit / kBlock * kBytes];
        pack_codes<F>(fits[0], sweep, bytes);
        const int block = begin / kBlock;
        memcpy(out + block * kBytes, bytes + block * kBytes, kBytes);
    }
    memcpy(x, sweep.x, (size_t)rows.n * sizeof(float));
    return stored;
}

// noinline, so that nothing floats out of the FloatMode
template <class F>
__attribute__((noinline)) int64_t round_rows(const GptqRows& rows, uint8_t* out, int64_t out_stride,
                                             float* errors) {
    for (int64_t row = 0; row < rows.n_rows; ++row) {
        float* x = rows.x + row * rows.row_stride;
        Sweep sweep = {};
        memcpy(sweep.x, x, (size_t)rows.n * sizeof(float));
        if (!round_row<F>(rows, x, out + row * out_stride, sweep)) return row;
        memcpy(errors + row * rows.n, sweep.errors, (size_t)rows.n * sizeof(float));
    }
    return -1;
}

using RoundRows = int64_t (*)(const GptqRows&, uint8_t*, int64_t, float*);

#define X(name) #name,
constexpr const char* kNames[] = {RAMGGUF_GPTQ_FORMATS(X)};
#undef X
#define X(name) round_rows<name>,
constexpr RoundRows kRound[] = {RAMGGUF_GPTQ_FORMATS(X)};
#undef X

int64_t round(int format, const GptqRows& rows, uint8_t* out, int64_t out_stride, float* errors) {
    const FloatMode mode;
    return kRound[format](rows, out, out_stride, errors);
}

}  // namespace

extern const Gptq gptq;
const Gptq gptq = {RAMGGUF_STRING(RAMGGUF_ISA), (int)(sizeof kNames / sizeof kNames[0]), kNames,
                   round};

}  // namespace ramgguf::RAMGGUF_ISA
