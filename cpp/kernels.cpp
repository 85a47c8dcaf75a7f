// Row loops over every block format; compiled once per ISA level, in namespace
// ramgguf::RAMGGUF_ISA.
#include "kernels.h"

#define RAMGGUF_STRING2(x) #x
#define RAMGGUF_STRING(x) RAMGGUF_STRING2(x)

namespace ramgguf::RAMGGUF_ISA {

extern const Kernels kernels;
const Kernels kernels = {RAMGGUF_STRING(RAMGGUF_ISA)};

}  // namespace ramgguf::RAMGGUF_ISA
