// Row loops over every block format; compiled once per ISA level, in namespace
// ramgguf::RAMGGUF_ISA.
//
// Rows of whole blocks lie one after the other, so all loops run over one stream of weights, in
// chunks that fit the first cache: a chunk is turned into floats once, and every format of the call
// encodes, decodes and adds up its errors from there, in registers.
#include "kernels.h"

#include "float_mode.h"
#include "search.h"

#define RAMGGUF_STRING2(x) #x
#define RAMGGUF_STRING(x) RAMGGUF_STRING2(x)

namespace ramgguf::RAMGGUF_ISA {

namespace {

constexpr int kChunkUnits = 8;
constexpr int kChunk = kChunkUnits * kUnit;

constexpr FormatInfo kFormats[] = {
#define X(name, id) {#name, id, name::block_size, (int)sizeof(name::Block)},
#include "formats.def"
#undef X
};
constexpr int kFormatCount = (int)(sizeof kFormats / sizeof kFormats[0]);

template <class F>
constexpr int kUnitBytes = kUnit / F::block_size * (int)sizeof(typename F::Block);

int64_t n_bytes(int format, int64_t n) {
    return n / kFormats[format].block_size * kFormats[format].block_bytes;
}

// --- one unit ---

// An encoder fits up to kUnits<F> units at once and quantizes with what it found.
struct Rtn {
    // A chunk's fits first, its weights later: a fit is a long chain of reductions and divisions,
    // and those of several units overlap.
    template <class F>
    static constexpr int kUnits = kChunkUnits;

    template <class F>
    static RAMGGUF_INLINE void fit(const float* x, const float*, int n, typename F::Fit* fits) {
        for (int u = 0; u < n; ++u) F::rtn(x + kUnit * u, fits[u]);
    }

    template <class F>
    static RAMGGUF_INLINE auto quantize(const typename F::Fit& fit, Lanes x, int j) {
        return F::quantize(fit, x, j);
    }
};

struct Searching {
    template <class F>
    static constexpr int kUnits = Search<F>::kUnits;

    template <class F>
    static RAMGGUF_INLINE void fit(const float* x, const float* w, int n_units,
                                   typename F::Fit* fits) {
        if (w) {
            Search<F>::template fit<true>(x, w, n_units, fits);
        } else {
            Search<F>::template fit<false>(x, w, n_units, fits);
        }
    }

    template <class F>
    static RAMGGUF_INLINE auto quantize(const typename F::Fit& fit, Lanes x, int j) {
        return Search<F>::quantize(fit, x, j);
    }
};

template <class F>
RAMGGUF_INLINE Lanes reconstruct_int(const typename F::Fit& fit, IntLanes q, int j) {
    if constexpr (F::block_size == 1) {
        return F::reconstruct(fit, q, j);
    } else {
        return F::reconstruct(fit, to_float(q), j);
    }
}

template <class F>
RAMGGUF_INLINE void decode_unit(const uint8_t* in, float* out) {
    typename F::Fit fit;
    IntLanes q[kVectors];
    F::unpack(in, fit, q);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
        store(out + kLanes * j, reconstruct_int<F>(fit, q[j], j));
    }
}

template <>
RAMGGUF_INLINE void decode_unit<F16>(const uint8_t* in, float* out) {
    for (int j = 0; j < kVectors; ++j) store(out + kLanes * j, load_f16(in + 2 * kLanes * j));
}

template <class F, class E>
RAMGGUF_INLINE void pack_unit(const typename F::Fit& fit, const float* x, uint8_t* out) {
    IntLanes q[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
        q[j] = to_int(E::template quantize<F>(fit, load(x + kLanes * j), j));
    }
    F::pack(fit, q, out);
}

// --- chunks: the functions of the tables below ---

// Floats of n <= kChunk weights, followed by zeros to the end of the last unit.
template <class F>
void decode_chunk(const uint8_t* in, int64_t n, float* out) {
    for (; n >= kUnit; n -= kUnit, in += kUnitBytes<F>, out += kUnit) decode_unit<F>(in, out);
    if (n > 0) {
        uint8_t bytes[kUnitBytes<F>] = {};
        std::memcpy(bytes, in, (size_t)(n / F::block_size) * sizeof(typename F::Block));
        decode_unit<F>(bytes, out);
        for (int64_t i = n; i < kUnit; ++i) out[i] = 0.0f;
    }
}

// Returns the index of the first unit with an overflow, or -1.
template <class F, class E>
int encode_chunk(const float* x, const float* w, int64_t n, uint8_t* out) {
    constexpr int step = E::template kUnits<F>;
    const int n_units = (int)((n + kUnit - 1) / kUnit);
    int overflow = -1;
    for (int first_unit = 0; first_unit < n_units; first_unit += step) {
        const int count = n_units - first_unit < step ? n_units - first_unit : step;
        const int64_t offset = (int64_t)first_unit * kUnit;
        typename F::Fit fits[step];
        E::template fit<F>(x + offset, w ? w + offset : nullptr, count, fits);
        for (int i = 0; i < count; ++i) {
            const int unit = first_unit + i;
            const float* unit_x = x + (int64_t)unit * kUnit;
            const int64_t left = n - (int64_t)unit * kUnit;
            uint8_t* unit_out = out + (int64_t)unit * kUnitBytes<F>;
            if (left >= kUnit) {
                pack_unit<F, E>(fits[i], unit_x, unit_out);
            } else {
                uint8_t bytes[kUnitBytes<F>];
                pack_unit<F, E>(fits[i], unit_x, bytes);
                std::memcpy(unit_out, bytes,
                            (size_t)(left / F::block_size) * sizeof(typename F::Block));
            }
            if (fits[i].overflow && overflow < 0) overflow = unit;
        }
    }
    return overflow;
}

// --- errors ---

// Sums over many units, lane by lane.
struct ErrorLanes {
    DoubleLanes squares = {}, weighted = {};
    double max_square = 0;
    bool overflow = false;
};

struct WeightLanes {
    DoubleLanes sum = {}, squares = {}, cubes = {}, fourths = {}, weighted = {};
    float max_square = 0;  // over the units that are not wide
    int32_t max_abs = 0;   // over those that are, as the bits of a float
};

// A chunk of weights as floats. In a unit that is `wide` some power of a weight up to the fourth
// could leave the range of a float; its sums are made in double.
struct Chunk {
    const float* x;
    const float* w;  // importance, or null
    int n_units;
    uint32_t wide;
};

// Adds the errors of a unit; reconstruct(j) is the reconstruction of vector j.
template <bool kWeighted, class Reconstruct>
RAMGGUF_INLINE Lanes add_errors(const float* x, const float* w, ErrorLanes& errors,
                                Reconstruct reconstruct) {
    Lanes squares[2] = {broadcast(0.0f), broadcast(0.0f)}, weighted = broadcast(0.0f);
    Lanes largest[2] = {broadcast(0.0f), broadcast(0.0f)};
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
        const Lanes error = load(x + kLanes * j) - reconstruct(j);
        const Lanes square = error * error;
        squares[j % 2] = squares[j % 2] + square;
        largest[j % 2] = max(largest[j % 2], square);
        if (kWeighted) weighted = weighted + load(w + kLanes * j) * square;
    }
    add_to(errors.squares, squares[0] + squares[1]);
    if (kWeighted) add_to(errors.weighted, weighted);
    return max(largest[0], largest[1]);
}

void add_wide_errors(const float* x, const float* w, const float* q, ErrorLanes& errors) {
    for (int i = 0; i < kUnit; ++i) {
        const double error = (double)x[i] - (double)q[i];
        const double square = error * error;
        add_to(errors.squares, i % kLanes, square);
        if (w) add_to(errors.weighted, i % kLanes, (double)w[i] * square);
        if (square > errors.max_square) errors.max_square = square;
    }
}

template <class F, class E, bool kWeighted>
void measure_units(const Chunk& chunk, ErrorLanes& errors) {
    constexpr int step = E::template kUnits<F>;
    typename F::Fit fits[step];
    Lanes largest = broadcast(0.0f);
    for (int u = 0; u < chunk.n_units; ++u) {
        const float* x = chunk.x + kUnit * u;
        const float* w = kWeighted ? chunk.w + kUnit * u : nullptr;
        if (u % step == 0) {
            const int left = chunk.n_units - u;
            E::template fit<F>(x, w, left < step ? left : step, fits);
        }
        const typename F::Fit& fit = fits[u % step];
        errors.overflow |= fit.overflow;
        const auto reconstruct = [&](int j) __attribute__((always_inline)) {
            return F::reconstruct(fit, E::template quantize<F>(fit, load(x + kLanes * j), j), j);
        };
        if (__builtin_expect(chunk.wide >> u & 1, 0)) {
            float q[kUnit];
            for (int j = 0; j < kVectors; ++j) store(q + kLanes * j, reconstruct(j));
            add_wide_errors(x, w, q, errors);
        } else {
            largest = max(largest, add_errors<kWeighted>(x, w, errors, reconstruct));
        }
    }
    errors.max_square =
        errors.max_square > (double)max_of(largest) ? errors.max_square : (double)max_of(largest);
}

template <class F, class E>
void measure_chunk(const Chunk& chunk, ErrorLanes& errors) {
    if (chunk.w) {
        measure_units<F, E, true>(chunk, errors);
    } else {
        measure_units<F, E, false>(chunk, errors);
    }
}

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

// --- the weights' own sums ---

constexpr int32_t kLargestFinite = 0x7f7fffff;

// The largest lane.
RAMGGUF_INLINE int32_t max_of(IntLanes a) {
    a = max(a, bits(exchange<8>(from_bits(a))));
    a = max(a, bits(exchange<4>(from_bits(a))));
    a = max(a, bits(exchange<2>(from_bits(a))));
    return max(a, bits(exchange<1>(from_bits(a)))).p[0][0];
}

// The largest magnitude of a unit as the bits of a float: NaN and infinity compare as largest.
RAMGGUF_INLINE int32_t max_magnitude(const float* x) {
    IntLanes largest = broadcast(0);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
        largest = max(largest, bits(load(x + kLanes * j)) & broadcast(INT32_MAX));
    }
    return max_of(largest);
}

void add_wide_weights(const float* x, const float* w, WeightLanes& sums) {
    for (int i = 0; i < kUnit; ++i) {
        const double value = (double)x[i], square = value * value;
        const int lane = i % kLanes;
        add_to(sums.sum, lane, value);
        add_to(sums.squares, lane, square);
        add_to(sums.cubes, lane, square * value);
        add_to(sums.fourths, lane, square * square);
        if (w) add_to(sums.weighted, lane, (double)w[i] * square);
    }
}

// Fills chunk.wide and the sums; returns whether all weights are finite. The sums of a unit that
// turns out to be wide are thrown away and made in double.
template <bool kWeighted>
bool add_units(Chunk& chunk, WeightLanes& sums) {
    chunk.wide = 0;
    // Of these two, which only the kurtosis needs, a float holds enough for a chunk.
    Lanes cubes = broadcast(0.0f), fourths = broadcast(0.0f);
    for (int u = 0; u < chunk.n_units; ++u) {
        const float* x = chunk.x + kUnit * u;
        const float* w = kWeighted ? chunk.w + kUnit * u : nullptr;
        const Lanes zero = broadcast(0.0f);
        Lanes sum = zero, squares = zero, weighted = zero, largest_square = zero;
        Lanes unit_cubes = zero, unit_fourths = zero;
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) {
            const Lanes value = load(x + kLanes * j), square = value * value;
            largest_square = max(largest_square, square);
            sum = sum + value;
            squares = squares + square;
            unit_cubes = unit_cubes + square * value;
            unit_fourths = unit_fourths + square * square;
            if (kWeighted) weighted = weighted + load(w + kLanes * j) * square;
        }
        const float largest = max_of(largest_square);
        // From 2^-30 to 2^30 fourth powers stay within 2^-120 .. 2^120. A NaN may hide from max,
        // not from the sum.
        const bool narrow =
            (largest >= 0x1p-60f) & (largest <= 0x1p60f) & (to_bits(sum == sum) == 0xffff);
        if (__builtin_expect(!narrow, 0)) {
            const int32_t magnitude = max_magnitude(x);
            if (magnitude > kLargestFinite) return false;
            sums.max_abs = magnitude > sums.max_abs ? magnitude : sums.max_abs;
            chunk.wide |= magnitude != 0 ? 1u << u : 0;
            add_wide_weights(x, w, sums);
            continue;
        }
        sums.max_square = largest > sums.max_square ? largest : sums.max_square;
        add_to(sums.sum, sum);
        add_to(sums.squares, squares);
        cubes = cubes + unit_cubes;
        fourths = fourths + unit_fourths;
        if (kWeighted) add_to(sums.weighted, weighted);
    }
    add_to(sums.cubes, cubes);
    add_to(sums.fourths, fourths);
    return true;
}

bool add_chunk(Chunk& chunk, WeightLanes& sums) {
    return chunk.w ? add_units<true>(chunk, sums) : add_units<false>(chunk, sums);
}

// --- tables ---

using DecodeChunk = void (*)(const uint8_t*, int64_t, float*);
using EncodeChunk = int (*)(const float*, const float*, int64_t, uint8_t*);
using MeasureChunk = void (*)(const Chunk&, ErrorLanes&);

constexpr DecodeChunk kDecode[] = {
#define X(name, id) decode_chunk<name>,
#include "formats.def"
#undef X
};

constexpr EncodeChunk kEncode[kEncoders][kFormatCount] = {{
#define X(name, id) encode_chunk<name, Rtn>,
#include "formats.def"
#undef X
                                                          },
                                                          {
#define X(name, id) encode_chunk<name, Searching>,
#include "formats.def"
#undef X
                                                          }};

constexpr MeasureChunk kMeasure[kEncoders][kFormatCount] = {{
#define X(name, id) measure_chunk<name, Rtn>,
#include "formats.def"
#undef X
                                                            },
                                                            {
#define X(name, id) measure_chunk<name, Searching>,
#include "formats.def"
#undef X
                                                            }};

// --- streams of weights ---

// Turns a stream of weights into chunks of floats, with the importance of their columns beside.
class Reader {
  public:
    explicit Reader(const Weights& in) : in_(in) {}

    // The next chunk; n weights of it count, zeros follow to the end of its last unit.
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
            kDecode[in_.format](bytes, n, x_);
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

    // The chunk after this one comes into the second cache while this one is worked on.
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

ErrorSums to_sums(const ErrorLanes& lanes) {
    ErrorSums sums;
    sums.squares = sum_of(lanes.squares);
    sums.weighted_squares = sum_of(lanes.weighted);
    sums.max_square = lanes.max_square;
    sums.overflow = lanes.overflow;
    return sums;
}

void finish(const WeightLanes& lanes, WeightSums& sums) {
    sums.sum = sum_of(lanes.sum);
    sums.squares = sum_of(lanes.squares);
    sums.cubes = sum_of(lanes.cubes);
    sums.fourths = sum_of(lanes.fourths);
    sums.weighted_squares = sum_of(lanes.weighted);
    // The root of a rounded square is the number itself, exactly, where nothing over- or underflows
    // (Boldo 2015, Stupid is as stupid does: taking the square root of the square of a float).
    std::memcpy(&sums.max_abs, &lanes.max_abs, sizeof lanes.max_abs);
    const float narrow = __builtin_sqrtf(lanes.max_square);
    sums.max_abs = narrow > sums.max_abs ? narrow : sums.max_abs;
}

bool all_finite(const Chunk& chunk) {
    int32_t largest = 0;
    for (int u = 0; u < chunk.n_units; ++u) {
        const int32_t magnitude = max_magnitude(chunk.x + kUnit * u);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest <= kLargestFinite;
}

// The index in the unit of its weight of largest magnitude.
int64_t largest_of_unit(const float* x) {
    int64_t found = 0;
    for (int64_t i = 1; i < kUnit; ++i) {
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
        kDecode[in.format](bytes, whole, out + start);
        if (whole < n) {
            float last[kUnit];
            kDecode[in.format](bytes + n_bytes(in.format, whole), n - whole, last);
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
        const int unit =
            kEncode[encoder][format](chunk.x, chunk.w, n, out + n_bytes(format, reader.start()));
        if (unit >= 0) {
            const int64_t first = (int64_t)unit * kUnit;
            result.first_overflow = reader.start() + first + largest_of_unit(chunk.x + first);
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
        for (int i = 0; i < n_formats; ++i) kMeasure[encoder][formats[i]](chunk, lanes[i]);
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

extern const Kernels kernels;
const Kernels kernels = {
    RAMGGUF_STRING(RAMGGUF_ISA), kFormats, kFormatCount, decode, encode, measure, compare};

}  // namespace ramgguf::RAMGGUF_ISA
