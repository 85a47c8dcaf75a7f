// Sums over weights and over their errors. They are added up in double, over units of 256 weights
// in a fixed order, so they are the same at every ISA level.
#pragma once
#include <cstdint>

namespace ramgguf {

// Power sums of the weights themselves.
struct WeightSums {
    double sum = 0, squares = 0, cubes = 0, fourths = 0;
    double weighted_squares = 0;  // sum of importance * x^2
    float max_abs = 0;
    int64_t first_nonfinite = -1;  // flat index; the sums then end before its chunk
};

// Errors x - q of one format.
struct ErrorSums {
    double squares = 0;
    double weighted_squares = 0;  // sum of importance * (x - q)^2
    double max_square = 0;
    bool overflow = false;  // a block scale (or value) is too large for the format
};

}  // namespace ramgguf
