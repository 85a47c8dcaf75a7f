// BF16 (ggml id 30), 16 bpw: the upper half of a float; nearest-even.
#pragma once
#include "formats/f32.h"

namespace ramgguf::RAMGGUF_ISA {

struct BF16 {
    static constexpr int block_size = 1;

    struct Block {
        uint16_t x;
    };
    static_assert(sizeof(Block) == 2, "BF16 is 2 bytes per weight");

    using Fit = NoFit;

    static RAMGGUF_INLINE void rtn(const float* x, Fit& fit) {
        Lanes largest = broadcast(0.0f);
        for (int j = 0; j < kVectors; ++j) largest = max(largest, abs(load(x + kLanes * j)));
        fit.overflow = any(largest >= from_bits(broadcast(0x7f7f8000)));  // rounds to infinity
    }
    static RAMGGUF_INLINE IntLanes quantize(const Fit&, Lanes x, int) { return f32_to_bf16(x); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit&, IntLanes q, int) { return bf16_to_f32(q); }

    // Vector by vector: with the codes of a whole unit in between, measuring took a fifth longer.
    static RAMGGUF_INLINE void decode(const uint8_t* in, float* out) {
        for (int j = 0; j < kVectors; ++j) {
            store(out + kLanes * j, bf16_to_f32(load_u16(in + 2 * kLanes * j)));
        }
    }

    static RAMGGUF_INLINE void pack(const Fit&, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int j = 0; j < kVectors; ++j) store_u16(out + 32 * j, q[j]);
    }
    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit&, IntLanes (&q)[kVectors]) {
        for (int j = 0; j < kVectors; ++j) q[j] = load_u16(in + 32 * j);
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
