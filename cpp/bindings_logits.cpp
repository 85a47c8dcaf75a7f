#include "bindings.h"

namespace ramgguf {

void bind_logits(pybind11::module_&) {}

}  // namespace ramgguf
