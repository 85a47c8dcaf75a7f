// The kernels of superblocks of affine sub-blocks.
#include "format_kernels.h"
#include "formats/q2_k.h"
#include "formats/q4_k.h"
#include "formats/q5_k.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(Q2_K)
RAMGGUF_FORMAT_KERNELS(Q4_K)
RAMGGUF_FORMAT_KERNELS(Q5_K)

}  // namespace ramgguf::RAMGGUF_ISA
