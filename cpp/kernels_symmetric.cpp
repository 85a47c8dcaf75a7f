// The kernels of superblocks of symmetric sub-blocks.
#include "format_kernels.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(Q3_K)
RAMGGUF_FORMAT_KERNELS(Q6_K)

}  // namespace ramgguf::RAMGGUF_ISA
