// All that an ISA level exports for rows of logits. Included by per-level objects and by the
// dispatcher.
#pragma once

namespace ramgguf {

struct Logits {
    const char* isa;
};

}  // namespace ramgguf
