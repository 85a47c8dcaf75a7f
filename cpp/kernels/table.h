// The table of formats of one ISA level: sizes from formats.def, functions from the sources that
// the build makes of format.cpp.in.
#pragma once
#include "kernels/chunk.h"

namespace ramgguf::RAMGGUF_ISA {

#define X(name, id, block_size, block_bytes) extern const FormatKernels kernels_of_##name;
#include "formats/formats.def"
#undef X

constexpr FormatInfo kFormats[] = {
#define X(name, id, block_size, block_bytes) {#name, id, block_size, block_bytes},
#include "formats/formats.def"
#undef X
};
constexpr int kFormatCount = (int)(sizeof kFormats / sizeof kFormats[0]);

constexpr const FormatKernels* kFormatKernels[] = {
#define X(name, id, block_size, block_bytes) &kernels_of_##name,
#include "formats/formats.def"
#undef X
};

constexpr int64_t n_bytes(int format, int64_t n) {
    return n / kFormats[format].block_size * kFormats[format].block_bytes;
}

}  // namespace ramgguf::RAMGGUF_ISA
