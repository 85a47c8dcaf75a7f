// Coordinate descent on one unit (256 columns) of one row, as templates over the format.
//
// With e = w - q and the gradient g = H e, changing the decoded weights by a vector c lowers the
// error e^T H e by 2 c^T g - c^T H c. So the best change of one weight, of a sub-block's scale or
// of a superblock's step has a closed form. It is rounded to what the format can store and made if
// it still lowers the error.
#pragma once
#include "formats/shared/affine.h"
#include "formats/shared/blocks32.h"
#include "formats/shared/symmetric.h"
#include "kernels/scalar_codes.h"

namespace ramgguf::RAMGGUF_ISA {

// What codes and scales are changed in turn how often. Once more lowers the error of 4-bit formats
// by less than 0.1 %.
constexpr int kDescentRounds = 2;

// The state of a unit while it is changed.
template <class F>
struct UnitState {
    typename F::Fit fit;
    alignas(64) float codes[kUnit];   // whole numbers
    alignas(64) float values[kUnit];  // what they decode to
    float* gradient;
};

// Subtracts steps[k] times row k of the Hessian, for k in begin .. end - 1, from n_wide vectors of
// the gradient. Several vectors at once, because each is a chain of additions.
template <int n_wide>
RAMGGUF_INLINE void subtract_rows(const float* row, int64_t stride, const float* steps, int begin,
                                  int end, float* gradient) {
    Lanes g[n_wide];
#pragma GCC unroll 4
    for (int v = 0; v < n_wide; ++v) g[v] = load(gradient + kLanes * v);
    for (int k = begin; k < end; ++k, row += stride) {
        const Lanes step = broadcast(steps[k]);
#pragma GCC unroll 4
        for (int v = 0; v < n_wide; ++v) g[v] = g[v] - step * load(row + kLanes * v);
    }
#pragma GCC unroll 4
    for (int v = 0; v < n_wide; ++v) store(gradient + kLanes * v, g[v]);
}

// Updates the gradient of the unit after columns begin .. end - 1 moved by `steps` (one a column of
// the unit).
RAMGGUF_INLINE void move_columns(const DescentUnit& unit, const float* steps, int begin, int end,
                                 float* gradient) {
    for (int at = 0; at < unit.n;) {
        const float* row = unit.hessian + begin * unit.stride + at;
        if (unit.n - at >= 4 * kLanes) {
            subtract_rows<4>(row, unit.stride, steps, begin, end, gradient + at);
            at += 4 * kLanes;
        } else {
            subtract_rows<2>(row, unit.stride, steps, begin, end, gradient + at);
            at += 2 * kLanes;
        }
    }
}

// --- codes ---

// Gives each weight in turn the code of least error. Returns whether one changed.
template <class F>
RAMGGUF_INLINE bool descend_codes(const DescentUnit& unit, UnitState<F>& state) {
    bool changed = false;
    for (int j = 0; j < unit.n / kLanes; ++j) {
        const Lanes diagonal = load(unit.diagonal + kLanes * j);
        const Lanes inverse = load(unit.inverse + kLanes * j);
        float* values = state.values + kLanes * j;
        // All lanes at once, up to the first one that changes: it changes the gradient of those
        // after it.
        for (uint32_t open = 0xffff; open != 0;) {
            const Lanes g = load(state.gradient + kLanes * j), value = load(values);
            const Lanes code = to_float(to_int(nearest_code<F>(state.fit, value + g * inverse, j)));
            const Lanes decoded = F::reconstruct(state.fit, code, j);
            const Lanes step = decoded - value;
            // The margin keeps rounding errors from moving a code to and fro.
            const Lanes cost = step * step * diagonal;
            const Mask better = step * (g + g) > cost * broadcast(1.00001f);
            open &= to_bits(better);
            if (open == 0) break;
            const int lane = __builtin_ctz(open);
            open = 0xffffu << (lane + 1) & 0xffff;
            alignas(64) float steps[kLanes], new_codes[kLanes], new_values[kLanes];
            store(steps, step);
            store(new_codes, code);
            store(new_values, decoded);
            values[lane] = new_values[lane];
            state.codes[kLanes * j + lane] = new_codes[lane];
            const float* row = unit.hessian + (kLanes * j + lane) * unit.stride;
            const Lanes moved = broadcast(steps[lane]);
            for (int v = 0; v < unit.n / kLanes; ++v) {
                float* gradient = state.gradient + kLanes * v;
                store(gradient, load(gradient) - moved * load(row + kLanes * v));
            }
            changed = true;
        }
    }
    return changed;
}

// --- scales ---

// What the error falls by along two directions a and b of the decoded weights: for s a + t b it is
// 2 (s ag + t bg) - (s^2 aa + 2 s t ab + t^2 bb).
struct Quadratic {
    double ag, bg, aa, ab, bb;

    double gain(double s, double t) const {
        return 2 * (s * ag + t * bg) - (s * s * aa + 2 * s * t * ab + t * t * bb);
    }
};

struct Move {
    double s, t, gain;
};

// The best of some moves, where store(s, t) makes both what the format can store.
template <class Store>
inline Move best_move(const Quadratic& q, Store store) {
    Move best = {0, 0, 0};
    const auto attempt = [&](double s, double t) {
        store(s, t);
        const double gain = q.gain(s, t);
        if (gain > best.gain) best = {s, t, gain};
    };
    const double det = q.aa * q.bb - q.ab * q.ab;
    if (det > 1e-9 * q.aa * q.bb) {
        const double s = (q.ag * q.bb - q.bg * q.ab) / det;
        const double t = (q.bg * q.aa - q.ag * q.ab) / det;
        attempt(s, t);
        // A rounded s wants another t, and the other way round.
        double s_stored = s, t_stored = t;
        store(s_stored, t_stored);
        attempt(s_stored, (q.bg - s_stored * q.ab) / q.bb);
        attempt((q.ag - t_stored * q.ab) / q.aa, t_stored);
    }
    if (q.aa > 0) attempt(q.ag / q.aa, 0);
    if (q.bb > 0) attempt(0, q.bg / q.bb);
    return best;
}

// The sum of the kBlock rows of the Hessian from row `begin` on, kLanes columns from k on.
template <int kBlock>
RAMGGUF_INLINE Lanes sum_of_rows(const DescentUnit& unit, int begin, int k) {
    const float* sums = unit.row_sums + begin / kLanes * kUnit + k;
    if constexpr (kBlock == kLanes) return load(sums);
    return load(sums) + load(sums + kUnit);
}

// The quadratic for the direction a and, if kOffset, the direction 1 (elsewhere 0) of columns
// begin .. begin + kBlock - 1.
template <int kBlock, bool kOffset>
RAMGGUF_INLINE Quadratic quadratic_of_block(const DescentUnit& unit, const float* a, int begin,
                                            const float* gradient) {
    constexpr int n = kBlock / kLanes;
    const Lanes zero = broadcast(0.0f);
    Lanes ha[n];
    for (int v = 0; v < n; ++v) ha[v] = zero;
    for (int k = begin; k < begin + kBlock; ++k) {
        const Lanes factor = broadcast(a[k]);
        const float* row = unit.hessian + k * unit.stride + begin;
        for (int v = 0; v < n; ++v) ha[v] = ha[v] + factor * load(row + kLanes * v);
    }
    Lanes ag = zero, bg = zero, aa = zero, ab = zero, bb = zero;
    for (int v = 0; v < n; ++v) {
        const int k = begin + kLanes * v;
        const Lanes g = load(gradient + k), x = load(a + k);
        ag = ag + x * g;
        aa = aa + x * ha[v];
        if constexpr (kOffset) {
            bg = bg + g;
            ab = ab + ha[v];
            bb = bb + sum_of_rows<kBlock>(unit, begin, k);
        }
    }
    if constexpr (!kOffset) return {(double)sum_of(ag), 0, (double)sum_of(aa), 0, 0};
    return {(double)sum_of(ag), (double)sum_of(bg), (double)sum_of(aa), (double)sum_of(ab),
            (double)sum_of(bb)};
}

// Two directions over a whole unit of 256 columns, times the Hessian.
struct Products {
    alignas(64) float ha[kUnit], hb[kUnit];
};

// Fills ha for the direction a.
inline void multiply_direction(const DescentUnit& unit, const float* a, Products& products) {
    constexpr int n_wide = 4;  // several vectors at once, as in subtract_rows
    for (int at = 0; at < kUnit; at += n_wide * kLanes) {
        Lanes ha[n_wide];
#pragma GCC unroll 4
        for (int v = 0; v < n_wide; ++v) ha[v] = broadcast(0.0f);
        const float* row = unit.hessian + at;
        for (int k = 0; k < kUnit; ++k, row += unit.stride) {
            const Lanes x = broadcast(a[k]);
#pragma GCC unroll 4
            for (int v = 0; v < n_wide; ++v) ha[v] = ha[v] + x * load(row + kLanes * v);
        }
#pragma GCC unroll 4
        for (int v = 0; v < n_wide; ++v) store(products.ha + at + kLanes * v, ha[v]);
    }
}

// Fills hb for the direction that is shares[i] all over sub-block i.
template <int kBlock>
RAMGGUF_INLINE void multiply_shares(const DescentUnit& unit, const float* shares,
                                    Products& products) {
    for (int k = 0; k < kUnit; k += kLanes) {
        Lanes hb = broadcast(0.0f);
        for (int i = 0; i < kUnit / kBlock; ++i) {
            hb = hb + broadcast(shares[i]) * sum_of_rows<kBlock>(unit, kBlock * i, k);
        }
        store(products.hb + k, hb);
    }
}

// The quadratic for the directions a and, if kOffset, b over a unit, from their products.
template <bool kOffset>
inline Quadratic quadratic_of_unit(const Products& products, const float* a, const float* b,
                                   const float* gradient) {
    DoubleLanes ag = {}, bg = {}, aa = {}, ab = {}, bb = {};
    for (int k = 0; k < kUnit; k += kLanes) {
        const Lanes g = load(gradient + k), x = load(a + k), ha = load(products.ha + k);
        add_to(ag, x * g);
        add_to(aa, x * ha);
        if constexpr (kOffset) {
            const Lanes y = load(b + k);
            add_to(bg, y * g);
            add_to(ab, y * ha);
            add_to(bb, y * load(products.hb + k));
        }
    }
    return {sum_of(ag), sum_of(bg), sum_of(aa), sum_of(ab), sum_of(bb)};
}

// Decodes columns begin .. end - 1 again after a change of scales and updates the gradient.
template <class F>
RAMGGUF_INLINE void decode_again(const DescentUnit& unit, int begin, int end, UnitState<F>& state) {
    alignas(64) float steps[kUnit];
    for (int j = begin / kLanes; j < end / kLanes; ++j) {
        const Lanes value = F::reconstruct(state.fit, load(state.codes + kLanes * j), j);
        store(steps + kLanes * j, value - load(state.values + kLanes * j));
        store(state.values + kLanes * j, value);
    }
    move_columns(unit, steps, begin, end, state.gradient);
}

// The same for a whole unit, whose weights moved by s a + t b.
template <bool kOffset, class F>
RAMGGUF_INLINE void decode_unit_again(const Move& move, const Products& products,
                                      UnitState<F>& state) {
    for (int j = 0; j < kVectors; ++j) {
        const int k = kLanes * j;
        store(state.values + k, F::reconstruct(state.fit, load(state.codes + k), j));
        Lanes moved = broadcast((float)move.s) * load(products.ha + k);
        if constexpr (kOffset) {
            moved = moved + broadcast((float)move.t) * load(products.hb + k);
        }
        store(state.gradient + k, load(state.gradient + k) - moved);
    }
}

// What the codes decode to with a scale of 1 and no offset.
template <class F>
RAMGGUF_INLINE void levels_of(const UnitState<F>& state, int n, float* levels) {
    typename F::Fit fit;
    set_unit_scale(fit);
    for (int j = 0; j < n / kLanes; ++j) {
        store(levels + kLanes * j, F::reconstruct(fit, load(state.codes + kLanes * j), j));
    }
}

inline double rounded_to_f16(double x) {
    return (double)f16_to_f32(f32_to_f16((float)x));
}

// The field nearest to `wanted`, within low .. high.
inline double nearest_field_of(double wanted, double low, double high) {
    return wanted <= low ? low : wanted >= high ? high : __builtin_floor(wanted + 0.5);
}

// --- scales and mins of sub-blocks as small integers (Q2_K, Q4_K, Q5_K) ---

template <int block, int field_max, int code_max>
RAMGGUF_INLINE void set_unit_scale(AffineFit<block, field_max, code_max>& fit) {
    fit.scale.set(broadcast(1.0f));
    fit.offset.set(broadcast(0.0f));
}

template <int block, int field_max, int code_max>
RAMGGUF_INLINE void complete(AffineFit<block, field_max, code_max>&) {}

template <class F, int block, int field_max, int code_max>
bool descend_scales(const DescentUnit& unit, AffineFit<block, field_max, code_max>& fit,
                    bool steps_too, UnitState<F>& state) {
    bool changed = false;
    alignas(64) float levels[kUnit], a[kUnit], b[kUnit];
    levels_of(state, unit.n, levels);
    const auto d = (double)f16_to_f32(fit.d), dmin = (double)f16_to_f32(fit.dmin);
    for (int i = 0; i < unit.n / block; ++i) {
        float& scale_field = fit.scale_fields.v[i];
        float& min_field = fit.min_fields.v[i];
        const auto field = (double)scale_field, other = (double)min_field;
        const auto new_field = [&](double s) {
            return d > 0 ? nearest_field_of(field + s / d, 0, field_max) : field;
        };
        const auto new_min = [&](double t) {
            return dmin > 0 ? nearest_field_of(other - t / dmin, 0, field_max) : other;
        };
        const Quadratic q =
            quadratic_of_block<block, true>(unit, levels, block * i, state.gradient);
        const Move move = best_move(q, [&](double& s, double& t) {
            s = d * (new_field(s) - field);
            t = dmin * (other - new_min(t));
        });
        if (!(move.gain > (double)unit.least_gain)) continue;
        scale_field = (float)new_field(move.s);
        min_field = (float)new_min(move.t);
        fit.set(fit.d, fit.dmin, fit.scale_fields.all(), fit.min_fields.all());
        decode_again(unit, block * i, block * (i + 1), state);
        changed = true;
    }
    if (!steps_too) return changed;
    for (int k = 0; k < unit.n; ++k) {
        a[k] = levels[k] * fit.scale_fields.v[k / block];
        b[k] = -fit.min_fields.v[k / block];
    }
    float shares[kUnit / block];
    for (int i = 0; i < kUnit / block; ++i) shares[i] = -fit.min_fields.v[i];
    Products products;
    multiply_direction(unit, a, products);
    multiply_shares<block>(unit, shares, products);
    const Quadratic q = quadratic_of_unit<true>(products, a, b, state.gradient);
    const Move move = best_move(q, [&](double& s, double& t) {
        s = rounded_to_f16(d + s > 0 ? d + s : 0) - d;
        t = rounded_to_f16(dmin + t > 0 ? dmin + t : 0) - dmin;
    });
    if (!(move.gain > (double)unit.least_gain)) return changed;
    fit.set(f32_to_f16((float)(d + move.s)), f32_to_f16((float)(dmin + move.t)),
            fit.scale_fields.all(), fit.min_fields.all());
    decode_unit_again<true>(move, products, state);
    return true;
}

// --- scales of sub-blocks as small signed integers (Q3_K, Q6_K, IQ4_XS) ---

template <int block, int lowest_field, int lowest_value>
RAMGGUF_INLINE void set_unit_scale(SymmetricFit<block, lowest_field, lowest_value>& fit) {
    fit.scale.set(broadcast(1.0f));
}

template <int block, int lowest_field, int lowest_value>
RAMGGUF_INLINE void complete(SymmetricFit<block, lowest_field, lowest_value>&) {}

template <class F, int block, int lowest_field, int lowest_value>
bool descend_scales(const DescentUnit& unit, SymmetricFit<block, lowest_field, lowest_value>& fit,
                    bool steps_too, UnitState<F>& state) {
    bool changed = false;
    alignas(64) float levels[kUnit], a[kUnit];
    levels_of(state, unit.n, levels);
    const auto d = (double)f16_to_f32(fit.d);
    for (int i = 0; i < unit.n / block && d != 0; ++i) {
        const auto field = (double)fit.fields.v[i];
        const auto new_field = [&](double s) {
            return nearest_field_of(field + s / d, lowest_field, -lowest_field - 1);
        };
        const Quadratic q =
            quadratic_of_block<block, false>(unit, levels, block * i, state.gradient);
        const Move move = best_move(q, [&](double& s, double&) { s = d * (new_field(s) - field); });
        if (!(move.gain > (double)unit.least_gain)) continue;
        fit.fields.v[i] = (float)new_field(move.s);
        fit.set(fit.d, fit.fields.all());
        decode_again(unit, block * i, block * (i + 1), state);
        changed = true;
    }
    if (!steps_too) return changed;
    for (int k = 0; k < unit.n; ++k) a[k] = levels[k] * fit.fields.v[k / block];
    Products products;
    multiply_direction(unit, a, products);
    const Quadratic q = quadratic_of_unit<false>(products, a, a, state.gradient);
    const Move move = best_move(q, [&](double& s, double&) { s = rounded_to_f16(d + s) - d; });
    if (!(move.gain > (double)unit.least_gain)) return changed;
    fit.set(f32_to_f16((float)(d + move.s)), fit.fields.all());
    decode_unit_again<false>(move, products, state);
    return true;
}

// --- an F16 scale and perhaps offset per block (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL) ---

RAMGGUF_INLINE void set_unit_scale(Blocks32Fit& fit) {
    fit.scale.set(broadcast(1.0f));
    fit.offset.set(broadcast(0.0f));
}

// Fills what quantize needs and unpack does not.
RAMGGUF_INLINE void complete(Blocks32Fit& fit) {
    fit.inverse.set(inverse_or_zero(fit.scale.all()));
    fit.low.set(fit.offset.all());
}

template <class F>
bool descend_scales(const DescentUnit& unit, Blocks32Fit& fit, bool, UnitState<F>& state) {
    bool changed = false;
    alignas(64) float levels[kUnit];
    levels_of(state, unit.n, levels);
    for (int i = 0; i < unit.n / 32; ++i) {
        const auto scale = (double)fit.scale.v[i], offset = (double)fit.offset.v[i];
        const Quadratic q =
            quadratic_of_block<32, F::has_offset>(unit, levels, 32 * i, state.gradient);
        const Move move = best_move(q, [&](double& s, double& t) {
            s = rounded_to_f16(scale + s) - scale;
            t = F::has_offset ? rounded_to_f16(offset + t) - offset : 0;
        });
        if (!(move.gain > (double)unit.least_gain)) continue;
        fit.d[i] = f32_to_f16((float)(scale + move.s));
        fit.scale.v[i] = f16_to_f32((uint16_t)fit.d[i]);
        if (F::has_offset) {
            fit.m[i] = f32_to_f16((float)(offset + move.t));
            fit.offset.v[i] = f16_to_f32((uint16_t)fit.m[i]);
        }
        complete(fit);
        decode_again(unit, 32 * i, 32 * (i + 1), state);
        changed = true;
    }
    return changed;
}

// --- a unit ---

template <class F>
bool descend_unit(const DescentUnit& unit, float* gradient, uint8_t* blocks, float* change) {
    const size_t n_bytes = (size_t)(unit.n / F::block_size) * sizeof(typename F::Block);
    uint8_t bytes[kUnit / F::block_size * sizeof(typename F::Block)] = {};
    std::memcpy(bytes, blocks, n_bytes);
    UnitState<F> state;
    state.gradient = gradient;
    IntLanes q[kVectors];
    F::unpack(bytes, state.fit, q);
    complete(state.fit);
    for (int j = 0; j < kVectors; ++j) {
        const Lanes code = to_float(q[j]), value = F::reconstruct(state.fit, code, j);
        store(state.codes + kLanes * j, code);
        store(state.values + kLanes * j, value);
        store(change + kLanes * j, -value);
    }
    bool changed = false;
    for (int round = 0; round < kDescentRounds; ++round) {
        changed |= descend_codes(unit, state);
        changed |= descend_scales(unit, state.fit, round + 1 == kDescentRounds, state);
    }
    if (!changed) return false;
    for (int j = 0; j < kVectors; ++j) {
        q[j] = truncate(load(state.codes + kLanes * j));
        store(change + kLanes * j, load(state.values + kLanes * j) + load(change + kLanes * j));
    }
    F::pack(state.fit, q, bytes);
    std::memcpy(blocks, bytes, n_bytes);
    return true;
}

// descend_unit<F>, or null for a format without a code for every weight.
template <class F>
constexpr DescendUnit descend_unit_of() noexcept {
    if constexpr (kScalarCodes<F>) {
        return descend_unit<F>;
    } else {
        return nullptr;
    }
}

}  // namespace ramgguf::RAMGGUF_ISA
