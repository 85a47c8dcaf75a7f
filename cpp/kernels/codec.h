// Block formats: what an ISA level exports. Plain data and functions only, because the code of
// every level and the dispatcher include it.
#pragma once
#include <cstdint>

#include "kernels/sums.h"

namespace ramgguf {

struct FormatInfo {
    const char* name;
    int type_id;     // ggml's
    int block_size;  // weights per block
    int block_bytes;
};

enum EncoderId { kRtn, kSearch, kEncoders };

// n weights as whole blocks of a format (an index into Codec::formats), in rows of row_length
// weights. importance is null or one non-negative float per column.
struct Weights {
    int format;
    const uint8_t* bytes;
    int64_t n;
    int64_t row_length;
    const float* importance;
};

// Why and where encoding stopped, as flat indices of weights; -1 where it did not.
struct EncodeResult {
    int64_t first_nonfinite = -1;
    int64_t first_overflow = -1;  // a weight too large for the scales of its block
};

struct Codec {
    const FormatInfo* formats;
    int n_formats;
    void (*decode)(const Weights& in, float* out);
    EncodeResult (*encode)(const Weights& in, EncoderId encoder, int format, uint8_t* out);
    // One pass over the weights for all formats; errors has n_formats entries.
    void (*measure)(const Weights& in, EncoderId encoder, const int* formats, int n_formats,
                    WeightSums& sums, ErrorSums* errors);
    // The error of b against a, added up in the order of measure.
    void (*compare)(const Weights& a, const Weights& b, WeightSums& sums, ErrorSums& error);
};

}  // namespace ramgguf
