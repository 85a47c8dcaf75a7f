// IQ3_S (ggml id 21), 3.4375 bpw: superblocks of 256 weights, 8 sub-blocks of 32, points of four.
//
//   x = d * (1 + 2 scale[b]) * sign * magnitude        scale in 0..15, magnitude in 1, 3 .. 15
//
// The magnitudes of four neighbouring weights are one of 512 points (iq3s_points.h).
//
//   byte  0    2                    66                    74                    106            110
//         | d  | qs: 64 bytes       | qh: 8 bytes         | signs: 32 bytes     | scales: 4    |
//         | F16| byte i: bits 0..7  | byte b, bit i: bit  | byte i, bit l: is   | byte i: of   |
//              | of the point of    | 8 of the point of   | weight 8i+l         | b=2i in bits |
//              | weights 4i..4i+3   | weights 32b+4i ..+3 | negative            | 0..3, 2i+1   |
//
// Layout of ggml-common.h (block_iq3_s). RTN: a sub-block's largest magnitude takes 15, d makes the
// largest scale the greatest, scales are rounded to nearest against the rounded d; four weights
// take the nearer of the two points that are nearest to the centre of their cell.
#pragma once
#include "formats/shared/iq3s_points.h"
#include "formats/shared/superblock_scales.h"

namespace ramgguf::RAMGGUF_ISA {

// Lane i: base^(i % 4), to write four digits of neighbouring lanes as one number.
alignas(64) static const float kPlaces16[kLanes] = {1, 16, 256, 4096, 1, 16, 256, 4096,
                                                    1, 16, 256, 4096, 1, 16, 256, 4096};
alignas(64) static const
    float kPlaces8[kLanes] = {1, 8, 64, 512, 1, 8, 64, 512, 1, 8, 64, 512, 1, 8, 64, 512};
alignas(64) static const float kPerPlace8[kLanes] = {
    1, 1.0f / 8, 1.0f / 64, 1.0f / 512, 1, 1.0f / 8, 1.0f / 64, 1.0f / 512,
    1, 1.0f / 8, 1.0f / 64, 1.0f / 512, 1, 1.0f / 8, 1.0f / 64, 1.0f / 512};
alignas(64) static const int32_t kDigit8[kLanes] = {7, 56, 448, 3584, 7, 56, 448, 3584,
                                                    7, 56, 448, 3584, 7, 56, 448, 3584};

// Every lane holds the sum of its four neighbours 4c..4c+3.
RAMGGUF_INLINE Lanes sum_of_fours(Lanes a) {
    a = a + exchange<1>(a);
    return a + exchange<2>(a);
}

// The magnitudes whose digits are in bits 0..11 of every lane, each lane its own of four.
RAMGGUF_INLINE Lanes magnitudes_of(IntLanes code) {
    const Lanes digit = to_float(code & load(kDigit8)) * load(kPerPlace8);
    return digit + digit + broadcast(1.0f);
}

// An entry of PointTables::nearest for four magnitudes.
RAMGGUF_INLINE IntLanes points_near(const Lanes* t) {
    const Lanes end = broadcast(15.5f);
    const IntLanes low = truncate(min(t[0], end)) | truncate(min(t[1], end)) << 4;
    const IntLanes high = truncate(min(t[2], end)) | truncate(min(t[3], end)) << 4;
    return gather(iq3s_tables().nearest, low | high << 8);
}

RAMGGUF_INLINE Lanes magnitude_at(IntLanes code, int k) {
    const Lanes digit = to_float(code >> (3 * k) & broadcast(7));
    return digit + digit + broadcast(1.0f);
}

// The sub-blocks' scales of least error; the solution's scales are real numbers.
template <bool weighted>
RAMGGUF_INLINE LinearSolution fit_points(const Tile<32, weighted>& tile, Lanes largest, Grid grid) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    const Mask something = largest >= broadcast(kSmallestSpan);
    const Lanes per_largest = select(something, one / select(something, largest, one), zero);
    Lanes best = zero, scale = zero, curvature = zero;
    const auto attempt = [&](Lanes step) {
        const Lanes per_x = per_largest * step;
        Lanes tl = zero, ll = zero;
        for (int g = 0; g < 32; g += 4) {
            Lanes t[4];
            for (int k = 0; k < 4; ++k) t[k] = tile.x[g + k] * per_x;
            const IntLanes code = points_near(t);
            for (int k = 0; k < 4; ++k) {
                const Lanes level = magnitude_at(code, k);
                const Lanes wl = tile.weigh(g + k, level);
                tl = tl + wl * tile.x[g + k];
                ll = ll + wl * level;
            }
        }
        tl = tl * per_largest;
        const Mask better = tl * tl > best * ll;
        const Lanes fitted = tl / select(better, ll, one);
        best = select(better, fitted * tl, best);
        scale = select(better, fitted, scale);
        curvature = select(better, ll, curvature);
    };
    for (int k = 0; k < grid.count; ++k) {
        attempt(broadcast(15.0f + grid.first + grid.step * (float)k));
    }
    attempt(inverse(scale));
    return {select(something, scale * largest, zero), curvature};
}

// The error of the sub-blocks under a scale, where every four weights take the better of two
// points. Calls keep(i, magnitude) with the magnitude that element i takes.
template <bool weighted, class Keep>
RAMGGUF_INLINE Lanes error_of_points(const Tile<32, weighted>& tile, Lanes scale, Keep keep) {
    const Lanes per_scale = inverse(scale);
    Lanes error = broadcast(0.0f);
    for (int g = 0; g < 32; g += 4) {
        Lanes t[4];
        for (int k = 0; k < 4; ++k) t[k] = tile.x[g + k] * per_scale;
        const IntLanes codes = points_near(t);
        Lanes squares[2], magnitude[2][4];
        for (int c = 0; c < 2; ++c) {
            squares[c] = broadcast(0.0f);
            for (int k = 0; k < 4; ++k) {
                magnitude[c][k] = magnitude_at(codes >> (12 * c), k);
                const Lanes off = tile.x[g + k] - scale * magnitude[c][k];
                squares[c] = squares[c] + tile.weigh(g + k, off) * off;
            }
        }
        const Mask other = squares[1] < squares[0];
        error = error + select(other, squares[1], squares[0]);
        for (int k = 0; k < 4; ++k) keep(g + k, select(other, magnitude[1][k], magnitude[0][k]));
    }
    return error;
}

struct IQ3_S {
    static constexpr int block_size = 256;

    struct Block {
        uint16_t d;
        uint8_t qs[64], qh[8], signs[32], scales[4];
    };
    static_assert(sizeof(Block) == 110, "IQ3_S is 110 bytes per 256 weights");

    struct Fit : OddFields {
        PerBlock scale, inverse;  // d * (1 + 2 scale), 1 / that or 0
        PerBlock fields;          // 1 + 2 scale, for pack
        uint16_t d;               // F16
        bool overflow;
        uint8_t chosen[kUnit];  // the magnitudes that `search` chose

        RAMGGUF_INLINE void set(uint16_t d_, Lanes fields_) {
            d = d_;
            overflow = is_infinite(d);
            fields.set(fields_);
            scale.set(broadcast(f16_to_f32(d)) * fields_);
            inverse.set(inverse_or_zero(scale.all()));
        }
    };

    static constexpr Grid plain_grid{9, -2.4f, 0.6f}, weighted_grid{13, -3.6f, 0.6f};

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        const auto larger = [](Lanes a, Lanes b) { return max(abs(a), abs(b)); };
        const Lanes wanted = reduce_blocks<32>(larger, x) * broadcast(1.0f / 15.0f);
        const float largest = first(reduce_all(Max{}, wanted));
        const uint16_t d = f32_to_f16(largest * (1.0f / Fit::kLargestField));
        fit.set(d, Fit::nearest_field(wanted * inverse_or_zero(broadcast(f16_to_f32(d)))));
    }

    // Codes are magnitudes with the weight's sign.
    static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
        const Lanes t = min(abs(x) * fit.inverse.at(j / 2), broadcast(15.5f));
        const Lanes digits = to_float(truncate(t)) * load(kPlaces16);
        const IntLanes cell = truncate(sum_of_fours(digits));
        const IntLanes codes = gather(iq3s_tables().nearest, cell);
        const Lanes a = magnitudes_of(codes), b = magnitudes_of(codes >> 12);
        const Lanes off_a = t - a, off_b = t - b;
        const Mask nearer = sum_of_fours(off_b * off_b) < sum_of_fours(off_a * off_a);
        return copy_sign(select(nearer, b, a), x);
    }

    static RAMGGUF_INLINE Lanes reconstruct(const Fit& fit, Lanes q, int j) {
        return fit.scale.at(j / 2) * q;
    }

    static RAMGGUF_INLINE void pack(const Fit& fit, const IntLanes (&q)[kVectors], uint8_t* out) {
        write(out, fit.d);
        uint8_t high[8] = {};
        for (int j = 0; j < kVectors; ++j) {
            const Lanes value = to_float(q[j]);
            const Lanes digits = (abs(value) - broadcast(1.0f)) * broadcast(0.5f);
            int32_t codes[kLanes];
            store(codes, truncate(sum_of_fours(digits * load(kPlaces8))));
            for (int k = 0; k < 4; ++k) {
                const int point = iq3s_tables().index[codes[4 * k]];
                out[2 + 4 * j + k] = (uint8_t)point;
                high[j / 2] = (uint8_t)(high[j / 2] | (point >> 8) << (j % 2 * 4 + k));
            }
            write(out + 74 + 2 * j, (uint16_t)to_bits(value < broadcast(0.0f)));
        }
        std::memcpy(out + 66, high, sizeof high);
        for (int i = 0; i < 4; ++i) {
            const int low = (int)fit.fields.v[2 * i] / 2, other = (int)fit.fields.v[2 * i + 1] / 2;
            out[106 + i] = (uint8_t)(low | other << 4);
        }
    }

    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit& fit, IntLanes (&q)[kVectors]) {
        const PointTables& tables = iq3s_tables();
        uint32_t magnitudes[64];
        for (int i = 0; i < 64; ++i) {
            const int point = in[2 + i] | (in[66 + i / 8] >> (i % 8) & 1) << 8;
            magnitudes[i] = tables.magnitudes[point];
        }
        for (int j = 0; j < kVectors; ++j) {
            const IntLanes magnitude = load_u8((const uint8_t*)(magnitudes + 4 * j));
            const Mask negative = lanes_with_bit(read<uint16_t>(in + 74 + 2 * j));
            q[j] = select(negative, broadcast(0) - magnitude, magnitude);
        }
        PerBlock fields;
        for (int b = 0; b < 8; ++b) {
            const int scale = in[106 + b / 2] >> (b % 2 * 4) & 15;
            fields.v[b] = fields.v[b + 8] = (float)(2 * scale + 1);
        }
        fit.scale.set(broadcast(f16_to_f32(read<uint16_t>(in))) * fields.all());
    }

    // A lane is a sub-block of 32; elements 4g..4g+3 of the tile take one point.
    struct Search {
        static constexpr int kUnits = 2;

        template <bool weighted>
        __attribute__((noinline)) static void fit(const float* x, const float* importance,
                                                  int n_units, Fit* fits) {
            Tile<32, weighted> tile;
            load_tile<32, 8>(x, importance, n_units, tile);
            Lanes largest = broadcast(0.0f);
            for (int i = 0; i < 32; ++i) {
                tile.x[i] = abs(tile.x[i]);
                largest = max(largest, tile.x[i]);
            }
            const LinearSolution found = fit_points(tile, largest, kGrid<IQ3_S, weighted>);
            const Lanes step = best_step<8>(found.scale, found.curvature, (int)Fit::kLargestField,
                                            Fit::nearest_field);
            const Lanes field =
                best_field(tile, step, Fit::nearest_field(found.scale * inverse(step)));
            for (int unit = 0; unit < n_units; ++unit) {
                fits[unit].set(f32_to_f16(first(lanes_of_unit(step, unit))),
                               lanes_of_unit(field, unit));
            }
            error_of_points(tile, step * field, [&](int i, Lanes magnitude) {
                uint8_t bytes[kLanes];
                store_u8(bytes, truncate(magnitude));
                for (int unit = 0; unit < n_units; ++unit) {
                    for (int b = 0; b < 8; ++b) fits[unit].chosen[32 * b + i] = bytes[8 * unit + b];
                }
            });
        }

        static RAMGGUF_INLINE Lanes quantize(const Fit& fit, Lanes x, int j) {
            return copy_sign(to_float(load_u8(fit.chosen + kLanes * j)), x);
        }

      private:
        // Tries a field and its two neighbours on the weights and returns the best.
        template <bool weighted>
        static RAMGGUF_INLINE Lanes best_field(const Tile<32, weighted>& tile, Lanes step,
                                               Lanes around) {
            Lanes best = around, least = broadcast(0x1p100f);
            constexpr float moves[3] = {0.0f, 2.0f, -2.0f};
            for (const float move : moves) {
                const Lanes field = clamp(around + broadcast(move), 1.0f, Fit::kLargestField);
                const Lanes error = error_of_points(tile, step * field, [](int, Lanes) {});
                const Mask better = error < least;
                least = select(better, error, least);
                best = select(better, field, best);
            }
            return best;
        }
    };
};

}  // namespace ramgguf::RAMGGUF_ISA
