// All that an ISA level exports for block formats. Included by per-level objects and by the
// dispatcher.
#pragma once

namespace ramgguf {

struct Kernels {
    const char* isa;
};

}  // namespace ramgguf
