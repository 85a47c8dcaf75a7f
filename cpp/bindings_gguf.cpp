#include "bindings.h"

namespace ramgguf {

void bind_gguf(pybind11::module_&) {}

}  // namespace ramgguf
