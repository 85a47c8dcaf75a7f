// The Python module ramgguf._core. Every function checks dtype, shape and contiguity, releases the
// GIL and calls the active ISA level.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
    m.doc() =
        "ramgguf's native core: block formats, GGUF header scanner, statistics of logits, sums of "
        "activations";
#if defined(__clang__)
    m.attr("compiler") = "Clang " __clang_version__;
#elif defined(__GNUC__)
    m.attr("compiler") = "GCC " __VERSION__;
#else
    m.attr("compiler") = "an unknown compiler";
#endif
    ramgguf::bind_codec(m);
    ramgguf::bind_gguf(m);
    ramgguf::bind_logits(m);
    ramgguf::bind_gptq(m);
}
