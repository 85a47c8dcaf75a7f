// The kernels of one format: decoding, encoding and measuring chunks, as templates over the format
// and the encoder, and rounding with error feedback.
//
// Every format is compiled in a source of its own (format.cpp.in), side by side.
#pragma once
#include "kernels/chunk.h"
#include "kernels/descent_unit.h"
#include "kernels/encoders.h"
#include "kernels/gptq_rows.h"

namespace ramgguf::RAMGGUF_ISA {

template <class F>
constexpr int kUnitBytes = kUnit / F::block_size * (int)sizeof(typename F::Block);

// --- one unit ---

template <class F>
RAMGGUF_INLINE Lanes reconstruct_int(const typename F::Fit& fit, IntLanes q, int j) {
    if constexpr (F::block_size == 1) {
        return F::reconstruct(fit, q, j);
    } else {
        return F::reconstruct(fit, to_float(q), j);
    }
}

// Formats may have a decoder of their own, Format::decode.
template <class F, class = void>
constexpr bool kOwnDecoder = false;
template <class F>
constexpr bool kOwnDecoder<F, std::void_t<decltype(&F::decode)>> = true;

template <class F>
RAMGGUF_INLINE void decode_unit(const uint8_t* in, float* out) {
    if constexpr (kOwnDecoder<F>) {
        F::decode(in, out);
    } else {
        typename F::Fit fit;
        IntLanes q[kVectors];
        F::unpack(in, fit, q);
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) {
            store(out + kLanes * j, reconstruct_int<F>(fit, q[j], j));
        }
    }
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

// --- the entry in table.h ---

#define X(name, id, block_size, block_bytes) \
    constexpr FormatInfo listed_##name = {#name, id, block_size, block_bytes};
#include "formats/formats.def"
#undef X

template <class F>
constexpr bool is_as_listed(FormatInfo listed) {
    return F::block_size == listed.block_size && sizeof(typename F::Block) == listed.block_bytes;
}

}  // namespace ramgguf::RAMGGUF_ISA

#define RAMGGUF_FORMAT_KERNELS(name)                                                           \
    namespace ramgguf::RAMGGUF_ISA {                                                           \
    static_assert(is_as_listed<name>(listed_##name), "formats.def has other sizes of " #name); \
    extern const FormatKernels kernels_of_##name;                                              \
    const FormatKernels kernels_of_##name = {                                                  \
        decode_chunk<name>,                                                                    \
        {encode_chunk<name, Rtn>, encode_chunk<name, Searching>},                              \
        {measure_chunk<name, Rtn>, measure_chunk<name, Searching>},                            \
        round_rows_of<name>(),                                                                 \
        descend_unit_of<name>()};                                                              \
    }
