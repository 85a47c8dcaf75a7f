// Error feedback for every format that has it; compiled once per ISA level, in namespace
// ramgguf::RAMGGUF_ISA.
#include "kernels/gptq.h"

#include "kernels/table.h"
#include "lanes/float_mode.h"

namespace ramgguf::RAMGGUF_ISA {
namespace {

bool supports(int format) {
    return kFormatKernels[format]->round != nullptr;
}

int64_t round(int format, const GptqRows& rows, uint8_t* out, int64_t out_stride, float* errors) {
    const FloatMode mode;
    return kFormatKernels[format]->round(rows, out, out_stride, errors);
}

}  // namespace

extern const Gptq gptq;
const Gptq gptq = {supports, round};

}  // namespace ramgguf::RAMGGUF_ISA
