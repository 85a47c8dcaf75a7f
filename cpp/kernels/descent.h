// Coordinate descent on encoded rows: what an ISA level exports. Plain data and functions only,
// because the code of every level and the dispatcher include it.
//
// For a row of weights w and its blocks, which decode to q, the error of the output is
// (w - q)^T H (w - q), where H is the Hessian: the mean of x x^T over inputs x. Descent lowers this
// error by changing codes and scales of the blocks (QuantEase, Behdin et al. 2023, arXiv
// 2309.01885, and the scales as well).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace ramgguf {

struct DescentRows {
    const float* w;        // n_rows x n
    int64_t n_rows;        //
    int64_t n;             // columns: whole blocks of the format
    const float* hessian;  // n x n, symmetric
    int n_sweeps;          // at most; a row is finished earlier when a sweep changes nothing
};

struct Descent {
    // Whether the format (an index into Codec::formats) has a code for every single weight.
    bool (*supports)(int format);
    // The number of floats of scratch memory for rows of n columns.
    size_t (*n_scratch)(int64_t n);
    // Changes the blocks in place. errors takes two numbers a row: its error before and after, of
    // which the second is never the larger.
    void (*descend)(int format, const DescentRows& rows, uint8_t* blocks, float* scratch,
                    double* errors);
};

}  // namespace ramgguf
