// The kernels of floats: sources, and formats for what is not quantized.
#include "format_kernels.h"
#include "formats/bf16.h"
#include "formats/f16.h"
#include "formats/f32.h"

namespace ramgguf::RAMGGUF_ISA {

// Straight through: by way of the codes of a whole unit, BF16 took a fifth longer to measure.
template <>
RAMGGUF_INLINE void decode_unit<BF16>(const uint8_t* in, float* out) {
    for (int j = 0; j < kVectors; ++j) {
        store(out + kLanes * j, bf16_to_f32(load_u16(in + 2 * kLanes * j)));
    }
}

RAMGGUF_FORMAT_KERNELS(F32)
RAMGGUF_FORMAT_KERNELS(F16)
RAMGGUF_FORMAT_KERNELS(BF16)

}  // namespace ramgguf::RAMGGUF_ISA
