// The points of IQ2_XXS, IQ2_XS, IQ2_S and IQ3_XXS, and what the search for the nearest one needs.
//
// A point is four or eight of a format's levels. Its code holds them as digits, the first weight's
// in the lowest place; a point's index in the format is its rank among the codes. ggml chose the
// points by a search (iq2xxs_grid, iq2xs_grid, iq2s_grid, iq3xxs_grid of ggml-common.h), so they
// are listed here, as bit sets: bit c % 64 of word c / 64 says that code c is a point.
#pragma once
#include "formats/shared/unit.h"

namespace ramgguf::RAMGGUF_ISA {

constexpr int power(int base, int exponent) {
    return exponent == 0 ? 1 : base * power(base, exponent - 1);
}

// The levels of a format, the nearest of them to a magnitude, and the scale that RTN takes.
struct ThreeLevels {
    static constexpr int kLevels = 3;
    static constexpr int levels[kLevels] = {8, 25, 43};
    static constexpr int kShift = 4;  // level >> kShift: its digit

    static RAMGGUF_INLINE Lanes nearest(Lanes v) {
        const Lanes lower = select(v > broadcast(16.5f), broadcast(25.0f), broadcast(8.0f));
        return select(v > broadcast(34.0f), broadcast(43.0f), lower);
    }
    static RAMGGUF_INLINE Lanes rtn_scale(Lanes mean, Lanes) {
        return mean * broadcast(1.0f / 18.0f);  // of least error on Gaussian weights
    }
};

struct EightLevels {
    static constexpr int kLevels = 8;
    static constexpr int levels[kLevels] = {4, 12, 20, 28, 36, 44, 52, 62};
    static constexpr int kShift = 3;

    static RAMGGUF_INLINE Lanes nearest(Lanes v) {
        const Lanes rank = round_even(clamp(v * broadcast(0.125f) - broadcast(0.5f), 0.0f, 6.0f));
        return select(v > broadcast(57.0f), broadcast(62.0f),
                      rank * broadcast(8.0f) + broadcast(4.0f));
    }
    static RAMGGUF_INLINE Lanes rtn_scale(Lanes, Lanes largest) {
        return largest * broadcast(1.0f / 62.0f);
    }
};

struct Iq2xxsPoints : ThreeLevels {
    static constexpr int kGroup = 8, kPoints = 256;
    static constexpr bool kEvenSigns = true;
    static constexpr uint64_t codes[] = {
        0x4141441055141555, 0x0000100044140400, 0x0040001400400400, 0x1050000004000000,
        0x4004140100114140, 0x0500001000400450, 0x0001000050000010, 0x4004144100004000,
        0x0400000400001414, 0x0000000000040000, 0x0000000000100400, 0x0010100414000000,
        0x1001040011040040, 0x0000000100404000, 0x0000000004010000, 0x0000400440041000,
        0x0000100000000004, 0x1000400000001000, 0x0000000000000000, 0x0040000004000105,
        0x0000000000110000, 0x0000000001000000, 0x0414000000000040, 0x0000050100010000,
        0x0000001010000000, 0x0000000000500000, 0x0000414000000000, 0x0040000000004001,
        0x0000004000040000, 0x0000000000000000, 0x0000040040000040, 0x0000000004000000,
        0x0000000000000000, 0x0000000001000000, 0x0110104144105000, 0x0000400010000414,
        0x0040400000440400, 0x4000000100404000, 0x0010000000010010, 0x0000001004000010,
        0x0000000100000000, 0x0414000000000000, 0x0000000000011000, 0x0401100000000004,
        0x0004000000000000, 0x0050441000040000, 0x0100000104000000, 0x0000000000040000,
        0x0000000000000001, 0x0000000000000040, 0x0001000001400000, 0x0400000000000000,
        0x0000000100000000, 0x0400000004100400, 0x0040000000000000, 0x0004000000000000,
        0x0000000000000000, 0x0001000001000041, 0x0040000000004000, 0x0000400000000000,
        0x0011000000001000, 0x0000000000000000, 0x0400000000001400, 0x0000000000000000,
        0x0000000000000000, 0x0000000000000001, 0x0000000000000000, 0x0000000000000000,
        0x0004000041400000, 0x0040040000004000, 0x0000000000000004, 0x0000000000000004,
        0x0040001000441400, 0x0400000004000000, 0x0004000010000000, 0x4000000001000040,
        0x0000000000000000, 0x0000000000010000, 0x0000010000000000, 0x0104000000000000,
        0x0100000000000410, 0x0040000000004000, 0x0001000000000000, 0x0040000400000000,
        0x0000000000000001, 0x0000000001000000, 0x0000000000000000, 0x0000000000000000,
        0x0100000000001000, 0x0000000000000000, 0x0000000000000000, 0x0000100000000400,
        0x0000000100000004, 0x0000040000000000, 0x0000000000000000, 0x0000000000000400,
        0x0000000000000000, 0x0000000000000000, 0x0000000000000000, 0x0000000000040000,
        0x0000000000000004, 0x0000000000000000, 0x0000000000000000};
};

struct Iq2xsPoints : ThreeLevels {
    static constexpr int kGroup = 8, kPoints = 512;
    static constexpr bool kEvenSigns = true;
    static constexpr uint64_t codes[] = {
        0x1541455551555555, 0x4145505555540145, 0x4010515400010510, 0x5550000101000441,
        0x0004140115154145, 0x0404010500414550, 0x0005100041400000, 0x1105554000004000,
        0x0540400010010414, 0x0010400000040001, 0x0000000104000100, 0x4550515554011000,
        0x1051540001054041, 0x5000500100004140, 0x0000010000400011, 0x1001450041455000,
        0x0100004140000004, 0x0400400000000000, 0x0000000000010000, 0x0400004004000505,
        0x0000000000110000, 0x0000000000000004, 0x5555000000000040, 0x0400010000414010,
        0x0010001040001050, 0x0000010000100000, 0x4000414400000400, 0x0040000000000001,
        0x1000000010040000, 0x0000000001000100, 0x0000040141100000, 0x0000000400100001,
        0x0000010010000000, 0x0144000000001001, 0x1105554145555000, 0x0500414550000414,
        0x0141404000440001, 0x4000000000000140, 0x0010000414014515, 0x0000041001050001,
        0x4000010100400000, 0x0414000000000010, 0x0000000101011000, 0x0040004100001004,
        0x0000000000400000, 0x1041455000000000, 0x4140000004000105, 0x0000000000050004,
        0x0000001000000040, 0x0004040105400000, 0x0000410100004010, 0x0000001040000000,
        0x0000100000001000, 0x0000404000400404, 0x0140100000010000, 0x0000000000000000,
        0x4000004000000000, 0x0100101001000041, 0x0000000000005000, 0x0010000000000000,
        0x4001000100000004, 0x0000000000000000, 0x0000000110000400, 0x0000000000001000,
        0x0000001000000000, 0x0000000001000000, 0x0000000000000400, 0x0010100000000400,
        0x0415010515400000, 0x0001155000005000, 0x0100000000041004, 0x0001400000000400,
        0x0040001000541441, 0x0100000004000040, 0x0400004000000000, 0x1000000100000000,
        0x0014010000040004, 0x0000000000040400, 0x0004000000000000, 0x0105100404100000,
        0x0000010001000400, 0x0001000000100001, 0x0400000000000000, 0x0000004400004000,
        0x0000000000001041, 0x0014000000001000, 0x0000000100000000, 0x0400000000000000,
        0x0000000400000000, 0x0000000000000100, 0x0000001000000010, 0x0000000404014500,
        0x4000000000010000, 0x0001144000000010, 0x0004000100000010, 0x4000000000400000,
        0x0000000000000000, 0x0000000000000000, 0x0040000400004000, 0x1040000000000045,
        0x0500000000000004, 0x0000050000000000, 0x0000000100010000};
};

struct Iq2sPoints : ThreeLevels {
    static constexpr int kGroup = 8, kPoints = 1024;
    static constexpr bool kEvenSigns = false;
    static constexpr uint64_t codes[] = {
        0x1555455551555555, 0x5545505155551105, 0x5010515414150514, 0x5550101111000455,
        0x5145541555555545, 0x5414555514555550, 0x1451000455401051, 0x1155154000105004,
        0x0540010110515555, 0x0040401051440455, 0x0000100510140100, 0x4551515554004000,
        0x5555541451151555, 0x5000145505155545, 0x0414000504414114, 0x1455551455455000,
        0x5505155540105154, 0x0514400010500414, 0x4000001000041401, 0x0140105154045155,
        0x0010500414550000, 0x1000041004000010, 0x5154000000000400, 0x0011010405415115,
        0x1401050540415054, 0x0104510010100004, 0x0514554400050000, 0x1440001050041455,
        0x0000110004140105, 0x0004000400010500, 0x1050001411000000, 0x0004150000400000,
        0x0000100000000000, 0x0140040000004004, 0x1555554555555000, 0x5505554550514414,
        0x1541401051541455, 0x4000005004145104, 0x4550515554555555, 0x1051541455550041,
        0x5004145500004150, 0x5514100000400010, 0x0001040041455051, 0x0100004140105154,
        0x0000400010500040, 0x1555455000000000, 0x5540005154145555, 0x0010500414550515,
        0x1400041401051440, 0x5154145555000000, 0x0414550000414010, 0x1400000040001050,
        0x0000000000110004, 0x0040414010515400, 0x0040001050000001, 0x1000100000000000,
        0x4400004000000000, 0x1040041451051545, 0x0004140105154000, 0x0400010400100010,
        0x1451010000000100, 0x0000004000105004, 0x0010001010000414, 0x0000000000040004,
        0x0000105000100000, 0x0010010000100000, 0x0000000000004000, 0x0000000400000000,
        0x5414114515404000, 0x1455450001411011, 0x1140004140005154, 0x0000000010500015,
        0x0041455011555400, 0x4140105154000105, 0x0010500001010000, 0x1000000000000050,
        0x0000000105000141, 0x4000010000014040, 0x0004000000000000, 0x5545010000400500,
        0x0000414010515410, 0x0000101050001411, 0x0000100004140000, 0x4010515440000000,
        0x1050004001000041, 0x1100000000004000, 0x0010001000000010, 0x0001100041400000,
        0x0000005000000000, 0x0000000000001100, 0x0040000000000000, 0x0000105410111100,
        0x0010000001040000, 0x4004100000000400, 0x5100014400000014, 0x0100000000400010,
        0x0000000010001040, 0x0000000000000000, 0x0040000000000004, 0x0100000000000040,
        0x0400004000000000, 0x0000011401400000, 0x0000000100001000};
};

struct Iq3xxsPoints : EightLevels {
    static constexpr int kGroup = 4, kPoints = 256;
    static constexpr bool kEvenSigns = true;
    static constexpr uint64_t codes[] = {
        0x2800000402058a15, 0x010010020522050a, 0x200082008a050215, 0x0100000000200582,
        0x2800801080000800, 0x0000040004000082, 0x0010000020000000, 0x0002000800005100,
        0x00000180150a050a, 0x0000000000050205, 0x040000000102050a, 0x0040004002010005,
        0x0000010000000022, 0x0200004000110000, 0x0000000000000020, 0x0000000100040000,
        0x0000000402450a05, 0x018800000102052a, 0x0000200180058205, 0x1100000000001102,
        0x0000080020000000, 0x1000000200800008, 0x0000000000000000, 0x000000200000400a,
        0x04200100000a0502, 0x0000005002010005, 0x040004000020010a, 0x0000000008000200,
        0x0400008001000000, 0x0000200000040041, 0x0008000040001000, 0x0001000008000000,
        0x00008800a0008010, 0x1000000000000000, 0x0041000180010000, 0x0000002000000080,
        0x0010020000000010, 0x0100000800200000, 0x0000000000000000, 0x0000000001000520,
        0x0100000200000400, 0x0000200000400041, 0x0400000004001000, 0x0000080000000004,
        0x0400000000880100, 0x0000000002000004, 0x0000010000000000, 0x0000000400100000,
        0x0010005000100000, 0x0002000000020000, 0x0010000000008000, 0x0000000041000000,
        0x0000001000000000, 0x0000040000000020, 0x0000000008000000, 0x0000000000020008,
        0x00000400040001a8, 0x0000000100400000, 0x0000042000000400, 0x0001000008002001,
        0x0000000200020000, 0x0000000000100005, 0x0000000001000000, 0x0000000000000000};
};

// Half of a code are the digits of a group's first or second half. For each second half that points
// have, the search wants the least of the errors of the first halves that go with it. These sets of
// first halves overlap, so the least of every pair that several of them contain is found once: a
// slot holds an error of one first half, or the lesser of two slots before it.
template <class P>
struct CodebookTables {
    static constexpr int kHalf = P::kGroup / 2;  // weights
    static constexpr int kHalves = power(P::kLevels, kHalf);
    static constexpr int kQuarters = power(P::kLevels, kHalf / 2);
    static constexpr int kMaxSlots = 160;

    struct Pair {
        uint16_t a, b;  // slots
    };

    struct Second {
        uint16_t half, low, high;  // its number, and those of its quarters
    };

    alignas(64) float places[kLanes];       // of the digits of groups
    uint32_t magnitudes[kHalves];           // of a half, a byte each
    uint8_t points[P::kPoints][P::kGroup];  // magnitudes
    uint16_t index[kHalves * kHalves];      // of a code that is a point; 0 for others

    Pair pairs[kMaxSlots];  // slot kHalves + i is the lesser of pairs[i]
    int n_pairs = 0;
    // The second halves in the order of how many slots they need, and these slots one after the
    // other.
    Second second[kHalves];
    uint16_t slots[P::kPoints];
    int n_of_size[kHalves + 1] = {};  // how many second halves need so many slots
    int largest_size = 0;

    CodebookTables() {
        static_assert(kHalves < 128, "a half is numbered with seven bits");
        for (int i = 0; i < kLanes; ++i) places[i] = (float)power(P::kLevels, i % P::kGroup);
        for (int half = 0; half < kHalves; ++half) {
            magnitudes[half] = 0;
            for (int k = 0, rest = half; k < kHalf; ++k, rest /= P::kLevels) {
                magnitudes[half] |= (uint32_t)P::levels[rest % P::kLevels] << (8 * k);
            }
        }
        bool sets[kHalves][kMaxSlots] = {};  // the slots of each second half
        int n = 0;
        for (int code = 0; code < kHalves * kHalves; ++code) {
            const bool is_point = P::codes[code / 64] >> (code % 64) & 1;
            index[code] = (uint16_t)(is_point ? n : 0);
            if (!is_point) continue;
            sets[code / kHalves][code % kHalves] = true;
            for (int k = 0, rest = code; k < P::kGroup; ++k, rest /= P::kLevels) {
                points[n][k] = (uint8_t)P::levels[rest % P::kLevels];
            }
            ++n;
        }
        share_pairs(sets);
        list_slots(sets);
    }

  private:
    // Gives the most frequent pair a slot of its own, until none occurs twice.
    void share_pairs(bool (&sets)[kHalves][kMaxSlots]) {
        for (int n_slots = kHalves; n_slots < kMaxSlots; ++n_slots) {
            int most = 1;
            Pair best = {};
            uint8_t counts[kMaxSlots][kMaxSlots] = {};
            for (const auto& set : sets) {
                for (int a = 0; a < n_slots; ++a) {
                    for (int b = a + 1; set[a] && b < n_slots; ++b) {
                        if (!set[b] || ++counts[a][b] <= most) continue;
                        most = counts[a][b];
                        best = {(uint16_t)a, (uint16_t)b};
                    }
                }
            }
            if (most == 1) break;
            pairs[n_pairs++] = best;
            for (auto& set : sets) {
                if (!set[best.a] || !set[best.b]) continue;
                set[best.a] = set[best.b] = false;
                set[n_slots] = true;
            }
        }
    }

    void list_slots(const bool (&sets)[kHalves][kMaxSlots]) {
        int n_listed = 0, n_slots = 0;
        for (int size = 1; size <= kHalves; ++size) {
            for (int half = 0; half < kHalves; ++half) {
                int found = 0;
                for (const bool is_needed : sets[half]) found += is_needed;
                if (found != size) continue;
                second[n_listed++] = {(uint16_t)half, (uint16_t)(half % kQuarters),
                                      (uint16_t)(half / kQuarters)};
                ++n_of_size[size];
                largest_size = size;
                for (int slot = 0; slot < kMaxSlots; ++slot) {
                    if (sets[half][slot]) slots[n_slots++] = (uint16_t)slot;
                }
            }
        }
    }
};

// Made at the first call, in some milliseconds.
template <class P>
inline const CodebookTables<P>& codebook_tables() {
    static const CodebookTables<P> tables;
    return tables;
}

}  // namespace ramgguf::RAMGGUF_ISA
