// The kernels of formats for ternary weights.
#include "format_kernels.h"
#include "formats/q2_0.h"
#include "formats/tq1_0.h"
#include "formats/tq2_0.h"
#include "search_blocks64.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(TQ1_0)
RAMGGUF_FORMAT_KERNELS(TQ2_0)
RAMGGUF_FORMAT_KERNELS(Q2_0)

}  // namespace ramgguf::RAMGGUF_ISA
