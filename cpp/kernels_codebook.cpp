// The kernels of formats with a codebook.
#include "format_kernels.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"
#include "search_fp4.h"

namespace ramgguf::RAMGGUF_ISA {

RAMGGUF_FORMAT_KERNELS(IQ4_NL)
RAMGGUF_FORMAT_KERNELS(IQ4_XS)
RAMGGUF_FORMAT_KERNELS(MXFP4)

}  // namespace ramgguf::RAMGGUF_ISA
