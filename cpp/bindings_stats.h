// Sums over rows of weights and their errors, as Python sees and merges them.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "row_stats.h"

namespace ramgguf {

struct FormatError {
    std::string format;
    ErrorSums sums;
};

struct RowStats {
    int64_t n_weights = 0;
    WeightSums sums;
    std::vector<FormatError> errors;
};

// An error that overflowed is infinite, not NaN.
void settle(ErrorSums& sums);

void bind_stats(pybind11::module_& m);

}  // namespace ramgguf
