// F32 (ggml id 0), 32 bpw: a float in four bytes.
#pragma once
#include "formats/shared/unit.h"

namespace ramgguf::RAMGGUF_ISA {

struct NoFit {
    bool overflow;
};

struct F32 {
    static constexpr int block_size = 1;

    struct Block {
        float x;
    };
    static_assert(sizeof(Block) == 4, "F32 is 4 bytes per weight");

    using Fit = NoFit;

    static RAMGGUF_INLINE void rtn(const float*, Fit& fit) { fit.overflow = false; }
    static RAMGGUF_INLINE IntLanes quantize(const Fit&, Lanes x, int) { return bits(x); }
    static RAMGGUF_INLINE Lanes reconstruct(const Fit&, IntLanes q, int) { return from_bits(q); }

    static RAMGGUF_INLINE void pack(const Fit&, const IntLanes (&q)[kVectors], uint8_t* out) {
        for (int j = 0; j < kVectors; ++j) store((int32_t*)(out + 64 * j), q[j]);
    }
    static RAMGGUF_INLINE void unpack(const uint8_t* in, Fit&, IntLanes (&q)[kVectors]) {
        for (int j = 0; j < kVectors; ++j) q[j] = load((const int32_t*)(in + 64 * j));
    }
};

}  // namespace ramgguf::RAMGGUF_ISA
