// Weights of any format, read as chunks of floats.
//
// Rows of whole blocks lie one after the other, so rows do not matter to the loops: they run over
// one stream of weights, in chunks that fit the first-level cache.
#pragma once
#include "kernels/table.h"

namespace ramgguf::RAMGGUF_ISA {

// Reads a stream of weights as chunks of floats, each with the importance of its columns.
class Reader {
  public:
    explicit Reader(const Weights& in) : in_(in) {}

    // Reads the next chunk: n weights, then zeros to the end of its last unit.
    bool next(Chunk& chunk, int64_t& n) {
        start_ += n_;
        if (start_ >= in_.n) return false;
        n_ = in_.n - start_ < kChunk ? in_.n - start_ : kChunk;
        n = n_;
        chunk.n_units = (int)((n + kUnit - 1) / kUnit);
        const uint8_t* bytes = in_.bytes + n_bytes(in_.format, start_);
        prefetch_next();
        chunk.x = as_floats(bytes);
        if (!chunk.x) {
            kFormatKernels[in_.format]->decode(bytes, n, x_);
            chunk.x = x_;
        }
        x_of_chunk_ = chunk.x;
        chunk.w = nullptr;
        if (in_.importance) {
            fill_importance(chunk.n_units * kUnit);
            chunk.w = w_;
        }
        return true;
    }

    int64_t start() const { return start_; }

    // The flat index of the first weight of this chunk that is NaN or infinite, -1 if none is.
    int64_t first_nonfinite() const {
        for (int64_t i = 0; i < n_; ++i) {
            if (!(x_of_chunk_[i] - x_of_chunk_[i] == 0.0f)) return start_ + i;
        }
        return -1;
    }

  private:
    // Whole units of aligned floats need no copy.
    const float* as_floats(const uint8_t* bytes) const {
        const bool usable = kFormats[in_.format].type_id == 0 && n_ % kUnit == 0 &&
                            (uintptr_t)bytes % alignof(float) == 0;
        return usable ? (const float*)bytes : nullptr;
    }

    // Fetches the next chunk into the second-level cache while this one is worked on.
    void prefetch_next() const {
        const int64_t begin = start_ + n_;
        const int64_t end = in_.n - begin < kChunk ? in_.n : begin + kChunk;
        const int64_t stop = n_bytes(in_.format, end);
        for (int64_t at = n_bytes(in_.format, begin); at < stop; at += 64) {
            __builtin_prefetch(in_.bytes + at, 0, 2);
        }
    }

    void fill_importance(int count) {
        int64_t column = start_ % in_.row_length;
        for (int filled = 0; filled < count;) {
            const int64_t run =
                in_.row_length - column < count - filled ? in_.row_length - column : count - filled;
            std::memcpy(w_ + filled, in_.importance + column, (size_t)run * sizeof(float));
            filled += (int)run;
            column = 0;
        }
    }

    const Weights in_;
    int64_t start_ = 0, n_ = 0;
    const float* x_of_chunk_ = nullptr;
    alignas(64) float x_[kChunk];
    alignas(64) float w_[kChunk];
};

}  // namespace ramgguf::RAMGGUF_ISA
