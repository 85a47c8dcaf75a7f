// GPTQ for one format (Frantar et al. 2022, arXiv 2210.17323, algorithm 1), as templates over it.
//
// The columns of a weight are rounded one after the other. Each one's error is handed on to the
// columns after it, as far as the correlation of their inputs lets them make up for it. The encoder
// `search` fits the scales of a block to the weights as they stand when the first column of the
// block is reached: for a superblock, once for all of its 256 columns.
//
// Several rows go side by side: rounding one weight is a long chain of operations, and the chains
// of different rows overlap. Blocks smaller than a unit are fitted for as many rows as make a unit.
#pragma once
#include "kernels/gptq.h"
#include "kernels/scalar_codes.h"

namespace ramgguf::RAMGGUF_ISA {

constexpr int kRowsTogether = 16;

// The units of columns of some rows while they are rounded.
struct alignas(64) Sweep {
    float x[kRowsTogether][kUnit];
    float errors[kRowsTogether][kUnit];
    int32_t codes[kRowsTogether][kUnit];
};

template <class F>
struct RowSweeper {
    static constexpr int kBlock = F::block_size;
    static constexpr int kBytes = (int)sizeof(typename F::Block);
    static constexpr int kSlots = kUnit / kBlock;  // rows that share a fit
    static constexpr int kFits = kRowsTogether / kSlots;
    static constexpr int kTogether = Search<F>::kUnits < kFits ? Search<F>::kUnits : kFits;

    const GptqRows& rows;
    Sweep& sweep;
    int n;  // rows of this sweep
    typename F::Fit fits[kFits];

    // Fits the blocks of all rows that begin at a column. Returns the first row whose scales
    // cannot be stored, or -1.
    RAMGGUF_INLINE int fit(int begin) {
        alignas(64) float importance[kTogether * kUnit];
        for (int i = 0; i < kTogether * kSlots; ++i) {
            std::memcpy(importance + i * kBlock, rows.importance + begin, kBlock * sizeof(float));
        }
        alignas(64) float blocks[kTogether * kUnit];
        for (int first = 0; first * kSlots < n; first += kTogether) {
            gather(first * kSlots, begin, blocks);
            Search<F>::template fit<true>(blocks, importance, kTogether, fits + first);
        }
        for (int row = 0; row < n; ++row) {
            if (fits[row / kSlots].overflow && overflows(row, begin, importance)) return row;
        }
        return -1;
    }

    // The blocks of the rows from `first` on, as kTogether units.
    RAMGGUF_INLINE void gather(int first, int begin, float* blocks) const {
        for (int i = 0; i < kTogether * kSlots; ++i) {
            float* block = blocks + i * kBlock;
            if (first + i < n) {
                std::memcpy(block, sweep.x[first + i] + begin, kBlock * sizeof(float));
            } else {
                std::memset(block, 0, kBlock * sizeof(float));
            }
        }
    }

    // Whether it is this row of those with a common fit.
    bool overflows(int row, int begin, const float* importance) const {
        alignas(64) float block[kTogether * kUnit] = {};
        std::memcpy(block, sweep.x[row] + begin, kBlock * sizeof(float));
        typename F::Fit alone[kTogether];
        Search<F>::template fit<true>(block, importance, kTogether, alone);
        return alone[0].overflow;
    }

    // Rounds column k of all rows and hands on their errors.
    RAMGGUF_INLINE void round_column(int k) {
        const int j = k / kLanes, lane = k % kLanes;
        const float* row = rows.factor + (int64_t)kUnit * k;
        alignas(64) int32_t codes[kRowsTogether][kLanes];
        alignas(64) float values[kRowsTogether][kLanes];
        for (int r = 0; r < n; ++r) {
            const typename F::Fit& fit = fits[r / kSlots];
            const int at = (r % kSlots * kBlock + k % kBlock) / kLanes;
            const IntLanes code = to_int(nearest_code<F>(fit, load(sweep.x[r] + kLanes * j), at));
            store(codes[r], code);
            store(values[r], F::reconstruct(fit, to_float(code), at));
        }
        for (int r = 0; r < n; ++r) {
            sweep.codes[r][k] = codes[r][lane];
            sweep.errors[r][k] = (sweep.x[r][k] - values[r][lane]) / row[k];
        }
        for (int r = 0; r < n; ++r) {
            const Lanes error = broadcast(sweep.errors[r][k]);
            for (int v = j; v < kVectors; ++v) {
                float* x = sweep.x[r] + kLanes * v;
                store(x, load(x) - error * load(row + kLanes * v));
            }
        }
    }

    // Writes the blocks that begin at a column; out is the first row's.
    RAMGGUF_INLINE void pack(int begin, uint8_t* out, int64_t out_stride) const {
        uint8_t bytes[kSlots * kBytes];
        for (int first = 0; first < n; first += kSlots) {
            IntLanes q[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                const int slot = v * kLanes / kBlock, row = first + slot < n ? first + slot : first;
                q[v] = load(sweep.codes[row] + begin + v * kLanes % kBlock);
            }
            F::pack(fits[first / kSlots], q, bytes);
            for (int slot = 0; slot < kSlots && first + slot < n; ++slot) {
                std::memcpy(out + (first + slot) * out_stride + begin / kBlock * kBytes,
                            bytes + slot * kBytes, kBytes);
            }
        }
    }

    // Returns the first row whose scales cannot be stored, or -1.
    RAMGGUF_INLINE int round(uint8_t* out, int64_t out_stride) {
        for (int begin = 0; begin < rows.n; begin += kBlock) {
            const int overflow = fit(begin);
            if (overflow >= 0) return overflow;
            for (int k = begin; k < begin + kBlock; ++k) round_column(k);
            pack(begin, out, out_stride);
        }
        return -1;
    }
};

// noinline, so that nothing floats out of the FloatMode
template <class F>
__attribute__((noinline)) int64_t round_rows(const GptqRows& rows, uint8_t* out, int64_t out_stride,
                                             float* errors) {
    const size_t n_bytes = (size_t)rows.n * sizeof(float);
    Sweep sweep = {};
    for (int64_t first = 0; first < rows.n_rows; first += kRowsTogether) {
        const int64_t left = rows.n_rows - first;
        RowSweeper<F> sweeper = {rows, sweep, left < kRowsTogether ? (int)left : kRowsTogether, {}};
        float* x = rows.x + first * rows.row_stride;
        for (int r = 0; r < sweeper.n; ++r) {
            std::memcpy(sweep.x[r], x + r * rows.row_stride, n_bytes);
        }
        const int overflow = sweeper.round(out + first * out_stride, out_stride);
        if (overflow >= 0) return first + overflow;
        for (int r = 0; r < sweeper.n; ++r) {
            std::memcpy(x + r * rows.row_stride, sweep.x[r], n_bytes);
            std::memcpy(errors + (first + r) * rows.n, sweep.errors[r], n_bytes);
        }
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
