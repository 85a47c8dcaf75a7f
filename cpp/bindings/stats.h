// RowStats: the sums over rows of weights and their errors, as a Python class.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/sums.h"

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

// Makes the error of a format that overflowed infinite; as summed it may be NaN.
void settle(ErrorSums& sums);

void bind_stats(pybind11::module_& m);

}  // namespace ramgguf
