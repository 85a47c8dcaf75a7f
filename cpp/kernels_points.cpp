// The kernels of formats whose codes are points of several weights.
#include "format_kernels.h"
#include "formats/iq3_s.h"
#include "search_points.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(IQ3_S)

}  // namespace ramgguf::RAMGGUF_ISA
