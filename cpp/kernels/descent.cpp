// Coordinate descent over rows; compiled once per ISA level, in namespace ramgguf::RAMGGUF_ISA.
//
// Rows are taken in batches, so that a unit's part of the Hessian is in the cache for many of them.
// A sweep goes through the units of columns. Each row's unit is changed with its part of the
// Hessian alone (descent_unit.h); then the changes are carried over to the gradient of all other
// columns.
#include "kernels/descent.h"

#include "kernels/table.h"
#include "lanes/float_mode.h"

namespace ramgguf::RAMGGUF_ISA {
namespace {

constexpr int kBatch = 96;

// Scales are changed for a gain of at least this share of a unit's part of the error: a changed
// step moves a whole unit, which takes as long as hundreds of codes.
constexpr double kLeastShare = 2e-3;

struct Batch {
    const DescentRows& rows;
    int format;
    int64_t n_rows;
    const float* w;
    uint8_t* blocks;
    int64_t row_bytes;
    float *gradients, *errors, *changes;  // n_rows x n, twice, and n_rows x kUnit
    float *unit, *panel;                  // parts of the Hessian: kUnit x kUnit, kUnit x kPanel
    uint8_t* start;                       // the blocks as they came
};

// Columns of a part of the Hessian that is used for all rows of a batch before the next one is. It
// is copied first: the Hessian's own rows are so far apart that they evict each other from the
// caches, most of all where n is a multiple of a large power of two.
constexpr int kPanel = 4 * kLanes;

// Copies n_rows rows of n_columns floats (a multiple of kLanes), which lie `stride` apart.
RAMGGUF_INLINE void copy_rows(const float* from, int64_t stride, int64_t n_rows, int n_columns,
                              float* to) {
    for (int64_t row = 0; row < n_rows; ++row) {
        for (int k = 0; k < n_columns; k += kLanes) {
            store(to + row * n_columns + k, load(from + row * stride + k));
        }
    }
}

// A tile of the product whose sums stay in registers.
constexpr int kTileRows = kParts == 1 ? 8 : kParts == 2 ? 6 : 2;
constexpr int kTileVectors = kParts == 1 ? 2 : 1;
static_assert(kBatch % kTileRows == 0, "whole tiles");

// Adds to out (n_tall rows, n apart) `count` columns of e (likewise) times as many rows of a panel,
// a tile's width.
template <int n_tall>
RAMGGUF_INLINE void multiply_tile(const float* e, const float* panel, int64_t count, int64_t n,
                                  float* out) {
    constexpr int n_wide = kTileVectors;
    Lanes sums[n_tall][n_wide];
#pragma GCC unroll 16
    for (int i = 0; i < n_tall * n_wide; ++i) sums[i / n_wide][i % n_wide] = broadcast(0.0f);
    for (int64_t k = 0; k < count; ++k, panel += n_wide * kLanes) {
        Lanes h[n_wide];
#pragma GCC unroll 2
        for (int v = 0; v < n_wide; ++v) h[v] = load(panel + kLanes * v);
#pragma GCC unroll 8
        for (int a = 0; a < n_tall; ++a) {
            const Lanes factor = broadcast(e[a * n + k]);
#pragma GCC unroll 2
            for (int v = 0; v < n_wide; ++v) sums[a][v] = sums[a][v] + factor * h[v];
        }
    }
#pragma GCC unroll 8
    for (int a = 0; a < n_tall; ++a) {
#pragma GCC unroll 2
        for (int v = 0; v < n_wide; ++v) {
            float* sum = out + a * n + kLanes * v;
            store(sum, load(sum) + sums[a][v]);
        }
    }
}

// Fills the gradients: the errors times the Hessian.
void make_gradients(const Batch& batch) {
    const int64_t n = batch.rows.n;
    constexpr int width = kTileVectors * kLanes;  // n is a multiple of 32
    std::memset(batch.gradients, 0, (size_t)(batch.n_rows * n) * sizeof(float));
    for (int64_t begin = 0; begin < n; begin += width) {
        float* out = batch.gradients + begin;
        for (int64_t first = 0; first < n; first += kUnit) {  // sums of sums lose less
            const int64_t count = n - first < kUnit ? n - first : kUnit;
            copy_rows(batch.rows.hessian + first * n + begin, n, count, width, batch.panel);
            const float* e = batch.errors + first;
            int64_t row = 0;
            for (; row + kTileRows <= batch.n_rows; row += kTileRows) {
                multiply_tile<kTileRows>(e + row * n, batch.panel, count, n, out + row * n);
            }
            for (; row < batch.n_rows; ++row) {
                multiply_tile<1>(e + row * n, batch.panel, count, n, out + row * n);
            }
        }
    }
}

// Fills the differences w - q.
void subtract(const Batch& batch) {
    const int64_t n = batch.rows.n;
    for (int64_t row = 0; row < batch.n_rows; ++row) {
        float* e = batch.errors + row * n;
        const float* w = batch.w + row * n;
        const uint8_t* blocks = batch.blocks + row * batch.row_bytes;
        for (int64_t first = 0; first < n; first += kUnit) {
            const int64_t count = n - first < kUnit ? n - first : kUnit;
            float q[kUnit];
            kFormatKernels[batch.format]->decode(blocks + n_bytes(batch.format, first), count, q);
            for (int64_t k = 0; k < count; k += kLanes) {
                store(e + first + k, load(w + first + k) - load(q + k));
            }
        }
    }
}

// Each row's e^T H e, from its difference e and its gradient H e.
void sum_errors(const Batch& batch, double* found) {
    const int64_t n = batch.rows.n;
    for (int64_t row = 0; row < batch.n_rows; ++row) {
        DoubleLanes sums = {};
        for (int64_t k = 0; k < n; k += kLanes) {
            add_to(sums, load(batch.errors + row * n + k) * load(batch.gradients + row * n + k));
        }
        found[row] = sum_of(sums);
    }
}

// Whether gradients that were kept up to date, and so have gathered rounding errors, are exact
// enough to say that every row's error fell.
bool clearly_fell(const Batch& batch, const double* before, const double* after,
                  const bool* moved) {
    for (int64_t row = 0; row < batch.n_rows; ++row) {
        if (moved[row] && !(after[row] < 0.99 * before[row])) return false;
    }
    return true;
}

// Fills DescentUnit::row_sums for a unit of n columns.
void sum_rows(const float* unit, int n, float* sums) {
    for (int i = 0; i < n / kLanes; ++i, unit += kLanes * n, sums += kUnit) {
        for (int k = 0; k < n; k += kLanes) {
            Lanes sum = broadcast(0.0f);
            for (int row = 0; row < kLanes; ++row) sum = sum + load(unit + row * n + k);
            store(sums + k, sum);
        }
    }
}

// Carries the changes of columns first .. first + count - 1 over to the gradient of kLanes * kWide
// columns, whose part of the Hessian is in `panel`.
template <int kWide>
RAMGGUF_INLINE void carry_tile(const uint8_t* moved, int n_moved, const float* change,
                               const float* panel, float* gradient) {
    Lanes g[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) g[v] = load(gradient + kLanes * v);
    for (int i = 0; i < n_moved; ++i) {
        const Lanes step = broadcast(change[moved[i]]);
        const float* row = panel + moved[i] * kWide * kLanes;
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) g[v] = g[v] - step * load(row + kLanes * v);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) store(gradient + kLanes * v, g[v]);
}

// Carries the changes of the columns from `first` on (`count` of them) over to all other columns.
void carry_over(const Batch& batch, const bool (&changed)[kBatch], int64_t first, int count) {
    const int64_t n = batch.rows.n;
    uint8_t moved[kBatch][kUnit];
    int n_moved[kBatch] = {};
    for (int64_t row = 0; row < batch.n_rows; ++row) {
        const float* change = batch.changes + row * kUnit;
        for (int k = 0; changed[row] && k < count; ++k) {
            if (change[k] != 0.0f) moved[row][n_moved[row]++] = (uint8_t)k;
        }
    }
    for (int64_t begin = 0; begin < n;) {
        if (begin == first) {
            begin += count;
            continue;
        }
        const int64_t end = begin < first ? first : n;
        const bool wide = end - begin >= kPanel;
        const int width = wide ? kPanel : kPanel / 2;
        copy_rows(batch.rows.hessian + first * n + begin, n, count, width, batch.panel);
        for (int64_t row = 0; row < batch.n_rows; ++row) {
            const float* change = batch.changes + row * kUnit;
            float* gradient = batch.gradients + row * n + begin;
            if (wide) {
                carry_tile<4>(moved[row], n_moved[row], change, batch.panel, gradient);
            } else {
                carry_tile<2>(moved[row], n_moved[row], change, batch.panel, gradient);
            }
        }
        begin += width;
    }
}

void descend_batch(const Batch& batch, const float* diagonal, const float* inverse,
                   double* errors) {
    const int64_t n = batch.rows.n;
    const DescendUnit descend_unit = kFormatKernels[batch.format]->descend;
    double before[kBatch], after[kBatch];
    std::memcpy(batch.start, batch.blocks, (size_t)(batch.n_rows * batch.row_bytes));
    subtract(batch);
    make_gradients(batch);
    sum_errors(batch, before);
    bool open[kBatch];  // another change may lower the row's error
    bool ever_moved[kBatch] = {};
    for (int64_t row = 0; row < batch.n_rows; ++row) open[row] = before[row] > 0;
    for (int sweep = 0; sweep < batch.rows.n_sweeps; ++sweep) {
        bool moved[kBatch] = {}, any = false;
        for (int64_t first = 0; first < n; first += kUnit) {
            const int count = (int)(n - first < kUnit ? n - first : kUnit);
            const double share = kLeastShare * (double)count / (double)n;
            copy_rows(batch.rows.hessian + first * n + first, n, count, count, batch.unit);
            alignas(64) float row_sums[kUnit / kLanes * kUnit];
            sum_rows(batch.unit, count, row_sums);
            bool changed[kBatch] = {};
            for (int64_t row = 0; row < batch.n_rows; ++row) {
                if (!open[row]) continue;
                const DescentUnit unit = {batch.unit,
                                          count,
                                          diagonal + first,
                                          inverse + first,
                                          row_sums,
                                          count,
                                          (float)(share * before[row])};
                // A copy, since the last unit may be shorter than what the kernel loads.
                alignas(64) float gradient[kUnit] = {};
                float* g = batch.gradients + row * n + first;
                std::memcpy(gradient, g, (size_t)count * sizeof(float));
                uint8_t* blocks =
                    batch.blocks + row * batch.row_bytes + n_bytes(batch.format, first);
                changed[row] = descend_unit(unit, gradient, blocks, batch.changes + row * kUnit);
                if (changed[row]) std::memcpy(g, gradient, (size_t)count * sizeof(float));
                moved[row] |= changed[row];
                any |= changed[row];
            }
            carry_over(batch, changed, first, count);
        }
        if (!any) break;
        for (int64_t row = 0; row < batch.n_rows; ++row) {
            open[row] &= moved[row];
            ever_moved[row] |= moved[row];
        }
    }
    subtract(batch);
    sum_errors(batch, after);
    if (!clearly_fell(batch, before, after, ever_moved)) {
        make_gradients(batch);
        sum_errors(batch, after);
    }
    for (int64_t row = 0; row < batch.n_rows; ++row) {
        if (!ever_moved[row]) {
            after[row] = before[row];
        } else if (!(after[row] < before[row])) {
            std::memcpy(batch.blocks + row * batch.row_bytes, batch.start + row * batch.row_bytes,
                        (size_t)batch.row_bytes);
            after[row] = before[row];
        }
        errors[2 * row] = before[row];
        errors[2 * row + 1] = after[row];
    }
}

bool supports(int format) {
    return kFormatKernels[format]->descend != nullptr;
}

// Per row of a batch: gradients, errors, changes, and the blocks (at most 17/16 bytes a weight).
size_t n_scratch(int64_t n) {
    const auto columns = (size_t)n;
    return 2 * columns + kUnit * (kUnit + kPanel) +
           kBatch * (2 * columns + kUnit + (columns / 32 * 34 + 3) / 4);
}

// noinline, so that nothing floats out of the FloatMode
__attribute__((noinline)) void descend_all(int format, const DescentRows& rows, uint8_t* blocks,
                                           float* scratch, double* errors) {
    const int64_t n = rows.n, row_bytes = n_bytes(format, n);
    float *diagonal = scratch, *inverse = scratch + n, *unit = scratch + 2 * n;
    float *panel = unit + kUnit * kUnit, *rest = panel + kUnit * kPanel;
    for (int64_t k = 0; k < n; ++k) {
        diagonal[k] = rows.hessian[k * n + k];
        inverse[k] = diagonal[k] > 0 ? 1 / diagonal[k] : 0;
    }
    for (int64_t row = 0; row < rows.n_rows; row += kBatch) {
        const int64_t left = rows.n_rows - row;
        const Batch batch = {rows,
                             format,
                             left < kBatch ? left : kBatch,
                             rows.w + row * n,
                             blocks + row * row_bytes,
                             row_bytes,
                             rest,
                             rest + kBatch * n,
                             rest + kBatch * 2 * n,
                             unit,
                             panel,
                             (uint8_t*)(rest + kBatch * (2 * n + kUnit))};
        descend_batch(batch, diagonal, inverse, errors + 2 * row);
    }
}

void descend(int format, const DescentRows& rows, uint8_t* blocks, float* scratch, double* errors) {
    const FloatMode mode;
    descend_all(format, rows, blocks, scratch, errors);
}

}  // namespace

extern const Descent descent;
const Descent descent = {supports, n_scratch, descend};

}  // namespace ramgguf::RAMGGUF_ISA
