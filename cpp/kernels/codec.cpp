// Loops over rows of block formats; compiled once per ISA level, in namespace ramgguf::RAMGGUF_ISA.
//
// A chunk of weights is decoded to floats once. Every format of the call then encodes it, decodes
// its own codes and adds up the errors, all in registers (kernels/format.h).
#include "kernels/codec.h"

#include "kernels/reader.h"
#include "kernels/weight_sums.h"
#include "lanes/float_mode.h"

namespace ramgguf::RAMGGUF_ISA {
namespace {

void compare_chunk(const Chunk& chunk, const float* q, ErrorLanes& errors) {
    Lanes largest = broadcast(0.0f);
    for (int u = 0; u < chunk.n_units; ++u, q += kUnit) {
        const float* x = chunk.x + kUnit * u;
        const float* w = chunk.w ? chunk.w + kUnit * u : nullptr;
        const auto reconstruct = [&](int j) { return load(q + kLanes * j); };
        if (chunk.wide >> u & 1) {
            add_wide_errors(x, w, q, errors);
        } else if (w) {
            largest = max(largest, add_errors<true>(x, w, errors, reconstruct));
        } else {
            largest = max(largest, add_errors<false>(x, w, errors, reconstruct));
        }
    }
    errors.max_square =
        errors.max_square > (double)max_of(largest) ? errors.max_square : (double)max_of(largest);
}

ErrorSums to_sums(const ErrorLanes& lanes) {
    ErrorSums sums;
    sums.squares = sum_of(lanes.squares);
    sums.weighted_squares = sum_of(lanes.weighted);
    sums.max_square = lanes.max_square;
    sums.overflow = lanes.overflow;
    return sums;
}

// The index of the weight of largest magnitude.
int64_t largest_of(const float* x, int64_t n) {
    int64_t found = 0;
    for (int64_t i = 1; i < n; ++i) {
        if (__builtin_fabsf(x[i]) > __builtin_fabsf(x[found])) found = i;
    }
    return found;
}

// --- what the level exports; noinline, so that nothing floats out of the FloatMode ---

__attribute__((noinline)) void decode_all(const Weights& in, float* out) {
    for (int64_t start = 0; start < in.n; start += kChunk) {
        const int64_t n = in.n - start < kChunk ? in.n - start : kChunk;
        const uint8_t* bytes = in.bytes + n_bytes(in.format, start);
        const int64_t whole = n / kUnit * kUnit;
        kFormatKernels[in.format]->decode(bytes, whole, out + start);
        if (whole < n) {
            float last[kUnit];
            kFormatKernels[in.format]->decode(bytes + n_bytes(in.format, whole), n - whole, last);
            std::memcpy(out + start + whole, last, (size_t)(n - whole) * sizeof(float));
        }
    }
}

__attribute__((noinline)) EncodeResult encode_all(const Weights& in, EncoderId encoder, int format,
                                                  uint8_t* out) {
    EncodeResult result;
    Reader reader(in);
    Chunk chunk;
    int64_t n;
    while (reader.next(chunk, n)) {
        if (!all_finite(chunk)) {
            result.first_nonfinite = reader.first_nonfinite();
            return result;
        }
        uint8_t* chunk_out = out + n_bytes(format, reader.start());
        const int unit = kFormatKernels[format]->encode[encoder](chunk.x, chunk.w, n, chunk_out);
        if (unit >= 0) {
            // Up to two units are fitted together, and then overflow together.
            const int64_t first = (int64_t)unit * kUnit;
            const int64_t some = n - first < 2 * kUnit ? n - first : 2 * kUnit;
            result.first_overflow = reader.start() + first + largest_of(chunk.x + first, some);
            return result;
        }
    }
    return result;
}

__attribute__((noinline)) void measure_all(const Weights& in, EncoderId encoder, const int* formats,
                                           int n_formats, WeightSums& sums, ErrorSums* errors) {
    ErrorLanes lanes[kFormatCount];
    WeightLanes weights;
    Reader reader(in);
    Chunk chunk;
    int64_t n;
    while (reader.next(chunk, n)) {
        if (!add_chunk(chunk, weights)) {
            sums.first_nonfinite = reader.first_nonfinite();
            break;
        }
        for (int i = 0; i < n_formats; ++i) {
            kFormatKernels[formats[i]]->measure[encoder](chunk, lanes[i]);
        }
    }
    finish(weights, sums);
    for (int i = 0; i < n_formats; ++i) errors[i] = to_sums(lanes[i]);
}

__attribute__((noinline)) void compare_all(const Weights& a, const Weights& b, WeightSums& sums,
                                           ErrorSums& error) {
    ErrorLanes lanes;
    WeightLanes weights;
    Reader reader_a(a), reader_b(b);
    Chunk chunk, other;
    int64_t n;
    while (reader_a.next(chunk, n) && reader_b.next(other, n)) {
        if (!add_chunk(chunk, weights)) {
            sums.first_nonfinite = reader_a.first_nonfinite();
            break;
        }
        lanes.overflow |= !all_finite(other);
        compare_chunk(chunk, other.x, lanes);
    }
    finish(weights, sums);
    error = to_sums(lanes);
}

void decode(const Weights& in, float* out) {
    const FloatMode mode;
    decode_all(in, out);
}

EncodeResult encode(const Weights& in, EncoderId encoder, int format, uint8_t* out) {
    const FloatMode mode;
    return encode_all(in, encoder, format, out);
}

void measure(const Weights& in, EncoderId encoder, const int* formats, int n_formats,
             WeightSums& sums, ErrorSums* errors) {
    const FloatMode mode;
    measure_all(in, encoder, formats, n_formats, sums, errors);
}

void compare(const Weights& a, const Weights& b, WeightSums& sums, ErrorSums& error) {
    const FloatMode mode;
    compare_all(a, b, sums, error);
}

}  // namespace

extern const Codec codec;
const Codec codec = {kFormats, kFormatCount, decode, encode, measure, compare};

}  // namespace ramgguf::RAMGGUF_ISA
