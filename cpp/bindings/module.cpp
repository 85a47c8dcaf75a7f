// The Python module ramgguf._core. Every function checks dtype, shape and contiguity, releases the
// GIL and calls the active ISA level.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
    m.doc() =
        "ramgguf's native core: block formats, GGUF header scanner, statistics of logits, sums of "
        "activations";
    ramgguf::bind_codec(m);
    ramgguf::bind_gguf(m);
    ramgguf::bind_logits(m);
    ramgguf::bind_gram(m);
    ramgguf::bind_gptq(m);
}
