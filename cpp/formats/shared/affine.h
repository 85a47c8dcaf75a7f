// The Fit that Q2_K, Q4_K and Q5_K share: x = d * scale * code - dmin * min, d and dmin F16 per
// superblock, scale and min small unsigned integers per sub-block.
//
// RTN: a sub-block's scale and min come from its own range [min(x, 0), max x]; d and dmin make the
// largest of them the field's largest value; fields are rounded to nearest against the rounded d
// and dmin; weights are rounded with what the decoder will see.
//
// Nearest, because rounding the fields up loses more. NMSE of Q2_K, Q4_K, Q5_K on 2 M weights of
// smol768: nearest 0.1196, 0.00726, 0.00173; mins up 0.1213, 0.00731, 0.00177; scales up 0.1336,
// 0.00746, 0.00178; both up 0.1332, 0.00743, 0.00178 (Gaussian and Student-t: the same order).
#pragma once
#include "formats/shared/superblock_scales.h"

namespace ramgguf::RAMGGUF_ISA {

template <int block, int field_max, int code_max>
struct AffineFit {
    static constexpr int kBlock = block, kFieldMax = field_max, kCodeMax = code_max;
    static constexpr int kBlocks = kUnit / kBlock;

    PerBlock scale, offset, inverse;    // d * scale, dmin * min, 1 / (d * scale) or 0
    PerBlock scale_fields, min_fields;  // whole numbers, for pack
    uint16_t d, dmin;                   // F16
    bool overflow;

    static RAMGGUF_INLINE int block_of(int vector) { return vector * kLanes / kBlock; }

    // Takes the fields as whole numbers in float lanes, for an encoder.
    RAMGGUF_INLINE void set(uint16_t d_, uint16_t dmin_, Lanes scale_fields_, Lanes min_fields_) {
        d = d_;
        dmin = dmin_;
        overflow = is_infinite(d) | is_infinite(dmin);
        scale_fields.set(scale_fields_);
        min_fields.set(min_fields_);
        set_values(broadcast(f16_to_f32(d)), broadcast(f16_to_f32(dmin)), scale_fields_,
                   min_fields_);
        inverse.set(inverse_or_zero(scale.all()));
    }

    // What the decoder multiplies with.
    RAMGGUF_INLINE void set_values(Lanes d_value, Lanes dmin_value, Lanes scale_fields_,
                                   Lanes min_fields_) {
        scale.set(d_value * scale_fields_);
        offset.set(dmin_value * min_fields_);
    }

    RAMGGUF_INLINE void rtn(const float* x) {
        if constexpr (kBlock == 32) {
            rtn_of_eight(x);
        } else {
            const Lanes minimum = -min(reduce_blocks<16>(Min{}, x), broadcast(0.0f));
            const Lanes range = reduce_blocks<16>(Max{}, x) + minimum;
            const Lanes scale_wanted = range * broadcast(1.0f / (float)kCodeMax);
            const Lanes per_field = broadcast(1.0f / (float)kFieldMax);
            const uint16_t d_ = f32_to_f16(first(reduce_all(Max{}, scale_wanted) * per_field));
            const uint16_t dmin_ = f32_to_f16(first(reduce_all(Max{}, minimum) * per_field));
            set(d_, dmin_, nearest_field(scale_wanted, broadcast(f16_to_f32(d_))),
                nearest_field(minimum, broadcast(f16_to_f32(dmin_))));
        }
    }

    // The same with the eight scales in lanes 0..7 and the eight mins in lanes 8..15.
    RAMGGUF_INLINE void rtn_of_eight(const float* x) {
        const Lanes ranges = ranges_of_blocks32(x);
        const Lanes minimum = max(exchange<8>(ranges), broadcast(0.0f));
        const Lanes scale_wanted = (ranges + minimum) * broadcast(1.0f / (float)kCodeMax);
        const Lanes wanted = lower_halves(scale_wanted, minimum);
        Lanes largest = max(wanted, exchange<4>(wanted));
        largest = max(largest, exchange<2>(largest));
        largest = max(largest, exchange<1>(largest));
        const IntLanes h = f32_to_f16(largest * broadcast(1.0f / (float)kFieldMax));
        const Lanes step = f16_to_f32(h);
        const Lanes fields = nearest_field(wanted, step);
        const Lanes values = step * fields;
        int32_t halves[kLanes];
        store(halves, h);
        d = (uint16_t)halves[0];
        dmin = (uint16_t)halves[8];
        overflow = is_infinite(d) | is_infinite(dmin);
        scale_fields.set(fields);
        min_fields.set(exchange<8>(fields));
        scale.set(values);
        offset.set(exchange<8>(values));
        inverse.set(inverse_or_zero(values));
    }

    static RAMGGUF_INLINE Lanes nearest_field(Lanes wanted, Lanes step) {
        return round_even(clamp(wanted * inverse_or_zero(step), 0.0f, (float)kFieldMax));
    }

    RAMGGUF_INLINE Lanes quantize(Lanes x, int vector) const {
        const int b = block_of(vector);
        return round_even(clamp((x + offset.at(b)) * inverse.at(b), 0.0f, (float)kCodeMax));
    }

    RAMGGUF_INLINE Lanes reconstruct(Lanes code, int vector) const {
        const int b = block_of(vector);
        return scale.at(b) * code - offset.at(b);
    }
};

// The encoder `search` of a format with an AffineFit.
template <class Format>
struct AffineSearch {
    using Fit = typename Format::Fit;
    static constexpr int kUnits = Fit::kBlock / 16, kGroup = Fit::kBlocks;

    template <bool weighted>
    __attribute__((noinline)) static void fit(const float* x, const float* importance, int n_units,
                                              Fit* fits) {
        Tile<Fit::kBlock, weighted> tile;
        load_tile<Fit::kBlock, kGroup>(x, importance, n_units, tile);
        const AffineScales found =
            fit_affine_scales<Fit::kCodeMax, Fit::kFieldMax, kGroup>(tile, kGrid<Format, weighted>);
        for (int unit = 0; unit < n_units; ++unit) {
            fits[unit].set(f32_to_f16(first(lanes_of_unit(found.step, unit))),
                           f32_to_f16(first(lanes_of_unit(found.min_step, unit))),
                           lanes_of_unit(found.sub, unit), lanes_of_unit(found.sub_min, unit));
        }
    }

    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        return fit.quantize(x, j);
    }
};

// Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit mins in 12 bytes:
//
//   byte 0..3    scale[i] in bits 0..5,  bits 4..5 of scale[i+4] in bits 6..7
//   byte 4..7    min[i] in bits 0..5,    bits 4..5 of min[i+4] in bits 6..7
//   byte 8..11   bits 0..3 of scale[i+4] in bits 0..3, of min[i+4] in bits 4..7      (i = 0..3)
RAMGGUF_INLINE void pack_6bit_pairs(const PerBlock& scales, const PerBlock& mins, uint8_t* out) {
    uint8_t bytes[kLanes];  // eight scales, eight mins
    store_u8(bytes, truncate(lower_halves(scales.all(), mins.all())));
    const uint32_t s0 = read<uint32_t>(bytes), s1 = read<uint32_t>(bytes + 4);
    const uint32_t m0 = read<uint32_t>(bytes + 8), m1 = read<uint32_t>(bytes + 12);
    write(out, s0 | (s1 & 0x30303030u) << 2);
    write(out + 4, m0 | (m1 & 0x30303030u) << 2);
    write(out + 8, (s1 & 0x0f0f0f0fu) | (m1 & 0x0f0f0f0fu) << 4);
}

// Lanes 0..7 and 8..15 of the result are the eight scales and the eight mins.
RAMGGUF_INLINE Lanes unpack_6bit_pairs(const uint8_t* in) {
    const uint32_t a = read<uint32_t>(in), b = read<uint32_t>(in + 4), c = read<uint32_t>(in + 8);
    uint8_t bytes[kLanes];
    write(bytes, a & 0x3f3f3f3fu);
    write(bytes + 4, (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u));
    write(bytes + 8, b & 0x3f3f3f3fu);
    write(bytes + 12, (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u));
    return to_float(load_u8(bytes));
}

}  // namespace ramgguf::RAMGGUF_ISA
