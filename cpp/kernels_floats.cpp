// The kernels of floats: sources, and formats for what is not quantized.
#include "format_kernels.h"
#include "formats/bf16.h"
#include "formats/f16.h"
#include "formats/f32.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(F32)
RAMGGUF_FORMAT_KERNELS(F16)
RAMGGUF_FORMAT_KERNELS(BF16)

}  // namespace ramgguf::RAMGGUF_ISA
