// Arguments from Python: looks up names and checks arrays. All functions throw
// std::invalid_argument with the name of the argument that is wrong.
#pragma once
#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

#include "dispatch/dispatch.h"

namespace ramgguf {

const Codec& codec();  // of the active ISA level

[[noreturn]] void fail(const std::string& message);

int find_format(const std::string& name);
EncoderId find_encoder(const std::string& name);

// Throws unless the array has this dtype and number of dimensions and is C-contiguous.
void check_array(const pybind11::array& a, const char* what, int n_dims,
                 const pybind11::dtype& dtype);
void check_writeable(const pybind11::array& a, const char* what);

// The number of weights in a row of row_bytes bytes.
int64_t row_length_of(const char* what, int format, int64_t row_bytes);

// The weights of a 2-D array of bytes in the format `type`.
Weights weights_of(const char* what, const std::string& type, const pybind11::array& a);
void set_importance(Weights& w, const pybind11::object& importance);
void check_block_size(const Weights& src, int format);

// The row and column of a weight, for messages.
std::string place(const Weights& w, int64_t index);

}  // namespace ramgguf
