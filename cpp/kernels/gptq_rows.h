// GPTQ for one format (Frantar et al. 2022, arXiv 2210.17323, algorithm 1), as templates over it.
//
// The columns of a weight are rounded one after the other. Each one's error is handed on to the
// columns after it, as far as the correlation of their inputs lets them make up for it. The encoder
// `search` fits the scales of a block to the weights as they stand when the first column of the
// block is reached: for a superblock, once for all of its 256 columns.
#pragma once
#include "kernels/gptq.h"
#include "kernels/scalar_codes.h"

namespace ramgguf::RAMGGUF_ISA {

// One row's unit of columns while it is rounded.
struct alignas(64) Sweep {
    float x[kUnit];
    float errors[kUnit];
    int32_t codes[kUnit];
};

// Rounds columns begin .. end - 1 one by one with the scales of fit and hands on their errors.
template <class F>
RAMGGUF_INLINE void round_columns(const typename F::Fit& fit, const float* factor, int begin,
                                  int end, Sweep& sweep) {
    for (int k = begin; k < end; ++k) {
        const int j = k / kLanes;
        const IntLanes code = to_int(nearest_code<F>(fit, load(sweep.x + kLanes * j), j));
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
        std::memcpy(out + block * kBytes, bytes + block * kBytes, kBytes);
    }
    std::memcpy(x, sweep.x, (size_t)rows.n * sizeof(float));
    return stored;
}

// noinline, so that nothing floats out of the FloatMode
template <class F>
__attribute__((noinline)) int64_t round_rows(const GptqRows& rows, uint8_t* out, int64_t out_stride,
                                             float* errors) {
    for (int64_t row = 0; row < rows.n_rows; ++row) {
        float* x = rows.x + row * rows.row_stride;
        Sweep sweep = {};
        std::memcpy(sweep.x, x, (size_t)rows.n * sizeof(float));
        if (!round_row<F>(rows, x, out + row * out_stride, sweep)) return row;
        std::memcpy(errors + row * rows.n, sweep.errors, (size_t)rows.n * sizeof(float));
    }
    return -1;
}

// round_rows<F>, or null for a format that cannot be rounded weight by weight.
template <class F>
constexpr RoundRows round_rows_of() noexcept {
    if constexpr (kScalarCodes<F>) {
        return round_rows<F>;
    } else {
        return nullptr;
    }
}

}  // namespace ramgguf::RAMGGUF_ISA
