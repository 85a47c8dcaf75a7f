// Gram matrices of activations; compiled once per ISA level, in namespace ramgguf::RAMGGUF_ISA.
//
// A tile of 4 x 32 entries stays in registers while a slice of rows, small enough for the
// second-level cache, is added to it. Every entry is a sum over rows in their order, so all levels
// give the same bits.
#include "kernels/gram.h"

#include <string.h>

#include "lanes/float_mode.h"
#include "lanes/lanes.h"

namespace ramgguf::RAMGGUF_ISA {
namespace {

constexpr size_t kTall = 4, kWide = 2 * kLanes;
static_assert(kWide == Gram::kScratchColumns, "tiles end where the scratch does");

// Adds rows' products of columns i .. i+3 and j .. j+31 to sums (kTall x kWide).
RAMGGUF_INLINE void add_tile(const float* x, size_t n_rows, size_t stride, size_t i, size_t j,
                             float (&sums)[kTall][kWide]) {
    Lanes left[kTall], right[kTall];
#pragma GCC unroll 4
    for (size_t a = 0; a < kTall; ++a) left[a] = right[a] = broadcast(0.0f);
    for (size_t row = 0; row < n_rows; ++row, x += stride) {
        const Lanes low = load(x + j), high = load(x + j + kLanes);
#pragma GCC unroll 4
        for (size_t a = 0; a < kTall; ++a) {
            const Lanes value = broadcast(x[i + a]);
            left[a] = left[a] + value * low;
            right[a] = right[a] + value * high;
        }
    }
#pragma GCC unroll 4
    for (size_t a = 0; a < kTall; ++a) {
        store(sums[a], left[a]);
        store(sums[a] + kLanes, right[a]);
    }
}

// Adds a slice's products to the entries on and right of the diagonal.
void add_slice(const float* x, size_t n_rows, size_t stride, size_t n, float* gram) {
    for (size_t i = 0; i < n; i += kTall) {
        for (size_t j = i / kWide * kWide; j < n; j += kWide) {
            float sums[kTall][kWide];
            add_tile(x, n_rows, stride, i, j, sums);
            for (size_t a = 0; a < kTall && i + a < n; ++a) {
                float* out = gram + (i + a) * n + j;
                for (size_t b = 0; b < kWide && j + b < n; ++b) out[b] += sums[a][b];
            }
        }
    }
}

// noinline, so that nothing floats out of the FloatMode
__attribute__((noinline)) void add_all(const float* x, size_t n_rows, size_t n, float* scratch,
                                       float* gram) {
    const size_t stride = (n + kWide - 1) / kWide * kWide;
    for (size_t row = 0; row < n_rows; row += Gram::kScratchRows) {
        const size_t left = n_rows - row;
        const size_t count = left < Gram::kScratchRows ? left : Gram::kScratchRows;
        for (size_t r = 0; r < count; ++r) {
            float* to = scratch + r * stride;
            memcpy(to, x + (row + r) * n, n * sizeof(float));
            memset(to + n, 0, (stride - n) * sizeof(float));
        }
        add_slice(scratch, count, stride, n, gram);
    }
    for (size_t i = 1; i < n; ++i) {
        for (size_t j = 0; j < i; ++j) gram[i * n + j] = gram[j * n + i];
    }
}

void add(const float* x, size_t n_rows, size_t n, float* scratch, float* gram) {
    const FloatMode mode;
    add_all(x, n_rows, n, scratch, gram);
}

}  // namespace

extern const Gram gram;
const Gram gram = {add};

}  // namespace ramgguf::RAMGGUF_ISA
