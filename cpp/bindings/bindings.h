#pragma once
#include <pybind11/pybind11.h>

namespace ramgguf {
void bind_codec(pybind11::module_& m);
void bind_gguf(pybind11::module_& m);
void bind_logits(pybind11::module_& m);
void bind_gptq(pybind11::module_& m);
}  // namespace ramgguf
