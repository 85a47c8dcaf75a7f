// The Python module ramgguf._core. Each part checks dtype, shape and contiguity, releases the GIL
// and calls.
#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_core, m) {
    m.doc() =
        "ramgguf's native core: block formats, GGUF header scanner, statistics of logits, sums of "
        "activations";
    ramgguf::bind_kernels(m);
    ramgguf::bind_gguf(m);
    ramgguf::bind_logits(m);
    ramgguf::bind_gram(m);
    ramgguf::bind_gptq(m);
}
