// The table of formats: sizes from the headers, kernels from the files kernels_*.cpp.
#pragma once
#include "chunk.h"
#include "formats/all.h"

namespace ramgguf::RAMGGUF_ISA {

#define X(name, id) extern const FormatKernels kernels_of_##name;
#include "formats.def"
#undef X

constexpr FormatInfo kFormats[] = {
#define X(name, id) {#name, id, name::block_size, (int)sizeof(name::Block)},
#include "formats.def"
#undef X
};
constexpr int kFormatCount = (int)(sizeof kFormats / sizeof kFormats[0]);

// A format that no kernels_*.cpp defines is missing when the module is linked.
constexpr const FormatKernels* kFormatKernels[] = {
#define X(name, id) &kernels_of_##name,
#include "formats.def"
#undef X
};

constexpr int64_t n_bytes(int format, int64_t n) {
    return n / kFormats[format].block_size * kFormats[format].block_bytes;
}

}  // namespace ramgguf::RAMGGUF_ISA
