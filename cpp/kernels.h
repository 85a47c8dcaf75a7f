// All that an ISA level exports for block formats. Included by per-level objects and by the
// dispatcher, so it holds plain data only.
#pragma once
#include <cstdint>

#include "row_stats.h"

namespace ramgguf {

struct FormatInfo {
    const char* name;
    int type_id;     // ggml's
    int block_size;  // weights per block
    int block_bytes;
};

enum EncoderId { kRtn, kSearch, kEncoders };

// Weights as bytes of a format (an index into Kernels::formats): n weights, whole blocks, of rows
// of row_length weights. importance is null or one non-negative float per column.
struct Weights {
    int format;
    const uint8_t* bytes;
    int64_t n;
    int64_t row_length;
    const float* importance;
};

// Where encoding had to stop, as flat indices of weights; -1: it did not.
struct EncodeResult {
    int64_t first_nonfinite = -1;
    int64_t first_overflow = -1;  // a weight too large for the scales of its block
};

struct Kernels {
    const char* isa;
    const FormatInfo* formats;
    int n_formats;
    void (*decode)(const Weights& in, float* out);
    EncodeResult (*encode)(const Weights& in, EncoderId encoder, int format, uint8_t* out);
    // One pass over the weights for all formats; errors has n_formats entries.
    void (*measure)(const Weights& in, EncoderId encoder, const int* formats, int n_formats,
                    WeightSums& sums, ErrorSums* errors);
    // The error of b against a, added up exactly as measure does.
    void (*compare)(const Weights& a, const Weights& b, WeightSums& sums, ErrorSums& error);
};

}  // namespace ramgguf
