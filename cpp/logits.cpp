// Statistics of rows of logits; compiled once per ISA level, in namespace ramgguf::RAMGGUF_ISA.
#include "logits.h"

#define RAMGGUF_STRING2(x) #x
#define RAMGGUF_STRING(x) RAMGGUF_STRING2(x)

namespace ramgguf::RAMGGUF_ISA {

extern const Logits logits;
const Logits logits = {RAMGGUF_STRING(RAMGGUF_ISA)};

}  // namespace ramgguf::RAMGGUF_ISA
