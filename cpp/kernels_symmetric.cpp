// The kernels of superblocks of symmetric sub-blocks.
#include "format_kernels.h"
#include "formats/q3_k.h"
#include "formats/q6_k.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(Q3_K)
RAMGGUF_FORMAT_KERNELS(Q6_K)

}  // namespace ramgguf::RAMGGUF_ISA
