// Arguments of the kernels from Python: what names and arrays stand for, refused by name if wrong.
// All throw std::invalid_argument.
#pragma once
#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

#include "dispatch.h"

namespace ramgguf {

const Kernels& kernels();  // of the active ISA level

[[noreturn]] void fail(const std::string& message);

int find_format(const std::string& name);
EncoderId find_encoder(const std::string& name);

// Refuses what is not C-contiguous and of so many dimensions.
void check_array(const pybind11::array& a, const char* what, int n_dims,
                 const pybind11::dtype& dtype);
void check_writeable(const pybind11::array& a, const char* what);

// Weights per row of bytes.
int64_t row_length_of(const char* what, int format, int64_t row_bytes);

// Rows of bytes of the format `type`.
Weights weights_of(const char* what, const std::string& type, const pybind11::array& a);
void set_importance(Weights& w, const pybind11::object& importance);
void check_block_size(const Weights& src, int format);

// Where a weight is, for messages.
std::string place(const Weights& w, int64_t index);

}  // namespace ramgguf
