// F16 (ggml id 1), 16 bpw: an IEEE binary16 in two bytes; nearest-even, 65520 and more overflow.
#pragma once
#include "formats/f32.h"

namespace ramgguf::RAMGGUF_ISA {

struct F16 {
    static constexpr int block_size = 1;

    struct Block {
        uint16_t x;
    };
    static_assert(sizeof(Block) == 2, "F16 is 2 bytes per weight");

    using Fit = NoFit;

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        Lanes largest = broadcast(0.0f);
        for (int j = 0; j < kVectors; ++j) largest = max(largest, abs(load(x + kLanes * j)));
        fit.overflow = any(largest >= broadcast(65520.0f));
    }
    static RAMGGUF_INLINE IntLanes quantize(const Fit&, Lanes x, int) { return f32_to_f16(x); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit&, IntLanes q, int) { return f16_to_f32(q); }

    // Some CPUs convert while they load.
    static RAMGGUF_INLINE void decode(const uint8_t* in, float* out) {
        for (int j = 0; j < kVectors; ++j) store(out + kLanes * j, load_f16(in + 2 * kLanes * j));
    }

    static RAMGGUF_INLINE void pack(const Fit&, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int j = 0; j < kVectors; ++j) store_u16(out + 32 * j, q[j]);
    }
    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit&, IntLanes (&q)[kVectors]) {
        for (int j = 0; j < kVectors; ++j) q[j] = load_u16(in + 32 * j);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
