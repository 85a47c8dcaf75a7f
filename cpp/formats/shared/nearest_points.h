// The points of a codebook that are nearest to groups of weights: sixteen groups at a time, one a
// lane, exactly, under any importance of the single weights.
//
// The error of a point is a sum over its weights, so it is that of its first half and that of its
// second half. The errors of all first halves (81 of four weights with three levels, 64 of two
// with eight) are made first, from few additions each. Then a second half costs the least error of
// the first halves that go with it; CodebookTables says how to find these with few minima.
//
// Signs are those of the weights. Where an even number of every eight weights must be negative, an
// odd one flips the weight for which that costs least. That depends on the point, so errors with
// one flip are found beside those without.
#pragma once
#include "formats/shared/codebooks.h"
#include "formats/shared/least_squares.h"

namespace ramgguf::RAMGGUF_ISA {

constexpr int kEight = 8;     // weights that share a parity of signs
constexpr int kHalfBits = 7;  // hold the number of a half
constexpr float kFarAway = 0x1p120f;

// Lanes in memory. GCC 12 copies a whole Lanes of an array to the stack before it uses it.
template <int n>
struct alignas(64) LanesArray {
    float v[n][kLanes];

    RAMGGUF_INLINE Lanes at(size_t i) const { return load(v[i]); }
    RAMGGUF_INLINE void set(size_t i, Lanes a) { store(v[i], a); }
};

// Errors of n choices for some weights, with the weights' signs and with one of them flipped.
template <int n, bool flips>
struct ChoiceErrors {
    LanesArray<n> plain;
    LanesArray<flips ? n : 1> flipped;
};

// A point of sixteen groups.
struct Nearest {
    Lanes error;
    IntLanes first, second;  // numbers of halves; first in the last kHalfBits bits
};

RAMGGUF_INLINE Nearest select(Mask m, const Nearest& a, const Nearest& b) {
    return {select(m, a.error, b.error), select(m, a.first, b.first),
            select(m, a.second, b.second)};
}

// P is one of codebooks.h. The tile holds magnitudes.
template <class P, int n, bool weighted>
class PointFinder {
  public:
    explicit PointFinder(const Tile<n, weighted>& tile) : tile_(tile) {}

    // The least error of the sub-blocks under a scale, but for flips of signs.
    RAMGGUF_INLINE Lanes error(Lanes scale) const {
        Lanes total = broadcast(0.0f);
        for (int i = 0; i < n; i += P::kGroup) {
            Nearest plain, unused;
            find<false, false>(i, scale, plain, unused);
            total = total + plain.error;
        }
        return total;
    }

    // Finds the nearest points: levels[i] takes the magnitude of weight i, negative where the sign
    // is flipped. odd[e]: lanes in which an odd number of the weights 8e..8e+7 is negative.
    RAMGGUF_INLINE void find_points(Lanes scale, const Mask* odd, Lanes* levels) const {
        for (int e = 0; e < n / kEight; ++e) {
            Nearest plain[kGroups], flipped[kGroups];
            for (int g = 0; g < kGroups; ++g) {
                find<true, P::kEvenSigns>(kEight * e + P::kGroup * g, scale, plain[g], flipped[g]);
            }
            if constexpr (!P::kEvenSigns) {
                for (int g = 0; g < kGroups; ++g) write_levels(plain[g], kEight * e, levels);
            } else if constexpr (kGroups == 1) {
                write_levels(select(odd[e], flipped[0], plain[0]), kEight * e, levels);
                flip_cheapest(kEight * e, odd[e], levels);
            } else {
                const Lanes in_first = flipped[0].error + plain[1].error;
                const Lanes in_second = plain[0].error + flipped[1].error;
                const Mask flips[2] = {odd[e] & (in_first <= in_second),
                                       odd[e] & (in_second < in_first)};
                for (int g = 0; g < kGroups; ++g) {
                    const int i = kEight * e + P::kGroup * g;
                    write_levels(select(flips[g], flipped[g], plain[g]), i, levels);
                    flip_cheapest(i, flips[g], levels);
                }
            }
        }
    }

  private:
    using Tables = CodebookTables<P>;
    static constexpr int kGroups = kEight / P::kGroup, kHalf = Tables::kHalf;
    static constexpr int kHalves = Tables::kHalves, kQuarters = Tables::kQuarters;

    struct Pair {
        Lanes plain, flipped;
    };

    // The errors of a choice for some weights and one for others.
    template <int na, int nb, bool flips>
    static RAMGGUF_INLINE Pair sum(const ChoiceErrors<na, flips>& a, size_t i,
                                   const ChoiceErrors<nb, flips>& b, size_t j) {
        const Lanes plain = a.plain.at(i) + b.plain.at(j);
        if constexpr (!flips) return {plain, plain};
        return {plain, min(a.flipped.at(i) + b.plain.at(j), a.plain.at(i) + b.flipped.at(j))};
    }

    // decoded: the levels times the scale
    template <bool flips>
    RAMGGUF_INLINE void level_errors(int i, const Lanes* decoded,
                                     ChoiceErrors<P::kLevels, flips>& out) const {
        for (int l = 0; l < P::kLevels; ++l) {
            const Lanes off = tile_.x[i] - decoded[l];
            out.plain.set(l, tile_.weigh(i, off) * off);
            if constexpr (flips) {
                const Lanes opposite = tile_.x[i] + decoded[l];
                out.flipped.set(l, tile_.weigh(i, opposite) * opposite);
            }
        }
    }

    // A quarter of a group is one weight or two.
    template <bool flips>
    RAMGGUF_INLINE void quarter_errors(int i, const Lanes* decoded,
                                       ChoiceErrors<kQuarters, flips>& out) const {
        if constexpr (kHalf == 2) {
            level_errors(i, decoded, out);
        } else {
            ChoiceErrors<P::kLevels, flips> one, two;
            level_errors(i, decoded, one);
            level_errors(i + 1, decoded, two);
            for (int c = 0; c < kQuarters; ++c) {
                const Pair error = sum(one, c % P::kLevels, two, c / P::kLevels);
                out.plain.set(c, error.plain);
                if constexpr (flips) out.flipped.set(c, error.flipped);
            }
        }
    }

    // Writes the half's number into the last bits of its error.
    static RAMGGUF_INLINE Lanes numbered(Lanes error, int half) {
        const IntLanes rounded = bits(error) & broadcast(-(1 << kHalfBits));
        return from_bits(rounded | broadcast(half));
    }

    // With `track` the halves, too.
    template <bool track>
    static RAMGGUF_INLINE void keep_lesser(Lanes error, Lanes first, int second, Nearest& least) {
        if constexpr (track) {
            const Mask better = error < least.error;
            least.first = select(better, bits(first), least.first);
            least.second = select(better, broadcast(second), least.second);
        }
        least.error = min(error, least.error);
    }

    // The nearest points of the weights i .. i + kGroup - 1, without a flip and with one.
    template <bool track, bool flips>
    RAMGGUF_INLINE void find(int i, Lanes scale, Nearest& plain, Nearest& flipped) const {
        const Tables& tables = codebook_tables<P>();
        Lanes decoded[P::kLevels];
        for (int l = 0; l < P::kLevels; ++l) decoded[l] = scale * broadcast((float)P::levels[l]);
        ChoiceErrors<kQuarters, flips> quarters[4];
        for (int k = 0; k < 4; ++k) quarter_errors(i + k * kHalf / 2, decoded, quarters[k]);

        ChoiceErrors<Tables::kMaxSlots, flips> slots;
        for (int h = 0; h < kHalves; ++h) {
            const Pair error = sum(quarters[0], h % kQuarters, quarters[1], h / kQuarters);
            slots.plain.set(h, track ? numbered(error.plain, h) : error.plain);
            if constexpr (flips) slots.flipped.set(h, numbered(error.flipped, h));
        }
        for (int p = 0; p < tables.n_pairs; ++p) {
            const typename Tables::Pair pair = tables.pairs[p];
            slots.plain.set(kHalves + p, min(slots.plain.at(pair.a), slots.plain.at(pair.b)));
            if constexpr (flips) {
                slots.flipped.set(kHalves + p,
                                  min(slots.flipped.at(pair.a), slots.flipped.at(pair.b)));
            }
        }

        plain = flipped = {broadcast(kFarAway), broadcast(0), broadcast(0)};
        const typename Tables::Second* second = tables.second;
        const uint16_t* slot = tables.slots;
        // `others` calls its argument with 1 .. size - 1.
        const auto try_all = [&](int size, auto others) __attribute__((always_inline)) {
            const auto* end = second + tables.n_of_size[size];
            for (; second != end; ++second, slot += size) {
                Pair least = {slots.plain.at(*slot), broadcast(0.0f)};
                if constexpr (flips) least.flipped = slots.flipped.at(*slot);
                others([&](int k) __attribute__((always_inline)) {
                    least.plain = min(least.plain, slots.plain.at(slot[k]));
                    if constexpr (flips) {
                        least.flipped = min(least.flipped, slots.flipped.at(slot[k]));
                    }
                });
                const Pair rest = sum(quarters[2], second->low, quarters[3], second->high);
                const int half = second->half;
                keep_lesser<track>(least.plain + rest.plain, least.plain, half, plain);
                if constexpr (flips) {
                    keep_lesser<track>(least.plain + rest.flipped, least.plain, half, flipped);
                    keep_lesser<track>(least.flipped + rest.plain, least.flipped, half, flipped);
                }
            }
        };
        // Loops of a known length for most of them: the CPU mispredicts where short ones end.
        try_all(1, [](auto) {});
        try_all(2, [](auto call) { call(1); });
        try_all(3, [](auto call) { call(1), call(2); });
        for (int size = 4; size <= tables.largest_size; ++size) {
            try_all(size, [&](auto call) __attribute__((always_inline)) {
                for (int k = 1; k < size; ++k) call(k);
            });
        }
    }

    static RAMGGUF_INLINE void write_levels(const Nearest& point, int i, Lanes* levels) {
        const uint32_t* table = codebook_tables<P>().magnitudes;
        const IntLanes halves[2] = {
            gather(table, point.first & broadcast((1 << kHalfBits) - 1)),
            gather(table, point.second),
        };
        for (int k = 0; k < P::kGroup; ++k) {
            levels[i + k] = to_float(halves[k / kHalf] >> (8 * (k % kHalf)) & broadcast(255));
        }
    }

    // Changes the sign of one of a group's levels in the lanes of `flips`.
    RAMGGUF_INLINE void flip_cheapest(int i, Mask flips, Lanes* levels) const {
        Lanes least = broadcast(kFarAway), at = broadcast(-1.0f);
        for (int k = 0; k < P::kGroup; ++k) {
            const Lanes cost = tile_.weigh(i + k, tile_.x[i + k]) * levels[i + k];
            at = select(cost < least, broadcast((float)k), at);
            least = min(cost, least);
        }
        for (int k = 0; k < P::kGroup; ++k) {
            const Mask flip = flips & (at == broadcast((float)k));
            levels[i + k] = select(flip, -levels[i + k], levels[i + k]);
        }
    }

    const Tile<n, weighted>& tile_;
};

}  // namespace ramgguf::RAMGGUF_ISA
