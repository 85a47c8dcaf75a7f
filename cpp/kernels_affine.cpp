// The kernels of superblocks of affine sub-blocks.
#include "format_kernels.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(Q2_K)
RAMGGUF_FORMAT_KERNELS(Q4_K)
RAMGGUF_FORMAT_KERNELS(Q5_K)

}  // namespace ramgguf::RAMGGUF_ISA
