// The 512 points of IQ3_S, and the two nearest to any four magnitudes.
//
// A point is four of the magnitudes 1, 3, 5 .. 15. Its code holds them as four digits 0..7, the
// first in bits 0..2, the last in bits 9..11. ggml chose its 512 of the 4096 codes by a search
// (iq3s_grid of ggml-common.h), so they are listed here, as a bit set. A point's index in the
// format is its rank in this set.
#pragma once
#include "formats/shared/unit.h"

namespace ramgguf::RAMGGUF_ISA {

constexpr int kPoints = 512, kPointCodes = 4096;

// Bit c % 64 of word c / 64: code c is a point.
constexpr uint64_t kIq3sPoints[kPointCodes / 64] = {
    0x92050aa5082357a7, 0x0422001022892317, 0x09000aa4112249a3, 0x228005104a052208,
    0x0100020904128801, 0x084000a208450014, 0x0200040002000a40, 0x0000110008450015,
    0x040250005205ab17, 0x410005020902114b, 0x040120090411a401, 0x0104000211820992,
    0x000011440a001428, 0x0000020005020902, 0x0000005000910000, 0x010400022002050a,
    0x2980052a058a55ab, 0x0000020412248905, 0x12008802810a0092, 0x004001040a140225,
    0x2400000224090082, 0x0100080180040210, 0x0002200000020085, 0x0000010801400220,
    0x020802942a04aa04, 0x44010001000a102a, 0x0000010014010401, 0x0800208a018a1102,
    0x0011040002044208, 0x0800401004200502, 0x0000000200004000, 0x000000002005000a,
    0x0100010204910411, 0x0000220821040a84, 0x010480010802210a, 0x0000000022050a10,
    0x0200000180100005, 0x00040000000200a0, 0x0001000010000800, 0x0000020801002100,
    0x1040049100041104, 0x040000000402042a, 0x0000080041080201, 0x0820021000800184,
    0x0000004004010012, 0x00000a0000400400, 0x0000000400000000, 0x0000000000040014,
    0x000100000a002a00, 0x0010000000810001, 0x0104200410000400, 0x0000000100021001,
    0x0004000800200000, 0x0001000010000009, 0x0000000100000020, 0x0000000000000a00,
    0x0004100140050091, 0x0000002800100204, 0x0000020001024112, 0x0000080024000004,
    0x0000010000010822, 0x0000000400040000, 0x0000000002000004, 0x0000000000000001};

// Four magnitudes 0 <= t < 16 lie in one of 16^4 cells of width 1. A cell's number has the first
// magnitude in bits 0..3, the last in bits 12..15.
struct PointTables {
    uint32_t magnitudes[kPoints];  // the four of a point, a byte each
    uint16_t index[kPointCodes];   // of codes that are points; 0 for others
    uint32_t nearest[1 << 16];     // of a cell: the code of the point nearest to its centre in bits
                                   // 0..11, of the second nearest in bits 12..23

    PointTables() {
        uint16_t codes[kPoints];
        int n = 0;
        for (int code = 0; code < kPointCodes; ++code) {
            const bool is_point = kIq3sPoints[code / 64] >> (code % 64) & 1;
            index[code] = (uint16_t)(is_point ? n : 0);
            if (!is_point) continue;
            uint32_t bytes = 0;
            for (int k = 0; k < 4; ++k) bytes |= (uint32_t)(2 * digit(code, k) + 1) << (8 * k);
            magnitudes[n] = bytes;
            codes[n++] = (uint16_t)code;
        }
        // A key is a squared distance, in half cell widths, times kPoints, plus the point's index:
        // the least key is the nearest point, and ties go to the lower index.
        int32_t of_last[16][kPoints], of_first[kPoints];
        for (int c = 0; c < 16; ++c) {
            for (int i = 0; i < kPoints; ++i) of_last[c][i] = distance(c, digit(codes[i], 3));
        }
        for (int cell = 0; cell < 1 << 12; ++cell) {
            for (int i = 0; i < kPoints; ++i) {
                of_first[i] = i;
                for (int k = 0; k < 3; ++k) {
                    of_first[i] += distance(cell >> (4 * k) & 15, digit(codes[i], k));
                }
            }
            for (int c = 0; c < 16; ++c) {
                nearest[cell | c << 12] = two_nearest(of_first, of_last[c], codes);
            }
        }
    }

  private:
    static int digit(int code, int k) { return code >> (3 * k) & 7; }

    static int32_t distance(int cell, int digit) {
        const int off = 2 * cell + 1 - 2 * (2 * digit + 1);
        return off * off * kPoints;
    }

    static uint32_t two_nearest(const int32_t* of_first, const int32_t* of_last,
                                const uint16_t* codes) {
        IntLanes least = broadcast(INT32_MAX), second = least;
        for (int i = 0; i < kPoints; i += kLanes) {
            const IntLanes key = load(of_first + i) + load(of_last + i);
            second = min(second, max(least, key));
            least = min(least, key);
        }
        int32_t keys[2 * kLanes], best = INT32_MAX, next = INT32_MAX;
        store(keys, least);
        store(keys + kLanes, second);
        for (const int32_t key : keys) {
            if (key < best) {
                next = best;
                best = key;
            } else if (key < next) {
                next = key;
            }
        }
        return (uint32_t)(codes[best % kPoints] | codes[next % kPoints] << 12);
    }
};

// Made at the first call, in some milliseconds.
inline const PointTables& iq3s_tables() {
    static const PointTables tables;
    return tables;
}

}  // namespace ramgguf::RAMGGUF_ISA
