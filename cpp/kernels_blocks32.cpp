// The kernels of blocks of 32 with an F16 scale.
#include "format_kernels.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q8_0.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(Q4_0)
RAMGGUF_FORMAT_KERNELS(Q4_1)
RAMGGUF_FORMAT_KERNELS(Q5_0)
RAMGGUF_FORMAT_KERNELS(Q5_1)
RAMGGUF_FORMAT_KERNELS(Q8_0)

}  // namespace ramgguf::RAMGGUF_ISA
