// Rounding groups of weights to points with error feedback; compiled once per ISA level, in
// namespace ramgguf::RAMGGUF_ISA.
//
// Where the rounding of the columns before is settled, a group's difference d = x - q adds
// |d L|^2 to the error of the output, once all columns after it have made up for d as well as they
// can. L is the inverse of the group's part of the factor. So the best point is the nearest one
// under that norm. All points are tried with the signs of the weights; then signs that lower the
// error are flipped, and the points are tried again.
#include "kernels/points.h"

#include "formats/shared/unit.h"
#include "lanes/float_mode.h"

namespace ramgguf::RAMGGUF_ISA {
namespace {

constexpr int kEight = 8;       // weights that share a byte of signs
constexpr int kFlipRounds = 2;  // how often signs, and then points, are tried again
constexpr float kFar = 0x1p120f;

// The inverse of a group's part of the factor, upper triangular.
template <int n>
struct Norm {
    float l[n][n];

    void set(const float* factor) {
        for (int j = 0; j < n; ++j) {
            for (int i = 0; i < n; ++i) l[i][j] = 0.0f;
            const float inverse = 1.0f / factor[j * kUnit + j];
            l[j][j] = inverse;
            for (int i = j - 1; i >= 0; --i) {
                float sum = 0.0f;
                for (int k = i; k < j; ++k) sum += l[i][k] * factor[k * kUnit + j];
                l[i][j] = -sum * inverse;
            }
        }
    }

    RAMGGUF_INLINE float of(const float (&difference)[n]) const {
        float total = 0.0f;
        for (int j = 0; j < n; ++j) {
            float sum = 0.0f;
            for (int i = 0; i <= j; ++i) sum += difference[i] * l[i][j];
            total += sum * sum;
        }
        return total;
    }
};

// What a group becomes.
template <int n>
struct Choice {
    float error = kFar;
    int point = 0;
    float sign[n];   // -1 or 1
    float value[n];  // decoded
};

template <int n>
struct Group {
    const Codebook& book;
    const Norm<n>& norm;
    float x[n];
    float scale;

    RAMGGUF_INLINE void decode(Choice<n>& choice) const {
        for (int i = 0; i < n; ++i) {
            choice.value[i] = choice.sign[i] * (scale * magnitude(i, choice.point));
        }
    }

    RAMGGUF_INLINE float magnitude(int i, int point) const {
        return book.magnitudes[(int64_t)i * book.n_points + point];
    }

    // Takes the point of least error under the choice's signs; of equal ones the first.
    RAMGGUF_INLINE void find_point(Choice<n>& choice) const {
        float target[n], step[n][n];
        for (int j = 0; j < n; ++j) {
            target[j] = 0.0f;
            for (int i = 0; i <= j; ++i) {
                target[j] += x[i] * norm.l[i][j];
                step[i][j] = choice.sign[i] * scale * norm.l[i][j];
            }
        }
        alignas(64) static const float numbers[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                          8, 9, 10, 11, 12, 13, 14, 15};
        Lanes least = broadcast(kFar), at = load(numbers), number = at;
        for (int first = 0; first < book.n_points; first += kLanes) {
            Lanes p[n], error = broadcast(0.0f);
#pragma GCC unroll 8
            for (int i = 0; i < n; ++i) p[i] = load(book.magnitudes + i * book.n_points + first);
#pragma GCC unroll 8
            for (int j = 0; j < n; ++j) {
                Lanes off = broadcast(target[j]);
#pragma GCC unroll 8
                for (int i = 0; i <= j; ++i) off = off - broadcast(step[i][j]) * p[i];
                error = error + off * off;
            }
            const Mask better = error < least;
            least = select(better, error, least);
            at = select(better, number, at);
            number = number + broadcast((float)kLanes);
        }
        choice.error = min_of(least);
        // Lanes hold every sixteenth point, so the first of equal ones is that of least number.
        choice.point = (int)min_of(select(least <= broadcast(choice.error), at, broadcast(kFar)));
        decode(choice);
    }

    // Flips signs, one at a time or two, while that lowers the error. Returns whether it did.
    bool flip_signs(Choice<n>& choice, bool in_pairs) const {
        float off[n];
        for (int i = 0; i < n; ++i) off[i] = x[i] - choice.value[i];
        float least = norm.of(off);
        bool any = false;
        for (bool better = true; better;) {
            better = false;
            for (int a = 0; a < n; ++a) {
                for (int b = in_pairs ? a + 1 : a; b < (in_pairs ? n : a + 1); ++b) {
                    float tried[n];
                    for (int i = 0; i < n; ++i) {
                        tried[i] = i == a || i == b ? x[i] + choice.value[i] : off[i];
                    }
                    const float error = norm.of(tried);
                    if (!(error < least)) continue;
                    least = error;
                    for (int i = 0; i < n; ++i) {
                        if (i != a && i != b) continue;
                        choice.sign[i] = -choice.sign[i];
                        choice.value[i] = -choice.value[i];
                        off[i] = tried[i];
                    }
                    any = better = true;
                }
            }
        }
        return any;
    }

    // The best choice that was found; with in_pairs, an odd or even number of signs is negative.
    Choice<n> best(bool in_pairs, bool odd) const {
        Choice<n> choice;
        int n_negative = 0, cheapest = 0;
        float cost = kFar;
        for (int i = 0; i < n; ++i) {
            choice.sign[i] = x[i] < 0 ? -1.0f : 1.0f;
            n_negative += x[i] < 0;
            const float share = x[i] * x[i] * norm.l[i][i] * norm.l[i][i];
            if (share < cost) {
                cost = share;
                cheapest = i;
            }
        }
        if (in_pairs && (n_negative % 2 != 0) != odd) {
            choice.sign[cheapest] = -choice.sign[cheapest];
        }
        find_point(choice);
        for (int round = 0; round < kFlipRounds && flip_signs(choice, in_pairs); ++round) {
            find_point(choice);
        }
        return choice;
    }
};

// One row's unit of columns while it is rounded.
struct alignas(64) Sweep {
    float x[kUnit];
    float errors[kUnit];
};

// Takes the decoded values for columns begin .. begin + count - 1 and hands on their errors to the
// columns up to `end`.
RAMGGUF_INLINE void hand_on(const float* factor, const float* values, int begin, int count, int end,
                            Sweep& sweep) {
    for (int k = begin; k < begin + count; ++k) {
        const float* row = factor + (int64_t)kUnit * k;
        const float error = (sweep.x[k] - values[k - begin]) / row[k];
        sweep.errors[k] = error;
        for (int v = k / kLanes; v < (end + kLanes - 1) / kLanes; ++v) {
            float* x = sweep.x + kLanes * v;
            store(x, load(x) - broadcast(error) * load(row + kLanes * v));
        }
    }
}

template <int n>
class Rounder {
  public:
    Rounder(const Codebook& book, const PointRows& rows) : book_(book), rows_(rows) {
        for (int g = 0; g < kUnit / n; ++g) norms_[g].set(rows.factor + g * n * (kUnit + 1));
    }

    void round_row(float* x, const float* scales, uint16_t* points, uint8_t* signs,
                   float* errors) const {
        Sweep sweep = {};
        std::memcpy(sweep.x, x, sizeof sweep.x);
        for (int begin = 0; begin < kUnit; begin += kEight) {
            round_eight(sweep, begin, scales[begin / rows_.sub_block], points + begin / n,
                        signs + begin / kEight);
        }
        std::memcpy(x, sweep.x, sizeof sweep.x);
        std::memcpy(errors, sweep.errors, sizeof sweep.errors);
    }

  private:
    Choice<n> best(const float* x, int begin, float scale, bool odd) const {
        Group<n> group = {book_, norms_[begin / n], {}, scale};
        for (int i = 0; i < n; ++i) group.x[i] = x[i];
        return group.best(book_.even_signs, odd);
    }

    static void keep(const Choice<n>& choice, int half, uint16_t* points, uint8_t* signs) {
        points[half] = (uint16_t)choice.point;
        for (int i = 0; i < n; ++i) {
            if (choice.sign[i] < 0) *signs = (uint8_t)(*signs | 1 << (n * half + i));
        }
    }

    // The second half's best choice after the first half's.
    Choice<n> second(const Sweep& sweep, const Choice<n>& first, int begin, float scale,
                     bool odd) const {
        Sweep after = sweep;
        hand_on(rows_.factor, first.value, begin, n, begin + kEight, after);
        return best(after.x + begin + n, begin + n, scale, odd);
    }

    void round_eight(Sweep& sweep, int begin, float scale, uint16_t* points, uint8_t* signs) const {
        *signs = 0;
        if constexpr (n == kEight) {
            const Choice<n> only = best(sweep.x + begin, begin, scale, false);
            keep(only, 0, points, signs);
            hand_on(rows_.factor, only.value, begin, n, kUnit, sweep);
        } else {
            Choice<n> one = best(sweep.x + begin, begin, scale, false);
            if (book_.even_signs) {  // both halves are even, or both odd
                const Choice<n> odd = best(sweep.x + begin, begin, scale, true);
                const Choice<n> after_even = second(sweep, one, begin, scale, false);
                const Choice<n> after_odd = second(sweep, odd, begin, scale, true);
                const bool is_odd = odd.error + after_odd.error < one.error + after_even.error;
                if (is_odd) one = odd;
                keep(one, 0, points, signs);
                hand_on(rows_.factor, one.value, begin, n, kUnit, sweep);
                const Choice<n>& two = is_odd ? after_odd : after_even;
                keep(two, 1, points, signs);
                hand_on(rows_.factor, two.value, begin + n, n, kUnit, sweep);
                return;
            }
            keep(one, 0, points, signs);
            hand_on(rows_.factor, one.value, begin, n, kUnit, sweep);
            const Choice<n> two = best(sweep.x + begin + n, begin + n, scale, false);
            keep(two, 1, points, signs);
            hand_on(rows_.factor, two.value, begin + n, n, kUnit, sweep);
        }
    }

    const Codebook& book_;
    const PointRows& rows_;
    Norm<n> norms_[kUnit / n];
};

// noinline, so that nothing floats out of the FloatMode
template <int n>
__attribute__((noinline)) void round_rows(const Codebook& book, const PointRows& rows,
                                          uint16_t* points, uint8_t* signs, float* errors) {
    const Rounder<n> rounder(book, rows);
    for (int64_t row = 0; row < rows.n_rows; ++row) {
        rounder.round_row(rows.x + row * rows.row_stride,
                          rows.scales + row * (kUnit / rows.sub_block), points + row * (kUnit / n),
                          signs + row * (kUnit / kEight), errors + row * kUnit);
    }
}

void round(const Codebook& book, const PointRows& rows, uint16_t* points, uint8_t* signs,
           float* errors) {
    const FloatMode mode;
    if (book.group == 4) {
        round_rows<4>(book, rows, points, signs, errors);
    } else {
        round_rows<8>(book, rows, points, signs, errors);
    }
}

}  // namespace

extern const Points points;
const Points points = {round};

}  // namespace ramgguf::RAMGGUF_ISA
