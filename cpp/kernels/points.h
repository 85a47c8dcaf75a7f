// Rounding groups of weights to points with error feedback: what an ISA level exports. Plain data
// and functions only, because the code of every level and the dispatcher include it.
//
// In the formats whose codes stand for 4 or 8 weights at once, a group is rounded to
// scale * sign * point, where `point` is one of a codebook of magnitudes. As in QuIP#'s LDLQ (Tseng
// et al. 2024, arXiv 2402.04396) a group is rounded at once, and its error is handed on to the
// columns after it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace ramgguf {

struct Codebook {
    const float* magnitudes;  // group x n_points: all first coordinates, then all second ones
    int n_points;             // a multiple of 16, at most 65,536
    int group;                // weights of a point: 4 or 8
    bool even_signs;          // an even number of every eight weights is negative
};

// Superblocks of 256 columns: the rows begin row_stride floats apart and are changed in place.
// factor (256 x 256, upper triangular) is the unit's part of the Cholesky factor U of the inverse
// Hessian, H^-1 = U^T U. scales has 256 / sub_block floats a row.
struct PointRows {
    float* x;
    int64_t n_rows;
    int64_t row_stride;
    const float* factor;
    const float* scales;
    int sub_block;  // weights of a scale: a multiple of 8
};

struct Points {
    // Fills, for every row, the points' numbers (256 / group), the signs (32 bytes, bit i of byte b
    // for weight 8b + i, set where it is negative) and the errors (256): each column's error over
    // the factor's diagonal, which the columns after the unit make up for.
    void (*round)(const Codebook& book, const PointRows& rows, uint16_t* points, uint8_t* signs,
                  float* errors);
};

}  // namespace ramgguf
