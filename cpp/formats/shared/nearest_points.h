// The points of a codebook that are nearest to groups of weights: sixteen groups at a time, one a
// lane, exactly, under any importance of the single weights.
//
// The error of a point is a sum over its weights, so it is the sum of its halves' errors. Those of
// all halves (81 of four weights with three levels, 64 of two with eight) are made first, from few
// additions each. Then every point costs one minimum: points with the same second half share its
// error, and of their first halves only the least is wanted.
//
// Signs are those of the weights. Where an even number of every eight weights must be negative, an
// odd one flips the weight for which that costs least, which depends on the point: errors with one
// flip are found beside those without.
#pragma once
#include "formats/shared/codebooks.h"
#include "formats/shared/least_squares.h"

namespace ramgguf::RAMGGUF_ISA {

constexpr int kEight = 8;      // weights that share a parity of signs
constexpr int kHalfBits = 7;   // hold the number of a half

// Lanes in memory. (GCC 12 copies a whole Lanes of an array to the stack before it uses it.)
template <int n>
struct alignas(64) LanesArray {
    float v[n][kLanes];

    RAMGGUF_INLINE Lanes at(size_t i) const { return load(v[i]); }
    RAMGGUF_INLINE void set(int i, Lanes a) { store(v[i], a); }
};

// Errors of the partial codes of some weights, without a flip and with one.
template <int n, bool flips>
struct PartialErrors {
    LanesArray<n> even;
    LanesArray<flips ? n : 1> odd;
};

// The nearest point without a flip or with one.
struct Nearest {
    Lanes error;
    IntLanes first, second;  // halves
};

template <class P, bool weighted, int n>
class PointFinder {
  public:
    static constexpr bool kFlips = P::kEvenSigns;
    using Tables = CodebookTables<P>;

    // magnitudes: of the tile's weights
    PointFinder(const Tile<n, weighted>& magnitudes) : tile_(magnitudes) {}

    // The least error of the tile's sub-blocks under a scale. odd[e]: lanes in which an odd number
    // of the weights 8e..8e+7 is negative.
    RAMGGUF_INLINE Lanes error(Lanes scale, const Mask* odd) const {
        Lanes total = broadcast(0.0f);
        for (int e = 0; e < n / kEight; ++e) {
            Nearest even[kGroups], flipped[kGroups];
            for (int g = 0; g < kGroups; ++g) {
                find<false>(kEight * e + P::kGroup * g, scale, even[g], flipped[g]);
            }
            Lanes least = even[0].error;
            if constexpr (kGroups == 2) least = least + even[1].error;
            if constexpr (kFlips) least = select(odd[e], with_a_flip(even, flipped), least);
            total = total + least;
        }
        return total;
    }

    // The nearest points themselves: signed[i] takes the magnitude of weight i, negative where the
    // sign differs from the weight's.
    RAMGGUF_INLINE Lanes points(Lanes scale, const Mask* odd, Lanes* found) const {
        Lanes total = broadcast(0.0f);
        for (int e = 0; e < n / kEight; ++e) {
            Nearest even[kGroups], flipped[kGroups];
            for (int g = 0; g < kGroups; ++g) {
                find<true>(kEight * e + P::kGroup * g, scale, even[g], flipped[g]);
            }
            Lanes least = even[0].error;
            if constexpr (kGroups == 2) least = least + even[1].error;
            if constexpr (kFlips) {
                const Lanes odd_error = with_a_flip(even, flipped);
                least = select(odd[e], odd_error, least);
                if constexpr (kGroups == 1) {
                    take(select(odd[e], flipped[0], even[0]), kEight * e, odd[e], found);
                } else {
                    const Lanes in_one = flipped[0].error + even[1].error;
                    const Lanes in_two = even[0].error + flipped[1].error;
                    const Mask one = odd[e] & (in_one <= in_two), two = odd[e] & (in_two < in_one);
                    take(select(one, flipped[0], even[0]), kEight * e, one, found);
                    take(select(two, flipped[1], even[1]), kEight * e + P::kGroup, two, found);
                }
            } else {
                for (int g = 0; g < kGroups; ++g) {
                    take(even[g], kEight * e + P::kGroup * g, Mask{}, found);
                }
            }
            total = total + least;
        }
        return total;
    }

  private:
    static constexpr int kGroups = kEight / P::kGroup, kHalf = Tables::kHalf;
    static constexpr int kHalves = Tables::kHalves, kLevels = P::kLevels;
    static constexpr int kQuarters = power(kLevels, kHalf / 2);
    using Quarter = PartialErrors<kQuarters, kFlips>;

    struct Pair {
        Lanes even, odd;
    };

    static RAMGGUF_INLINE Lanes with_a_flip(const Nearest* even, const Nearest* flipped) {
        if constexpr (kGroups == 1) return flipped[0].error;
        return min(flipped[0].error + even[kGroups - 1].error,
                   even[0].error + flipped[kGroups - 1].error);
    }

    static RAMGGUF_INLINE Nearest select(Mask m, const Nearest& a, const Nearest& b) {
        return {ramgguf::RAMGGUF_ISA::select(m, a.error, b.error),
                ramgguf::RAMGGUF_ISA::select(m, a.first, b.first),
                ramgguf::RAMGGUF_ISA::select(m, a.second, b.second)};
    }
    static RAMGGUF_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
        return ramgguf::RAMGGUF_ISA::select(m, a, b);
    }
    static RAMGGUF_INLINE IntLanes select(Mask m, IntLanes a, IntLanes b) {
        return ramgguf::RAMGGUF_ISA::select(m, a, b);
    }

    RAMGGUF_INLINE void level_errors(int i, const Lanes* decoded,
                                     PartialErrors<kLevels, kFlips>& out) const {
        for (int l = 0; l < kLevels; ++l) {
            const Lanes off = tile_.x[i] - decoded[l];
            out.even.set(l, tile_.weigh(i, off) * off);
            if constexpr (kFlips) {
                const Lanes flipped = tile_.x[i] + decoded[l];
                out.odd.set(l, tile_.weigh(i, flipped) * flipped);
            }
        }
    }

    // The errors of quarters of a group: of the first and the second part of a half.
    RAMGGUF_INLINE void quarter_errors(int i, const Lanes* decoded, Quarter& out) const {
        if constexpr (kHalf == 2) {
            level_errors(i, decoded, out);
        } else {
            PartialErrors<kLevels, kFlips> one, two;
            level_errors(i, decoded, one);
            level_errors(i + 1, decoded, two);
            for (int c = 0; c < kQuarters; ++c) {
                const Pair error = sum(one, c % kLevels, two, c / kLevels);
                out.even.set(c, error.even);
                if constexpr (kFlips) out.odd.set(c, error.odd);
            }
        }
    }

    // Of two parts' errors: without a flip, and with one in either of them.
    template <class A, class B>
    static RAMGGUF_INLINE Pair sum(const A& a, size_t i, const B& b, size_t j) {
        const Lanes even = a.even.at(i) + b.even.at(j);
        if constexpr (!kFlips) return {even, even};
        return {even, min(a.odd.at(i) + b.even.at(j), a.even.at(i) + b.odd.at(j))};
    }

    // Writes the half's number into the last bits of its error.
    static RAMGGUF_INLINE Lanes numbered(Lanes error, int half) {
        const IntLanes rounded = bits(error) & broadcast(-(1 << kHalfBits));
        return from_bits(rounded | broadcast(half));
    }

    // With `track` the halves, too.
    template <bool track>
    static RAMGGUF_INLINE void lower(Lanes error, IntLanes first, int second, Nearest& least) {
        if constexpr (track) {
            const Mask better = error < least.error;
            least.first = select(better, first, least.first);
            least.second = select(better, broadcast(second), least.second);
        }
        least.error = min(error, least.error);
    }

    template <bool track>
    RAMGGUF_INLINE void find(int i, Lanes scale, Nearest& even, Nearest& flipped) const {
        const Tables& tables = codebook_tables<P>();
        Lanes decoded[kLevels];
        for (int l = 0; l < kLevels; ++l) decoded[l] = scale * broadcast((float)P::levels[l]);
        Quarter quarters[4];
        for (int k = 0; k < 4; ++k) quarter_errors(i + k * kHalf / 2, decoded, quarters[k]);
        PartialErrors<Tables::kMaxSlots, kFlips> slots;
        for (int h = 0; h < kHalves; ++h) {
            const Pair error = sum(quarters[0], h % kQuarters, quarters[1], h / kQuarters);
            slots.even.set(h, track ? numbered(error.even, h) : error.even);
            if constexpr (kFlips) slots.odd.set(h, track ? numbered(error.odd, h) : error.odd);
        }
        for (int p = 0; p < tables.n_pairs; ++p) {
            const typename Tables::Pair pair = tables.pairs[p];
            slots.even.set(kHalves + p, min(slots.even.at(pair.a), slots.even.at(pair.b)));
            if constexpr (kFlips) {
                slots.odd.set(kHalves + p, min(slots.odd.at(pair.a), slots.odd.at(pair.b)));
            }
        }
        even = flipped = {broadcast(0x1p120f), broadcast(0), broadcast(0)};
        const typename Tables::Second* second = tables.second;
        const uint16_t* slot = tables.slots;
        const auto try_all = [&](int size, auto loop) __attribute__((always_inline)) {
            const auto* end = second + tables.n_of_size[size];
            for (; second != end; ++second, slot += size) {
                Pair least = {slots.even.at(*slot), slots.even.at(*slot)};
                if constexpr (kFlips) least.odd = slots.odd.at(*slot);
                loop([&](int k) __attribute__((always_inline)) {
                    least.even = min(least.even, slots.even.at(slot[k]));
                    if constexpr (kFlips) least.odd = min(least.odd, slots.odd.at(slot[k]));
                });
                const Pair rest = sum(quarters[2], second->low, quarters[3], second->high);
                lower<track>(least.even + rest.even, bits(least.even), second->half, even);
                if constexpr (kFlips) {
                    lower<track>(least.even + rest.odd, bits(least.even), second->half, flipped);
                    lower<track>(least.odd + rest.even, bits(least.odd), second->half, flipped);
                }
            }
        };
        try_all(1, [](auto) {});
        try_all(2, [](auto next) { next(1); });
        try_all(3, [](auto next) { next(1), next(2); });
        for (int size = 4; size <= tables.largest_size; ++size) {
            try_all(size, [&](auto next) __attribute__((always_inline)) {
                for (int k = 1; k < size; ++k) next(k);
            });
        }
    }

    // Writes a group's magnitudes, and flips the cheapest of them in the lanes of `odd`.
    RAMGGUF_INLINE void take(const Nearest& point, int i, Mask odd, Lanes* found) const {
        const uint32_t* table = codebook_tables<P>().magnitudes;
        const IntLanes first = gather(table, point.first & broadcast((1 << kHalfBits) - 1));
        const IntLanes second = gather(table, point.second);
        Lanes cheapest = broadcast(0x1p120f), at = broadcast(-1.0f);
        for (int k = 0; k < P::kGroup; ++k) {
            const IntLanes four = k < kHalf ? first : second;
            const Lanes magnitude = to_float(four >> (8 * (k % kHalf)) & broadcast(255));
            found[i + k] = magnitude;
            if constexpr (kFlips) {
                const Lanes cost = tile_.weigh(i + k, tile_.x[i + k]) * magnitude;
                at = select(cost < cheapest, broadcast((float)k), at);
                cheapest = min(cost, cheapest);
            }
        }
        if constexpr (kFlips) {
            for (int k = 0; k < P::kGroup; ++k) {
                const Mask flip = odd & (at == broadcast((float)k));
                found[i + k] = select(flip, -found[i + k], found[i + k]);
            }
        }
    }

    const Tile<n, weighted>& tile_;
};

}  // namespace ramgguf::RAMGGUF_ISA
