// The kernels of formats with a codebook.
#include "format_kernels.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(IQ4_NL)
RAMGGUF_FORMAT_KERNELS(IQ4_XS)

}  // namespace ramgguf::RAMGGUF_ISA
